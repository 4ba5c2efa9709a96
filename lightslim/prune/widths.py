"""How many units each group keeps so that the whole model reaches a FLOPs target."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

from lightslim.errors import CompressionError
from lightslim.graph import Axis, Graph, Group

TOLERANCE = 0.01
MANY = 64  # moves of which every pair is still tried
Widths = dict[Axis, int]


@dataclass(frozen=True)
class Rounding:
    """Which widths a group may take.

    Runtimes work in blocks: a layer of 45 channels can be slower than one of 48. Small layers gain nothing from it.

    Args:
        round_to: groups of ``4 * round_to`` units or more keep a multiple of it.
        min_units: no group keeps fewer units than this.

    Raises:
        CompressionError: either is less than 1.

    Example:
        >>> rounding = Rounding(round_to=8, min_units=2)
        >>> rounding.nearest(64, 0.3), rounding.nearest(10, 0.5), rounding.nearest(10, 0.99)
        (48, 5, 2)
    """

    round_to: int = 8
    min_units: int = 1

    def __post_init__(self) -> None:
        for name in ("round_to", "min_units"):
            if getattr(self, name) < 1:
                raise CompressionError(f"{name} is {getattr(self, name)}; it must be 1 or more")

    def step(self, size: int) -> int:
        """The distance between two allowed widths of a group of ``size`` units."""
        return self.round_to if size >= 4 * self.round_to else 1

    def nearest(self, size: int, ratio: float) -> int:
        """The allowed width nearest to keeping a share of ``1 - ratio`` of ``size`` units."""
        step = self.step(size)
        return self.clip(size, round(size * (1 - ratio) / step) * step)

    def allowed(self, size: int) -> list[int]:
        """Every width that a group of ``size`` units may have."""
        step = self.step(size)
        return sorted({self.clip(size, width) for width in (*range(step, size, step), size)})

    def clip(self, size: int, width: int) -> int:
        """``width`` within what a group of ``size`` units may keep."""
        return min(size, max(width, self.step(size), self.min_units))


@dataclass(frozen=True)
class Solution:
    """Widths by group axis, the common ratio behind them, and the share of FLOPs that they remove."""

    widths: Widths
    ratio: float
    share: float


def uniform_widths(graph: Graph, groups: Sequence[Group], target: float, rounding: Rounding) -> Solution:
    """One common ratio for all ``groups``, found by bisection, that removes a share ``target`` of the FLOPs.

    Rounding makes the reachable shares coarse, so groups may then move by a step (or an eighth of their units; by more
    if that is not enough) as long as that brings the total nearer to the target. The nearest solution found is
    returned, whether or not it hits.

    Args:
        graph: the recording that predicts FLOPs.
        groups: those that may lose units.
        target: share of the graph's FLOPs to remove, in (0, 1).
        rounding: the widths allowed.
    """
    whole = graph.flops() or 1

    def removed(widths: Mapping[Axis, int]) -> float:
        return 1 - graph.flops(widths) / whole

    def at(ratio: float) -> Widths:
        return {group.axis: rounding.nearest(group.size, ratio) for group in groups}

    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if removed(at(middle)) < target else (low, middle)
    ratio = min((low, high), key=lambda r: abs(removed(at(r)) - target))
    widths = start = at(ratio)
    for reach in (1, 2, 4, 8):  # as near to one common ratio as the target allows
        widths = _settle(widths, start, groups, target, rounding, reach, removed)
        if abs(removed(widths) - target) <= TOLERANCE:
            break
    else:
        widths = _of_all(widths, start, groups, target, rounding, removed)
    return Solution(widths, ratio, removed(widths))


def _settle(
    widths: Widths,
    start: Widths,
    groups: Sequence[Group],
    target: float,
    rounding: Rounding,
    reach: int,
    removed: Callable[[Widths], float],
) -> Widths:
    """Move single groups by one step, or two at once, the most helpful first, until nothing brings the total nearer."""
    error = abs(removed(widths) - target)
    while error > TOLERANCE / 4:
        moves = [move for group in groups for move in _moves(group, widths, start, rounding, reach)]
        best, move = _nearest_move(widths, moves, target, removed)
        if best >= error and error > TOLERANCE and len(moves) <= MANY:
            best, move = _nearest_move(widths, [a | b for a, b in combinations(moves, 2)], target, removed)
        if best >= error:
            break
        widths, error = widths | move, best
    return widths


def _of_all(
    widths: Widths,
    start: Widths,
    groups: Sequence[Group],
    target: float,
    rounding: Rounding,
    removed: Callable[[Widths], float],
) -> Widths:
    """Where there are few combinations of widths, look at all: the most uniform that hits, else the nearest."""
    choices = [rounding.allowed(group.size) for group in groups]
    if math.prod(map(len, choices)) > MANY**2:
        return widths

    def rank(candidate: Widths) -> tuple[float, float]:
        error = abs(removed(candidate) - target)
        return max(error, TOLERANCE / 2), max(abs(candidate[g.axis] - start[g.axis]) / g.size for g in groups)

    axes = [group.axis for group in groups]
    return min((dict(zip(axes, combination, strict=True)) for combination in product(*choices)), key=rank)


def _nearest_move(
    widths: Widths, moves: Sequence[Widths], target: float, removed: Callable[[Widths], float]
) -> tuple[float, Widths]:
    errors = [abs(removed(widths | move) - target) for move in moves]
    best = min(range(len(moves)), key=errors.__getitem__, default=None)
    return (errors[best], moves[best]) if best is not None else (float("inf"), {})


def _moves(group: Group, widths: Widths, start: Widths, rounding: Rounding, reach: int) -> list[Widths]:
    step = rounding.step(group.size)
    furthest = reach * max(step, group.size // 8)
    near = {rounding.clip(group.size, widths[group.axis] + delta) for delta in (-step, step)}
    return [
        {group.axis: width}
        for width in sorted(near)
        if width != widths[group.axis] and abs(width - start[group.axis]) <= furthest
    ]
