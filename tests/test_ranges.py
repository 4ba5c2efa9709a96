"""Ranges: what they learn, what they ignore, and what calibration chooses."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightslim import CompressionError
from lightslim.kernels import fake_quant
from lightslim.quantize import (
    Bounds,
    Entropy,
    FakeQuantize,
    LeastSquares,
    Max,
    MovingAverageAbsMax,
    MovingAverageMinMax,
    Percentile,
    RangeAbsMax,
    ranges,
)
from lightslim.quantize.bounds import Given
from lightslim.quantize.calibration import BINS
from lightslim.testing import assert_range

LEARNING = [MovingAverageAbsMax, MovingAverageMinMax, RangeAbsMax, Max]
CALIBRATED = [Percentile, LeastSquares, Entropy]
numbers = st.floats(-100, 100, width=32)


@given(st.lists(st.lists(numbers, min_size=1, max_size=5), min_size=1, max_size=12))
def test_a_moving_average_is_the_weighted_mean_of_the_peaks(batches):
    rule, affine = MovingAverageAbsMax(rate=0.8), MovingAverageMinMax(rate=0.8)
    for batch in batches:
        bounds, both = rule(torch.tensor(batch)), affine(torch.tensor(batch))
    weights = [0.8**age for age in reversed(range(len(batches)))]

    def mean(of):
        return sum(w * of(batch) for w, batch in zip(weights, batches, strict=True)) / sum(weights)

    assert bounds.amax.item() == pytest.approx(mean(lambda b: max(map(abs, b))), rel=1e-4, abs=1e-4)
    assert both.amax.item() == pytest.approx(mean(max), rel=1e-4, abs=1e-4)
    assert both.amin.item() == pytest.approx(mean(min), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("kind", LEARNING)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_does_no_lasting_harm(kind, bad):
    rule = kind()
    rule(torch.tensor([2.0, -1.0]))
    rule(torch.tensor([bad, 0.5]))
    rule.eval()
    bounds = rule(torch.tensor([0.0]))
    assert bounds.amax.item() == pytest.approx(2.0)
    assert bounds.amin is None or bounds.amin.item() == pytest.approx(-1.0)


@pytest.mark.parametrize("kind", LEARNING)
def test_an_empty_batch_teaches_nothing(kind):
    rule = kind()
    rule(torch.tensor([2.0]))
    rule(torch.empty(0, 3))
    assert rule(torch.tensor([2.0])).amax.item() == 2.0


@pytest.mark.parametrize("peak", [1.0, 3.0, 8.0])
def test_a_promise_that_nothing_is_clipped_holds(peak):
    rule = MovingAverageAbsMax()
    rule(torch.tensor([3.0]))
    bounds = rule(torch.tensor([peak, -0.5]))
    assert bounds.clips == (peak > bounds.amax.item())


def test_in_range_batches_give_the_gradient_as_it_is_and_others_the_masked_one():
    for peak, expected in ((1.0, [1.0, 1.0]), (8.0, [0.0, 1.0])):
        rule = MovingAverageAbsMax()
        rule(torch.tensor([3.0]))
        x = torch.tensor([peak, -0.5], requires_grad=True)
        bounds = rule(x)
        fake_quant(x, bounds.amax, clips=bounds.clips).sum().backward()
        assert x.grad.tolist() == expected


def histogram_of(rule, *batches):
    for batch in batches:
        rule.watch(batch)
    return rule.counts, rule.top.item()


@given(st.lists(st.floats(0.01, 50), min_size=1, max_size=6))
def test_a_histogram_grows_without_losing_anything(peaks):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(100, generator=generator) * peak for peak in peaks]
    counts, top = histogram_of(Percentile(), *batches)
    joined = torch.cat(batches)
    assert counts.sum().item() == joined.numel()
    assert top >= joined.max().item()
    expected = torch.histc(joined, BINS, 0, top).double()
    assert (counts.cumsum(0) - expected.cumsum(0)).abs().max() <= 3, "edges may fall to either side"


@pytest.mark.parametrize("kind", CALIBRATED)
def test_calibrated_ranges_learn_from_watching_only(kind):
    rule = kind()
    rule(torch.randn(1000))
    assert rule(torch.zeros(1)).amax.item() == 0.0
    rule.watch(torch.randn(1000))
    chosen = rule(torch.zeros(1)).amax.item()
    assert chosen > 0
    rule.eval().watch(100 * torch.randn(1000))
    assert rule(torch.zeros(1)).amax.item() == chosen


def test_least_squares_is_the_best_of_all_cuts():
    x = torch.cat([torch.randn(50_000, generator=torch.Generator().manual_seed(0)), torch.tensor([30.0])])
    rule = LeastSquares(bits=4)
    rule.watch(x)

    def error(amax):
        return (fake_quant(x, torch.tensor(amax), bits=4) - x).double().square().sum().item()

    best = min(error(30.0 * i / 400) for i in range(1, 401))
    assert error(rule(x).amax.item()) <= 1.02 * best < 0.2 * error(30.0)


@pytest.mark.parametrize("kind", [Entropy, LeastSquares])
def test_outliers_are_cut_off_and_flat_distributions_are_not(kind):
    outlier = torch.cat([torch.randn(200_000, generator=torch.Generator().manual_seed(0)), torch.tensor([100.0])])
    flat = torch.linspace(0, 1, 100_000)
    for x, low, high in ((outlier, 2.5, 60.0), (flat, 0.9, 1.0)):
        rule = kind()
        rule.watch(x)
        assert low <= rule(x).amax.item() <= high


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MovingAverageAbsMax(rate=1.0), "rate is 1.0"),
        (lambda: RangeAbsMax(window_size=0), "window_size is 0"),
        (lambda: RangeAbsMax(axis=0), "one range of the whole tensor"),
        (lambda: Percentile(percentile=0.0), "percentile is 0.0"),
    ],
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(CompressionError, match=message):
        build()


def test_a_delayed_average_rounds_to_what_it_knew_before():
    plain, late = FakeQuantize(MovingAverageAbsMax()), FakeQuantize(MovingAverageAbsMax(delayed=True))
    batches = [torch.randn(64, generator=torch.Generator().manual_seed(i)) * (i + 1) for i in range(4)]
    assert torch.equal(plain(batches[0]), late(batches[0])), "nothing is known before the first"
    for batch in batches[1:]:
        known = late.rule.amax.clone()
        assert torch.equal(late(batch), fake_quant(batch, known))
        plain(batch)
        assert torch.equal(late.rule.amax, plain.rule.amax), "both learn the same"
    again = FakeQuantize(MovingAverageAbsMax(delayed=True))
    again.load_state_dict(late.state_dict())
    assert torch.equal(again(batches[1]), late(batches[1])), "a resumed one goes on where it was"
    x = (3 * late.rule.amax * torch.tensor([1.0, 0.1])).requires_grad_()
    late(x).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("bits", [4, 8, 12])
@pytest.mark.parametrize("count", [2, 5, 16, 17, 256])
@pytest.mark.parametrize("kind", CALIBRATED)
def test_inputs_of_few_values_keep_them(kind, count, bits):
    values = torch.linspace(0, 1, count)[torch.randint(count, (20_000,), generator=torch.Generator().manual_seed(0))]
    rule = kind(bits=bits).train()
    rule.watch(values)
    amax = rule.eval()(values).amax
    few = count <= 2 ** (bits - 1)
    assert amax > (0.9 if few else 0.5), amax


@pytest.mark.parametrize("kind", LEARNING)
def test_a_layer_that_runs_again_rounds_as_it_did_where_numbers_cannot_be_looked_at(kind, monkeypatch):
    monkeypatch.setattr(ranges, "readable", lambda value: False)
    assert_range(kind)


@pytest.mark.parametrize("number", [float, torch.tensor])
def test_what_was_given_is_found_by_what_was_seen(number):
    recent = Given()
    assert recent.find(number(1.0)) is None
    for seen, amax in ((1.0, 10.0), (2.0, 20.0), (1.0, 30.0), (4.0, 40.0)):
        recent.note(number(seen), Bounds(torch.tensor(amax), torch.tensor(-1.0)))
    assert [recent.find(number(seen)).amax.item() for seen in (2.0, 1.0)] == [20.0, 30.0]
    assert recent.find(number(2.0)).amin.item() == -1.0
    copied = copy.deepcopy(recent)
    assert copied.find(number(2.0)) is None
