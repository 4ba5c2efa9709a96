"""Launches the kernels that serve many tensors at once: builds the table of where each row lies."""

# mypy: disable-error-code="import-untyped"
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import triton
from torch import Tensor

from lightslim.kernels import triton_rows as kernels
from lightslim.kernels.grid import levels

BLOCK = 1024
ALIGN = 128
"""Elements: each result starts at a multiple of it, as if it had been allocated alone."""


def quantize_many(tensors: Sequence[Tensor], bits: int, block: int = BLOCK) -> list[Tensor]:
    """Each row (axis 0) of each contiguous tensor on the grid of its own largest magnitude; one launch per dtype."""
    return _by_dtype(tensors, lambda group: _quantize_group(group, bits, block))


def l1_norms(tensors: Sequence[Tensor], dim: int, block: int = BLOCK) -> list[Tensor]:
    """The sum of magnitudes at each position of ``dim``; one launch per dtype."""
    return _by_dtype(tensors, lambda group: _norms_of_group(group, dim, block))


def _by_dtype(tensors: Sequence[Tensor], serve: Callable[[list[Tensor]], list[Tensor]]) -> list[Tensor]:
    results: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        places = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
        results.update(zip(places, serve([tensors[i] for i in places]), strict=True))
    return [results[i] for i in range(len(tensors))]


def _quantize_group(tensors: list[Tensor], bits: int, block: int) -> list[Tensor]:
    shapes = tuple((x.data_ptr(), x.shape[0], x.numel() // max(x.shape[0], 1), x.element_size()) for x in tensors)
    table, offsets = _row_table(shapes, tensors[0].device)
    out = tensors[0].new_empty(offsets[-1])
    rows = table.shape[1]
    if rows:
        with torch.cuda.device_of(out):
            kernels.quantize_rows[rows,](table, out, rows, levels(bits, affine=False), block, enable_fp_fusion=False)
    return [out[start:].as_strided(x.shape, x.stride()) for start, x in zip(offsets, tensors, strict=False)]


@lru_cache(maxsize=16)
def _row_table(shapes: tuple[tuple[int, int, int, int], ...], device: torch.device) -> tuple[Tensor, list[int]]:
    """Address, place in the result and length of each row, one column each; and where each tensor's result starts.

    Made once for a set of weights: the key holds their addresses, so a weight that moves gets a new table.
    """
    columns, offsets = [], [0]
    for address, rows, length, size in shapes:
        row = torch.arange(rows)
        columns.append(torch.stack([address + row * length * size, offsets[-1] + row * length, 0 * row + length]))
        offsets.append(offsets[-1] + triton.cdiv(rows * length, ALIGN) * ALIGN)
    return torch.cat(columns, dim=1).to(device), offsets


def _norms_of_group(tensors: list[Tensor], dim: int, block: int) -> list[Tensor]:
    if tensors[0].dtype == torch.float64:
        return [x.abs().movedim(dim, 0).flatten(1).sum(1) if x.ndim > 1 else x.abs() for x in tensors]
    dense = [x.contiguous() for x in tensors]
    table = torch.cat([_slices(x, dim % x.ndim) for x in dense], dim=1).to(dense[0].device)
    out = torch.empty(table.shape[1], dtype=torch.float32, device=table.device)
    if table.shape[1]:
        with torch.cuda.device_of(out):
            kernels.l1_rows[table.shape[1],](table, dense[0], out, table.shape[1], block, enable_fp_fusion=False)
    return list(out.split([x.shape[dim] for x in dense]))


def _slices(x: Tensor, dim: int) -> Tensor:
    """Address, number of elements, length of a run and distance between runs, for each position of ``dim``."""
    run = x.stride(dim)
    position = torch.arange(x.shape[dim])
    address = x.data_ptr() + position * run * x.element_size()
    count = x.numel() // max(x.shape[dim], 1)
    return torch.stack([address, *(0 * position + value for value in (count, max(run, 1), run * x.shape[dim]))])
