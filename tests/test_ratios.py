"""From curves of loss to shares: monotone, and the target is met where it can be."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightslim import CompressionError
from lightslim.prune.ratios import Curve, common_level, measured_ratios, step_target

losses = st.floats(-0.5, 1.0).map(lambda x: round(x, 3))
shares = st.lists(st.integers(1, 99), min_size=1, max_size=6, unique=True).map(lambda xs: sorted(x / 100 for x in xs))
curves = shares.flatmap(
    lambda xs: st.builds(
        Curve, st.just(tuple(xs)), st.tuples(*[losses] * len(xs)), st.floats(0.05, 1.0).map(lambda x: round(x, 2))
    )
)


@given(curves, st.floats(-1, 2), st.floats(-1, 2))
def test_a_share_never_falls_as_the_level_rises(curve, one, other):
    low, high = sorted((one, other))
    assert 0 <= curve.share(low) <= curve.share(high) <= curve.highest <= min(curve.most, max(curve.shares))
    assert curve.share(-1e-9) == 0


@given(curves, st.floats(0, 1), st.floats(0, 1))
def test_a_loss_never_falls_as_the_share_rises(curve, one, other):
    low, high = sorted((one, other))
    assert 0 <= curve.at(low) <= curve.at(high)


@given(curves)
def test_points_measured_lie_on_the_curve_unless_an_earlier_one_was_worse(curve):
    worst = 0.0
    for share, loss in zip(curve.shares, curve.losses, strict=True):
        worst = max(worst, loss)
        assert curve.at(share) == worst
        assert Curve(curve.shares, curve.losses).share(worst) >= share


@given(curves, st.floats(0, 1))
def test_a_share_costs_no_more_than_the_level_and_more_of_it_would(curve, level):
    share = curve.share(level)
    assert curve.at(share) <= level + 1e-9
    if share < curve.highest - 1e-6:
        assert curve.at(share + 1e-6) >= level - 1e-9


@given(st.dictionaries(st.sampled_from("abcdefgh"), curves, min_size=1), st.data())
def test_the_target_is_hit_wherever_it_can_be(layers, data):
    weights = {name: data.draw(st.floats(0.1, 5.0)) for name in layers}
    total = sum(weights.values())

    def removed(found):
        return sum(weights[name] * share for name, share in found.items()) / total

    target = data.draw(st.floats(0.01, 0.99))
    most = {name: curve.highest for name, curve in layers.items()}
    found, level = common_level(layers, removed, target)
    assert all(0 <= share <= most[name] for name, share in found.items())
    assert removed(found) == pytest.approx(min(target, removed(most)), abs=1e-6)
    for name, curve in layers.items():
        assert curve.at(found[name]) <= level + 1e-6, "no layer loses more than the common level"


@given(st.dictionaries(st.sampled_from("abcd"), curves, min_size=1), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_a_larger_target_takes_no_less_of_any_layer(layers, one, other):
    few, many = (
        common_level(layers, lambda found: sum(found.values()) / len(layers), t)[0] for t in sorted((one, other))
    )
    assert all(few[name] <= many[name] + 1e-6 for name in layers)


def test_what_is_not_a_number_is_worse_than_anything():
    curve = Curve((0.2, 0.4, 0.6), (0.1, math.nan, 0.05))
    assert curve.share(100.0) == pytest.approx(0.2)
    assert curve.at(0.6) == math.inf
    assert common_level({"a": curve}, lambda found: found["a"], 0.5)[0]["a"] == pytest.approx(0.2)


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_equal_steps_make_the_whole(steps):
    left = 1.0
    for _ in range(steps):
        left *= 1 - step_target(0.5, steps)
    assert left == pytest.approx(0.5)


@pytest.mark.parametrize("rate", [0.01, 0.07, 0.1, 0.2, 0.25, 0.3, 0.5, 0.99])
def test_ratios_measured_ascend_in_equal_steps_below_one(rate):
    found = measured_ratios(rate)
    assert found[0] == rate
    assert all(b - a > 0.005 for a, b in itertools.pairwise(found))
    assert 1 - rate - 0.01 <= found[-1] < 1


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0, 0.001, math.nan])
def test_a_rate_out_of_bounds_is_refused(rate):
    with pytest.raises(CompressionError, match="delta_rate is"):
        measured_ratios(rate)
