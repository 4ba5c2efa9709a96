"""Gradual magnitude pruning, a strategy for lightslim: single weights become zero, along a cubic schedule."""

from lightslim import hookimpl
from lightslim.registry import Registry
from lightslim_gradual.layers import sparsify
from lightslim_gradual.masks import cubic, masks_for
from lightslim_gradual.strategy import GradualPruningStrategy

__all__ = ["GradualPruningStrategy", "cubic", "masks_for", "sparsify"]


@hookimpl
def lightslim_register(registry: Registry) -> None:
    """Add the strategy."""
    registry.add("strategy", GradualPruningStrategy)
