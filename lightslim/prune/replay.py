"""Compute once what a step does before it first reads a masked weight, and put the results in place from then on.

A step is any Python, so nothing is known about its layers. What is seen are the tensor operations: up to the first one
that reads a masked weight they are the same under every mask. Those of one batch are noted once, with the content of
every tensor that is still alive where they end. From then on each is checked against the note and answered with an
empty tensor, or, if it is to live, with one that shares the content noted until somebody writes to it. Modules of
torch's own are answered as a whole: most of an answer's time is the way to it.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from lightslim.prune.modules import plainly_called, unchanged
from lightslim.prune.prefix import VIEW, Argument, Blank, Label, Prefix, Span, leaves_of
from lightslim.prune.sources import Lasting, Passing, Source

# What reads a tensor's memory without a tensor operation.
_READERS = frozenset({"numpy", "tolist", "data_ptr", "untyped_storage", "storage", "__array__", "__dlpack__",
                      "__deepcopy__", "__reduce_ex__"})  # fmt: skip


class Unseen:
    """While in force, no mode sees what happens to tensors: it is no part of the step."""

    def __enter__(self) -> None:
        self._guards = torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction()
        for guard in self._guards:
            guard.__enter__()

    def __exit__(self, *_: object) -> None:
        for guard in reversed(self._guards):
            guard.__exit__(None, None, None)


class Diverged(BaseException):
    """A step did not begin as it had begun when it was noted; no user's ``except Exception`` holds it up."""


class FastForward(TorchDispatchMode):
    """Runs a step whose beginning is known.

    Args:
        prefix: the known beginning.
        lasting: the tensors that outlive a step, by id.
        poisoned: fill what is answered without computing with NaN, so that whoever reads it is found out.

    Attributes:
        left: whether nothing of the step is seen any more.
    """

    def __init__(self, prefix: Prefix, lasting: Mapping[int, Lasting], poisoned: bool = False) -> None:
        super().__init__()
        self.prefix, self.lasting, self.poisoned = prefix, lasting, poisoned
        self.sources: list[Source | None] = []
        self.diverged = self.left = False
        self._readers = _Readers(self)
        self._position = 0
        self._busy, self._watches = False, True
        self._watching, self._reading = contextlib.ExitStack(), contextlib.ExitStack()
        self._numbers: dict[int, int] = {}
        self._made: list[StorageWeakRef | None] = []
        self._given: dict[int, tuple[int, Tensor]] = {}
        self._waiting: dict[int, int] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled meanwhile, and torch would look for that at each operation

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run what is inside; raises :class:`Diverged` when it is not the step that was noted."""
        with self._reading, self._watching:
            self._reading.enter_context(self._readers)
            self._watching.enter_context(self)
            yield
        if self.diverged or not self._resumed:
            raise Diverged
        self._fill_all()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._busy:
            return func(*args, **kwargs)
        self._busy = True
        try:
            return self._go_on(func, args, kwargs) if self._resumed else self._answer(func, args, kwargs)
        finally:
            self._busy = False

    def called(self, call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """What a module returns: as it was noted if nothing is different now."""
        span = self.prefix.spans.get((self._position, id(module)))
        if span is not None and self._on_top() and plainly_called():
            with Unseen():
                if self._begins(span, args, kwargs):
                    return self._skip(span, args, kwargs)
        self.leave_altogether()
        return call(module, *args, **kwargs)

    def _on_top(self) -> bool:
        """Whether no mode of the step's own would see what is called."""
        return _get_current_dispatch_mode() is self and _get_current_function_mode() is self._readers

    def read(self) -> None:
        """The memory of some tensor is about to be read."""
        if self._busy:  # by ourselves
            return
        self._busy = True
        try:
            if not self._resumed:
                self._diverge()
            self._fill_all()
            self._read_on()
        finally:
            self._busy = False

    def leave(self) -> None:
        """Watch no longer, once nothing is left to answer: each operation watched takes its time."""
        if self._watches and self._finished and _get_current_dispatch_mode() is self:  # and not one of the step's own
            self._watching.close()
            self._watches = False
            self._fill_all()

    def leave_altogether(self) -> None:
        """See no functions any more, either; a function cannot do that, since it is being seen."""
        self.leave()
        if not self._watches and _get_current_function_mode() is self._readers:
            self._reading.close()
            self.left = True

    @property
    def _finished(self) -> bool:
        return self._resumed and not self._busy

    @property
    def _resumed(self) -> bool:
        return self._position == len(self.prefix.calls)

    def _go_on(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation after the known ones."""
        if self._waiting:
            self._fill(leaves_of(args, kwargs))
        return func(*args, **kwargs)

    def _read_on(self) -> None:
        """Memory is about to be read after the known operations."""

    def _fill(self, leaves: Iterable[Any]) -> None:
        """Give the tensors among ``leaves`` the content that they had at the end of the prefix."""
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                storage = leaf.untyped_storage()
                number = self._waiting.pop(storage._cdata, None)
                if number is not None:
                    storage.copy_(self.prefix.contents[number])

    def _fill_all(self) -> None:
        for number in self._waiting.values():
            storage = self._alive(number)
            if storage is not None:
                storage.copy_(self.prefix.contents[number])
        self._waiting.clear()

    def _alive(self, number: int) -> torch.UntypedStorage | None:
        """The memory of this number, if anybody still has it."""
        made = self._made[number]
        return None if made is None else torch.UntypedStorage._new_with_weak_ptr(made.cdata)

    def _diverge(self) -> None:
        self.diverged = True
        raise Diverged

    def _answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operation returned when it was noted."""
        call, leaves = self.prefix.calls[self._position], leaves_of(args, kwargs)
        if func is not call.func or call.given != self._labels(leaves, self._source):
            self._diverge()
        self._position += 1
        if call.kind == VIEW:
            out = func(*args, **kwargs)
            self._adopt(out)
            return out
        numbers = self._new_numbers(len(call.blanks))
        return self._returned(call.answer, call.form, leaves, numbers)

    def _begins(self, span: Span, args: Any, kwargs: Any) -> bool:
        """Whether a module is as it was, is given what it was given, and finds what it found."""
        return (
            len(args) == len(span.args)
            and list(kwargs) == list(span.kwargs)
            and all(map(self._matches, args, span.args))
            and all(map(self._matches, kwargs.values(), span.kwargs.values()))
            and all(map(Lasting.unchanged, span.fresh))
            and unchanged(span.states)
        )

    def _matches(self, value: Any, noted: Any) -> bool:
        """Whether an argument is the one that was noted."""
        if type(noted) is Label:
            return isinstance(value, Tensor) and self._label(value, self._index_of) == noted
        if isinstance(noted, (list, tuple)):
            return type(value) is type(noted) and len(value) == len(noted) and all(map(self._matches, value, noted))
        return value is noted or (type(value) is type(noted) and not isinstance(value, Tensor) and value == noted)

    def _skip(self, span: Span, args: Any, kwargs: Any) -> Any:
        """What a module returned, its operations being passed over."""
        for source in self.prefix.sources[len(self.sources) : span.sources]:
            self._give(getattr(source, "tensor", None), source)
        made = self._new_numbers(span.made - len(self._made))
        self._position = span.end
        return self._returned(span.answer, span.form, leaves_of(args, kwargs), [made[at] for at in span.numbers])

    def _new_numbers(self, count: int) -> range:
        self._made.extend([None] * count)
        return range(len(self._made) - count, len(self._made))

    def _returned(self, answer: Iterable[Any], form: Any, leaves: Sequence[Any], numbers: Iterable[int]) -> Any:
        numbered, outs = iter(numbers), []
        for item in answer:
            if isinstance(item, Blank):
                item = self._tensor(item, next(numbered))
            outs.append(leaves[item.position] if isinstance(item, Argument) else item)
        return outs[0] if form is None else pytree.tree_unflatten(outs, form)

    def _tensor(self, blank: Blank, number: int) -> Tensor:
        """A tensor in the place of the one that was made."""
        content = self.prefix.contents.get(number)
        tensor = blank.make(self.poisoned) if content is None or self.poisoned else blank.copy(content)
        self._mark(tensor, number)
        if content is not None and self.poisoned:
            self._waiting[tensor.untyped_storage()._cdata] = number
        return tensor

    def _mark(self, tensor: Tensor, number: int) -> None:
        storage = tensor.untyped_storage()
        self._numbers[storage._cdata] = number
        self._made[number] = StorageWeakRef(storage)  # no later storage gets its address

    def _labels(self, leaves: Iterable[Any], origin_of: Callable[[Tensor], int]) -> tuple[Any, ...]:
        return tuple(
            self._label(leaf, origin_of) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves
        )

    def _label(self, tensor: Tensor, origin_of: Callable[[Tensor], int]) -> Label:
        if tensor.layout is not torch.strided:
            self._diverge()
        number = self._numbers.get(tensor.untyped_storage()._cdata)
        found, origin = (True, origin_of(tensor)) if number is None else (False, number)
        return Label(
            type(tensor), found, origin, tensor.shape, tensor.stride(), int(tensor.storage_offset()), tensor.dtype
        )

    def _source(self, tensor: Tensor) -> int:
        """Which of the tensors that the step did not make this is; the next one, if it is new."""
        if id(tensor) not in self._given:
            known = self.prefix.sources[len(self.sources) : len(self.sources) + 1]
            if not self._resumed and not (known and known[0] and known[0].same(tensor)):
                self._diverge()
            self._give(tensor, known[0] if known else self._new_source(tensor))
        return self._given[id(tensor)][0]

    def _index_of(self, tensor: Tensor) -> int:
        """The same for one that has come up; -1 for others."""
        return self._given[id(tensor)][0] if id(tensor) in self._given else -1

    def _new_source(self, tensor: Tensor) -> Source:
        lasting = self.lasting.get(id(tensor))
        return lasting if lasting and lasting.same(tensor) else Passing(tensor.clone())

    def _give(self, tensor: Tensor | None, source: Source | None) -> None:
        if tensor is not None:
            self._given[id(tensor)] = len(self.sources), tensor
        self.sources.append(source)

    def _adopt(self, out: Any) -> None:
        """Views of what the step did not make itself are as good as that."""
        for view in pytree.tree_leaves(out):
            if isinstance(view, Tensor) and view.untyped_storage()._cdata not in self._numbers:
                self._give(view, None)


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
