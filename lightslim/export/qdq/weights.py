"""Integer weights and biases as initializers of a graph."""

import numpy as np
import onnx_ir as ir
import torch

from lightslim.export.qdq.graph import (
    Array,
    Before,
    attribute,
    constant,
    is_plain_product,
    marks,
    only_consumer,
    replace,
)
from lightslim.export.qdq.marks import OF_WEIGHT
from lightslim.export.qdq.presets import Encoding
from lightslim.export.qdq.spelling import Spelling
from lightslim.export.qdq.values import Wanted
from lightslim.export.qdq.whole import is_rounded, spelling_of
from lightslim.kernels.codes import Codes
from lightslim.kernels.grid import along

LARGEST_BIAS = 2**30


def turn_matrices(graph: ir.Graph, weights: dict[str, Codes]) -> None:
    """Transpose the codes themselves, in ``weights``, where the graph transposes a weight."""
    found = list(marks(graph, OF_WEIGHT))
    uses = [layer for _, layer in found]
    for mark, layer in found:
        node = only_consumer(mark.outputs[0])
        if node is not None and node.op_type == "Transpose" and uses.count(layer) == 1:
            order = list(attribute(node, "perm", None) or reversed(range(weights[layer].values.ndim)))
            weights[layer] = _turned(weights[layer], order)
            replace(node, mark.outputs[0])


def _turned(codes: Codes, order: list[int]) -> Codes:
    axis = None if codes.axis is None else order.index(codes.axis)
    return Codes(codes.values.permute(order).contiguous(), codes.step, codes.zero, axis)


def add_biases_in_float(graph: ir.Graph, weights: dict[str, Codes]) -> None:
    """Take the bias of each layer out of it: runtimes would count it in the layer's steps, and so round it.

    By subtraction, since ONNX Runtime puts a layer and an addition together again; where there is no bias a zero keeps
    it from rounding the weight anew.
    """
    for mark, layer in marks(graph, OF_WEIGHT):
        node = only_consumer(mark.outputs[0])
        if node is not None and is_plain_product(node, mark.outputs[0]):
            weights[layer] = _turned(weights[layer], [1, 0])
            _apart(graph, node, layer, "MatMul", ())
        elif node is not None and node.op_type in ("Conv", "ConvTranspose"):
            _apart(graph, node, layer, node.op_type, (-1, *[1] * (weights[layer].values.ndim - 2)))


def _apart(graph: ir.Graph, node: ir.Node, layer: str, operator: str, shape: tuple[int, ...]) -> None:
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(1, np.float32)
    if bias is None:
        return
    place = Before(node, graph, layer)
    attributes = {} if operator == "MatMul" else {name: one.value for name, one in node.attributes.items()}
    product = place.node(operator, *node.inputs[:2], **attributes)
    negative = place.constant("negative_bias", -bias.reshape(shape or bias.shape))
    replace(node, place.node("Sub", product, negative))


def encode_weights(
    graph: ir.Graph, weights: dict[str, Codes], wanted: Wanted, whole: set[ir.Node], encoding: Encoding
) -> None:
    """Replace the marks of weights by integers and the nodes that decode them."""
    for mark, layer in marks(graph, OF_WEIGHT):
        codes = weights[layer]._replace(step=_nowhere_zero(weights[layer].step))
        nodes = mark.outputs[0].consumers()
        for node in nodes:
            spelling = spelling_of(node, wanted)
            if encoding.rounds_bias and spelling and _is_one_operation(node, wanted, whole):
                _count_bias(Before(node, graph, f"{layer}.bias"), node, codes, spelling)
        place = Before(mark, graph, f"{layer}.weight")
        replace(mark, _decoded(place, codes) if whole.issuperset(nodes) else _decoded_at_loading(place, codes))


def _is_one_operation(node: ir.Node, wanted: Wanted, whole: set[ir.Node]) -> bool:
    return node in whole and (node.op_type == "Gemm" or is_rounded(node.outputs[0], wanted))


def _nowhere_zero(step: torch.Tensor) -> torch.Tensor:
    """A channel of zeros takes any step; it must not be one that a bias cannot be counted in."""
    return torch.where(step == 0, step.max().item() or 1.0, step)


def _decoded(place: Before, codes: Codes) -> ir.Value:
    scale = codes.step.float().numpy()
    parts = place.constant("scale", scale), place.constant("zero_point", np.zeros(scale.shape, np.int8))
    axis = {} if codes.axis is None else {"axis": codes.axis}
    return place.node("DequantizeLinear", place.constant("codes", codes.values.numpy()), *parts, **axis)


def _decoded_at_loading(place: Before, codes: Codes) -> ir.Value:
    scale = along(codes.step.float(), codes.values, codes.axis).numpy()
    values = place.node("Cast", place.constant("codes", codes.values.numpy()), to=ir.DataType.FLOAT.value)
    return place.node("Mul", values, place.constant("scale", scale))


def _count_bias(place: Before, node: ir.Node, codes: Codes, spelling: Spelling) -> None:
    """Write the bias of a layer as the integers that it adds, unless they are too many."""
    bias = constant(node.inputs[2]) if node.op_type in ("Conv", "Gemm") and len(node.inputs) > 2 else None
    if bias is None:
        return
    scale = np.broadcast_to(np.float32(spelling.step) * codes.step.float().numpy(), bias.shape)
    counts = np.round(bias / scale.astype(np.float64))
    if np.abs(counts).max(initial=0) <= LARGEST_BIAS:
        node.replace_input_with(2, _counted(place, counts, scale))


def _counted(place: Before, counts: Array, scale: Array) -> ir.Value:
    integers = place.constant("codes", counts.astype(np.int32))
    return place.node("DequantizeLinear", integers, place.constant("scale", scale), axis=0)
