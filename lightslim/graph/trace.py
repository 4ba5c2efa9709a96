"""The shapes that a run went through: what a cut model must show where the algebra predicts it.

A size that the model's Python holds as a constant (``view(b, 2, -1)``) can swallow a cut without an error and mean
something else. Comparing every intermediate shape with the predicted one finds that out, whatever the values are.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from lightslim.graph.axes import Axis, count, leaves
from lightslim.steps import tensors_in


@dataclass(frozen=True)
class Made:
    """One op of a run.

    Attributes:
        op: its name.
        outputs: what it made, by their axes.
        inputs: what it made that from.
        where: path of the module whose own code called it ("" for the whole model).
    """

    op: str
    outputs: tuple[tuple[Axis, ...], ...]
    inputs: tuple[tuple[Axis, ...], ...] = ()
    where: str = ""

    @property
    def touched(self) -> Iterator[Axis]:
        """Every axis of inputs and outputs."""
        return (axis for axes in (*self.outputs, *self.inputs) for axis in axes)


class ShapeTrace(TorchDispatchMode):
    """Notes the name and the output shapes of every op that runs under it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[tuple[int, ...], ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        shapes = tuple(tuple(tensor.shape) for tensor in tensors_in(out))
        if shapes:
            self.seen.append((func.overloadpacket.__name__, shapes))
        return out


def disagreement(expected: Sequence[Made], trace: ShapeTrace, kept: Mapping[Axis, int]) -> tuple[Made, str] | None:
    """The first op whose shapes are not those that keeping ``kept`` units predicts, and why; None if there is none.

    Where the runs part ways (a branch that depends on values) there is nothing more to compare.
    """
    for made, (op, shapes) in zip(expected, trace.seen, strict=False):
        if op != made.op or len(shapes) != len(made.outputs):
            return None
        for axes, shape in zip(made.outputs, shapes, strict=True):
            if len(axes) != len(shape):
                return None
            for axis, size in zip(axes, shape, strict=True):
                predicted = count(axis, kept)
                if predicted != size and any(leaf in kept for leaf in leaves(axis)):
                    why = f"{op} makes a size of {size}, the cut asks for {predicted}: a size is fixed in the code"
                    return made, why
    return None


_COPIES = {"detach", "alias", "clone"}  # autograd makes some of its own


def same_way(one: Iterable[Made], other: Iterable[Made], kept: Mapping[Axis, Any], apart: Container[str]) -> bool:
    """Whether two runs did the same to the units of ``kept``: the same ops, by the same modules, on the same sizes.

    Args:
        one: a run.
        other: another.
        kept: the axes that matter.
        apart: paths of modules that may do what they like.
    """

    def steps(run: Iterable[Made]) -> Iterator[tuple[str, str, list[int]]]:
        for made in run:
            touches = any(leaf in kept for axis in made.touched for leaf in leaves(axis))
            if touches and made.op not in _COPIES and made.where not in apart:
                yield made.op, made.where, [axis.size for axis in made.outputs[0]]

    return list(steps(one)) == list(steps(other))


@contextmanager
def whereabouts(module: nn.Module) -> Iterator[list[str]]:
    """A stack whose last entry is the path of the submodule whose ``forward`` is running."""
    names = {id(child): name for name, child in module.named_modules()}
    stack = [""]

    def enter(child: nn.Module, inputs: Any) -> None:
        stack.append(names.get(id(child), stack[-1]))

    def leave(child: nn.Module, inputs: Any, output: Any) -> None:
        stack.pop()

    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
    try:
        yield stack
    finally:
        for hook in hooks:
            hook.remove()
