"""When does a kernel agree with the float64 reference? One table of cases for every kernel and device."""

import torch

from lightslim.kernels.grid import along
from lightslim.kernels.reference import steps

SHAPES = [(), (1,), (7,), (0,), (4, 0), (3, 5), (1023,), (2, 3, 5), (4, 8, 3, 3), (2, 3, 1, 2, 4), (40001,)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SPECIAL = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-30, 6e4]


def assert_on_grid(y, x, amax, bits=8, axis=None, amin=None, truncates=False):
    """Every element has the integer code of the float64 reference, and the value of that code in its own dtype.

    Only where the float64 value lies within float32 rounding of the edge between two codes may it have either.
    """
    assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    y, x, dtype = y.detach().double().cpu(), x.detach().double().cpu(), x.dtype
    amax, amin = (None if end is None else along(end.to(work).double().cpu(), x, axis) for end in (amax, amin))
    step, low, high = (part.expand(x.shape) for part in steps(amax, amin, bits))
    undefined = x.isnan() | ~step.isfinite()
    assert y[undefined].isnan().all(), "NaN, and whatever meets a range without an end, gives NaN"
    assert (y[~undefined & (step == 0)] == 0).all(), "an empty range gives zeros"
    real = ~undefined & (step > 0)
    y, step, low, high, x = y[real], step[real], low[real], high[real], x[real]
    exact = (x / step).clamp(low, high)
    code = exact.round()
    other = (code + (exact - code).sign()).clamp(low, high)
    on_edge = ((exact - code).abs() - 0.5).abs() <= torch.finfo(work).eps * 2 * exact.abs()
    wrong = (~_is(y, code * step, dtype, truncates)) & ~(on_edge & _is(y, other * step, dtype, truncates))
    assert not wrong.any(), f"{int(wrong.sum())} wrong, first at {exact[wrong][0]}: {y[wrong][0]} by {step[wrong][0]}"


def _is(y, value, dtype, truncates):
    """Whether ``y`` is ``value`` rounded to its dtype: half a unit in the last place, and float32's rounding before."""
    info = torch.finfo(dtype)
    last_place = info.eps * (1.0 if truncates else 0.5)
    before = {torch.float64: 4e-16}.get(dtype, 2e-7)
    return (y - value).abs() <= (last_place + before) * value.abs() + info.smallest_normal * info.eps


def sample(shape, dtype=torch.float32, seed=0, special=True):
    """Normal numbers with the special ones strewn in where there is room."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if special and x.numel() > 3 * len(SPECIAL):
        x.view(-1)[: 3 * len(SPECIAL) : 3] = torch.tensor(SPECIAL)
    return x.to(dtype)
