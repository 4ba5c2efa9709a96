"""The rounding, its gradients and the first step against the paper's formulas, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightslim_lsq import LearnedStepSize, round_by_step
from torch import nn

from lightslim import CompressionError
from lightslim.kernels.codes import encode
from lightslim.quantize import freeze, to_int8, transform

numbers = st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=20)
bits_of = st.sampled_from([2, 3, 4, 8])


def by_hand(values, step, bits, unsigned):
    """Rounded values, their slopes, and the slopes of the step, one number at a time."""
    low, high = (0, 2**bits - 1) if unsigned else (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
    for x in values:
        code = x / step
        inside = low < code < high
        bound = low if code <= low else high
        yield (
            max(low, min(high, round(code))) * step,
            float(inside),
            round(code) - code if inside else bound,
        )


def close_to_a_half(values, step):
    return any(abs(x / step % 1 - 0.5) < 1e-6 for x in values)


@settings(max_examples=100, deadline=None)
@given(numbers, st.floats(0.05, 2), bits_of, st.booleans())
def test_rounding_and_both_gradients_are_the_papers(values, step, bits, unsigned):
    if close_to_a_half(values, step):
        return
    x = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    s = torch.tensor(step, dtype=torch.float64, requires_grad=True)
    weights = torch.arange(1.0, len(values) + 1, dtype=torch.float64)
    y = round_by_step(x, s, bits, unsigned, scale=0.25)
    (weights * y).sum().backward()
    rounded, slopes, of_step = zip(*by_hand(values, step, bits, unsigned), strict=True)
    torch.testing.assert_close(y.tolist(), list(rounded))
    torch.testing.assert_close(x.grad.tolist(), [w * slope for w, slope in zip(weights.tolist(), slopes, strict=True)])
    expected = 0.25 * sum(w * slope for w, slope in zip(weights.tolist(), of_step, strict=True))
    assert s.grad.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_first_step_and_the_scale_of_its_gradient_are_the_papers(bits):
    weight = nn.Parameter(torch.randn(6, 5, dtype=torch.float64))
    rule = LearnedStepSize(bits=bits).double()
    rule.rounded(weight).sum().backward()
    top = 2 ** (bits - 1) - 1
    step = 2 * weight.detach().abs().mean().item() / math.sqrt(top)
    assert rule.step.item() == pytest.approx(step, rel=1e-6)
    slopes = [slope for *_, slope in by_hand(weight.flatten().tolist(), rule.step.item(), bits, False)]
    assert rule.step.grad.item() == pytest.approx(sum(slopes) / math.sqrt(30 * top), rel=1e-6)


def test_an_input_without_negative_numbers_is_unsigned_and_scaled_by_the_numbers_of_a_sample():
    x = torch.rand(8, 5, dtype=torch.float64)
    rule = LearnedStepSize(bits=4).double()
    rule.rounded(x).sum().backward()
    assert rule(x).amin == 0
    assert rule.step.item() == pytest.approx(2 * x.mean().item() / math.sqrt(15))
    slopes = [slope for *_, slope in by_hand(x.flatten().tolist(), rule.step.item(), 4, True)]
    assert rule.step.grad.item() == pytest.approx(sum(slopes) / math.sqrt(5 * 15))
    weight = LearnedStepSize(bits=4)
    weight(nn.Parameter(x.float()))
    assert weight(x).amin is None, "a weight is signed, whatever it begins with"


def test_only_training_begins_it_and_only_once():
    rule = LearnedStepSize().eval()
    assert rule(torch.ones(3)).amax == 0
    rule.train()
    rule(torch.zeros(3)), rule(torch.full((3,), math.inf)), rule(torch.empty(0))
    assert rule.first == 0, "nothing to be learned from these"
    rule(-torch.ones(3))
    rule(torch.full((3,), 9.0))
    assert rule.step.item() == rule.first.item() == pytest.approx(2 / math.sqrt(127))


def test_no_step_falls_through_zero_and_it_can_come_back():
    rule = LearnedStepSize(bits=4)
    x = torch.randn(4, 8)
    rule(x)
    rule.step.data.fill_(-1.0)
    assert rule(x).amax.item() == pytest.approx(rule.first.item() / 256 * 7)
    (rule.rounded(x) - x).square().sum().backward()
    assert rule.step.grad < 0, "a wider step would do better"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**16), bits_of, st.booleans())
def test_what_it_computes_is_what_its_codes_say(seed, bits, positive):
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(seed))
    x = x.abs() if positive else x
    rule = LearnedStepSize(bits=bits)
    y, bounds = rule.rounded(x).detach(), rule(x)
    assert torch.equal(encode(x, bounds.amax, bits, amin=bounds.amin).decoded(), y)
    assert torch.equal(rule.eval().rounded(x), y)


def test_a_transformed_model_trains_its_steps_and_freezes_without_them():
    torch.manual_seed(0)
    net = transform(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), 4, 4, "lsq", "lsq")
    x, wanted = torch.randn(64, 8), torch.randn(64, 2)
    net(x)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    before = {name: value.item() for name, value in net.named_parameters() if name.endswith("step")}
    first = None
    for _ in range(50):
        loss = nn.functional.mse_loss(net(x), wanted)
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len(before) == 4
    assert all(dict(net.named_parameters())[name].item() != value for name, value in before.items())
    assert loss.item() < first
    expected = net.eval()(x)
    assert torch.equal(freeze(net)(x), expected)
    assert torch.equal(to_int8(net)(x), expected)


def test_a_layer_may_be_called_twice_before_the_way_back():
    net = transform(nn.Sequential(nn.Linear(4, 4)), 4, 4, "lsq", "lsq")
    net(net(torch.randn(2, 4))).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_an_axis_is_refused():
    with pytest.raises(CompressionError, match="one step for the whole tensor"):
        LearnedStepSize(axis=0)
