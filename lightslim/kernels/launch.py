"""Launches the Triton kernels of fake quantization: tensors and ranges in, grids of programs out."""

# mypy: disable-error-code="import-untyped"
from typing import Any

import torch
import triton
from torch import Tensor

from lightslim.kernels import triton_fake_quant as kernels
from lightslim.kernels.grid import levels
from lightslim.kernels.launch_rows import l1_norms, quantize_many

__all__ = ["l1_norms", "quantize", "quantize_and_keep", "quantize_and_peak", "quantize_many", "straight_through"]

BLOCK = 2048
LONG_ROW = 1024
"""From here on a row has programs of its own; shorter ones share them."""


def quantize(
    x: Tensor,
    amax: Tensor,
    amin: Tensor | None,
    bits: int,
    axis: int | None,
    clips: bool = True,
    block: int = BLOCK,
) -> Tensor:
    """``x`` on the grid of its range; clamping costs nothing beside the memory traffic, so it is always done."""
    return _quantize(x, amax, amin, bits, axis, block)


def quantize_and_keep(
    x: Tensor, amax: Tensor, amin: Tensor | None, bits: int, axis: int | None, block: int = BLOCK
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The same, and what :func:`straight_through` asks for: one bit per element, or with an axis the input."""
    if axis is not None:
        return _quantize(x, amax, amin, bits, axis, block), (x, amax, amin)
    clipped = torch.empty(triton.cdiv(x.numel(), 8), dtype=torch.uint8, device=x.device)
    return _quantize(x, amax, amin, bits, None, block, clipped=clipped), (clipped,)


def quantize_and_peak(
    x: Tensor, amax: Tensor, bits: int, block: int = BLOCK
) -> tuple[Tensor, tuple[Tensor | None, ...], Tensor]:
    """The same with one symmetric range, and the largest magnitude of ``x``, found on the way."""
    clipped = torch.empty(triton.cdiv(x.numel(), 8), dtype=torch.uint8, device=x.device)
    peak = torch.zeros((), dtype=torch.int32, device=x.device)
    y = _quantize(x, amax, None, bits, None, block, clipped, peak)
    return y, (clipped,), peak.view(torch.float32).to(x.dtype)


def straight_through(
    grad: Tensor, kept: tuple[Any, ...], axis: int | None, strides: tuple[int, ...], block: int = BLOCK
) -> Tensor:
    """``grad`` where the input was not clipped, zero where it was; ``strides`` are those of the quantized tensor."""
    grad, out = laid_out(grad, strides), torch.empty_strided(grad.shape, strides, dtype=grad.dtype, device=grad.device)
    if grad.numel() == 0:
        return out
    if len(kept) == 1:
        _launch(kernels.pass_marked, grad, grad.numel(), block, kept[0], out, grad.numel())
        return out
    x, amax, amin = kept
    # The bounds do not depend on the number of bits
    _walk(kernels.pass_inside, grad, axis, block, laid_out(x, strides), out, make_grid(amax, amin, bits=8))
    return out


def _quantize(
    x: Tensor,
    amax: Tensor,
    amin: Tensor | None,
    bits: int,
    axis: int | None,
    block: int,
    clipped: Tensor | None = None,
    peak: Tensor | None = None,
) -> Tensor:
    y, source = in_memory_order(x)
    if x.numel():
        outputs = (y, y if clipped is None else clipped, y if peak is None else peak)
        kept = {"KEEP": clipped is not None, "PEAK": peak is not None}
        _walk(kernels.quantize, source, axis, block, *outputs, make_grid(amax, amin, bits), **kept)
    return y


def in_memory_order(x: Tensor) -> tuple[Tensor, Tensor]:
    """A new tensor without gaps, and the tensor to read that has the very same strides.

    Kernels then walk both as one stretch of memory, whatever the order of the dimensions. Where ``x`` has gaps the new
    tensor takes a copy of it and is its own source.
    """
    y = torch.empty_like(x)
    return y, x if x.stride() == y.stride() else y.copy_(x)


def laid_out(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``x``, copied if its strides are not those asked for."""
    if x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def make_grid(amax: Tensor, amin: Tensor | None, bits: int) -> Tensor:
    """The grids of all channels, one column each: see :func:`triton_fake_quant.make_grid`."""
    channels, affine = amax.numel(), amin is not None
    amax = amax.float().contiguous()
    least = amax if amin is None else amin.float().contiguous()
    grid = torch.empty(6, channels, dtype=torch.float32, device=amax.device)
    _launch(kernels.make_grid, amax, channels, 128, least, grid, channels, levels(bits, affine), AFFINE=affine)
    return grid


def _walk(kernel: Any, x: Tensor, axis: int | None, block: int, *arguments: Any, **options: Any) -> None:
    """Launch a kernel that goes through ``x`` in memory order and knows where each channel lies."""
    grid, inner, count = arguments[-1], 1 if axis is None else x.stride(axis), x.numel()
    by = "tensor" if axis is None else "row" if inner >= LONG_ROW else "element"
    if by == "element":
        # Each element holds a grid of its own, which takes registers
        block //= 4
    padded = count // inner * triton.cdiv(inner, block) * block if by == "row" else count
    _launch(kernel, x, padded, block, *arguments, grid.shape[1], inner, count, BY=by, **options)


def _launch(kernel: Any, x: Tensor, count: int, block: int, *arguments: Any, **options: Any) -> None:
    """One program per ``block`` of ``count`` elements, on the device of ``x``."""
    with torch.cuda.device_of(x):
        # Nothing may be contracted: a fused multiply-add would round once where the reference rounds twice
        kernel[triton.cdiv(count, block),](x, *arguments, BLOCK=block, enable_fp_fusion=False, **options)
