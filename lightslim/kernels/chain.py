"""Fake quantization by plain torch operations: the way of the CPU, and of every device without a kernel of its own."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightslim.kernels import fused
from lightslim.kernels.grid import Grid, along, bounds, scalar_grid, tensor_grid

HALVES = (torch.float16, torch.bfloat16)
LEAST = {torch.float32: 2.0**-149, torch.float64: 2.0**-1074}
"""The smallest positive number: ``value > -LEAST`` is ``value >= 0``."""

LARGEST = torch.finfo(torch.float32).max
"""Of float32: nothing finite lies above it."""

PIECE = 2**20
"""Elements for each thread: small enough to stay in a cache, large enough to be worth starting the threads for."""

Kept = tuple[Tensor, Tensor, Tensor | None]


def quantize(x: Tensor, amax: Tensor, amin: Tensor | None, bits: int, axis: int | None, clips: bool = True) -> Tensor:
    """``x`` on the grid of its range: one new tensor, then in place; half types are worked out in float32."""
    # An affine grid is moved to hold zero, which takes the far end of its range off by half a step
    return on_grid(x, grid_of(x, amax, amin, bits, axis), clips or amin is not None)


def quantize_many(tensors: Sequence[Tensor], bits: int, axis: int | None) -> list[Tensor]:
    """Each tensor on symmetric grids that reach to its largest magnitudes along ``axis``, all worked out at once.

    Args:
        tensors: float32, none of them empty.
        bits: width of the integers.
        axis: the dimension of the channels; None for one range of all of a tensor.
    """
    reach = _peaks_of_all(tensors, axis)
    inverse, step, low, high = tensor_grid(reach, None, bits, reach.dtype)
    shares = zip(tensors, _split(inverse, tensors, axis), _split(step, tensors, axis), strict=True)
    return [on_grid(x, Grid(its_inverse, its_step, low, high), clips=False) for x, its_inverse, its_step in shares]


def _split(values: Tensor, tensors: Sequence[Tensor], axis: int | None) -> list[Tensor]:
    """What belongs to each tensor, shaped so that it broadcasts; one by one, each view would cost an operation."""
    if axis is None:
        return list(values.split(1))
    sizes = [x.shape[axis] for x in tensors]
    shaped = {ndim: along(values, x, axis).split(sizes) for ndim, x in {x.ndim: x for x in tensors}.items()}
    return [shaped[x.ndim][at] for at, x in enumerate(tensors)]


def _peaks_of_all(tensors: Sequence[Tensor], axis: int | None) -> Tensor:
    others = [] if axis is None else [_others(x, axis) for x in tensors]
    if axis is None or not all(others):
        return torch.cat([peaks(x, axis).reshape(-1) for x in tensors])
    highest = torch.cat([x.amax(dims) for x, dims in zip(tensors, others, strict=True)])
    lowest = torch.cat([x.amin(dims) for x, dims in zip(tensors, others, strict=True)])
    return torch.maximum(highest, lowest.neg_())


def on_grid(x: Tensor, grid: Grid[Any], clips: bool) -> Tensor:
    """``x`` rounded to ``grid``, and clamped to it if it ``clips``."""
    if fused.compiles(x):
        return fused.quantize(x, grid)
    if is_whole(x):
        return _rounded(x, None, grid, clips)
    y = torch.empty_like(x)
    for part, target, *numbers in pieces(x, y, *grid):
        _rounded(part, target, Grid(*numbers), clips)
    return y


def _rounded(x: Tensor, out: Tensor | None, grid: Grid[Any], clips: bool) -> Tensor:
    half = x.dtype in HALVES
    y = x.float().mul_(grid.inverse) if half else torch.mul(x, grid.inverse, out=out)
    if clips:
        y.clamp_(grid.low, grid.high)
    y.round_().mul_(grid.step)
    if half:
        return y.to(x.dtype) if out is None else out.copy_(y)
    return y


def quantize_and_keep(x: Tensor, amax: Tensor, amin: Tensor | None, bits: int, axis: int | None) -> tuple[Tensor, Kept]:
    """The same, and what :func:`straight_through` asks for: the input, which its producer mostly keeps anyway."""
    return quantize(x, amax, amin, bits, axis), (x, amax, amin)


def quantize_and_peak(x: Tensor, amax: Tensor, bits: int) -> tuple[Tensor, Kept, Tensor]:
    """The same with one symmetric range, and the largest magnitude of ``x``."""
    return quantize(x, amax, None, bits, None), (x, amax, None), peaks(x, None)


def straight_through(grad: Tensor, kept: Kept, axis: int | None, strides: tuple[int, ...]) -> Tensor:
    """``grad`` where the input was not clipped, zero where it was; torch finds the strides of the result itself."""
    x, amax, amin = kept
    if axis is None and x.device.type == "cpu" and not fused.compiles(x):
        passed: Tensor = torch.ops.aten.hardtanh_backward(grad, x, *just_outside(x, amax, amin))
        return passed
    lower, upper = (along(bound, x, axis) for bound in bounds(*wide(x, amax, amin)))
    if fused.compiles(x):
        return fused.straight_through(grad, x, lower, upper)
    out = torch.empty_like(x)
    passing = _pass_by_quotient if amin is None and x.dtype not in HALVES and _divides(upper) else _pass_by_distance
    for operands in pieces(grad, x, out, lower, upper):
        passing(*operands)
    return out


def _divides(upper: Tensor) -> bool:
    """Whether no quotient by a bound is NaN that should not be."""
    if not upper.numel():
        return False
    low, high = torch.aminmax(upper)
    return low.item() > 0 and high.item() < math.inf


def _pass_by_quotient(grad: Tensor, x: Tensor, out: Tensor, lower: Tensor, upper: Tensor) -> None:
    # A correctly rounded quotient is above 1 just where ``x`` is above its bound
    beyond = 1 + torch.finfo(x.dtype).eps
    share = torch.div(x, upper, out=out)
    torch.ops.aten.hardtanh_backward.grad_input(grad, share, -beyond, beyond, grad_input=out)


def _pass_by_distance(grad: Tensor, x: Tensor, out: Tensor, lower: Tensor, upper: Tensor) -> None:
    if x.dtype in HALVES:
        full = x.float()
        out.copy_(grad).masked_fill_((full < lower) | (full > upper), 0)
        return
    # A threshold on the distance to the bound: half the time of a comparison, a mask and a fill
    grad = torch.ops.aten.threshold_backward(grad, x - lower, -LEAST[x.dtype])
    distance = torch.sub(upper, x, out=out)
    torch.ops.aten.threshold_backward.grad_input(grad, distance, -LEAST[x.dtype], grad_input=out)


def pieces(*operands: Any) -> Iterator[tuple[Any, ...]]:
    """The operands of an element-wise chain, a few rows at a time, so that all but its first pass find them in a cache.

    The first operand decides: it is left whole if it is small, has a single row, or lies on another device. What is no
    tensor, or broadcasts along the rows, is handed out with each piece as it is.
    """
    x = operands[0]
    if is_whole(x):
        yield operands
        return
    rows = max(1, PIECE * torch.get_num_threads() * x.shape[0] // x.numel())
    for start in range(0, x.shape[0], rows):
        yield tuple(each[start : start + rows] if _has_rows(each, x) else each for each in operands)


def is_whole(x: Tensor) -> bool:
    """Whether a tensor is worked on as a whole."""
    return x.numel() <= PIECE * torch.get_num_threads() or x.shape[0] == 1 or x.device.type != "cpu"


def _has_rows(operand: Any, x: Tensor) -> bool:
    return isinstance(operand, Tensor) and operand.ndim == x.ndim and operand.shape[0] == x.shape[0]


def grid_of(x: Tensor, amax: Tensor, amin: Tensor | None, bits: int, axis: int | None) -> Grid[Any]:
    """The grid in the precision of the work: Python numbers where reading them is free, else tensors."""
    amax, least = wide(x, amax, amin)
    if axis is None and x.device.type == "cpu":
        return scalar_grid(amax.item(), None if least is None else least.item(), bits)
    grid = tensor_grid(amax, least, bits, amax.dtype)
    return Grid(*(along(part, x, axis) if isinstance(part, Tensor) else part for part in grid))


def wide(x: Tensor, amax: Tensor, amin: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The range in the precision that ``x`` is worked out in."""
    dtype = torch.float32 if x.dtype in HALVES else x.dtype
    if amax.dtype == dtype and amin is None:  # asked here, since ``to`` takes its time even to do nothing
        return amax, None
    return amax.to(dtype), None if amin is None else amin.to(dtype)


def just_outside(x: Tensor, amax: Tensor, amin: Tensor | None) -> tuple[float, float]:
    """The neighbours of the bounds: ``hardtanh_backward`` drops what lies on a bound, we keep it."""
    amax, least = wide(x, amax, amin)
    upper = amax.item()
    if least is None:
        bound = just_above(upper, x.dtype)
        return -bound, bound
    return -just_above(max(-least.item(), 0.0), x.dtype), just_above(max(upper, 0.0), x.dtype)


def just_above(value: float, dtype: torch.dtype) -> float:
    """The next number above one that is not negative, in the precision that ``dtype`` is worked out in."""
    if dtype == torch.float64:
        return math.nextafter(value, math.inf)
    # Of float32 by Python numbers: a tensor operation takes longer
    if value == 0:
        return LEAST[torch.float32]
    return value + math.ldexp(1.0, max(math.frexp(value)[1] - 24, -149)) if abs(value) < LARGEST else value


def peaks(x: Tensor, axis: int | None) -> Tensor:
    """The largest magnitude of ``x``, or of each position of ``axis``; zero where there is none to take.

    Example:
        >>> peaks(torch.tensor([[1.0, -2.0], [0.5, 0.0]]), axis=1)
        tensor([1., 2.])
    """
    x = x.detach()
    if not x.numel():
        return x.new_zeros([] if axis is None else [x.shape[axis]])
    if axis is None:
        low, high = torch.aminmax(x)
        return torch.maximum(low.neg_(), high)
    others = _others(x, axis)
    # Two reductions without a copy are faster than one of abs(), and along a dimension much faster than aminmax
    return torch.maximum(x.amax(others), x.amin(others).neg_()) if others else x.abs()


def _others(x: Tensor, axis: int) -> list[int]:
    return [d for d in range(x.ndim) if d != axis % x.ndim]
