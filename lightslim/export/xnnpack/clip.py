"""Grids and activations as XNNPACK has them: int8, all of it, and one activation behind a layer."""

import math
from typing import Any

import torch
from torch import fx

from lightslim.export.xnnpack.edit import ACTIVATIONS, HARDTANH, LIMITS, Edit, kind_of

TINY = torch.finfo(torch.float32).tiny


def spell_as_int8(edit: Edit, node: Any) -> None:
    """Spell a rounding as XNNPACK does, which has int8 only and all of it: -128 is a code there, but on few grids."""
    x, step, zero, low, high, dtype = node.args
    shift = 128 if dtype == torch.uint8 else 0
    zero, low, high, step = zero - shift, low - shift, high - shift, max(step, TINY)
    for reader in list(node.users):
        reader.args = (node, step, zero, *LIMITS)
    if (low > -128 and bounds(x)[0] < 0) or high < 127:
        x = bounded(edit, node, x, (low - zero) * step, (high - zero) * step)
    node.args = (x, step, zero, *LIMITS)


def bounds(node: Any) -> tuple[float, float]:
    """Between what an activation keeps its values; no bounds for anything else."""
    least, most = ACTIVATIONS.get(kind_of(node), (-math.inf, math.inf))
    return (node.args[1:] + (least, most)[len(node.args) - 1 :])[:2] if kind_of(node) == HARDTANH else (least, most)


def bounded(edit: Edit, before: fx.Node, x: Any, low: float, high: float) -> fx.Node:
    """Between bounds, in one activation with ``x`` itself: of two, XNNPACK's lowering forgets the first."""
    if kind_of(x) in ACTIVATIONS and len(x.users) == 1:
        x, (least, most) = x.args[0], bounds(x)
        low, high = max(low, least), min(high, most)
    return edit.call(before, HARDTANH, x, low, high)
