"""Attention transfer, a distiller for lightslim: the student looks where its teacher looks."""

from lightslim import hookimpl
from lightslim.registry import Registry
from lightslim_attention.distiller import AttentionDistiller
from lightslim_attention.loss import attention_loss, attention_map

__all__ = ["AttentionDistiller", "attention_loss", "attention_map"]


@hookimpl
def lightslim_register(registry: Registry) -> None:
    """Add the distiller."""
    registry.add("distiller", AttentionDistiller)
