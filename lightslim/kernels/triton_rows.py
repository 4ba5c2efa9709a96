"""Rows of many tensors in one launch: a table of addresses says where each row lies.

A program serves one row. Its address comes out of a table, so the compiler cannot know how it is aligned; rows whose
address and length are multiples of 16 take a branch that says so and moves 128 bits at a time.
"""

# mypy: disable-error-code="untyped-decorator, import-untyped"
import triton
import triton.language as tl

from lightslim.kernels.triton_fake_quant import on_grid, row_grid


@triton.jit
def _peak(x: tl.tensor, columns: tl.tensor, BLOCK: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    """The largest magnitude of a row; NaN counts as larger than infinity."""
    best = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, columns, BLOCK):
        at = _positions(start, BLOCK, ALIGNED)
        value = tl.load(x + at, mask=at < columns, other=0.0).to(tl.float32)
        best = tl.maximum(best, tl.abs(value).to(tl.int32, bitcast=True))
    return tl.max(best, axis=0).to(tl.float32, bitcast=True)


@triton.jit
def _positions(start: tl.tensor, BLOCK: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    return (tl.multiple_of(start, 16) if ALIGNED else start) + tl.arange(0, BLOCK)


@triton.jit
def _quantize_row(
    x: tl.tensor, y: tl.tensor, columns: tl.tensor, levels: tl.tensor, BLOCK: tl.constexpr, ALIGNED: tl.constexpr
) -> None:
    inverse, step = row_grid(_peak(x, columns, BLOCK, ALIGNED), levels)
    rounding = (inverse, step, -levels * 1.0, levels * 1.0)
    for start in range(0, columns, BLOCK):
        at = _positions(start, BLOCK, ALIGNED)
        # The row was read a moment ago: this read comes from a cache
        value = tl.load(x + at, mask=at < columns, other=0.0).to(tl.float32)
        tl.store(y + at, on_grid(value, rounding).to(y.dtype.element_ty), mask=at < columns)


@triton.jit
def quantize_rows(table: tl.tensor, out: tl.tensor, rows: tl.tensor, levels: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Each row of the table on the symmetric grid of its own largest magnitude, written to its place in ``out``."""
    row = tl.program_id(0)
    address, place = tl.load(table + row), tl.load(table + rows + row)
    columns = tl.load(table + 2 * rows + row).to(tl.int32)
    x = address.to(tl.pointer_type(out.dtype.element_ty))
    if (address % 16 == 0) & (place % 16 == 0) & (columns % 16 == 0):
        even = tl.multiple_of(columns, 16)
        _quantize_row(tl.multiple_of(x, 16), out + tl.multiple_of(place, 16), even, levels, BLOCK, True)
    else:
        _quantize_row(x, out + place, columns, levels, BLOCK, False)


@triton.jit
def l1_rows(table: tl.tensor, kind: tl.tensor, out: tl.tensor, rows: tl.tensor, BLOCK: tl.constexpr) -> None:
    """The sum of magnitudes of each row; a row is made of runs of ``run`` elements that lie ``jump`` apart."""
    row = tl.program_id(0)
    address, jump = tl.load(table + row), tl.load(table + 3 * rows + row)
    count, run = tl.load(table + rows + row).to(tl.int32), tl.load(table + 2 * rows + row).to(tl.int32)
    x = address.to(tl.pointer_type(kind.dtype.element_ty))
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        place = (at // run) * jump + at % run
        total += tl.abs(tl.load(x + place, mask=at < count, other=0.0).to(tl.float32))
    tl.store(out + row, tl.sum(total, axis=0))
