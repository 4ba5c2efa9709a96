"""Which values to round besides the inputs of layers, so that what a runtime computes in integers stays in integers.

A runtime's integer convolution gives integers: one whose output nothing rounds runs in float, and so does an addition
of what is not rounded. Looking at the model as it runs shows who gives a value and who reads it.
"""

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from lightslim.steps import tensors_in

_CONVOLUTION, _PRODUCT = "a convolution", "a product of matrices"
_JOINTS = {"add", "add_", "cat"}
# Folded into a convolution by runtimes
_NORMS = {"native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
          "miopen_batch_norm"}  # fmt: skip
# Done by rounding, or to integers as well as to floats
_CLIPS = {"relu", "relu_", "hardtanh", "hardtanh_", "clamp", "clamp_", "clamp_min", "clamp_min_"}
# The same numbers in another place, or the largest of them; some of them; and what else leaves them as they are
_MOVES = {"view", "_unsafe_view", "permute", "transpose", "clone", "max_pool2d_with_indices"}
_PARTS = {"slice", "split", "split_with_sizes", "unbind", "select"}
_SAME = {"squeeze", "unsqueeze", "expand", "t", "detach", "alias", "_to_copy"}
# May run every child, of which a quantizer must not become one; or are made anew by a copy
_CLOSED = (nn.Sequential, nn.ModuleList, nn.ModuleDict, fx.GraphModule)


@dataclass(eq=False)
class Value:
    """What a tensor holds until something writes to it.

    Attributes:
        made: how many ops came before the one that made it; -1 for what the model is given.
        readers: the ops that read it.
        givers: the names of the modules from which all of these have it, the innermost first.
        returned: whether the model returns it.
    """

    made: int = -1
    readers: list["Op"] = field(default_factory=list)
    givers: list[str] = field(default_factory=list)
    returned: bool = False


@dataclass(eq=False)
class Op:
    """A call of a quantized layer as a whole, with its name, or an ATen op outside of those."""

    kind: str
    layer: str
    inputs: list[Value]
    outputs: list[Value]


class Wiring(TorchDispatchMode):
    """Watches a run of a model.

    Attributes:
        ops: what was done, in order.
        calls: how many times each module was called, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.calls: Counter[str] = Counter()
        self._values = WeakTensorKeyDictionary()
        self._begun: list[int] = []
        self._read: list[list[Value]] = []

    @contextlib.contextmanager
    def watching(self, model: nn.Module, layers: Collection[str]) -> Iterator[None]:
        """Watch what ``model`` does inside; a call of one of ``layers`` is one op."""
        with contextlib.ExitStack() as stack:
            for name, module in model.named_modules():
                if isinstance(module, torch.jit.ScriptModule):
                    continue
                stack.callback(module.register_forward_pre_hook(self._begin).remove)
                if name in layers:
                    stack.callback(module.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
                    stack.callback(module.register_forward_hook(self._leaving(name), always_call=True).remove)
                stack.callback(module.register_forward_hook(self._giving(name), always_call=True).remove)
            yield stack.enter_context(self)

    def _begin(self, _: nn.Module, __: Any) -> None:
        self._begun.append(len(self.ops))

    def _enter(self, _: nn.Module, inputs: Any, named: Any) -> None:
        self._read.append(self._known([inputs, named]))

    def _leaving(self, name: str) -> Callable[..., None]:
        def leave(layer: nn.Module, _: Any, output: Any) -> None:
            self._note(_CONVOLUTION if isinstance(layer, _ConvNd) else _PRODUCT, name, self._read.pop(), output)

        return leave

    def _giving(self, name: str) -> Callable[..., None]:
        def give(module: nn.Module, _: Any, output: Any) -> None:
            self.calls[name] += 1
            begun = self._begun.pop()
            if not name:
                for value in self._known(output):
                    value.returned = True
            elif isinstance(output, Tensor) and output.is_floating_point() and _can_round(module):
                (value,) = self._known(output)
                # Else it can be had from elsewhere, too: what passes an Identity is not its own
                if value.made >= begun and not value.readers:
                    value.givers.append(name)

        return give

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._read:
            return func(*args, **(kwargs or {}))
        inputs = self._known([args, kwargs])
        out = func(*args, **(kwargs or {}))
        self._note(func.overloadpacket.__name__, "", inputs, out)
        return out

    def _known(self, tree: Any) -> list[Value]:
        return [self._values.setdefault(tensor, Value()) for tensor in tensors_in(tree)]

    def _note(self, kind: str, layer: str, inputs: list[Value], made: Any) -> None:
        tensors = list(tensors_in(made))
        op = Op(kind, layer, inputs, [Value(len(self.ops)) for _ in tensors])
        self.ops.append(op)
        for value in dict.fromkeys(inputs):
            value.readers.append(op)
        for tensor, value in zip(tensors, op.outputs, strict=True):
            self._values[tensor] = value


def _can_round(module: nn.Module) -> bool:
    """Whether a quantizer can be put behind ``forward``, which must be that of the class."""
    return not isinstance(module, _CLOSED) and "forward" not in vars(module)


@dataclass(frozen=True)
class Between:
    """What is rounded between layers.

    Attributes:
        outputs: names of modules whose outputs are to be rounded.
        fed: names of layers that read nothing else, and need not round it again.
    """

    outputs: tuple[str, ...] = ()
    fed: tuple[str, ...] = ()


def between(model: nn.Module, run: Callable[[AbstractContextManager[None]], Any], layers: Collection[str]) -> Between:
    """Which outputs to round so that convolutions, and additions and concatenations of what they give, can be integers.

    A value that is read by one quantized layer alone is rounded there. Any other is rounded once, where it is given:
    behind the batch norm, the clipping (ReLU) and the largest-of pooling that follow the convolution. What the model
    returns stays as it is. Products of matrices give floats anyway: what a transformer adds stays in float.

    Args:
        model: in evaluation mode, not quantized yet.
        run: runs the model within a context, the same each time.
        layers: names of the layers that are going to be.

    Returns:
        Names, in the order of the run. A value that no module gives, or only one that is called several times, has no
        name: it stays in float, and what reads it.

    Example:
        >>> import torch
        >>> class Residual(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        ...
        ...     def forward(self, x):
        ...         return self.norm(self.conv(x)) + x
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), Residual(), nn.Conv2d(4, 2, 1)).eval()
        >>> def run(within):
        ...     with within, torch.no_grad():
        ...         net(torch.zeros(1, 3, 8, 8))
        >>> between(net, run, ["0", "2.conv", "3"])
        Between(outputs=('1', '2.norm'), fed=('2.conv',))
    """
    wiring = Wiring()
    run(wiring.watching(model, layers))
    for op in reversed(wiring.ops):
        if op.kind in _MOVES | _PARTS | _SAME and any(value.returned for value in op.outputs):
            for value in op.inputs:
                value.returned = True
    return _confirmed(model, run, _found(wiring))


def _found(wiring: Wiring) -> Between:
    places: dict[Value, str] = {}
    moved: set[Value] = set()
    for op in wiring.ops:
        rest = [value for value in dict.fromkeys(op.inputs) if value not in places and value not in moved]
        if op.kind in _JOINTS and len(rest) < len(set(op.inputs)):
            # Some of it is rounded: if all the rest has names, that can be, too
            named = {value: name for one in rest for value, name in _names([one], wiring.calls).items()}
            if len(named) == len(rest):
                places.update(named)
                rest = []
        if op.kind == _CONVOLUTION or (op.kind in _JOINTS and len(op.inputs) > 1 and not rest):
            places.update(_place(op, wiring.calls))
        if op.kind in _MOVES | _PARTS and not rest:
            moved.update(op.outputs)
    reads: dict[str, list[bool]] = {}
    for op in wiring.ops:
        if op.layer:
            reads.setdefault(op.layer, []).append(bool(op.inputs) and op.inputs[0] in places)
    return Between(tuple(places.values()), tuple(layer for layer, each in reads.items() if all(each)))


def _confirmed(model: nn.Module, run: Callable[[AbstractContextManager[None]], Any], found: Between) -> Between:
    """Without the layers that read something else if the outputs are other tensors, as rounded ones are.

    A module may keep what it returns elsewhere, a hook change it, and what is written through a view is seen nowhere.
    """
    given = WeakTensorKeyDictionary()
    unfed: set[str] = set()

    def give(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        other = output.clone()
        given[other] = other._version
        return other

    def reading(name: str) -> Callable[..., None]:
        def read(_: nn.Module, inputs: Any, named: Any) -> None:
            x = next(tensors_in([inputs, named]))
            if given.get(x) != x._version:
                unfed.add(name)

        return read

    @contextlib.contextmanager
    def hooked() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name in found.outputs:
                # Before the hooks of others, since a quantizer is within the module
                stack.callback(model.get_submodule(name).register_forward_hook(give, prepend=True).remove)
            for name in found.fed:
                hook = model.get_submodule(name).register_forward_pre_hook(reading(name), with_kwargs=True)
                stack.callback(hook.remove)
            yield

    run(hooked())
    return Between(found.outputs, tuple(name for name in found.fed if name not in unfed))


def _names(values: Iterable[Value], calls: Mapping[str, int]) -> dict[Value, str]:
    """The first of ``values`` that a module gives which is called once, and its name; none if the model returns one."""
    values = list(values)
    if any(value.returned for value in values):
        return {}
    named = ((value, name) for value in values for name in value.givers if calls[name] == 1)
    return dict(itertools.islice(named, 1))


def _place(op: Op, calls: Mapping[str, int]) -> dict[Value, str]:
    """The last value of the chain behind ``op`` that has a name, if there is a need to round it."""
    chain = _chain(op)
    readers = chain[-1].readers if chain else []
    read_once = len(readers) == 1 and readers[0].layer
    return {} if read_once or not readers else _names(reversed(chain), calls)


def _chain(op: Op) -> list[Value]:
    """The values behind ``op`` of which any can be rounded in place of the others: each has one reader but the last."""
    chain = op.outputs[:1]
    while chain and len(chain[-1].readers) == 1 and chain[-1].readers[0].inputs[0] is chain[-1]:
        reader = chain[-1].readers[0]
        if reader.kind in _CLIPS | _MOVES:
            chain = [*chain, reader.outputs[0]]
        elif reader.kind in _NORMS and op.kind == _CONVOLUTION and chain == op.outputs[:1]:
            chain = reader.outputs[:1]  # rounded before, it could not be folded
        else:
            break
    return chain
