"""The beginning of a step as it was noted: its operations, and how to answer them without computing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightslim.prune.modules import State
from lightslim.prune.sources import Lasting, Source

VIEW, WRITE, NEW = "view", "write", "new"
Birth = tuple[int, int]
"""Where memory was made: by which of the operations that return tensors, and as which of its tensors."""


@dataclass(frozen=True)
class Blank:
    """How to make an empty tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def like(cls, tensor: Tensor) -> "Blank":
        """The one that makes tensors like this."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    def make(self, poisoned: bool) -> Tensor:
        """The tensor; full of NaN (or of the largest number) if ``poisoned``."""
        tensor = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        if poisoned:
            tensor.fill_(_worst(self.dtype))
        return tensor

    def over(self, storage: torch.UntypedStorage) -> Tensor:
        """A tensor of this shape over memory that exists."""
        tensor = torch.empty(0, dtype=self.dtype, device=self.device)
        return tensor.set_(storage, 0, self.shape, self.stride)

    def copy(self, storage: torch.UntypedStorage) -> Tensor:
        """The same with memory of its own, which is copied only when one of the two is written to."""
        try:
            return self.over(storage)._lazy_clone()
        except (NotImplementedError, RuntimeError):  # a device, or memory, that knows no copy on write
            return self.over(storage.clone())


class Label(NamedTuple):
    """What a tensor is in a step: where it came from, and how it lies in its memory.

    Attributes:
        kind: its class.
        found: whether the step was given it, and did not make it.
        origin: the number of its memory; of what was given, which of those it is.
        shape: its sizes.
        stride: its strides.
        offset: where in the memory it begins.
        dtype: of its numbers.
    """

    kind: type
    found: bool
    origin: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Argument:
    """An argument that is returned, by its position among the leaves."""

    position: int


@dataclass(frozen=True)
class Call:
    """One operation: what it was given and how to answer it without computing."""

    func: Any
    given: tuple[Any, ...]
    kind: str
    answer: tuple[Any, ...]  # by leaf: a Blank, an Argument or a plain value
    form: Any  # None if that is the only leaf

    @cached_property
    def blanks(self) -> list[Blank]:
        """The new tensors."""
        return [item for item in self.answer if isinstance(item, Blank)]

    @property
    def returns_tensors(self) -> bool:
        """Whether it returns any."""
        return self.kind == VIEW or bool(self.answer if self.kind == WRITE else self.blanks)


@dataclass(frozen=True)
class Span:
    """The operations that a call of a module comes to, and what it returns.

    Attributes:
        states: what the module and those in it looked like.
        args: what it was given: a :class:`Label` for each tensor but those that outlive the step, which stand as
            they are.
        kwargs: the same, given by name.
        fresh: what outlives the step and comes up in it for the first time.
        end: how many operations there are when it returns.
        sources: how many sources have come up by then.
        made: how much memory has been made.
        answer: what it returns, by leaf: as of a :class:`Call`.
        numbers: which of the memory that it makes is that of the Blanks.
        form: as of a Call.
    """

    states: Sequence[State]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    fresh: Sequence[Lasting]
    end: int
    sources: int
    made: int
    answer: tuple[Any, ...]
    numbers: Sequence[int]
    form: Any


@dataclass(frozen=True)
class Prefix:
    """The beginning of one step.

    Attributes:
        calls: its operations.
        sources: the tensors that it did not make itself, in the order in which they came; None for a view of one.
        contents: the memory that is alive at its end, by number; a step that writes to it writes to a copy.
        units: which of it holds units that are about to be masked, for which there is a second copy.
        spans: operations that can be answered together, by the position of the first and the id of the module.
    """

    calls: tuple[Call, ...]
    sources: tuple[Source | None, ...]
    contents: Mapping[int, torch.UntypedStorage]
    units: frozenset[int]
    spans: Mapping[tuple[int, int], Span]

    @property
    def bytes(self) -> int:
        """The memory that it holds."""
        held = [*self.contents.values(), *(self.contents[number] for number in self.units)]
        return sum(s.nbytes() for s in held) + sum(s.bytes for s in self.sources if s)

    @property
    def ops(self) -> list[str]:
        """The names of the operations that return tensors."""
        return [name_of(call.func) for call in self.calls if call.returns_tensors]

    @cached_property
    def births(self) -> list[tuple[Birth, Blank]]:
        """Where the memory of each number was made, and how it lies."""
        making = (call for call in self.calls if call.returns_tensors)
        return [((i, k), blank) for i, call in enumerate(making) for k, blank in enumerate(call.blanks)]

    def copy(self) -> "Prefix":
        """The same with memory of its own for the units, which is copied when one of the two is written to."""
        births = self.births
        own = {number: births[number][1].copy(self.contents[number]).untyped_storage() for number in self.units}
        return replace(self, contents={**self.contents, **own})

    def reads(self, storages: set[int]) -> bool:
        """Whether it reads one of these storages."""
        return any(isinstance(source, Lasting) and source.storage in storages for source in self.sources)


NOTHING = Prefix((), (), {}, frozenset(), {})


def name_of(func: Any) -> str:
    """The name of an operation, without that of its overload."""
    return str(func.overloadpacket.__name__)


@cache
def arguments_of(func: Any) -> tuple[tuple[str, bool], ...]:
    """The names of an operation's arguments, and whether it writes into them."""
    named = ((argument.name, argument.alias_info) for argument in func._schema.arguments)
    return tuple((name, alias is not None and alias.is_write) for name, alias in named)


@cache
def kind_of(func: Any) -> str:
    """Whether an operation writes into an argument, looks at one in another way, or makes something new."""
    if any(writes for _, writes in arguments_of(func)):
        return WRITE
    return VIEW if any(returned.alias_info is not None for returned in func._schema.returns) else NEW


def leaves_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments of an operation with the items of lists, which hold no further lists, among them.

    Example:
        >>> leaves_of((1, [2, 3]), {"dim": 4})
        [1, 2, 3, 4]
    """
    found: list[Any] = []
    for value in (*args, *kwargs.values()):
        found.extend(value) if isinstance(value, (list, tuple)) else found.append(value)
    return found


def plain(leaf: Any) -> bool:
    """Whether a leaf of the arguments is no tensor, or one of strided memory and nothing else."""
    if not isinstance(leaf, Tensor):
        return True
    usual = type(leaf) in (Tensor, nn.Parameter) and leaf.layout is torch.strided and leaf.device.type != "meta"
    return usual and not (leaf.is_conj() or leaf.is_neg() or leaf.is_quantized)


def _worst(dtype: torch.dtype) -> Any:
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return True if dtype is torch.bool else torch.iinfo(dtype).max
