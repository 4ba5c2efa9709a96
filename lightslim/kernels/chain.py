"""Fake quantization by plain torch operations: the way of the CPU, and of every device without a kernel of its own."""

import math
from typing import Any

import torch
from torch import Tensor

from lightslim.kernels.grid import Grid, along, bounds, scalar_grid, tensor_grid

HALVES = (torch.float16, torch.bfloat16)
LEAST = {torch.float32: 2.0**-149, torch.float64: 2.0**-1074}
"""The smallest positive number: ``value > -LEAST`` is ``value >= 0``."""

Kept = tuple[Tensor, Tensor, Tensor | None]


def quantize(x: Tensor, amax: Tensor, amin: Tensor | None, bits: int, axis: int | None) -> Tensor:
    """``x`` on the grid of its range: one new tensor, then in place; half types are worked out in float32."""
    inverse, step, low, high = grid_of(x, amax, amin, bits, axis)
    value = x.float().mul_(inverse) if x.dtype in HALVES else x.mul(inverse)
    return value.clamp_(low, high).round_().mul_(step).to(x.dtype)


def quantize_and_keep(x: Tensor, amax: Tensor, amin: Tensor | None, bits: int, axis: int | None) -> tuple[Tensor, Kept]:
    """The same, and what :func:`straight_through` asks for: the input, which its producer mostly keeps anyway."""
    return quantize(x, amax, amin, bits, axis), (x, amax, amin)


def quantize_and_peak(x: Tensor, amax: Tensor, bits: int) -> tuple[Tensor, Kept, Tensor]:
    """The same with one symmetric range, and the largest magnitude of ``x``."""
    return quantize(x, amax, None, bits, None), (x, amax, None), peaks(x, None)


def straight_through(grad: Tensor, kept: Kept, axis: int | None, strides: tuple[int, ...]) -> Tensor:
    """``grad`` where the input was not clipped, zero where it was; torch finds the strides of the result itself."""
    x, amax, amin = kept
    if axis is None and x.device.type == "cpu":
        passed: Tensor = torch.ops.aten.hardtanh_backward(grad, x, *open_bounds(x, amax, amin))
        return passed
    lower, upper = (along(bound, x, axis) for bound in bounds(*wide(x, amax, amin)))
    if x.dtype in HALVES:
        full = x.float()
        return grad.masked_fill((full < lower) | (full > upper), 0)
    # A threshold on the distance to the bound: half the time of a comparison, a mask and a fill
    distances = [x.abs().neg_().add_(upper)] if amin is None else [x - lower, upper - x]
    for distance in distances:
        grad = torch.ops.aten.threshold_backward(grad, distance, -LEAST[x.dtype])
    return grad


def grid_of(x: Tensor, amax: Tensor, amin: Tensor | None, bits: int, axis: int | None) -> Grid[Any]:
    """The grid in the precision of the work: Python numbers where reading them is free, else tensors."""
    amax, least = wide(x, amax, amin)
    if axis is None and x.device.type == "cpu":
        return scalar_grid(amax.item(), None if least is None else least.item(), bits)
    return Grid(*(along(part, x, axis) for part in tensor_grid(amax, least, bits, amax.dtype)))


def wide(x: Tensor, amax: Tensor, amin: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The range in the precision that ``x`` is worked out in."""
    dtype = torch.float32 if x.dtype in HALVES else x.dtype
    return amax.to(dtype), None if amin is None else amin.to(dtype)


def open_bounds(x: Tensor, amax: Tensor, amin: Tensor | None) -> tuple[float, float]:
    """The neighbours just outside the range: ``hardtanh_backward`` drops what lies on its bounds, we keep it."""
    lower, upper = bounds(*wide(x, amax, amin))
    out = upper.new_tensor(math.inf)
    return torch.nextafter(lower, -out).item(), torch.nextafter(upper, out).item()


def peaks(x: Tensor, axis: int | None) -> Tensor:
    """The largest magnitude of ``x``, or of each position of ``axis``; zero where there is none to take.

    Example:
        >>> peaks(torch.tensor([[1.0, -2.0], [0.5, 0.0]]), axis=1)
        tensor([1., 2.])
    """
    x = x.detach()
    others = [d for d in range(x.ndim) if axis is None or d != axis % x.ndim]
    if not x.numel():
        return x.new_zeros([] if axis is None else [x.shape[axis]])
    # Two reductions without a copy are faster than one of abs()
    return torch.maximum(x.amax(others), x.amin(others).neg_()) if others else x.abs()
