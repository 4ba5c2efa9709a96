"""Integer weights and biases as initializers of a graph."""

from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from lightslim.export.qdq.graph import Array, Before, attribute, constant, marks, only_consumer, replace
from lightslim.export.qdq.marks import OF_WEIGHT
from lightslim.export.qdq.presets import Encoding
from lightslim.export.qdq.spelling import Spelling
from lightslim.kernels.codes import Codes

SATURATION = 2**15 - 1
LARGEST_BIAS = 2**30


def encode_weights(
    graph: ir.Graph, weights: dict[str, Codes], inputs: dict[ir.Value, Spelling], encoding: Encoding
) -> None:
    """Replace the marks of weights by integers and the nodes that decode them."""
    for mark, layer in marks(graph, OF_WEIGHT):
        codes, place = weights[layer], mark
        transpose = only_consumer(mark.outputs[0])
        if transpose is not None and transpose.op_type == "Transpose":
            codes, place = _transposed(codes, list(attribute(transpose, "perm", None) or ())), transpose
        codes = codes._replace(step=_nowhere_zero(codes.step))
        node = only_consumer(place.outputs[0])
        spelling = inputs.get(node.inputs[0]) if node is not None and node.inputs[0] is not None else None
        shift = 128 if encoding.weights == "fitting" and spelling and _overflows(codes, spelling) else 0
        decoded = _decoded(Before(place, graph, f"{layer}.weight"), codes, shift)
        if node is not None and spelling is not None and encoding.integer_bias:
            _encode_bias(Before(place, graph, f"{layer}.bias"), node, codes, spelling)
        replace(place, decoded)
        if place is not mark:
            graph.remove(mark, safe=True)


def _transposed(codes: Codes, order: list[int]) -> Codes:
    order = order or list(reversed(range(codes.values.ndim)))
    axis = None if codes.axis is None else order.index(codes.axis)
    return Codes(codes.values.permute(order), codes.step, codes.zero, axis)


def _nowhere_zero(step: torch.Tensor) -> torch.Tensor:
    """A channel of zeros takes any step; it must not be one that a bias cannot be counted in."""
    largest = step.max().item() or 1.0
    return torch.where(step == 0, largest, step)


def _overflows(codes: Codes, spelling: Spelling) -> bool:
    """Whether the sum of two products may leave 16 bits, which some CPUs cut off there without a word."""
    return 2 * spelling.high * int(codes.values.int().abs().max()) > SATURATION


def _decoded(place: Before, codes: Codes, shift: int) -> ir.Value:
    values = codes.values.contiguous().numpy()
    if shift:
        values = (values.astype(np.int16) + shift).astype(np.uint8)
    scale = codes.step.float().numpy()
    # Under the weight's own name
    integers = place.constant("codes", values)
    parts = place.constant("scale", scale), place.constant("zero_point", np.full_like(scale, shift, dtype=values.dtype))
    axis: dict[str, Any] = {} if codes.axis is None else {"axis": codes.axis}
    return place.node("DequantizeLinear", integers, *parts, **axis)


def _encode_bias(place: Before, node: ir.Node, codes: Codes, spelling: Spelling) -> None:
    """Count the bias of a layer in its own integers, if that lets the whole layer run as one integer operation."""
    bias = constant(node.inputs[2]) if node.op_type in ("Conv", "Gemm") and len(node.inputs) > 2 else None
    rounding = _rounding_after(node.outputs[0])
    if bias is None or not (rounding or node.op_type == "Gemm"):
        return
    scale = np.broadcast_to(np.float32(spelling.step) * codes.step.float().numpy(), bias.shape)
    counts = np.round(bias / scale.astype(np.float64))
    if np.abs(counts).max(initial=0) <= LARGEST_BIAS:
        node.replace_input_with(2, _counted(place, counts, scale))


def _counted(place: Before, counts: Array, scale: Array) -> ir.Value:
    integers = place.constant("codes", counts.astype(np.int32))
    return place.node("DequantizeLinear", integers, place.constant("scale", scale), axis=0)


def _rounding_after(value: ir.Value) -> ir.Node | None:
    """The node that rounds ``value``, if a runtime can move it up to there and nothing else reads what is before."""
    reader = only_consumer(value)
    while reader is not None and reader.op_type in ("MaxPool", "Reshape", "Transpose", "Flatten"):
        reader = only_consumer(reader.outputs[0])
    return reader if reader is not None and reader.op_type == "QuantizeLinear" else None
