"""Each Triton kernel against its float64 reference: on a GPU where there is one, else in Triton's interpreter.

The interpreter is switched on before Triton is imported, so ``test_kernels.py`` runs this file in a process of its own.
"""

import os

import pytest
import torch
from kernels.agreement import DTYPES, SHAPES, assert_on_grid, sample

from lightslim.kernels.chain import peaks
from lightslim.kernels.reference import l1_reference, straight_through_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter takes milliseconds per program, whatever its size; a GPU runs the blocks that users run
BLOCK = {"block": 1 << 14} if INTERPRETED else {}

RUNS = INTERPRETED or torch.cuda.is_available()
pytestmark = [
    pytest.mark.skipif(not RUNS, reason="needs a GPU or TRITON_INTERPRET=1"),
    # The interpreter computes with NumPy, which warns of NaN and infinity
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

if RUNS:
    from lightslim.kernels import launch

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def assert_right(y, x, amax, **options):
    # The interpreter cuts float32 to bfloat16 where hardware rounds
    assert_on_grid(y, x, amax, truncates=INTERPRETED and x.dtype == torch.bfloat16, **options)


def assert_passes(passed, grad, x, amax, axis=None, amin=None):
    assert torch.equal(passed, straight_through_reference(grad, x, amax, axis, amin))


def on_device(*tensors):
    return [tensor.to(DEVICE) for tensor in tensors]


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_range(shape, dtype):
    x, grad, amax = on_device(sample(shape, dtype), sample(shape, dtype, seed=1), torch.tensor(1.7))
    y, kept = launch.quantize_and_keep(x, amax, None, 8, None, **BLOCK)
    assert_right(y, x, amax)
    assert torch.equal(launch.quantize(x, amax, None, 8, None, **BLOCK), y) or x.isnan().any()
    assert [(k.dtype, k.numel()) for k in kept] == [(torch.uint8, (x.numel() + 7) // 8)]
    assert_passes_nan(launch.straight_through(grad, kept, None, y.stride(), **BLOCK), grad, x, amax)
    assert_passes_nan(launch.straight_through(grad, (x, amax, None), None, y.stride(), **BLOCK), grad, x, amax)


def assert_passes_nan(passed, grad, x, amax, axis=None, amin=None):
    """Gradients may hold NaN themselves."""
    expected = straight_through_reference(grad, x, amax, axis, amin)
    torch.testing.assert_close(passed, expected, rtol=0, atol=0, equal_nan=True)


@dtypes
@pytest.mark.parametrize("ends", ["symmetric", "affine", "unsigned", "positive"])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_every_kind_of_grid(bits, ends, dtype):
    lowest = {"symmetric": None, "affine": -0.9, "unsigned": 0.0, "positive": 0.5}[ends]
    x, amax = on_device(sample((3, 700), dtype), torch.tensor(2.1))
    amin = None if lowest is None else torch.tensor(lowest, device=DEVICE)
    assert_right(launch.quantize(x, amax, amin, bits, None, **BLOCK), x, amax, bits=bits, amin=amin)


@dtypes
@pytest.mark.parametrize("affine", [False, True], ids=["symmetric", "affine"])
@pytest.mark.parametrize(
    ("shape", "axis"), [((5,), 0), ((6, 5), 0), ((6, 5), 1), ((3, 4, 5), -2), ((4, 3, 3, 3), 0), ((3, 1100), 0),
    ((2, 3, 1025), 1), ((0, 3), 1), ((3, 0), 0), ((1, 4, 1), 2)], ids=str,
)  # fmt: skip
def test_a_range_for_each_channel(shape, axis, affine, dtype):
    x, grad = on_device(sample(shape, dtype), sample(shape, dtype, seed=1, special=False))
    (amax,) = on_device(sample((shape[axis],), seed=2, special=False).abs() + 0.1)
    amin = -amax / 3 if affine else None
    y, kept = launch.quantize_and_keep(x, amax, amin, 8, axis, **BLOCK)
    assert_right(y, x, amax, axis=axis, amin=amin)
    assert_passes(launch.straight_through(grad, kept, axis, y.stride(), **BLOCK), grad, x, amax, axis, amin)


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 2),
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "gaps": lambda x: x[:, ::2, 1:],
    "expanded": lambda x: x[:, :1].expand(x.shape),
    "backwards": lambda x: x.flip(0).permute(3, 1, 0, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_in_memory(layout):
    (x,) = on_device(LAYOUTS[layout](sample((4, 6, 5, 3))))
    grad, amax = torch.rand_like(x).contiguous(), torch.rand(x.shape[1], device=DEVICE) + 0.1
    for axis, end in ((None, amax[0]), (1, amax)):
        y, kept = launch.quantize_and_keep(x, end, None, 8, axis, **BLOCK)
        assert_right(y, x, end, axis=axis)
        assert y.stride() == torch.empty_like(x).stride()
        assert_passes(launch.straight_through(grad, kept, axis, y.stride(), **BLOCK), grad, x, end, axis)


@pytest.mark.parametrize("amax", [0.0, 1e-40, 2.0**-101, 2.0**-99, 1e30, torch.inf, torch.nan, -1.0])
def test_ranges_at_the_end_of_what_floats_can_hold(amax):
    x, amax = on_device(sample((200,)), torch.tensor(amax))
    for amin in (None, -amax):
        y = launch.quantize(x, amax, amin, 8, None, **BLOCK)
        if amax < 0:
            assert (y[~x.isnan()] == 0).all()
        else:
            assert_right(y, x, amax, amin=amin)


def test_the_bound_itself_keeps_its_gradient():
    x, amax = on_device(torch.tensor([1.5, -1.5, 1.5000001, -1.5000001, torch.nan]), torch.tensor(1.5))
    y, kept = launch.quantize_and_keep(x, amax, None, 8, None, **BLOCK)
    for known in (kept, (x, amax, None)):
        passed = launch.straight_through(torch.ones_like(x), known, None, y.stride(), **BLOCK)
        assert passed.tolist() == [1, 1, 0, 0, 1]


@dtypes
@pytest.mark.parametrize("last", [0.0, -9.5, torch.inf, torch.nan])
def test_the_peak_comes_with_the_pass(dtype, last):
    x, amax = on_device(sample((50_001,), dtype, special=False), torch.tensor(2.0))
    x[-1] = last
    y, kept, peak = launch.quantize_and_peak(x, amax, 8, **BLOCK)
    assert_right(y, x, amax)
    torch.testing.assert_close(peak, peaks(x, None), rtol=0, atol=0, equal_nan=True)
    grad = torch.ones_like(x)
    assert_passes(launch.straight_through(grad, kept, None, y.stride(), **BLOCK), grad, x, amax)


def many():
    shapes = [(4, 9), (3, 16, 16), (2, 5), (7,), (4, 3, 3, 3), (0, 3), (3, 0), (2, 20_000)]
    dtypes = [torch.float32, torch.float32, torch.float16, torch.float32, torch.bfloat16, *[torch.float32] * 3]
    return on_device(*(sample(shape, dtype, special=False) for shape, dtype in zip(shapes, dtypes, strict=True)))


def test_all_weights_in_one_launch():
    weights = many()
    weights[0][1] = 0.0
    for w, y in zip(weights, launch.quantize_many(weights, 8, **BLOCK), strict=True):
        assert_right(y, w, peaks(w, 0), axis=0)


def test_all_norms_in_one_launch():
    tensors = [*many(), many()[1].transpose(0, 2)]
    for dim in (0, -1):
        tensors = [x for x in tensors if x.shape[dim] < 100]
        for x, norms in zip(tensors, launch.l1_norms(tensors, dim, **BLOCK), strict=True):
            torch.testing.assert_close(norms.double(), l1_reference(x, dim), rtol=1e-6, atol=1e-30)
