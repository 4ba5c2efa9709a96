"""Units that live or die together: what a recording says can be cut."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from lightslim.graph.axes import Axis, count, leaves, mask, units
from lightslim.graph.record import Recorder, Work
from lightslim.graph.rules import KERNEL
from lightslim.graph.trace import Made
from lightslim.steps import Probe

Kept = Mapping[Axis, Tensor]


@dataclass(frozen=True)
class Slot:
    """One dimension of one parameter or buffer, and the axis it lies along."""

    tensor: str
    dim: int
    axis: Axis


@dataclass(frozen=True, eq=False)
class Group:
    """A set of units that can be removed one by one; removing unit i removes it from every slot.

    Attributes:
        name: the first layer whose weight makes the units.
        axis: the leaf that the units are.
        slots: every dimension of a parameter or buffer that holds the units, possibly beside others.
        weights: the slots in parameters of two or more dimensions.
    """

    name: str
    axis: Axis
    slots: tuple[Slot, ...]
    weights: tuple[Slot, ...]

    @property
    def size(self) -> int:
        """The number of units."""
        return self.axis.size

    def gather(self, slot: Slot, scores: Tensor) -> Tensor:
        """Sum per-position ``scores`` of a slot (1-D, its length) into per-unit scores (1-D, ``size``)."""
        owner = units(slot.axis, self.axis).to(scores.device)
        return scores.new_zeros(self.size).index_add_(0, owner[owner >= 0], scores[owner >= 0])


@dataclass(frozen=True)
class FrozenGroup:
    """Parameter dimensions that cannot lose units, and why."""

    tensors: tuple[str, ...]
    size: int
    reason: str


@dataclass(frozen=True)
class Graph:
    """What one recording of a model says: the groups that can be cut, what cannot and why, and where the FLOPs go.

    Iterating over it yields its groups.

    Attributes:
        groups: in the order in which the model defines their parameters.
        frozen: everything else that some op used.
        slots: every dimension of every parameter and buffer that some op used.
        work: FLOPs by op, of one evaluation step.
        parameters: the names of all parameters.
        untrained: those without gradient, in a model where others have one.
        unreached: parameters that no run used; they are left alone.
        unknown: ops without a rule.
        batch_size: samples in the recorded step.
        traces: what each op made, in order, by mode (False for evaluation, True for training).
        heads: leaves along which products of matrices are independent.
        normalised: leaves over which the model's own code normalises, by a mean or a variance.
        follow: paths of modules whose Python holds sizes that have to change with the axes they equal, and which
            reading of them to take where there are several.
    """

    groups: tuple[Group, ...]
    frozen: tuple[FrozenGroup, ...]
    slots: tuple[Slot, ...]
    work: tuple[Work, ...]
    parameters: tuple[str, ...]
    untrained: frozenset[str]
    unreached: tuple[str, ...]
    unknown: tuple[str, ...]
    batch_size: int
    traces: Mapping[bool, Sequence[Made]]
    heads: frozenset[Axis] = frozenset()
    normalised: frozenset[Axis] = frozenset()
    follow: Mapping[str, int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def flops(self, kept: Mapping[Axis, int] | None = None) -> int:
        """FLOPs per sample (2 per multiply-add) when each leaf keeps ``kept[leaf]`` units."""
        return sum(self.flops_by_layer(kept).values())

    def flops_by_layer(self, kept: Mapping[Axis, int] | None = None) -> dict[str, int]:
        """The same, by the layer whose weight does the work."""
        layers: Counter[str] = Counter()
        for item in self.work:
            layers[item.layer] += self.flops_of(item, kept or {})
        return dict(layers)

    def flops_of(self, item: Work, kept: Mapping[Axis, int]) -> int:
        """The same of one op."""
        share = math.prod(count(axis, kept) / axis.size for axis in item.axes if axis.size)
        return round(item.flops * share / self.batch_size)

    def made_by(self, path: str) -> Sequence[Made]:
        """The ops that the own code of the module at ``path`` ran, of all runs."""
        return self._by_path.get(path, ())

    @cached_property
    def _by_path(self) -> dict[str, list[Made]]:
        paths: dict[str, list[Made]] = {}
        for made in (made for trace in self.traces.values() for made in trace):
            paths.setdefault(made.where, []).append(made)
        return paths

    def without(self, refused: Iterable[Group], reason: str) -> "Graph":
        """The same graph with some groups frozen for ``reason``."""
        refused = list(refused)
        frozen = tuple(FrozenGroup(_tensors(group.slots), group.size, reason) for group in refused)
        groups = tuple(group for group in self.groups if group not in refused)
        return replace(self, groups=groups, frozen=self.frozen + frozen)


def record(probe: Probe) -> Graph:
    """Run one evaluation and one training step of a model, and find the groups of units in it.

    Both are watched since branches differ: an auxiliary head runs only in training, and a cut must fit it too.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightslim.steps import forward_probe
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> graph = record(forward_probe(net, torch.zeros(1, 4)))
        >>> [(group.name, group.size) for group in graph], graph.flops()
        ([('0', 8)], 96)
    """
    book = Recorder(probe.module)
    traces: dict[bool, Sequence[Made]] = {}
    used: set[str] = set()
    for training in (False, True) if probe.train else (False,):
        book.counting = not book.work  # a validation step may do without the model: then training counts
        traces[training] = book.trace = []
        output, _ = probe.run(training, within=book.watching())
        book.protect(output)
        used = used or (set(book.reached) if book.work else set())
    book.settle()
    return _graph(book, probe, traces, used)


def _graph(book: Recorder, probe: Probe, traces: Mapping[bool, Sequence[Made]], used: set[str]) -> Graph:
    reached = [name for name in book.tensors if name in book.reached]
    slots = [Slot(name, dim, axis) for name in reached for dim, axis in enumerate(book.reached[name])]
    by_leaf: dict[Axis, list[Slot]] = {}
    for slot in slots:
        for leaf in dict.fromkeys(leaves(slot.axis)):
            if leaf.size > 1:
                by_leaf.setdefault(leaf, []).append(slot)
    read = {leaf for axis in book.reads for leaf in leaves(axis)}
    parameters = dict(probe.module.named_parameters())
    groups, frozen = [], []
    for leaf, owned in by_leaf.items():
        weights = [slot for slot in owned if slot.tensor in parameters and parameters[slot.tensor].ndim > 1]
        reason = leaf.frozen or _not_units(leaf, weights, read, used)
        if reason is None:
            groups.append(Group(_layer(weights), leaf, tuple(owned), tuple(weights)))
        elif reason != KERNEL:
            frozen.append(FrozenGroup(_tensors(owned), leaf.size, reason))
    return Graph(
        groups=tuple(groups),
        frozen=tuple(frozen),
        slots=tuple(slots),
        work=tuple(book.work),
        parameters=tuple(parameters),
        untrained=_untrained(parameters),
        unreached=tuple(name for name in parameters if name not in book.reached),
        unknown=tuple(sorted(book.unknown)),
        batch_size=probe.batch_size,
        traces=traces,
        heads=frozenset(leaf for axis in book.parallel for leaf in leaves(axis)),
        normalised=frozenset(leaf for axis in book.normalised for leaf in leaves(axis)),
    )


def _not_units(leaf: Axis, weights: list[Slot], read: set[Axis], used: set[str]) -> str | None:
    if not weights:
        return "no weight makes these units"
    if not any(slot.tensor in used for slot in weights):
        return "used in training only: cutting it would save nothing"
    return None if leaf in read else "no later layer reads these units: an output"


def _untrained(parameters: Mapping[str, Tensor]) -> frozenset[str]:
    without = frozenset(name for name, parameter in parameters.items() if not parameter.requires_grad)
    return without if len(without) < len(parameters) else frozenset()


def _layer(weights: list[Slot]) -> str:
    maker = min(weights, key=lambda slot: slot.dim)
    return maker.tensor.rpartition(".")[0] or maker.tensor


def _tensors(slots: Iterable[Slot]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(slot.tensor for slot in slots))


def masks_of(slots: Iterable[Slot], kept: Kept) -> dict[Slot, Tensor]:
    """Which positions of each slot remain (1-D bool); slots that lose nothing are left out."""
    slots = list(slots)
    masks = {
        axis: mask(axis, kept) for axis in {slot.axis for slot in slots} if any(leaf in kept for leaf in leaves(axis))
    }
    cut = {axis: positions for axis, positions in masks.items() if not bool(positions.all())}
    return {slot: cut[slot.axis] for slot in slots if slot.axis in cut}


def kept_sizes(kept: Kept) -> dict[Axis, int]:
    """How many units of each leaf remain."""
    return {leaf: int(positions.sum()) for leaf, positions in kept.items()}
