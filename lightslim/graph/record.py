"""Watch one real step of a model, op by op, and note which dimensions are the same axis."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from lightslim.graph.axes import Axis, find, freeze
from lightslim.graph.rules import fresh, pointwise
from lightslim.graph.table import RULES
from lightslim.graph.trace import Made, whereabouts
from lightslim.steps import tensors_in

Axes = Sequence[Axis]


@dataclass(frozen=True)
class Work:
    """The FLOPs of one op, which shrink in proportion to each of ``axes``."""

    layer: str
    flops: int
    axes: tuple[Axis, ...]


class Recorder(TorchDispatchMode):
    """Gives every tensor dimension its axis while the model runs under it.

    It sees ATen ops, below autograd and below any Python: loops, branches and modules without ``forward`` look alike.
    One recorder can watch several runs (evaluation and training); a parameter keeps its axes throughout.

    Attributes:
        work: the FLOPs of each op of the runs watched with ``counting`` on.
        reads: axes that some weight contracts over, i.e. whose units a later layer reads.
        parallel: axes along which products of matrices are independent: the heads of an attention.
        normalised: axes over which the model takes a mean or a variance to normalise what it is taken of.
        unknown: names of ops without a rule; all they touched is frozen.
        reached: the axes of the parameters and buffers that some op used.
        trace: what each op of the runs made, in order.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.names: dict[int, str] = {id(t): name for name, t in named_tensors(module)}
        self.tensors: dict[str, Tensor] = dict(named_tensors(module))
        self.counting = True
        self.work: list[Work] = []
        self.reads: list[Axis] = []
        self.parallel: list[Axis] = []
        self.normalised: list[Axis] = []
        self.unknown: set[str] = set()
        self.reached: dict[str, Axes] = {}
        self.trace: list[Made] = []
        self._axes = WeakTensorKeyDictionary()
        self._origin = WeakTensorKeyDictionary()
        self._spent: tuple[str, tuple[Axis, ...]] = ("", ())
        self._where = [""]
        self._statistics: dict[Axis, tuple[Axis, str]] = {}

    def __getitem__(self, tensor: Tensor) -> Axes:
        axes: Axes | None = self._axes.get(tensor)
        if axes is None:
            axes = self._axes[tensor] = self._first_sight(tensor)
        return axes

    def __setitem__(self, tensor: Tensor, axes: Iterable[Axis]) -> None:
        self._axes[tensor] = tuple(axes)

    def _first_sight(self, tensor: Tensor) -> Axes:
        name = self.names.get(id(tensor))
        if name is None:
            return tuple(Axis(size, "an input of the model") for size in tensor.shape)
        self._origin[tensor] = name
        if name not in self.reached:
            whole = None if tensor.is_floating_point() else "an integer buffer"
            self.reached[name] = tuple(Axis(size, whole) for size in tensor.shape)
        return self.reached[name]

    def origin(self, tensor: Tensor) -> str | None:
        """The parameter that ``tensor`` is a mere function of, if any."""
        name: str | None = self._origin.get(tensor)
        return name

    def contract(self, weight: Tensor, axis: Axis) -> None:
        """Note that ``axis`` is summed over; it counts as read if a parameter holds the factors."""
        if self.origin(weight) is not None:
            self.reads.append(axis)

    def spend(self, axes: Iterable[Axis], weight: Tensor) -> None:
        """Note what the FLOPs of the op at hand are proportional to, and the weight whose layer they count for."""
        name = self.origin(weight)
        self._spent = (name.rpartition(".")[0] if name else "", tuple(axes))

    def statistic(self, over: Axis, reason: str) -> Axis:
        """The dimension of size 1 that a statistic over units leaves.

        A statistic that meets its units again normalises them, as a layer norm does, and stands their loss; any other
        use freezes them for ``reason``.
        """
        left = Axis(1)
        self._statistics[left] = over, reason
        return left

    def meet(self, operands: Sequence[Axes]) -> None:
        """Note which statistics meet the units that they were taken over; axes broadcast, aligned from the right."""
        for column in itertools.zip_longest(*(reversed(axes) for axes in operands)):
            axes = {find(axis) for axis in column if axis is not None}
            met = [one for one, (over, _) in self._statistics.items() if {find(one), find(over)} <= axes]
            self.normalised += [self._statistics.pop(one)[0] for one in met]

    def settle(self) -> None:
        """Freeze the units whose statistics were put to another use."""
        for over, reason in self._statistics.values():
            freeze(over, reason)
        self._statistics.clear()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what runs inside; the values returned by the model's own ``forward`` are outputs, and stay."""

        def outputs(module: nn.Module, inputs: Any, output: Any) -> None:
            self.protect(output)

        handle = self.module.register_forward_hook(outputs)
        try:
            with whereabouts(self.module) as self._where, self:
                yield
        finally:
            handle.remove()

    def protect(self, output: Any) -> None:
        """Freeze every dimension of an output of the model."""
        for tensor in tensors_in(output):
            for axis in self[tensor]:
                freeze(axis, "an output of the model")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._spent = ("", ())
        self._note(func, _named(func, args, kwargs), out)
        formula = flop_registry.get(func.overloadpacket)
        if self.counting and formula is not None:
            layer, axes = self._spent
            self.work.append(Work(layer or _name(func), int(formula(*args, **kwargs, out_val=out)), axes))
        return out

    def _note(self, func: Any, arguments: dict[str, Any], out: Any) -> None:
        outs, ins = list(tensors_in(out)), list(tensors_in(arguments))
        if not outs:
            return
        for tensor in ins:
            _ = self[tensor]
        self._inherit_origin(ins, outs)
        rule = fresh if _in_backward() else _rule_for(func)
        arguments.pop("out", None)
        if rule is fresh:
            for tensor in outs:
                fresh(self, tensor)
        elif rule is not None:
            rule(self, out, func=func, **arguments)
        elif ins:
            self._distrust(func, ins, outs)
        for tensor in outs:
            if tensor not in self._axes:
                reason = f"made by {_name(func)}" if ins else None
                self[tensor] = [Axis(size, reason) for size in tensor.shape]
        made, read = (tuple(tuple(self[tensor]) for tensor in tensors) for tensors in (outs, ins))
        self.trace.append(Made(_name(func), made, read, self._where[-1]))

    def _inherit_origin(self, ins: list[Tensor], outs: list[Tensor]) -> None:
        origins = [self.origin(tensor) for tensor in ins]
        if ins and None not in origins:
            for tensor in outs:
                self._origin.setdefault(tensor, origins[0])

    def _distrust(self, func: Any, ins: list[Tensor], outs: list[Tensor]) -> None:
        self.unknown.add(_name(func))
        for tensor in ins:
            for axis in self[tensor]:
                freeze(axis, f"touched by {_name(func)}, an op without a rule")


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then buffers, by their full names; tied ones once, under their first name."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def _name(func: Any) -> str:
    return str(func.overloadpacket.__name__)


def _in_backward() -> bool:
    """Whether autograd is differentiating: gradients have the shapes of what was recorded on the way forward."""
    return torch._C._current_autograd_node() is not None


@functools.cache
def _rule_for(func: Any) -> Callable[..., None] | None:
    """The rule of an op or of the op that it does in place; anything torch calls pointwise needs none of its own."""
    name = _name(func)
    functional = getattr(torch.ops.aten, name.rstrip("_"), None)
    overloads = [func, *(getattr(functional, overload) for overload in (functional.overloads() if functional else ()))]
    rule = RULES.get(name) or RULES.get(name.rstrip("_"))
    return rule or (pointwise if any(torch.Tag.pointwise in overload.tags for overload in overloads) else None)


def _named(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an op under the names that its schema gives them, defaults included."""
    names, defaults = _schema(func)
    return defaults | dict(zip(names, args, strict=False)) | kwargs


@functools.cache
def _schema(func: Any) -> tuple[list[str], dict[str, Any]]:
    """The names of an op's arguments, and the defaults of those that have one."""
    schema = func._schema.arguments
    return [a.name for a in schema], {a.name: a.default_value for a in schema if a.has_default_value()}
