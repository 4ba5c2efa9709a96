"""The shapes that a run went through: what a cut model must show where the algebra predicts it.

A size that the model's Python holds as a constant (``view(b, 2, -1)``) can swallow a cut without an error and mean
something else. Comparing every intermediate shape with the predicted one finds that out, whatever the values are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from lightslim.graph.axes import Axis, count, leaves
from lightslim.steps import tensors_in


@dataclass(frozen=True)
class Made:
    """The outputs of one op, by their axes."""

    op: str
    outputs: tuple[tuple[Axis, ...], ...]


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


def disagreement(expected: Sequence[Made], trace: ShapeTrace, kept: Mapping[Axis, int]) -> str | None:
    """The first op whose shapes are not those that keeping ``kept`` units predicts; None if there is none.

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
                    return f"{op} makes a size of {size}, the cut asks for {predicted}: a size is fixed in the code"
    return None
