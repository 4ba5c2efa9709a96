"""The losses, the names of maps, projections, the cache: what distillation is made of, without a fit."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightslim import CompressionError, DistillationStrategy, FSPDistiller, L2Distiller, SoftLabelDistiller
from lightslim.distill import fsp_loss, fsp_matrix, l2_loss, soft_label_loss
from lightslim.distill.cache import Cache
from lightslim.distill.optimizers import factory_of
from lightslim.distill.projection import Projection
from lightslim.distill.spots import Tap, Watch, locate, modules_of

SIZES = st.integers(1, 4)
SEEDS = st.integers(0, 2**20)


def randn(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=30)
@given(SEEDS, SIZES, SIZES, SIZES, SIZES, SIZES)
def test_fsp_is_the_formula(seed, n, c0, c1, height, width):
    s0, s1 = randn(seed, n, c0, height, width), randn(seed + 1, n, c1, height, width)
    t0, t1 = randn(seed + 2, n, c0, 3, 2), randn(seed + 3, n, c1, 3, 2)
    expected = 0.0
    for i in range(n):
        for a in range(c0):
            for b in range(c1):
                student = sum(float(s0[i, a, y, x] * s1[i, b, y, x]) for y in range(height) for x in range(width))
                teacher = sum(float(t0[i, a, y, x] * t1[i, b, y, x]) for y in range(3) for x in range(2))
                expected += (student / (height * width) - teacher / 6) ** 2
    assert fsp_loss((s0, s1), (t0, t1)).item() == pytest.approx(expected / (n * c0 * c1), rel=1e-10)


@settings(deadline=None)
@given(SEEDS, SIZES, SIZES, SIZES)
def test_fsp_matrices_transpose_scale_and_ignore_the_order_of_positions(seed, c0, c1, positions):
    one, other = randn(seed, 2, c0, positions, 3), randn(seed + 1, 2, c1, positions, 3)
    matrix = fsp_matrix(one, other)
    torch.testing.assert_close(fsp_matrix(other, one), matrix.transpose(1, 2))
    torch.testing.assert_close(fsp_matrix(2 * one, -3 * other), -6 * matrix)
    torch.testing.assert_close(fsp_matrix(one.flip(3), other.flip(3)), matrix)
    torch.testing.assert_close(fsp_matrix(one.repeat(1, 1, 2, 1), other.repeat(1, 1, 2, 1)), matrix)


@settings(deadline=None)
@given(SEEDS, SIZES, SIZES)
def test_l2_is_the_formula(seed, rows, columns):
    s, t = randn(seed, rows, columns), randn(seed + 1, rows, columns)
    expected = sum((float(a) - float(b)) ** 2 for a, b in zip(s.flatten(), t.flatten(), strict=True)) / s.numel()
    assert l2_loss(s, t).item() == pytest.approx(expected, rel=1e-12)


@settings(deadline=None)
@given(SEEDS, SIZES, st.integers(2, 5), st.floats(0.25, 8), st.floats(0.25, 8), st.booleans())
def test_soft_labels_are_the_formula(seed, rows, classes, student_t, teacher_t, scaled):
    s, t = randn(seed, rows, classes), randn(seed + 1, rows, classes)
    total = 0.0
    for row in range(rows):
        wanted = [math.exp(float(x) / teacher_t) for x in t[row]]
        normaliser = math.log(sum(math.exp(float(x) / student_t) for x in s[row]))
        total -= sum(w / sum(wanted) * (float(x) / student_t - normaliser) for w, x in zip(wanted, s[row], strict=True))
    expected = total / rows * (student_t * teacher_t if scaled else 1)
    assert soft_label_loss(s, t, student_t, teacher_t, scaled).item() == pytest.approx(expected, rel=1e-10)


@settings(deadline=None)
@given(SEEDS, st.floats(0.5, 5))
def test_equal_scores_have_no_gradient_and_cost_the_entropy(seed, temperature):
    t = randn(seed, 3, 5)
    s = t.clone().requires_grad_()
    loss = soft_label_loss(s, t, temperature, temperature)
    loss.backward()
    p = torch.softmax(t / temperature, 1)
    assert loss.item() == pytest.approx(-(p * p.log()).sum(1).mean().item(), rel=1e-10)
    assert s.grad.abs().max() < 1e-12


def test_scaling_by_the_temperature_keeps_the_size_of_the_gradient():
    sizes = []
    for temperature in (10.0, 40.0):
        s = randn(0, 4, 6).requires_grad_()
        soft_label_loss(s, randn(1, 4, 6), temperature, temperature, scale_by_temperature=True).backward()
        sizes.append(s.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


LOSSES = {
    "fsp": lambda s, t: fsp_loss((s, s), (t, t)),
    "l2": l2_loss,
    "soft label": soft_label_loss,
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_gradients_reach_the_student_only_and_are_right(loss):
    s, t = randn(0, 2, 3, 2, 2).requires_grad_(), randn(1, 2, 3, 2, 2).requires_grad_()
    loss(s, t).backward()
    assert s.grad.abs().sum() > 0
    assert t.grad is None
    assert torch.autograd.gradcheck(lambda x: loss(x, t), s)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_half_precision_is_summed_in_float32(loss, dtype):
    s, t = (randn(seed, 2, 3, 16, 16).to(dtype) for seed in (0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(s, t)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(loss(s.double(), t.double()).item(), rel=1e-5)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
        self.cell = nn.LSTMCell(4, 4)
        self.again = self.body[2]

    def forward(self, x, scale=None):
        h = c = torch.zeros_like(x)
        for _ in range(3):
            h, c = self.cell(self.body(x), (h, c))
        return {"h": h, "c": c}


def seen(text, whole=False, copies=False):
    net = Net()
    tap = Tap(locate(text, net, "here"), whole)
    tap.copies = copies
    watch = Watch(net, [tap])
    watch.attach()
    watch.on = True
    x = torch.randn(2, 4)
    watch.whole_call((x,), {})
    watch.whole_result(net(x))
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())
    watch.on = False
    net(x)
    assert hooks == (1 if tap.spot.path else 0)
    return net, x, tap, watch


@pytest.mark.parametrize(
    ("text", "path", "side", "call", "index"),
    [
        ("body.0", "body.0", "output", None, None),
        ("*.0:input", "body.0", "input", None, None),
        ("re:body\\.[2]", "body.2", "output", None, None),
        ("cell@-1:output[1]", "cell", "output", -1, 1),
        ("again@2", "again", "output", 2, None),
        ("", "", "output", None, None),
        ("@1:input", "", "input", 1, None),
    ],
)
def test_a_map_is_named_by_path_side_call_and_index(text, path, side, call, index):
    spot = locate(text, Net(), "here")
    assert (spot.path, spot.side, spot.call, spot.index) == (path, side, call, index)


def test_names_go_through_compiled_wrappers():
    net = Net()
    net.body = torch.compile(net.body, backend="eager")
    assert "body.0" in modules_of(net)
    assert locate("body.0", net, "here").path == "body.0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("body.9", r"student_map: 'body\.9' matches none of .* names; nearest: body"),
        ("body.[01]", r"student_map: 'body\.\[01\]' matches 2 modules, body\.0, body\.1; name one"),
        ("re:(", "not a valid regular expression"),
    ],
)
def test_a_name_that_fits_nothing_or_two_is_refused(text, message):
    with pytest.raises(CompressionError, match=message):
        locate(text, Net(), "student_map")


def test_what_passes_is_kept_by_call():
    net, x, first, watch = seen("cell@0:output[0]")
    inner, zero = net.body(x), torch.zeros(2, 4)
    h, c = net.cell(inner, (zero, zero))
    torch.testing.assert_close(first.value(), h)
    h, c = net.cell(inner, (h, c))
    _, _, last, _ = seen("cell@-2:output[1]")
    assert last.value().shape == c.shape
    assert last.calls == 3
    watch.detach()
    assert not any(m._forward_hooks for m in net.modules())
    assert not first.filled
    with pytest.raises(CompressionError, match="called 0 times in this step"):
        first.value()


def test_a_call_or_tensor_that_is_not_said_is_asked_for():
    with pytest.raises(CompressionError, match=r"2 tensors pass there; say which, as 'cell:output\[0\]'"):
        seen("cell@0")
    tap = seen("body")[2]
    with pytest.raises(CompressionError, match="called 3 times in a step; say which, as 'body@0'"):
        tap.check_calls()


def test_what_is_overwritten_is_noticed_and_can_be_copied():
    net, x, tap, _ = seen("body.0@0")
    assert tap.spoiled
    net, x, tap, _ = seen("body.0@0", copies=True)
    assert not tap.spoiled
    torch.testing.assert_close(tap.value(), net.body[0](x))


def test_the_whole_call_is_kept():
    _, x, tap, _ = seen(":input", whole=True)
    (kept,), options = tap.value()
    assert kept is x
    assert options == {}


@settings(deadline=None)
@given(SEEDS, st.integers(1, 3), SIZES, SIZES)
def test_a_projection_is_a_matrix_along_its_dimension(seed, dim, into, out):
    projection = Projection(dim, into, out).double()
    shape = [2, 3, 3, 3]
    shape[dim] = into
    x = randn(seed, *shape)
    expected = torch.tensordot(x, projection.weight, dims=([dim], [1])).movedim(-1, dim)
    torch.testing.assert_close(projection(x), expected)
    again = Projection.restored(projection.saved())
    assert torch.equal(again.weight, projection.weight)


@settings(deadline=None)
@given(SEEDS, st.sets(st.integers(0, 3)), SIZES, SIZES)
def test_sections_are_compared_as_if_their_maps_were_projected(seed, which, into, out):
    distiller = FSPDistiller([("a", "b"), ("c", "d")], [("a", "b"), ("c", "d")], project=True)
    projections = {i: Projection(1, into, out).double() for i in which}
    student = [randn(seed + i, 2, into, 3, 4).requires_grad_() for i in range(4)]
    teacher = [randn(9 + seed + i, 2, out if i in which else into, 5, 2) for i in range(4)]
    maps = [projections[i](x) if i in which else x for i, x in enumerate(student)]
    expected = fsp_loss(maps[:2], teacher[:2]) + fsp_loss(maps[2:], teacher[2:])
    loss = distiller.compare(student, teacher, projections)
    learnt = [*student, *(projection.weight for projection in projections.values())]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, learnt), torch.autograd.grad(expected, learnt))


def test_a_projection_draws_no_random_number_and_is_the_same_each_time():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = Projection(1, 3, 4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(Projection(1, 3, 4).weight, one.weight)


S = torch.Size


@pytest.mark.parametrize(
    ("distiller", "student", "teacher", "expected"),
    [
        (L2Distiller(project=True), [S([2, 3, 5, 5])], [S([2, 7, 5, 5])], {0: (1, 3, 7)}),
        (L2Distiller(project=True), [S([2, 5, 8])], [S([2, 5, 6])], {0: (2, 8, 6)}),
        (L2Distiller(project=True), [S([2, 5])], [S([2, 5])], {}),
        (L2Distiller(), [S([2, 5])], [S([2, 6])], None),
        (L2Distiller(project=True), [S([2, 5, 4])], [S([2, 6, 3])], None),
        (L2Distiller(project=True), [S([2, 5])], [S([3, 5])], None),
        (L2Distiller(project=True), [S([2, 5])], [S([2, 5, 1])], None),
        (FSPDistiller([("a", "b")], [("c", "d")]), [S([2, 3, 4, 4])] * 2, [S([2, 3, 8, 8])] * 2, {}),
        (FSPDistiller([("a", "b")], [("c", "d")]), [S([2, 3, 4, 4])] * 2, [S([2, 5, 4, 4])] * 2, None),
        (FSPDistiller([("a", "b")], [("c", "d")], project=True), [S([2, 3, 4, 4]), S([2, 5, 4, 4])],
         [S([2, 6, 8, 8]), S([2, 5, 8, 8])], {0: (1, 3, 6)}),
    ],
)  # fmt: skip
def test_shapes_that_differ_are_projected_or_named(distiller, student, teacher, expected):
    if expected is not None:
        assert distiller.mapped(student, teacher) == expected
        return
    with pytest.raises(CompressionError) as caught:
        distiller.mapped(student, teacher)
    assert str(tuple(student[0])) in str(caught.value)
    assert str(tuple(teacher[0])) in str(caught.value)


def test_the_maps_of_an_fsp_pair_must_have_equal_positions():
    distiller = FSPDistiller([("a", "b")], [("c", "d")])
    with pytest.raises(CompressionError, match=r"'a' is \(2, 3, 4, 4\) and 'b' is \(2, 3, 2, 2\)"):
        distiller.mapped([S([2, 3, 4, 4]), S([2, 3, 2, 2])], [S([2, 3, 4, 4])] * 2)


L2 = L2Distiller("a", "b")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FSPDistiller(), "student_pairs is ()"),
        (lambda: FSPDistiller([("a", "b")], ["ab"]), "teacher_pairs is"),
        (lambda: FSPDistiller([("a", "b")], [("a", "b")] * 2), "student_pairs has 1 pairs, teacher_pairs 2"),
        (lambda: L2Distiller(distillation_loss_weight=0), "distillation_loss_weight is 0"),
        (lambda: L2Distiller(distillation_loss_weight=math.nan), "distillation_loss_weight is nan"),
        (lambda: SoftLabelDistiller(student_temperature=0), "student_temperature is 0"),
        (lambda: SoftLabelDistiller(teacher_temperature=-1), "teacher_temperature is -1"),
        (lambda: DistillationStrategy(), "distillers is empty"),
        (lambda: DistillationStrategy([L2, L2Distiller("a", "b")]), "two losses would be logged as 'l2loss_a_b'"),
        (lambda: DistillationStrategy([L2], task_loss_weight=-1), "task_loss_weight is -1"),
        (lambda: DistillationStrategy([L2], teacher="slf"), "did you mean 'self'"),
        (lambda: DistillationStrategy([L2], cache_bytes=0), "cache_bytes is 0"),
        (lambda: DistillationStrategy([L2], start_epoch=3, end_epoch=3), "end_epoch is 3"),
        (lambda: factory_of({"optimizer": "SDG"}), "did you mean 'SGD'"),
        (lambda: factory_of({"lr": 1}), "'optimizer' is None"),
        (lambda: factory_of({"optimizer": "SGD", "lr": -1}), "SGD refuses its arguments"),
        (lambda: factory_of({"optimizer": "SGD", "rate": 1}), "SGD refuses its arguments"),
    ],
)
def test_bad_arguments_fail_in_the_constructor(build, message):
    with pytest.raises(CompressionError) as caught:
        build()
    assert message in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_the_cache_gives_back_what_it_was_given(tmp_path, dtype):
    cache = Cache(tmp_path, 2**20, "one")
    answer = [(10 * torch.randn(3, 4)).to(dtype), torch.tensor(2.5)]
    x = torch.randn(3)
    computed = []

    def compute():
        computed.append(1)
        return answer

    for arguments in (((x,), {}), ((x.clone(),), {})):
        found = cache.get(arguments, compute)
        assert all(torch.equal(one, other) and one.dtype == other.dtype
                   for one, other in zip(found, answer, strict=True))  # fmt: skip
    assert len(computed) == cache.hits == 1
    for arguments in (((x + 1,), {}), ((), {"x": x}), ((x, x), {})):
        cache.get(arguments, compute)
    Cache(tmp_path, 2**20, "another teacher").get(((x,), {}), compute)
    assert len(computed) == 5
    assert Cache(tmp_path, 2**20, "one").get(((x,), {}), list)[0].dtype == dtype


def test_the_cache_is_bounded_and_says_when_it_is_full(tmp_path):
    cache = Cache(tmp_path, 10_000, "")

    def fill():
        for i in range(20):
            cache.get(((torch.tensor(i),), {}), lambda: [torch.zeros(500)])

    with pytest.warns(UserWarning, match="is full, cache_bytes are 10,000"):
        fill()
    assert 1 < len(list(tmp_path.iterdir())) < 5
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 12_500


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize("damage", ["cut", "payload"])
def test_a_damaged_answer_is_computed_again_and_never_executed(tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    cache = Cache(tmp_path / "c", 2**20, "")
    arguments = ((torch.ones(2),), {})
    cache.get(arguments, lambda: [torch.ones(2)])
    (path,) = (tmp_path / "c").iterdir()
    path.write_bytes(path.read_bytes()[:-30]) if damage == "cut" else torch.save([Payload()], path)
    with pytest.warns(UserWarning, match="is damaged"):
        assert torch.equal(cache.get(arguments, lambda: [torch.zeros(2)])[0], torch.zeros(2))
    assert torch.equal(cache.get(arguments, list)[0], torch.zeros(2))
    assert not (tmp_path / "ran").exists()
