"""From a range to its grid: the numbers that integer codes stand for.

A symmetric range ``[-amax, amax]`` has the codes ``-R .. R`` with ``R = 2**(bits-1) - 1``. An affine one is widened
until it holds zero, has ``2**bits - 1`` steps, and is moved by less than a step so that zero has a code of its own.

Everything is worked out in float64 and rounded once, so each device and each path ends with the same grid.
"""

import math
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

TINY = 2.0**-100
"""A range below it counts as zero: its inverse would overflow float32."""

BELOW_TINY = TINY * (1 - 2.0**-24)

Number = TypeVar("Number", float, Tensor)


class Grid(NamedTuple, Generic[Number]):
    """``round(clamp(x * inverse, low, high)) * step`` is the value on the grid nearest to ``x``."""

    inverse: Number
    step: Number
    low: Number | float
    high: Number | float


def levels(bits: int, affine: bool) -> int:
    """How many steps lead from zero to ``amax``, or across an affine range.

    Example:
        >>> levels(8, affine=False), levels(8, affine=True)
        (127, 255)
    """
    return int(2**bits - 1) if affine else int(2 ** (bits - 1) - 1)


def scalar_grid(amax: float, amin: float | None, bits: int) -> Grid[float]:
    """The grid of one range given as Python numbers, which CPU kernels take without a tensor.

    Example:
        >>> scalar_grid(2.0, None, 2)
        Grid(inverse=0.5, step=2.0, low=-1.0, high=1.0)
        >>> scalar_grid(2.0, -1.0, 2)
        Grid(inverse=1.0, step=1.0, low=-1.0, high=2.0)
    """
    count = float(levels(bits, amin is not None))
    lower = 0.0 if amin is None else min(amin, 0.0)
    span = amax if amin is None else max(amax, 0.0) - lower
    if not math.isfinite(span):
        return Grid(math.nan, math.nan, -count, count)
    inverse, step = count / max(span, TINY), 0.0 if span < TINY else span / count
    if amin is None:
        return Grid(inverse, step, -count, count)
    zero = float(round(-lower * inverse))
    return Grid(inverse, step, -zero, count - zero)


def tensor_grid(amax: Tensor, amin: Tensor | None, bits: int, dtype: torch.dtype) -> Grid[Tensor]:
    """The grids of many ranges at once, as tensors of ``dtype``; symmetric ones share their lowest and highest code."""
    if amin is None:
        # The quotient of two float32 is the same rounded from float64, and this is done for each weight at each step
        return _symmetric(amax.to(dtype), float(levels(bits, affine=False)))
    amax, count = amax.double(), float(levels(bits, affine=True))
    lower, upper = bounds(amax, amin.double())
    inverse, step, *_ = _symmetric(upper - lower, count)
    zero = (-lower * inverse).round()
    return Grid(inverse.to(dtype), step.to(dtype), (-zero).to(dtype), (count - zero).to(dtype))


def _symmetric(span: Tensor, count: float) -> Grid[Tensor]:
    # A tensor, since torch divides a number by a tensor through the reciprocal, which rounds twice
    steps = torch.scalar_tensor(count, dtype=span.dtype, device=span.device)
    return Grid(steps / span.clamp_min(TINY), torch.threshold(span, BELOW_TINY, 0.0) / steps, -count, count)


def bounds(amax: Tensor, amin: Tensor | None) -> tuple[Tensor, Tensor]:
    """The lowest and the highest value that is not clipped; an affine range always holds zero."""
    return (-amax, amax) if amin is None else (amin.clamp(max=0), amax.clamp(min=0))


def along(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """``values`` shaped so that they broadcast over ``x``: one for all of it, or one per position of ``axis``."""
    if axis is None:
        return values.reshape(())
    return values.view(-1, *[1] * (x.ndim - 1 - axis % x.ndim))
