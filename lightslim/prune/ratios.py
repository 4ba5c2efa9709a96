"""From curves of loss to how much each layer loses: one common level of loss, as deep as the target asks."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lightslim.errors import CompressionError

Shares = dict[str, float]
_HALVINGS = 60


@dataclass(frozen=True)
class Curve:
    """How much the metric loses when a share of a layer's units is gone: straight between the points measured.

    It starts at (0, 0) and never falls: where the loss was less than before, it stays what it was.

    Args:
        shares: of units gone, ascending, in (0, 1).
        losses: at these shares; NaN counts as worse than anything.
        most: the largest share that may go.

    Example:
        >>> curve = Curve((0.2, 0.4, 0.6), (0.1, 0.05, 0.3))
        >>> curve.at(0.2), round(curve.at(0.5), 3)
        (0.1, 0.2)
        >>> curve.share(0.1), round(curve.share(0.2), 3), curve.share(9)
        (0.4, 0.5, 0.6)
    """

    shares: Sequence[float]
    losses: Sequence[float]
    most: float = 1.0

    @property
    def highest(self) -> float:
        """The largest share that may go: no more than was measured and is allowed."""
        return min(max(self.shares, default=0.0), self.most)

    @property
    def points(self) -> list[tuple[float, float]]:
        """(share, loss), from (0, 0) on; neither ever falls."""
        worst = math.inf
        losses = itertools.accumulate((worst if math.isnan(loss) else loss for loss in self.losses), max, initial=0.0)
        return list(zip((0.0, *self.shares), losses, strict=True))

    def at(self, share: float) -> float:
        """The loss when ``share`` of the units is gone; beyond the last point that of the last point."""
        for (x0, y0), (x1, y1) in itertools.pairwise(self.points):
            if share < x1:
                return y0 if y1 == y0 or share <= x0 else y0 + (y1 - y0) * (share - x0) / (x1 - x0)
        return self.points[-1][1]

    def share(self, level: float) -> float:
        """The largest share whose loss is ``level`` or less, at most :attr:`highest`; 0 below 0."""
        found = 0.0
        for (x0, y0), (x1, y1) in itertools.pairwise(self.points):
            if level >= y1:
                found = x1
            elif level >= y0:
                found = x0 + (x1 - x0) * (level - y0) / (y1 - y0)
        return min(found, self.highest)


def common_level(
    curves: Mapping[str, Curve], removed: Callable[[Shares], float], target: float
) -> tuple[Shares, float]:
    """The shares at which all layers lose the same, and ``target`` of the FLOPs is gone, both by bisection.

    Where a curve is flat its share jumps with the level; within the jump all shares move together.

    Args:
        curves: layer to its curve.
        removed: from shares to the part of the FLOPs they remove; never falls when no share does.
        target: the part to remove.

    Returns:
        The shares, all of them as large as can be if even those remove less than ``target``, and the level of loss.

    Example:
        >>> curves = {"a": Curve((0.5,), (0.1,)), "b": Curve((0.5,), (0.4,))}
        >>> shares, level = common_level(curves, lambda shares: sum(shares.values()) / 2, 0.3)
        >>> {name: round(share, 3) for name, share in shares.items()}, round(level, 3)
        ({'a': 0.48, 'b': 0.12}, 0.096)
    """

    def at(level: float) -> Shares:
        return {name: curve.share(level) for name, curve in curves.items()}

    levels = [y for curve in curves.values() for _, y in curve.points if math.isfinite(y)]
    low, high = -1.0, max(levels, default=0.0)
    if removed(at(high)) <= target:
        return at(high), high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if removed(at(middle)) <= target else (low, middle)
    below, above = at(low), at(high)

    def between(part: float) -> Shares:
        return {name: below[name] + part * (above[name] - below[name]) for name in curves}

    first, last = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (first + last) / 2
        first, last = (middle, last) if removed(between(middle)) <= target else (first, middle)
    nearest = min((first, last), key=lambda part: abs(removed(between(part)) - target))
    return between(nearest), max(high, 0.0)


def step_target(target: float, num_steps: int) -> float:
    """What each of ``num_steps`` equal steps removes of what is left then, so that all together remove ``target``.

    Source: the seed; ``1 - (1 - target)^(1 / num_steps)``.

    Example:
        >>> round(step_target(0.5, 2), 4), step_target(0.5, 1)
        (0.2929, 0.5)
    """
    return float(1 - (1 - target) ** (1 / num_steps))


def measured_ratios(delta_rate: float) -> tuple[float, ...]:
    """``delta_rate``, twice, three times ... below 1, to two digits.

    Raises:
        CompressionError: ``delta_rate`` does not lie between 0 and 1, or is less than 0.01.

    Example:
        >>> measured_ratios(0.2), measured_ratios(0.3)
        ((0.2, 0.4, 0.6, 0.8), (0.3, 0.6, 0.9))
    """
    if not 0.01 <= delta_rate < 1:
        raise CompressionError(f"delta_rate is {delta_rate}; it is the step between shares: at least 0.01, less than 1")
    found = (round(delta_rate * i, 2) for i in itertools.count(1))
    return tuple(itertools.takewhile(lambda ratio: ratio < 1, found))
