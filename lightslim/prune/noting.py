"""Note what a step does, up to the first operation that reads a masked weight and mixes its units with others."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightslim.prune.modules import PLAIN_VALUES, Looks, State, plainly_called, unchanged
from lightslim.prune.prefix import (
    VIEW,
    WRITE,
    Argument,
    Blank,
    Call,
    Prefix,
    Span,
    arguments_of,
    kind_of,
    leaves_of,
    name_of,
    plain,
)
from lightslim.prune.replay import FastForward, Unseen
from lightslim.prune.sources import Lasting, Source
from lightslim.prune.unitwise import Chain


class Stop(BaseException):
    """Ends a step whose beginning has been noted; no user's ``except Exception`` holds it up."""


class Noting(FastForward):
    """Runs a step to where it first reads and mixes masked weights, and notes it.

    Args:
        prefix: what is known of it already.
        lasting: the tensors that outlive a step, by id.
        looks: what modules look like.
        until: storages; where the first of them is read the step is stopped and ``noted`` holds what came before.
        room: bytes that ``noted`` may hold.
        chain: go on beyond ``until`` while it lasts.

    Attributes:
        noted: the longer beginning; None if there is none to be had.
    """

    def __init__(
        self, prefix: Prefix, lasting: Mapping[int, Lasting], looks: Looks, until: set[int], room: int,
        chain: Chain | None = None,
    ) -> None:  # fmt: skip
        super().__init__(prefix, lasting)
        self.looks, self.until, self.room, self.chain = looks, until, room, chain
        self.calls, self.spans = list(prefix.calls), dict(prefix.spans)
        self.noted: Prefix | None = None
        self._foreign: set[int] = set()
        self._ops = prefix.ops if chain is not None else []
        self._entered = self._aligned = self._stopped = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._stopped:  # somebody held the exception up
            raise Stop
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _go_on(self, func: Any, args: Any, kwargs: Any) -> Any:
        leaves = leaves_of(args, kwargs)
        self._fill(leaves)
        if not all(map(plain, leaves)) or self._ends_here(func, args, leaves):
            self._stop()
        kind, given = kind_of(func), self._labels(leaves, self._source)
        out = func(*args, **kwargs)
        outs, form = _flattened(out)
        answer = self._answerable(kind, outs, leaves) if given == self._labels(leaves, self._source) else None
        if answer is None:  # and it may have written already: there is no note
            self._stopped = True
            raise Stop
        self.calls.append(Call(func, given, kind, answer, form))
        if self.chain is not None and self.calls[-1].returns_tensors:
            self._ops.append(name_of(func))
        if kind == VIEW:
            self._adopt(out)
        return out

    def _read_on(self) -> None:
        self._stop()

    def _ends_here(self, func: Any, args: Any, leaves: Iterable[Any]) -> bool:
        """Whether the operation mixes masked units, or leaves other traces than its result."""
        storages = [leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, Tensor)]
        named = list(zip(arguments_of(func), args, strict=False))
        return bool(
            func.namespace != "aten"
            or {torch.Tag.nondeterministic_seeded, torch.Tag.inplace_view} & set(func.tags)
            or self._mixes(func, storages)
            or any(name in ("train", "training") and value is True for (name, _), value in named)
            or (kind_of(func) == WRITE and not self._writes_own(named, leaves))
        )

    def _mixes(self, func: Any, storages: Iterable[int]) -> bool:
        """Whether the operation reads a masked weight, unless it is known to keep the units apart."""
        masked = not self.until.isdisjoint(storages)
        at = len(self._ops)
        if masked and not self._entered:
            self._entered = True
            self._aligned = self.chain is not None and self._ops == list(self.chain.ops[:at])
        if self.chain is None or not self._aligned or not self._entered:
            return masked
        known = at < len(self.chain.ops) and self.chain.ops[at] == name_of(func)
        return not known or (masked and at not in self.chain.touching)

    def _writes_own(self, named: Iterable[tuple[tuple[str, bool], Any]], leaves: Iterable[Any]) -> bool:
        """Whether only tensors that the step has made itself are written; those given by name could be any."""
        written = [value for (_, writes), value in named if writes]
        tensors = [leaf for leaf in pytree.tree_leaves(written or list(leaves)) if isinstance(leaf, Tensor)]
        return all(tensor.untyped_storage()._cdata in self._numbers for tensor in tensors)

    def _answerable(self, kind: str, outs: list[Any], leaves: Sequence[Any]) -> tuple[Any, ...] | None:
        if kind == VIEW:
            return ()
        if kind == WRITE:
            found = [_argument(out, leaves) for out in outs]
            return None if None in found else tuple(found)
        storages = [out.untyped_storage()._cdata for out in outs if isinstance(out, Tensor)]
        if len(set(storages)) < len(storages) or not all(map(self._is_new, outs)):
            return None
        return tuple(map(self._blank, outs))

    def _is_new(self, out: Any) -> bool:
        if not isinstance(out, Tensor):
            return True
        if not plain(out) or not _fills_its_memory(out):
            return False
        address = out.untyped_storage()._cdata
        return address not in self._numbers and address not in self._foreign

    def _give(self, tensor: Tensor | None, source: Source | None) -> None:
        super()._give(tensor, source)
        if tensor is not None:
            self._foreign.add(tensor.untyped_storage()._cdata)

    def _blank(self, out: Any) -> Any:
        if not isinstance(out, Tensor):
            return out
        self._mark(out, self._new_numbers(1)[0])
        return Blank.like(out)

    @property
    def _finished(self) -> bool:
        return False  # there is something to note up to the end

    def called(self, call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """What a module returns, which is noted as a whole if all that its call does is to compute that."""
        key, sources, made = (self._count(), id(module)), len(self.sources), len(self._made)
        with Unseen():
            looked_at = key not in self.spans and self._on_top() and plainly_called()
            states = self.looks.at(module) if looked_at else None
        out = super().called(call, module, args, kwargs)
        if states is not None and self._count() > key[0]:
            with Unseen():
                span = self._span(states, args, kwargs, out, sources, made) if unchanged(states) else None
            if span is not None:
                self.spans[key] = span
        return out

    def _count(self) -> int:
        """How many operations there have been."""
        return len(self.calls) if self._resumed else self._position

    def _span(self, states: Sequence[State], args: Any, kwargs: Any, out: Any, sources: int, made: int) -> Span | None:
        """The note of a call that leaves nothing behind but what it returns, and returns nothing old."""
        leaves, found, (outs, form) = leaves_of(args, kwargs), self.sources[sources:], _flattened(out)
        answer = tuple(_argument(item, leaves) or (Blank.like(item) if _is_blank(item) else item) for item in outs)
        numbers = [self._number(item) for item, known in zip(outs, answer, strict=True) if isinstance(known, Blank)]
        kept = [number for number in range(made, len(self._made)) if self._alive(number) is not None]
        fresh = [source for source in found if isinstance(source, Lasting)]
        if sorted(numbers) != kept or not (
            all(source is None or isinstance(source, Lasting) for source in found)
            and all(map(self._is_traced, leaves))
            and all(type(item) in (Blank, Argument, *PLAIN_VALUES) for item in answer)
        ):
            return None
        return Span(
            states=states,
            args=tuple(map(self._noted, args)),
            kwargs={name: self._noted(value) for name, value in kwargs.items()},
            fresh=fresh,
            end=self._count(),
            sources=len(self.sources),
            made=len(self._made),
            answer=answer,
            numbers=[number - made for number in numbers],
            form=form,
        )

    def _noted(self, value: Any) -> Any:
        """An argument as a :class:`Span` holds it."""
        if type(value) in (list, tuple):
            return type(value)(map(self._noted, value))
        if not isinstance(value, Tensor) or id(value) in self.lasting:
            return value
        return self._label(value, self._index_of)

    def _number(self, tensor: Tensor) -> int:
        return self._numbers.get(tensor.untyped_storage()._cdata, -1)

    def _is_traced(self, leaf: Any) -> bool:
        """Whether it is known what an argument is."""
        if not isinstance(leaf, Tensor):
            return type(leaf) in PLAIN_VALUES
        return plain(leaf) and (self._number(leaf) >= 0 or id(leaf) in self._given)

    def _stop(self) -> None:
        self._stopped = True
        self._fill_all()
        alive = {number: self._alive(number) for number in range(len(self._made))}
        contents = {number: storage for number, storage in alive.items() if storage is not None}
        noted = Prefix(tuple(self.calls), tuple(self.sources), contents, frozenset(), self.spans)
        births, dims = noted.births, self.chain.dims if self.chain is not None and self._aligned else {}
        noted = replace(noted, units=frozenset(number for number in contents if births[number][0] in dims))
        if noted.bytes <= self.room and self.calls:
            # The step is over, but what it has put somewhere may be written to in the next
            copies = {number: births[number][1].copy(storage).untyped_storage() for number, storage in contents.items()}
            self.noted = replace(noted, contents=copies)
        raise Stop


class FirstReads(TorchDispatchMode):
    """Notes when each storage is first read, and whether processes talk to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.at: dict[int, int] = {}
        self.collective = False
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        self.collective |= "c10d" in func.namespace
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                self.at.setdefault(leaf.untyped_storage()._cdata, self.count)
        return func(*args, **(kwargs or {}))


def _argument(out: Any, leaves: Iterable[Any]) -> Argument | None:
    return next((Argument(i) for i, leaf in enumerate(leaves) if leaf is out), None)


def _flattened(out: Any) -> tuple[list[Any], Any]:
    """The leaves of what was returned, and its form; None if that is a leaf itself."""
    outs, form = pytree.tree_flatten(out)
    return outs, None if form.is_leaf() else form


def _is_blank(item: Any) -> bool:
    return isinstance(item, Tensor) and plain(item) and _fills_its_memory(item)


def _fills_its_memory(tensor: Tensor) -> bool:
    """Whether a tensor lies at the beginning of its memory and reaches to its end."""
    extent = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    needed = extent * tensor.element_size() if tensor.numel() else 0
    return not tensor.storage_offset() and tensor.untyped_storage().nbytes() == needed
