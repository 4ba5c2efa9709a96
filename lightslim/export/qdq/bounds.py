"""What can be told about the values in a graph without running it: between which numbers they lie."""

from collections.abc import Callable, Sequence
from math import inf

import onnx_ir as ir

Interval = tuple[float, float]
EVERYTHING: Interval = (-inf, inf)


def interval(value: ir.Value | None) -> Interval:
    """Bounds that ``value`` never leaves, whatever the inputs.

    Example:
        >>> x = ir.val("x", ir.DataType.FLOAT, (1, 4))
        >>> relu = ir.node("Relu", [x])
        >>> interval(ir.node("MaxPool", relu.outputs).outputs[0])
        (0.0, inf)
    """
    node = value.producer() if value is not None else None
    if node is None or node.domain:
        return EVERYTHING
    if node.op_type in FIXED:
        return FIXED[node.op_type]
    rule = RULES.get(node.op_type)
    return rule(node) if rule else EVERYTHING


def _first(node: ir.Node) -> Interval:
    return interval(node.inputs[0])


def _relu(node: ir.Node) -> Interval:
    low, high = _first(node)
    return max(low, 0.0), max(high, 0.0)


def _clip(node: ir.Node) -> Interval:
    low, high = _first(node)
    floor, ceiling = clip_limits(node)
    return min(max(low, floor), ceiling), max(min(high, ceiling), floor)


def clip_limits(node: ir.Node) -> Interval:
    """Between what a Clip node keeps its values."""
    limits = [number(value) for value in node.inputs[1:]] + [None, None]
    return -inf if limits[0] is None else limits[0], inf if limits[1] is None else limits[1]


def number(value: ir.Value | None) -> float | None:
    """A constant of one element; None where there is none."""
    constant = None if value is None else ir.convenience.get_const_tensor(value)
    return None if constant is None or constant.size != 1 else float(constant.numpy().reshape(-1)[0])


def _with_zero(node: ir.Node) -> Interval:
    """Zeros at the border may take part."""
    low, high = _first(node)
    return min(low, 0.0), max(high, 0.0)


def _union(values: Sequence[ir.Value | None]) -> Interval:
    bounds = [interval(value) for value in values]
    return min(low for low, _ in bounds), max(high for _, high in bounds)


def _sum(node: ir.Node) -> Interval:
    (a, b), (c, d) = (interval(value) for value in node.inputs[:2])
    return a + c, b + d


def _product(node: ir.Node) -> Interval:
    a, b = (interval(value) for value in node.inputs[:2])
    return (0.0, inf) if min(a[0], b[0]) >= 0 else EVERYTHING


FIXED: dict[str, Interval] = {
    "Sigmoid": (0.0, 1.0),
    "HardSigmoid": (0.0, 1.0),
    "Softmax": (0.0, 1.0),
    "Tanh": (-1.0, 1.0),
    "Exp": (0.0, inf),
    "Abs": (0.0, inf),
    "Softplus": (0.0, inf),
}

SAME = (
    "MaxPool GlobalMaxPool GlobalAveragePool ReduceMean ReduceMax Reshape Transpose Flatten Squeeze Unsqueeze Slice "
    "Gather Split Expand Identity Dropout DepthToSpace SpaceToDepth"
)
RULES: dict[str, Callable[[ir.Node], Interval]] = {
    **dict.fromkeys(SAME.split(), _first),
    "Relu": _relu,
    "Clip": _clip,
    "AveragePool": _with_zero,
    "Concat": lambda node: _union(node.inputs),
    "Max": lambda node: _union(node.inputs),
    "Add": _sum,
    "Mul": _product,
}
