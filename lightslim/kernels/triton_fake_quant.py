"""Fake quantization as Triton kernels: one read and one write per element.

A tensor is walked in memory order. A block that lies wholly inside it takes no mask, which is what gives 128-bit loads
and stores at any length; only the last block is masked. The grid of a range is a column of six float32 numbers that
:func:`make_grid` writes, so that no element pays for a division.
"""

# mypy: disable-error-code="untyped-decorator, import-untyped"
import triton
import triton.language as tl

ROUND = tl.constexpr(12582912.0)
"""1.5 * 2**23: adding and subtracting it rounds a small float32 to a whole number, halves to even."""
ROUND_DOUBLE = tl.constexpr(6755399441055744.0)
TINY = tl.constexpr(2.0**-100)


@triton.jit
def make_grid(
    amax: tl.tensor, amin: tl.tensor, grid: tl.tensor, channels: tl.tensor, levels: tl.tensor,
    AFFINE: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Write inverse, step, lowest code, highest code, lower and upper bound of each channel: six rows of ``grid``."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = at < channels
    upper = tl.load(amax + at, mask=real, other=0.0).to(tl.float64)
    lower, span = -upper, upper
    if AFFINE:
        lower = -_at_least_zero(-tl.load(amin + at, mask=real, other=0.0).to(tl.float64))
        upper = _at_least_zero(upper)
        span = upper - lower
    inverse, step = row_grid(span, levels)
    low = tl.zeros_like(span) - levels
    if AFFINE:
        low = ROUND_DOUBLE - (ROUND_DOUBLE - lower * (levels / _not_tiny(span)))
    high = levels + low if AFFINE else -low
    grid += at
    tl.store(grid, inverse, mask=real)
    tl.store(grid + channels, step, mask=real)
    tl.store(grid + 2 * channels, low.to(tl.float32), mask=real)
    tl.store(grid + 3 * channels, high.to(tl.float32), mask=real)
    tl.store(grid + 4 * channels, lower.to(tl.float32), mask=real)
    tl.store(grid + 5 * channels, upper.to(tl.float32), mask=real)


@triton.jit
def row_grid(span: tl.tensor, levels: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Inverse and step of a range, worked out in float64 and rounded once, as everywhere."""
    span = span.to(tl.float64)
    step = tl.where(span < TINY, 0.0, span / levels)
    return (levels / _not_tiny(span)).to(tl.float32), step.to(tl.float32)


@triton.jit
def _not_tiny(span: tl.tensor) -> tl.tensor:
    return tl.where(span < TINY, TINY, span)


@triton.jit
def _at_least_zero(value: tl.tensor) -> tl.tensor:
    """NaN stays, which ``maximum`` would not promise."""
    return tl.where(value < 0, 0.0, value)


@triton.jit
def read(source: tl.tensor, left: tl.tensor, BLOCK: tl.constexpr, WHOLE: tl.constexpr) -> tl.tensor:
    """A block, or what is left of it."""
    at = tl.arange(0, BLOCK)
    return tl.load(source + at) if WHOLE else tl.load(source + at, mask=at < left, other=0)


@triton.jit
def write(target: tl.tensor, value: tl.tensor, left: tl.tensor, BLOCK: tl.constexpr, WHOLE: tl.constexpr) -> None:
    """A block, or what is left of it."""
    at = tl.arange(0, BLOCK)
    value = value.to(target.dtype.element_ty)
    if WHOLE:
        tl.store(target + at, value)
    else:
        tl.store(target + at, value, mask=at < left)


@triton.jit
def on_grid(value: tl.tensor, rounding: tl.tuple) -> tl.tensor:
    """The nearest value on the grid; saturation is exact because clamping comes before rounding."""
    inverse, step, low, high = rounding
    code = tl.clamp(value * inverse, low, high, propagate_nan=tl.PropagateNan.ALL)
    return ((code + ROUND) - ROUND) * step


@triton.jit
def pack(flags: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Eight truth values to a byte, the first one lowest."""
    eights = tl.reshape(flags.to(tl.int32), (BLOCK // 8, 8))
    return tl.sum(eights << tl.arange(0, 8)[None, :], axis=1).to(tl.uint8)


@triton.jit
def unpack(packed: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """The truth values that :func:`pack` packed."""
    eights = (packed.to(tl.int32)[:, None] >> tl.arange(0, 8)[None, :]) & 1
    return tl.reshape(eights, (BLOCK,)) != 0


@triton.jit
def locate(
    channels: tl.tensor, inner: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr, BY: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """Where the block of this program starts, how many elements are left from there on, and their channel.

    BY "tensor" there is one channel; BY "row" a block stays within a row of ``inner`` elements and has the channel of
    that row; BY "element" rows are short and every element has its own.
    """
    block = tl.program_id(0).to(tl.int64)
    if BY == "row":
        blocks = tl.cdiv(inner, BLOCK)
        row, within = block // blocks, block % blocks * BLOCK
        start, left, channel = row * inner + within, inner - within, row % channels
    elif BY == "element":
        start = block * BLOCK
        # The remainder fits 32 bits, whose divisions are several times faster
        position = (start % (inner * channels)).to(tl.int32) + tl.arange(0, BLOCK)
        left, channel = count - start, position // inner % channels
    else:
        start = block * BLOCK
        left, channel = count - start, 0
    return start, left, channel


@triton.jit
def _quantize_block(
    x: tl.tensor, y: tl.tensor, clipped: tl.tensor, peak: tl.tensor, rounding: tl.tuple,
    bounds: tl.tuple, left: tl.tensor, BLOCK: tl.constexpr, WHOLE: tl.constexpr, KEEP: tl.constexpr,
    PEAK: tl.constexpr,
) -> None:  # fmt: skip
    value = read(x, left, BLOCK, WHOLE).to(tl.float32)
    write(y, on_grid(value, rounding), left, BLOCK, WHOLE)
    if KEEP:
        write(clipped, pack(is_clipped(value, bounds), BLOCK), (left + 7) // 8, BLOCK // 8, WHOLE)
    if PEAK:
        # Magnitudes order as their bit patterns do, and NaN comes above infinity
        magnitude = tl.abs(value).to(tl.int32, bitcast=True)
        tl.atomic_max(peak, tl.max(magnitude, axis=0))


@triton.jit
def is_clipped(value: tl.tensor, bounds: tl.tuple) -> tl.tensor:
    """Whether ``value`` lies outside its range, which NaN does not."""
    return (value < bounds[0]) | (value > bounds[1])


@triton.jit
def load_rounding(grid: tl.tensor, channels: tl.tensor) -> tuple[tl.tensor, ...]:
    """Inverse, step, lowest and highest code."""
    return (
        tl.load(grid), tl.load(grid + channels), tl.load(grid + 2 * channels), tl.load(grid + 3 * channels),
    )  # fmt: skip


@triton.jit
def load_bounds(grid: tl.tensor, channels: tl.tensor) -> tuple[tl.tensor, ...]:
    """The lowest and the highest value that is not clipped."""
    return tl.load(grid + 4 * channels), tl.load(grid + 5 * channels)


@triton.jit
def quantize(
    x: tl.tensor, y: tl.tensor, clipped: tl.tensor, peak: tl.tensor, grid: tl.tensor, channels: tl.tensor,
    inner: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr, BY: tl.constexpr, KEEP: tl.constexpr, PEAK: tl.constexpr,
) -> None:  # fmt: skip
    """``y`` is ``x`` on its grid; KEEP packs what was clipped into bits, PEAK finds the largest magnitude."""
    start, left, channel = locate(channels, inner, count, BLOCK, BY)
    rounding, bounds = load_rounding(grid + channel, channels), load_bounds(grid + channel, channels)
    x, y, clipped = x + start, y + start, clipped + start // 8
    if left >= BLOCK:
        _quantize_block(x, y, clipped, peak, rounding, bounds, left, BLOCK, True, KEEP, PEAK)
    else:
        _quantize_block(x, y, clipped, peak, rounding, bounds, left, BLOCK, False, KEEP, PEAK)


@triton.jit
def _pass_marked_block(
    grad: tl.tensor, clipped: tl.tensor, out: tl.tensor, left: tl.tensor, BLOCK: tl.constexpr, WHOLE: tl.constexpr
) -> None:
    outside = unpack(read(clipped, (left + 7) // 8, BLOCK // 8, WHOLE), BLOCK)
    write(out, tl.where(outside, 0.0, read(grad, left, BLOCK, WHOLE)), left, BLOCK, WHOLE)


@triton.jit
def pass_marked(grad: tl.tensor, clipped: tl.tensor, out: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr) -> None:
    """The straight-through gradient, by the bits that the forward pass packed."""
    start, left, _ = locate(1, 1, count, BLOCK, "tensor")
    grad, clipped, out = grad + start, clipped + start // 8, out + start
    if left >= BLOCK:
        _pass_marked_block(grad, clipped, out, left, BLOCK, True)
    else:
        _pass_marked_block(grad, clipped, out, left, BLOCK, False)


@triton.jit
def _pass_inside_block(
    grad: tl.tensor, x: tl.tensor, out: tl.tensor, bounds: tl.tuple, left: tl.tensor,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
) -> None:  # fmt: skip
    outside = is_clipped(read(x, left, BLOCK, WHOLE).to(tl.float32), bounds)
    write(out, tl.where(outside, 0.0, read(grad, left, BLOCK, WHOLE)), left, BLOCK, WHOLE)


@triton.jit
def pass_inside(
    grad: tl.tensor, x: tl.tensor, out: tl.tensor, grid: tl.tensor, channels: tl.tensor, inner: tl.tensor,
    count: tl.tensor, BLOCK: tl.constexpr, BY: tl.constexpr,
) -> None:  # fmt: skip
    """The straight-through gradient, by the input itself."""
    start, left, channel = locate(channels, inner, count, BLOCK, BY)
    bounds = load_bounds(grid + channel, channels)
    grad, x, out = grad + start, x + start, out + start
    if left >= BLOCK:
        _pass_inside_block(grad, x, out, bounds, left, BLOCK, True)
    else:
        _pass_inside_block(grad, x, out, bounds, left, BLOCK, False)
