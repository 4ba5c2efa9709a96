"""Learned step size quantization, a range for lightslim: the distance between two codes is trained with the weights."""

from lightslim import hookimpl
from lightslim.registry import Registry
from lightslim_lsq.gradient import round_by_step
from lightslim_lsq.range import LearnedStepSize

__all__ = ["LearnedStepSize", "round_by_step"]


@hookimpl
def lightslim_register(registry: Registry) -> None:
    """Add the range."""
    registry.add("range", LearnedStepSize, "lsq")
