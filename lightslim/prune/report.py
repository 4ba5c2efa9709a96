"""What a cut did, as plain records and as a table for people."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightslim.graph import Graph, Kept, kept_sizes
from lightslim.prune.couplings import dims_by_layer, named_groups
from lightslim.tables import table


@dataclass(frozen=True)
class PruneReport:
    """The outcome of one cut.

    Attributes:
        flops: of one sample in a fit, of the example inputs otherwise, before and after (2 per multiply-add).
        params: trainable and frozen parameters, before and after.
        units: group name to units before and after.
        layers: layer name to its FLOPs before and after.
        ratio: the common ratio behind the widths.
        target_ratio: the share of FLOPs that was asked for.
        frozen: what could not lose units: (first tensor, units, reason).
        unused: trainable parameters that neither step uses.
        chosen: where layers differ, the share of units that goes, by the parameter that stands for its group.
        coupled: group name to its layers, and the dimensions of their weights that hold its units.
    """

    flops: tuple[int, int]
    params: tuple[int, int]
    units: dict[str, tuple[int, int]]
    layers: dict[str, tuple[int, int]]
    ratio: float
    target_ratio: float
    frozen: tuple[tuple[str, int, str], ...]
    unused: tuple[str, ...] = ()
    chosen: Mapping[str, float] = field(default_factory=dict)
    coupled: Mapping[str, Mapping[str, Sequence[int]]] = field(default_factory=dict)

    @property
    def flops_removed(self) -> float:
        """The share of FLOPs that is gone."""
        return 1 - self.flops[1] / self.flops[0] if self.flops[0] else 0.0

    def to_record(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers, as a strategy's history and a checkpoint hold them."""
        return {
            "flops": list(self.flops),
            "params": list(self.params),
            "flops_removed": self.flops_removed,
            "target_ratio": self.target_ratio,
            "ratio": self.ratio,
            "units": {name: list(pair) for name, pair in self.units.items()},
            "layers": {name: list(pair) for name, pair in self.layers.items()},
            "frozen": [list(item) for item in self.frozen],
            "coupled": {name: {layer: list(dims) for layer, dims in by.items()} for name, by in self.coupled.items()},
        }

    @property
    def summary(self) -> str:
        """One line for people."""
        return (
            f"FLOPs {self.flops[0]:,} -> {self.flops[1]:,} (-{self.flops_removed:.1%}), "
            f"parameters {self.params[0]:,} -> {self.params[1]:,}"
        )

    def __str__(self) -> str:
        names = dict.fromkeys([*self.layers, *self.units])
        rows = [
            (name, *_cells(self.units.get(name)), *_cells(self.layers.get(name)), self._share(name)) for name in names
        ]
        heads = ("layer", "units", "kept", "FLOPs", "after", "share")
        return "\n".join([self.summary, table(heads, rows), *self._stuck()])

    def _share(self, name: str) -> str:
        """A layer's part of all FLOPs before the cut."""
        return f"{self.layers[name][0] / self.flops[0]:.1%}" if name in self.layers and self.flops[0] else ""

    def _stuck(self) -> list[str]:
        reasons = Counter(reason for _, _, reason in self.frozen)
        first = {reason: name for name, _, reason in reversed(self.frozen)}
        return [f"not cut: {first[reason]}{_others(count)}: {reason}" for reason, count in reasons.items()]


def _cells(pair: tuple[int, int] | None) -> tuple[str, str]:
    return (f"{pair[0]:,}", f"{pair[1]:,}") if pair else ("", "")


def _others(count: int) -> str:
    return f" and {count - 1} more" if count > 1 else ""


def layers_report(graph: Graph, kept: Kept) -> dict[str, tuple[int, int]]:
    """FLOPs before and after by layer."""
    after = graph.flops_by_layer(kept_sizes(kept))
    return {name: (flops, after[name]) for name, flops in graph.flops_by_layer().items()}


def units_report(graph: Graph, kept: Kept) -> dict[str, tuple[int, int]]:
    """Units before and after for each group that takes part, by group name."""
    sizes = kept_sizes(kept)
    return {name: (g.size, sizes[g.axis]) for name, g in named_groups(graph).items() if g.axis in sizes}


def coupled_report(graph: Graph, kept: Kept) -> dict[str, dict[str, list[int]]]:
    """The layers of each group that takes part."""
    return {name: dims_by_layer(group) for name, group in named_groups(graph).items() if group.axis in kept}


def frozen_report(graph: Graph) -> tuple[tuple[str, int, str], ...]:
    """What cannot lose units, and why."""
    frozen = [(group.tensors[0], group.size, group.reason) for group in graph.frozen]
    return (*frozen, *((name, 0, "no step uses it") for name in graph.unreached))
