"""How far the units of a layer stay apart: up to the first operation that mixes them, masked ones need no computing."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightslim.graph import Axis, Graph, Group, Made, leaves
from lightslim.prune.prefix import Birth, Prefix
from lightslim.prune.sources import equal
from lightslim.surgery import Cut

# Each unit by itself, or weighed: no number in their arguments can stem from how many units there are
UNIT_BY_UNIT = frozenset(
    """
    convolution mkldnn_convolution cudnn_convolution native_batch_norm cudnn_batch_norm empty addmm mm t view
    _unsafe_view clone detach alias mean relu hardtanh hardswish hardsigmoid silu gelu sigmoid tanh leaky_relu elu
    max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d
    """.split()  # noqa: SIM905
)
OF_TWO = frozenset({"add", "sub", "mul", "div"})
Batch = tuple[int, int]
"""The indices of a loader and of a batch of it."""
_POSITION_OF_INPUT = {"addmm": 1}


@dataclass(frozen=True)
class Chain:
    """A step up to where the units of a group are first mixed.

    Attributes:
        ops: its operations that return tensors.
        touching: the positions of those that handle the units.
        dims: by operation and output, the dimension that the units are.
        slot: a parameter, and the dimension of it that the units are.
    """

    ops: tuple[str, ...]
    touching: frozenset[int]
    dims: Mapping[Birth, int]
    slot: tuple[str, int]

    def gone(self, cut: Cut) -> set[int]:
        """The units that ``cut`` masks; a small share of few units may be none."""
        gone = (set(range(item.size)) - set(item.kept) for item in cut.slices if (item.tensor, item.dim) == self.slot)
        return next(gone, set())


def chains(graph: Graph, groups: Mapping[str, Group]) -> dict[str, Chain]:
    """The chain of each group that has one, by its name."""
    run, where = graph.traces[False], _places(graph.traces[False])
    found = {name: _chain(run, group, where.get(group.axis, [])) for name, group in groups.items()}
    return {name: chain for name, chain in found.items() if chain is not None}


def _places(run: Iterable[Made]) -> dict[Axis, list[int]]:
    """The operations that handle each leaf."""
    places: dict[Axis, list[int]] = {}
    for i, made in enumerate(run):
        for leaf in {leaf for axis in made.touched for leaf in leaves(axis)}:
            places.setdefault(leaf, []).append(i)
    return places


def _chain(run: Sequence[Made], group: Group, places: Iterable[int]) -> Chain | None:
    touching: list[int] = []
    dims: dict[Birth, int] = {}
    for i in places:
        if not _keeps_apart(run[i], group.axis):
            break
        touching.append(i)
        dims |= {(i, k): found[0] for k, axes in enumerate(run[i].outputs) if (found := _dims(axes, group.axis))}
    slot = next(((s.tensor, s.dim) for s in group.weights if leaves(s.axis) == [group.axis]), None)
    if not touching or slot is None:
        return None
    return Chain(tuple(made.op for made in run[: touching[-1] + 1]), frozenset(touching), dims, slot)


def _keeps_apart(made: Made, leaf: Axis) -> bool:
    """Whether an operation makes each unit of its result of the same unit of what it gets, and of nothing else."""
    op, tensors = made.op.rstrip("_"), (*made.inputs, *made.outputs)
    plain = all(leaves(axis) == [leaf] for axes in tensors for axis in axes if leaf in leaves(axis))
    once = all(len(_dims(axes, leaf)) < 2 for axes in tensors)
    if op not in UNIT_BY_UNIT | OF_TWO or not plain or not once or not _dims(made.outputs[0], leaf):
        return False
    if "convolution" in op or op in ("mm", "addmm"):
        given = made.inputs[_POSITION_OF_INPUT.get(op, 0)]
        depthwise = "convolution" in op and made.inputs[1][1].size == 1
        return depthwise or not _dims(given, leaf)
    return True


def _dims(axes: Sequence[Axis], leaf: Axis) -> list[int]:
    return [dim for dim, axis in enumerate(axes) if leaf in leaves(axis)]


@dataclass(frozen=True)
class Constants:
    """What masked units are at the end of their chain: of zero weights, so the same everywhere and for every batch.

    Provided that the step computes with finite numbers: zero times infinity is not zero.

    Attributes:
        chain: where they were made.
        values: by operation and output, one number per unit.
    """

    chain: Chain
    values: Mapping[Birth, Tensor]

    @classmethod
    def found(cls, chain: Chain, cut: Cut, prefix: Prefix) -> "Constants | None":
        """Those in ``prefix``, noted while ``cut`` was masked; None if some unit is not the same everywhere."""
        gone, values = chain.gone(cut), {}
        for number in prefix.units:
            birth, blank = prefix.births[number]
            rows = blank.over(prefix.contents[number]).movedim(chain.dims[birth], 0)
            if not rows.numel():
                return None
            rows = rows.reshape(len(rows), -1)
            masked = rows[sorted(gone)]
            if not equal(masked, masked[:, :1].expand_as(masked).contiguous()):
                return None
            values[birth] = rows[:, 0].clone()
        return cls(chain, values)

    def cover(self, prefix: Prefix) -> bool:
        """Whether all that holds units at the end of ``prefix`` is known."""
        return all(prefix.births[number][0] in self.values for number in prefix.units)

    def put(self, prefix: Prefix, units: Sequence[int]) -> None:
        """Give these units their values in ``prefix``."""
        for number in prefix.units:
            birth, blank = prefix.births[number]
            dim, content = self.chain.dims[birth], blank.over(prefix.contents[number])
            at = torch.tensor(units, dtype=torch.int64, device=content.device)
            values = self.values[birth][at].reshape([-1 if d == dim else 1 for d in range(content.ndim)])
            shape = [len(units) if d == dim else size for d, size in enumerate(content.shape)]
            content.index_copy_(dim, at, values.expand(shape))


class Masked:
    """The beginnings of steps under one mask after another.

    Args:
        prefixes: the beginnings without a mask, by batch.
        constants: what masked units hold at their ends; None if no unit is handled in them.

    Attributes:
        prefixes: the same under the mask.
    """

    def __init__(self, prefixes: Mapping[Batch, Prefix], constants: Constants | None) -> None:
        self._plain, self._constants = prefixes, constants
        self._gone: set[int] | None = None
        self.prefixes = prefixes

    def mask(self, cut: Cut) -> None:
        """Change to another mask; what stays masked is not touched, so that larger ones had better come later."""
        if self._constants is None:
            return
        gone = self._constants.chain.gone(cut)
        if self._gone is None or not self._gone <= gone:
            self.prefixes = {}  # its copies go before new ones come
            self.prefixes, self._gone = {batch: prefix.copy() for batch, prefix in self._plain.items()}, set()
        for prefix in self.prefixes.values():
            self._constants.put(prefix, sorted(gone - self._gone))
        self._gone = gone
