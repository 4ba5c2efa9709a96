"""Compute once what a step does before it first reads a masked weight, and put the results in place from then on.

A step is any Python, so nothing is known about its layers. What is seen are the tensor operations: up to the first one
that reads a masked weight they are the same under every mask. Those of one batch are noted once, with the content of
every tensor that is still alive where they end. From then on each is checked against the note and answered with an
empty tensor, or, if it is to live, with one that shares the content noted until somebody writes to it. Where masked
units are in it, it gets a content of its own, when something reads it after the last known operation.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightslim.prune.prefix import VIEW, WRITE, Blank, Call, Prefix, kind_of, leaves_of, name_of, plain
from lightslim.prune.sources import Lasting, Passing, Source
from lightslim.prune.unitwise import Chain, Constants

# What reads a tensor's memory without a tensor operation.
_READERS = frozenset({"numpy", "tolist", "data_ptr", "untyped_storage", "storage", "__array__", "__dlpack__",
                      "__deepcopy__", "__reduce_ex__"})  # fmt: skip


class Stop(BaseException):
    """Ends a step whose beginning has been noted; no user's ``except Exception`` holds it up."""


class Diverged(BaseException):
    """A step did not begin as it had begun when it was noted."""


class FastForward(TorchDispatchMode):
    """Runs a step whose beginning is known; may note how it goes on.

    Args:
        prefix: the known beginning.
        lasting: the tensors that outlive a step, by id.
        until: storages; where the first of them is read the step is stopped and ``noted`` holds what came before.
            None to run to the end.
        room: bytes that ``noted`` may hold.
        poisoned: fill what is answered without computing with NaN, so that whoever reads it is found out.
        chain: go on beyond ``until`` while it lasts.
        constants: what masked units hold at the end of ``prefix``.

    Attributes:
        noted: the longer beginning; None if there is none to be had.
    """

    def __init__(
        self, prefix: Prefix, lasting: Mapping[int, Lasting], until: set[int] | None = None, room: int = 0,
        poisoned: bool = False, chain: Chain | None = None, constants: Constants | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.prefix, self.lasting, self.until, self.room, self.poisoned = prefix, lasting, until, room, poisoned
        self.calls: list[Call] = list(prefix.calls) if until is not None else []
        self.sources: list[Source | None] = []
        self.noted: Prefix | None = None
        self.diverged = False
        self.chain, self.constants = chain, constants
        self._ops = prefix.ops if chain is not None else []
        self._entered = self._aligned = False
        self._position = 0
        self._busy = self._stopped = False
        self._active = contextlib.ExitStack()
        self._numbers: dict[int, int] = {}
        self._made: list[StorageWeakRef] = []
        self._given: dict[int, tuple[int, Tensor]] = {}
        self._waiting: dict[int, int] = {}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run what is inside; raises :class:`Diverged` when it is not the step that was noted."""
        with _Readers(self), contextlib.ExitStack() as self._active:
            self._active.enter_context(self)
            yield
        if self.diverged or self._position < len(self.prefix.calls):
            raise Diverged
        self._fill_all()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._stopped:  # somebody held the exception up
            raise Stop
        if self._busy:
            return func(*args, **(kwargs or {}))
        kwargs, self._busy = kwargs or {}, True
        try:
            if self._position < len(self.prefix.calls):
                return self._answer(func, args, kwargs)
            if self._waiting:
                self._fill(leaves_of(args, kwargs))
            return func(*args, **kwargs) if self.until is None else self._note(func, args, kwargs)
        finally:
            self._busy = False

    def read(self) -> None:
        """The memory of some tensor is about to be read."""
        if self._busy:  # by ourselves
            return
        self._busy = True
        try:
            if self._position < len(self.prefix.calls):
                self._diverge()
            self._fill_all()
            if self.until is not None:
                self._stop()
        finally:
            self._busy = False

    def leave(self) -> None:
        """Watch no longer, once there is nothing more to answer or to note: each operation watched takes its time."""
        if not self._busy and self.until is None and self._position == len(self.prefix.calls):
            self._active.close()
            self._fill_all()

    def _fill(self, leaves: Iterable[Any]) -> None:
        """Give the tensors among ``leaves`` the content that they had at the end of the prefix."""
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                storage = leaf.untyped_storage()
                number = self._waiting.pop(storage._cdata, None)
                if number is not None:
                    self._restore(storage, number)

    def _fill_all(self) -> None:
        for number in self._waiting.values():
            storage = torch.UntypedStorage._new_with_weak_ptr(self._made[number].cdata)
            if storage is not None:
                self._restore(storage, number)
        self._waiting.clear()

    def _restore(self, storage: torch.UntypedStorage, number: int) -> None:
        storage.copy_(self.prefix.contents[number])
        if self.constants is not None:
            self.constants.put(storage, *self.prefix.births[number])

    def _diverge(self) -> None:
        self.diverged = True
        raise Diverged

    def _answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        call = self.prefix.calls[self._position]
        leaves = leaves_of(args, kwargs)
        if func is not call.func or call.given != self._labels(leaves):
            self._diverge()
        if call.kind == VIEW:
            out = func(*args, **kwargs)
            self._adopt(out)
        else:
            out = pytree.tree_unflatten([self._leaf(call, item, leaves) for item in call.answer], call.form)
        self._position += 1
        return out

    def _leaf(self, call: Call, item: Any, leaves: list[Any]) -> Any:
        if call.kind == WRITE:
            return leaves[item]
        if not isinstance(item, Blank):
            return item
        content = self.prefix.contents.get(len(self._made))
        if content is None or self.poisoned or self._holds_masked(len(self._made)):
            tensor = item.make(self.poisoned)
        else:
            tensor, content = item.copy(content), None
        number = self._number(tensor)
        if content is not None:
            self._waiting[tensor.untyped_storage()._cdata] = number
        return tensor

    def _holds_masked(self, number: int) -> bool:
        """Whether masked units are in this memory, so that it is another one under each mask."""
        return self.constants is not None and self.prefix.births[number][0] in self.constants.values

    def _number(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self._numbers[storage._cdata] = len(self._made)
        self._made.append(StorageWeakRef(storage))  # no later storage gets its address
        return len(self._made) - 1

    def _labels(self, leaves: Iterable[Any]) -> tuple[Any, ...]:
        return tuple(self._label(leaf) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves)

    def _label(self, tensor: Tensor) -> tuple[Any, ...]:
        """What a tensor is in this step: where its memory came from and how it lies in it."""
        if tensor.layout is not torch.strided:
            self._diverge()
        number = self._numbers.get(tensor.untyped_storage()._cdata)
        origin = self._source(tensor) if number is None else number
        return (
            type(tensor),
            number is None,
            origin,
            tensor.shape,
            tensor.stride(),
            tensor.storage_offset(),
            tensor.dtype,
        )

    def _source(self, tensor: Tensor) -> int:
        if id(tensor) not in self._given:
            known = self.prefix.sources[len(self.sources) : len(self.sources) + 1]
            if self._position < len(self.prefix.calls) and not (known and known[0] and known[0].same(tensor)):
                self._diverge()
            self._give(tensor, known[0] if known else self._new_source(tensor))
        return self._given[id(tensor)][0]

    def _new_source(self, tensor: Tensor) -> Source:
        lasting = self.lasting.get(id(tensor))
        return lasting if lasting and lasting.same(tensor) else Passing(tensor.clone())

    def _give(self, tensor: Tensor, source: Source | None) -> None:
        self._given[id(tensor)] = len(self._given), tensor
        self.sources.append(source)

    def _adopt(self, out: Any) -> None:
        """Views of what the step did not make itself are as good as that."""
        for view in pytree.tree_leaves(out):
            if isinstance(view, Tensor) and view.untyped_storage()._cdata not in self._numbers:
                self._give(view, None)

    def _note(self, func: Any, args: Any, kwargs: Any) -> Any:
        leaves = leaves_of(args, kwargs)
        if not all(map(plain, leaves)) or self._ends_here(func, args, leaves):
            self._stop()
        kind, given = kind_of(func), self._labels(leaves)
        out = func(*args, **kwargs)
        outs, form = pytree.tree_flatten(out)
        answer = self._answerable(kind, outs, leaves) if given == self._labels(leaves) else None
        if answer is None:  # and it may have written already: there is no note
            self._stopped = True
            raise Stop
        self.calls.append(Call(func, given, kind, answer, form))
        if self.chain is not None and self.calls[-1].returns_tensors:
            self._ops.append(name_of(func))
        if kind == VIEW:
            self._adopt(out)
        return out

    def _ends_here(self, func: Any, args: Any, leaves: Iterable[Any]) -> bool:
        """Whether the operation mixes masked units, or leaves other traces than its result."""
        storages = [leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, Tensor)]
        named = list(zip(func._schema.arguments, args, strict=False))
        return bool(
            func.namespace != "aten"
            or {torch.Tag.nondeterministic_seeded, torch.Tag.inplace_view} & set(func.tags)
            or self._mixes(func, storages)
            or any(argument.name in ("train", "training") and value is True for argument, value in named)
            or (kind_of(func) == WRITE and not self._writes_own(named, leaves))
        )

    def _mixes(self, func: Any, storages: Iterable[int]) -> bool:
        """Whether the operation reads a masked weight, unless it is known to keep the units apart."""
        masked = not (self.until or set()).isdisjoint(storages)
        at = len(self._ops)
        if masked and not self._entered:
            self._entered = True
            self._aligned = self.chain is not None and self._ops == list(self.chain.ops[:at])
        if self.chain is None or not self._aligned or not self._entered:
            return masked
        known = at < len(self.chain.ops) and self.chain.ops[at] == name_of(func)
        return not known or (masked and at not in self.chain.touching)

    def _writes_own(self, named: Iterable[tuple[Any, Any]], leaves: Iterable[Any]) -> bool:
        """Whether only tensors that the step has made itself are written; those given by name could be any."""
        written = [value for argument, value in named if argument.alias_info and argument.alias_info.is_write]
        tensors = [leaf for leaf in pytree.tree_leaves(written or list(leaves)) if isinstance(leaf, Tensor)]
        return all(tensor.untyped_storage()._cdata in self._numbers for tensor in tensors)

    def _answerable(self, kind: str, outs: list[Any], leaves: list[Any]) -> tuple[Any, ...] | None:
        if kind == VIEW:
            return ()
        if kind == WRITE:
            found = [next((i for i, leaf in enumerate(leaves) if leaf is out), None) for out in outs]
            return None if None in found else tuple(found)
        storages = [out.untyped_storage()._cdata for out in outs if isinstance(out, Tensor)]
        if len(set(storages)) < len(storages) or not all(map(self._is_new, outs)):
            return None
        return tuple(map(self._blank, outs))

    def _is_new(self, out: Any) -> bool:
        if not isinstance(out, Tensor):
            return True
        if not plain(out) or out.storage_offset():
            return False
        storage, known = out.untyped_storage(), {t.untyped_storage()._cdata for _, t in self._given.values()}
        extent = 1 + sum((size - 1) * step for size, step in zip(out.shape, out.stride(), strict=True))
        needed = extent * out.element_size() if out.numel() else 0
        return storage._cdata not in self._numbers and storage._cdata not in known and storage.nbytes() == needed

    def _blank(self, out: Any) -> Any:
        if not isinstance(out, Tensor):
            return out
        self._number(out)
        return Blank(tuple(out.shape), out.stride(), out.dtype, out.device)

    def _stop(self) -> None:
        self._stopped = True
        self._fill_all()
        alive = {n: torch.UntypedStorage._new_with_weak_ptr(ref.cdata) for n, ref in enumerate(self._made)}
        contents = {number: storage for number, storage in alive.items() if storage is not None}
        self.noted = Prefix(tuple(self.calls), tuple(self.sources), contents)
        if self.noted.bytes > self.room or not self.calls:
            self.noted = None
        else:
            # The step is over, but what it has put somewhere may be written to in the next
            births = self.noted.births
            copies = {number: births[number][1].copy(storage).untyped_storage() for number, storage in contents.items()}
            self.noted = replace(self.noted, contents=copies)
        raise Stop


class _Readers(TorchFunctionMode):
    """Tells when memory is read without a tensor operation."""

    def __init__(self, step: FastForward) -> None:
        super().__init__()
        self.step = step

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _READERS:
            self.step.read()
        self.step.leave()
        return func(*args, **(kwargs or {}))


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
