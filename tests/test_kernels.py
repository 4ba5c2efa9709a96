"""Fake quantization and norms where every user has them, on the CPU; the Triton kernels in an interpreter."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.agreement import DTYPES, SHAPES, SPECIAL, assert_on_grid, sample
from torch.autograd import forward_ad

from lightslim.errors import CompressionError
from lightslim.kernels import chain, fake_quant, fake_quant_and_peak, fake_quant_many, l1_norms
from lightslim.kernels.chain import peaks
from lightslim.kernels.grid import scalar_grid, tensor_grid
from lightslim.kernels.reference import l1_reference, straight_through_reference

ONE = torch.tensor(1.0)
FLOATS = [*DTYPES, torch.float64]
floats = pytest.mark.parametrize("dtype", FLOATS, ids=str)


@st.composite
def cases(draw):
    """An input, its range and how to quantize it: any shape, dtype, bits, axis and kind of range."""
    shape = draw(st.lists(st.integers(0, 6), max_size=5))
    axis = draw(st.sampled_from([None, *range(-len(shape), len(shape))]))
    x = sample(shape, draw(st.sampled_from(FLOATS)), draw(st.integers(0, 9)))
    if x.numel() and draw(st.booleans()):
        x.view(-1)[0] = draw(st.sampled_from(SPECIAL))
    amax = sample(() if axis is None else (x.shape[axis],), x.dtype, seed=11, special=False).abs() * 2
    amin = draw(st.sampled_from([None, amax * 0, amax / 2, -amax, -amax / 3]))
    if x.ndim > 1 and draw(st.booleans()):
        x, axis = x.transpose(0, 1), {0: 1, 1: 0, -x.ndim: 1, 1 - x.ndim: 0}.get(axis, axis)
    return x, amax, draw(st.integers(2, 16)), axis, amin


@settings(deadline=None, max_examples=300)
@given(cases())
def test_codes_and_gradients_are_those_of_the_reference(case):
    x, amax, bits, axis, amin = case
    x = x.detach().requires_grad_()
    grad = torch.rand_like(x)
    y = fake_quant(x, amax, bits, axis, amin=amin)
    assert_on_grid(y, x, amax, bits, axis, amin)
    assert_passes(torch.autograd.grad(y, x, grad)[0], grad, x.detach(), amax, axis, amin)


def assert_passes(passed, grad, x, amax, axis, amin):
    """The masked straight-through gradient; at NaN torch's own kernels hand it on in one place and not in another."""
    expected = straight_through_reference(grad, x, amax, axis, amin)
    assert torch.equal(passed.where(~x.isnan(), 0), expected.where(~x.isnan(), 0))


@floats
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_of_the_table(shape, dtype):
    x = sample(shape, dtype)
    assert_on_grid(fake_quant(x, ONE), x, ONE)
    y, peak = fake_quant_and_peak(x, ONE)
    assert_on_grid(y, x, ONE)
    torch.testing.assert_close(peak, peaks(x, None), equal_nan=True)


@floats
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_the_bound_keeps_its_gradient_and_its_neighbour_loses_it(dtype, per_channel, affine):
    bound = torch.tensor(1.5, dtype=dtype)
    above = torch.nextafter(bound, torch.tensor(9.0, dtype=dtype))
    x = torch.stack([bound, -bound, above, -above])[None].requires_grad_()
    end, axis = (bound[None], 0) if per_channel else (bound, None)
    fake_quant(x, end, 8, axis, amin=-end if affine else None).sum().backward()
    assert x.grad.tolist() == [[1, 1, 0, 0]]


@given(st.lists(st.floats(0, 2.0**126, width=32), min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_so_do_all_bounds_of_channels_down_to_the_smallest(bounds):
    amax = torch.tensor(bounds)
    above = torch.nextafter(amax, torch.tensor(torch.inf))
    x = torch.stack([amax, -amax, above, -above], 1).requires_grad_()
    fake_quant(x, amax, 8, 0).sum().backward()
    assert torch.equal(x.grad, torch.tensor([[1.0, 1.0, 0.0, 0.0]]).expand_as(x))


@floats
@pytest.mark.parametrize("shape", [(300, 50), (3, 5_000), (1, 15_000), (15_000,)], ids=str)
def test_large_tensors_are_worked_on_in_pieces(shape, dtype, monkeypatch):
    monkeypatch.setattr(chain, "PIECE", 1000)
    x, grad = sample(shape, dtype).requires_grad_(), sample(shape, dtype, seed=1, special=False)
    for axis in (None, 0, len(shape) - 1):
        amax = ONE if axis is None else sample((shape[axis],), special=False).abs() + 0.1
        for amin in (None, -amax / 3):
            y = fake_quant(x, amax, 8, axis, amin=amin)
            assert_on_grid(y, x, amax, 8, axis, amin)
            assert_passes(torch.autograd.grad(y, x, grad)[0], grad, x.detach(), amax, axis, amin)


@pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")  # torch's own forward mode asks for it
def test_the_gradient_can_be_taken_forwards_and_of_gradients_and_values_elsewhere_stay():
    x, amax = torch.tensor([-5.0, 0.3, 2.0, 4.0]), torch.tensor(2.0)
    passing = torch.tensor([0.0, 1.0, 1.0, 0.0])
    for traced in (False, True):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.clone().requires_grad_(traced), torch.full_like(x, 3.0))
            assert torch.equal(forward_ad.unpack_dual(fake_quant(dual, amax)).tangent, 3 * passing)
            assert (forward_ad.unpack_dual(fake_quant(dual, 9 * amax, clips=False)).tangent == 3).all()
    assert torch.equal(torch.func.grad(lambda x: fake_quant(x, amax).sum())(x.requires_grad_()), passing)
    (first,) = torch.autograd.grad((fake_quant(x, amax) * x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(second, 2 * passing)
    assert torch.equal(x, torch.tensor([-5.0, 0.3, 2.0, 4.0]))


def test_a_promise_not_to_clip_makes_the_backward_pass_free():
    x, kept = torch.randn(9, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
        y = fake_quant(x, x.detach().abs().max(), clips=False)
    assert not kept
    grad = torch.randn(9)
    assert torch.autograd.grad(y, x, grad)[0].data_ptr() == grad.data_ptr()


@pytest.mark.parametrize("amax", [0.0, 1e-45, 2.0**-101, -3.0])
def test_an_empty_range_gives_zeros_and_a_gradient_without_nan(amax):
    x = torch.tensor([0.0, 1.0, -torch.inf, 1e-44], requires_grad=True)
    for end, axis in ((torch.tensor(amax), None), (torch.full((4,), amax), 0)):
        y = fake_quant(x, end, 8, axis)
        assert (y == 0).all()
        assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("amax", [torch.nan, torch.inf])
def test_a_range_without_an_end_gives_nan(amax):
    for amin in (None, torch.tensor(-amax)):
        assert fake_quant(torch.tensor([0.0, 1.0]), torch.tensor(amax), amin=amin).isnan().all()


def test_zero_and_saturated_values_are_exactly_on_the_grid():
    x = torch.tensor([-torch.inf, -1e30, -0.3, 0.0, 0.7, 1e30, torch.inf])
    for bits in range(2, 17):
        y = fake_quant(x, torch.tensor(0.7), bits, amin=torch.tensor(-0.3))
        assert y[3] == 0
        assert y[0] == y[1] <= y[2]
        assert y[4] <= y[5] == y[6]
        assert y.unique().numel() <= 2**bits


@given(st.floats(0, 2.0**99, width=32), st.floats(-(2.0**99), 2.0**99, width=32), st.integers(2, 16))
def test_scalars_and_tensors_have_the_same_grid(amax, amin, bits):
    for low in (None, amin):
        one = torch.tensor(scalar_grid(amax, low, bits))
        least = None if low is None else torch.tensor([low])
        grid = tensor_grid(torch.tensor([amax]), least, bits, torch.float32)
        assert torch.equal(torch.tensor([float(part) for part in grid]), one)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_many_at_once_equals_one_by_one(axis):
    weights = [sample(s, special=False).requires_grad_() for s in [(4, 9), (3, 5, 2), (2, 0)]]
    together = fake_quant_many(weights, 4, axis)
    for w, y in zip(weights, together, strict=True):
        assert torch.equal(y, fake_quant(w, peaks(w, axis), 4, axis))
        assert torch.equal(torch.autograd.grad(y.sum(), w)[0], torch.ones_like(w))
    assert fake_quant_many([]) == []


@pytest.mark.parametrize("axis", [0, -1, None])
def test_many_at_once_without_a_gradient_equal_one_by_one(axis):
    weights = [sample(s, seed=i) for i, s in enumerate([(40, 9), (3, 5, 2), (7,), (2, 60)])]
    weights.append(torch.zeros(3, 4))
    for x, y in zip(weights, fake_quant_many(weights, 4, axis), strict=True):
        assert torch.equal(y.view(torch.int32), fake_quant(x, peaks(x, axis), 4, axis).view(torch.int32))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(-4, 3), st.sampled_from(FLOATS))
def test_norms(shape, dim, dtype):
    dim = max(-len(shape), min(dim, len(shape) - 1))
    x = sample(shape, dtype, special=False)
    for norms in l1_norms([x, x.clone()], dim):
        torch.testing.assert_close(norms.double(), l1_reference(x, dim), rtol=1e-6, atol=0)


WRONG = {
    "bits is 1;": lambda x: fake_quant(x, ONE, 1),
    "bits is 17;": lambda x: fake_quant(x, ONE, 17),
    "bits is 8.0;": lambda x: fake_quant(x, ONE, 8.0),
    "bits is True;": lambda x: fake_quant_many([x], True),
    "x is int64;": lambda x: fake_quant(x.long(), ONE),
    r"amax has shape \(3,\); without axis": lambda x: fake_quant(x, torch.ones(3)),
    r"amax has shape \(2,\); it must have \(3,\)": lambda x: fake_quant(x, torch.ones(2), 8, 1),
    r"amin has shape \(\); it must have \(2,\)": lambda x: fake_quant(x, torch.ones(2), 8, 0, amin=ONE),
    "axis is 2, but": lambda x: fake_quant(x, ONE, 8, 2),
    "axis is -3, but": lambda x: l1_norms([x], -3),
    "amax is int64;": lambda x: fake_quant(x, ONE.long()),
    "amax is on meta, x on cpu": lambda x: fake_quant(x, ONE.to("meta")),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    with pytest.raises(CompressionError, match=message):
        WRONG[message](torch.ones(2, 3))


OPTIONS = [((3, 4), None, True), ((3, 4), 1, True), ((3, 4), 0, False), ((0, 4), 1, True), ((), None, True)]


@pytest.mark.parametrize(("shape", "axis", "clips"), OPTIONS, ids=str)
def test_the_op_keeps_its_contract_with_torch(shape, axis, clips):
    x = torch.randn(shape).requires_grad_()
    amax = torch.rand(() if axis is None else shape[axis]) + 0.5
    arguments = (x, amax, None, 8, axis, clips)
    torch.library.opcheck(torch.ops.lightslim.fake_quant.default, arguments)
    assert torch.equal(torch.ops.lightslim.fake_quant(*arguments), fake_quant(x, amax, 8, axis, clips=clips))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_it_compiles_into_one_graph(backend):
    def layer(x, amax, rows):
        y = fake_quant(x.relu(), amax, 8, amin=amax * 0) + fake_quant(x, rows, 4, 0, clips=False)
        return y * fake_quant_and_peak(x, amax)[1]

    x, amax = torch.randn(5, 6, requires_grad=True), torch.tensor(0.9)
    rows = x.detach().abs().amax(1)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    expected, actual = layer(x, amax, rows), compiled(x, amax, rows)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (actual, expected)))


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_it_exports_as_one_node(strict):
    class Layer(torch.nn.Module):
        def forward(self, x):
            return fake_quant(x, ONE, 8)

    x = torch.randn(4, 3)
    program = torch.export.export(Layer(), (x,), dynamic_shapes=({0: torch.export.Dim("n")},), strict=strict)
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [
        torch.ops.lightslim.fake_quant.default
    ]
    x = torch.randn(7, 3)
    assert torch.equal(program.module()(x), fake_quant(x, ONE))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_one_compiled_pass_on_request():
    script = """
import torch
from kernels.agreement import assert_on_grid, sample
from lightslim.kernels import fake_quant
from lightslim.kernels.reference import straight_through_reference
for dtype in (torch.float32, torch.bfloat16):
    x, rows = sample((400, 700), dtype), torch.rand(400) + 0.1
    for amax, axis, amin in ((rows[0], None, None), (rows[0], None, -rows[1]), (rows, 0, None), (rows, 0, -rows)):
        y = fake_quant(x.requires_grad_(), amax, 8, axis, amin=amin)
        assert_on_grid(y, x, amax, 8, axis, amin)
        grad = torch.rand_like(x)
        expected = straight_through_reference(grad, x.detach(), amax, axis, amin)
        assert torch.equal(torch.autograd.grad(y, x, grad)[0], expected)
"""
    env = {**os.environ, "LIGHTSLIM_COMPILE": "1", "PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_the_triton_kernels_agree_in_the_interpreter():
    file = Path(__file__).parent / "kernels" / "test_triton.py"
    # The interpreter is chosen when Triton is imported, so it has a process of its own
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600,
        cwd=file.parent.parent.parent,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-5000:]
    assert "skipped" not in run.stdout
