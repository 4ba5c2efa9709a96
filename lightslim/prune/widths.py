"""How many units each group keeps so that the whole model reaches a FLOPs target."""

import math
from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product

from lightslim.errors import CompressionError
from lightslim.graph import Axis, Graph, Group, leaves

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
    """Widths by group axis, what they have in common, and the share of FLOPs that they remove.

    Attributes:
        widths: units to keep.
        ratio: the common ratio, or the common level of loss, behind them.
        share: of FLOPs.
        shares: of units that go, by name, where they differ.
    """

    widths: Widths
    ratio: float
    share: float
    shares: Mapping[str, float] = field(default_factory=dict)


def uniform_widths(graph: Graph, groups: Sequence[Group], target: float, rounding: Rounding) -> Solution:
    """One common ratio for all ``groups``, found by bisection, that removes a share ``target`` of the FLOPs.

    Rounding makes the reachable shares coarse, so groups may then move by a step, see :func:`settle`. The nearest
    solution found is returned, whether or not it hits.

    Args:
        graph: the recording that predicts FLOPs.
        groups: those that may lose units.
        target: share of the graph's FLOPs to remove, in (0, 1).
        rounding: the widths allowed.
    """
    removed = Removal(graph)

    def at(ratio: float) -> Widths:
        return {group.axis: rounding.nearest(group.size, ratio) for group in groups}

    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if removed(at(middle)) < target else (low, middle)
    ratio = min((low, high), key=lambda r: abs(removed(at(r)) - target))
    widths = settle(at(ratio), groups, target, rounding, removed)
    return Solution(widths, ratio, removed(widths))


class Removal:
    """From widths to the share of a graph's FLOPs that they remove.

    A search asks for many widths that hardly differ, so only what has changed since the last ones is counted anew, and
    of a move only what it touches.

    Args:
        graph: the recording that predicts FLOPs.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._left = [graph.flops_of(item, {}) for item in graph.work]
        self._touched: dict[Axis, set[int]] = {}
        for index, item in enumerate(graph.work):
            for leaf in (leaf for axis in item.axes for leaf in leaves(axis)):
                self._touched.setdefault(leaf, set()).add(index)
        self._last: Widths = {}
        self._total = sum(self._left)
        self._whole = self._total or 1

    def __call__(self, widths: Widths) -> float:
        """The share that ``widths`` remove."""
        for index in self._work_of(axis for axis, _ in widths.items() ^ self._last.items()):
            self._total -= self._left[index]
            self._left[index] = self._graph.flops_of(self._graph.work[index], widths)
            self._total += self._left[index]
        self._last = dict(widths)
        return 1 - self._total / self._whole

    def moved(self, move: Widths) -> float:
        """The share that the last widths remove once ``move`` has changed some of them."""
        widths = ChainMap(move, self._last)
        work = self._work_of(move)
        more = sum(self._graph.flops_of(self._graph.work[index], widths) - self._left[index] for index in work)
        return 1 - (self._total + more) / self._whole

    def _work_of(self, axes: Iterable[Axis]) -> set[int]:
        return set[int]().union(*(self._touched.get(axis, ()) for axis in axes))


def settle(
    start: Widths,
    groups: Sequence[Group],
    target: float,
    rounding: Rounding,
    removed: Removal,
    floors: Mapping[Axis, int] | None = None,
) -> Widths:
    """Bring widths nearer to the target while they stay as near to ``start`` as that allows.

    Single groups move by a step or an eighth of their units; by more if that is not enough.

    Args:
        start: the widths to begin with.
        groups: those that may move.
        target: share of FLOPs to remove.
        rounding: the widths allowed.
        removed: from widths to the share that they remove.
        floors: widths below which single groups must not fall.
    """
    search = _Search(start, groups, target, rounding, removed, floors or {})
    widths = start
    for reach in (1, 2, 4, 8):
        widths = search.settle(widths, reach)
        if search.error(widths) <= TOLERANCE:
            return widths
    return search.among_all(widths)


@dataclass(frozen=True)
class _Search:
    """What a search for widths is about; see :func:`settle`."""

    start: Widths
    groups: Sequence[Group]
    target: float
    rounding: Rounding
    removed: Removal
    floors: Mapping[Axis, int]

    def error(self, widths: Widths) -> float:
        return abs(self.removed(widths) - self.target)

    def settle(self, widths: Widths, reach: int) -> Widths:
        """Move single groups by one step, or two at once, the most helpful first, until nothing helps."""
        error = self.error(widths)
        while error > TOLERANCE / 4:
            moves = [move for group in self.groups for move in self._moves(group, widths, reach)]
            best, move = self._nearest(widths, moves)
            if best >= error and error > TOLERANCE and len(moves) <= MANY:
                best, move = self._nearest(widths, [a | b for a, b in combinations(moves, 2)])
            if best >= error:
                break
            widths, error = widths | move, best
        return widths

    def among_all(self, widths: Widths) -> Widths:
        """Where there are few combinations, look at all: the nearest to the start that hits, else the nearest."""
        choices = [
            [width for width in self.rounding.allowed(group.size) if width >= self.floors.get(group.axis, 0)]
            for group in self.groups
        ]
        if math.prod(map(len, choices)) > MANY**2:
            return widths

        def rank(candidate: Widths) -> tuple[float, float]:
            moved = max(abs(candidate[g.axis] - self.start[g.axis]) / g.size for g in self.groups)
            return max(self.error(candidate), TOLERANCE / 2), moved

        axes = [group.axis for group in self.groups]
        return min((dict(zip(axes, combination, strict=True)) for combination in product(*choices)), key=rank)

    def _nearest(self, widths: Widths, moves: Sequence[Widths]) -> tuple[float, Widths]:
        self.removed(widths)
        errors = [abs(self.removed.moved(move) - self.target) for move in moves]
        best = min(range(len(moves)), key=errors.__getitem__, default=None)
        return (errors[best], moves[best]) if best is not None else (float("inf"), {})

    def _moves(self, group: Group, widths: Widths, reach: int) -> list[Widths]:
        step = self.rounding.step(group.size)
        furthest, now = reach * max(step, group.size // 8), widths[group.axis]
        near = {self.rounding.clip(group.size, now + delta) for delta in (-step, step)} - {now}
        return [
            {group.axis: width}
            for width in sorted(near)
            if abs(width - self.start[group.axis]) <= furthest and width >= self.floors.get(group.axis, 0)
        ]
