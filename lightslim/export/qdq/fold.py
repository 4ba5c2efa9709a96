"""Batch norm behind an integer layer, folded into its scales: the integers stay what they are.

``gamma * (w * x + b - mean) / sigma + beta`` with ``w = codes * step`` is ``codes' * step' * x + b'`` with
``codes' = codes * sign(gamma)`` and ``step' = step * |gamma| / sigma``, channel by channel.
"""

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from lightslim.export.qdq.graph import (
    Array,
    attribute,
    constant,
    is_plain_product,
    marks,
    new_constant,
    only_consumer,
    replace,
)
from lightslim.export.qdq.marks import OF_WEIGHT
from lightslim.kernels.codes import Codes
from lightslim.kernels.grid import along


def fold_batch_norms(graph: ir.Graph, weights: dict[str, Codes]) -> None:
    """Fold where a layer's output goes into a batch norm and nowhere else; ``weights`` is changed to fit."""
    found = list(marks(graph, OF_WEIGHT))
    uses = [layer for _, layer in found]
    for mark, layer in found:
        node = only_consumer(mark.outputs[0])
        norm = only_consumer(node.outputs[0]) if node is not None and _foldable(node, mark) else None
        # A layer that runs twice has one weight and perhaps two batch norms
        if uses.count(layer) == 1 and norm is not None and norm.op_type == "BatchNormalization":
            assert node is not None
            _fold(graph, node, norm, layer, weights)


def _foldable(node: ir.Node, mark: ir.Node) -> bool:
    if node.op_type == "Gemm":
        return is_plain_product(node, mark.outputs[0])
    # The scales of a grouped transposed convolution repeat in each group
    plain = node.op_type == "Conv" or (node.op_type == "ConvTranspose" and attribute(node, "group", 1) == 1)
    return plain and node.inputs[1] is mark.outputs[0]


def _fold(graph: ir.Graph, node: ir.Node, norm: ir.Node, layer: str, weights: dict[str, Codes]) -> None:
    numbers = [constant(value) for value in norm.inputs[1:5]]
    bias = constant(node.inputs[2]) if _has_bias(node) else np.zeros(1)
    if bias is None or any(part is None for part in numbers):
        return
    gamma, beta, mean, variance = (np.asarray(part, np.float64) for part in numbers)
    factor = gamma / np.sqrt(variance + attribute(norm, "epsilon", 1e-5))
    axis = 1 if node.op_type == "ConvTranspose" else 0
    weights[layer] = scaled(weights[layer], torch.from_numpy(factor), axis)
    _set_bias(graph, node, f"{layer}.bias", (bias - mean) * factor + beta)
    replace(norm, node.outputs[0])


def scaled(codes: Codes, factor: Tensor, axis: int) -> Codes:
    """The codes of the weight times ``factor`` along ``axis``: their signs may change, nothing else.

    Example:
        >>> codes = Codes(torch.tensor([[1, -2], [3, 4]], dtype=torch.int8), torch.tensor(0.5), torch.tensor(0), None)
        >>> scaled(codes, torch.tensor([-2.0, 3.0]), axis=0)[:2]
        (tensor([[-1,  2],
                [ 3,  4]], dtype=torch.int8), tensor([1.0000, 1.5000]))
    """
    sign = along(factor.sign().to(codes.values.dtype), codes.values, axis)
    step = (codes.step.double() * factor.abs()).float()
    return Codes(codes.values * sign, step, torch.zeros_like(step), axis)


def _has_bias(node: ir.Node) -> bool:
    return len(node.inputs) > 2 and node.inputs[2] is not None


def _set_bias(graph: ir.Graph, node: ir.Node, name: str, bias: Array) -> None:
    value = new_constant(graph, name, bias.astype(np.float32))
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, value)
