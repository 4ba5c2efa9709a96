"""Spend a target of FLOPs where the curves of loss say that it costs least."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from typing_extensions import override

from lightslim.graph import Axis, Graph, Group
from lightslim.prune.analysis import parameter_names
from lightslim.prune.ratios import Curve, common_level
from lightslim.prune.uniform import UniformPruning
from lightslim.prune.widths import Removal, Solution, settle


@dataclass(frozen=True)
class SensitivePruning(UniformPruning):
    """Uniform pruning's plan, with widths from curves of loss.

    Args:
        curves: by the parameter that stands for a group; groups without one keep their units.
    """

    curves: Mapping[str, Curve] = field(default_factory=dict)

    @override
    def solve(self, graph: Graph, groups: Sequence[Group], scores: Mapping[Axis, Tensor]) -> Solution:
        named = parameter_names(groups, self.pruner, graph.parameters)
        named = {name: group for name, group in named.items() if name in self.curves}
        removed = Removal(graph)

        def widths(shares: Mapping[str, float]) -> dict[Any, int]:
            return {named[name].axis: self._width(name, named[name], share) for name, share in shares.items()}

        shares, level = common_level(
            {name: self.curves[name] for name in named}, lambda shares: removed(widths(shares)), self.target_ratio
        )
        floors = {group.axis: self._least(name, group) for name, group in named.items()}
        start = {group.axis: group.size for group in groups} | widths(shares)
        found = settle(start, list(named.values()), self.target_ratio, self.rounding, removed, floors)
        gone = {name: 1 - found[group.axis] / group.size for name, group in named.items()}
        return Solution(found, level, removed(found), gone)

    def _width(self, name: str, group: Group, share: float) -> int:
        """The allowed width nearest to losing ``share`` of the units."""
        return max(self.rounding.nearest(group.size, share), self._least(name, group))

    def _least(self, name: str, group: Group) -> int:
        """The smallest allowed width that loses no more than was measured and is allowed."""
        least = math.ceil(group.size * (1 - self.curves[name].highest) - 1e-9)
        return min(width for width in self.rounding.allowed(group.size) if width >= least)
