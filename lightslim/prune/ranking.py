"""Global ranking: one bar for the units of all groups, instead of one ratio for all groups."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from lightslim.graph import Axis, Graph, Group
from lightslim.prune.widths import Rounding, Solution, Widths


def global_widths(
    graph: Graph, groups: Sequence[Group], scores: Mapping[Axis, Tensor], target: float, rounding: Rounding
) -> Solution:
    """How many units each group keeps when all units below one bar go, the bar set by bisection to the FLOPs target.

    Scores are divided by their group's mean, since the sums behind them run over weights of different number and scale.

    Args:
        graph: the recording that predicts FLOPs.
        groups: those that may lose units.
        scores: by group axis, one per unit.
        target: share of the graph's FLOPs to remove, in (0, 1).
        rounding: the widths allowed.
    """
    whole = graph.flops() or 1
    relative = {axis: score / score.mean().clamp_min(1e-30) for axis, score in scores.items()}

    def at(bar: float) -> Widths:
        return {group.axis: _allowed(group, int((relative[group.axis] >= bar).sum()), rounding) for group in groups}

    def removed(bar: float) -> float:
        return 1 - graph.flops(at(bar)) / whole

    low, high = 0.0, max((float(score.max()) for score in relative.values()), default=0.0) + 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if removed(middle) < target else (low, middle)
    bar = min((low, high), key=lambda b: abs(removed(b) - target))
    widths = at(bar)
    gone = 1 - sum(widths.values()) / max(sum(group.size for group in groups), 1)
    return Solution(widths, gone, removed(bar))


def _allowed(group: Group, count: int, rounding: Rounding) -> int:
    return rounding.nearest(group.size, 1 - count / group.size)
