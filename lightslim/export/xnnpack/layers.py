"""Which integer layers of XNNPACK a layer becomes, and the graph that says so.

XNNPACK has two kinds of integer layers. One goes from int8 to int8: it takes the learned steps as they are, but counts
its bias in whole products of two codes, which moves some results over a rounding edge. The other goes from int8 to
float and keeps its bias in float; it is made for inputs whose range is only known at run time. Here such a layer gets
two more input channels, with the ends of the learned grid in them and zeros for weights: the range that is found at run
time then is the learned one, and each code what it was in training.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lightslim.export.xnnpack.clip import spell_as_int8
from lightslim.export.xnnpack.edit import (
    ACTIVATIONS,
    CONV2D,
    DECODE,
    LIMITS,
    LINEAR,
    NORM,
    ONE_DIMENSION,
    ROUND,
    SAME,
    TRANSPOSED,
    UNROUND,
    Edit,
    kind_of,
    only_user,
)
from lightslim.kernels.codes import Codes
from lightslim.kernels.grid import along

TINY = torch.finfo(torch.float32).tiny


@dataclass(eq=False)
class Layer:
    """A convolution or linear operator ``node`` with integer weights, a step for each channel, and perhaps a bias."""

    node: Any
    codes: Codes
    bias: Tensor | None

    @property
    def groups(self) -> int:
        """Of a convolution; one for any other."""
        return self.node.args[6] if kind_of(self.node) != LINEAR and len(self.node.args) > 6 else 1

    @property
    def step(self) -> Tensor:
        """The steps as normal numbers, which XNNPACK insists on: any will do for a channel of zeros."""
        empty = self.codes.values.transpose(0, self.codes.axis or 0).flatten(1).abs().amax(1) == 0
        return torch.where(empty, self.codes.step.max(), self.codes.step).clamp_min(TINY)


def with_integers(module: fx.GraphModule, deploy: str) -> fx.GraphModule:
    """Spell each layer that has integer weights as XNNPACK runs it; ``deploy`` as in ``mobile`` files."""
    edit = Edit(module)
    nodes = [node for node in edit.graph.nodes if _has_codes(node)]
    layers = [Layer(node, _codes(edit, node.args[1]), edit.content((*node.args, None)[2])) for node in nodes]
    for layer in layers:
        _fold_norm(edit, layer)
        if kind_of(layer.node) in ONE_DIMENSION:
            _as_image(edit, layer)
    _share_rounding(edit)
    _part_decoding(edit)
    for node in list(edit.graph.nodes):
        if kind_of(node) == ROUND:
            spell_as_int8(edit, node)
    for layer in layers:
        _spelling(layer, deploy)(edit, layer)
    for node in list(edit.graph.nodes):
        if kind_of(node) == DECODE and not all(_has_codes(reader) for reader in node.users):
            node.replace_all_uses_with(edit.constant(node, _codes(edit, node).decoded()))
    return edit.done()


def _has_codes(node: Any) -> bool:
    return kind_of(node) in (LINEAR, CONV2D, SAME, TRANSPOSED, *ONE_DIMENSION) and kind_of(node.args[1]) == DECODE


def _codes(edit: Edit, decode: Any) -> Codes:
    values, step = (edit.content(part) for part in decode.args[:2])
    return Codes(values, step, torch.zeros_like(step), decode.args[3])


def _fold_norm(edit: Edit, layer: Layer) -> None:
    """Fold a batch norm into steps and bias, if nothing else reads the layer: the codes stay, but for their signs."""
    norm = only_user(layer.node)
    if kind_of(norm) != NORM or (kind_of(layer.node) == LINEAR and layer.node.meta["val"].ndim != 2):
        return
    gamma, beta, mean, variance = (edit.content(part) for part in norm.args[1:5])
    values, step, zero, axis = layer.codes
    if mean is None or len(mean) != len(step):
        return
    factor = (1.0 if gamma is None else gamma) / (variance + norm.args[6]).sqrt()
    signs = along(factor.sign().to(torch.int8), values, axis)
    layer.codes = Codes(values * signs, step * factor.abs(), zero, axis)
    layer.bias = ((0.0 if layer.bias is None else layer.bias) - mean) * factor + (0.0 if beta is None else beta)
    for part in list(norm.users):
        part.replace_all_uses_with(layer.node)
        edit.graph.erase_node(part)
    edit.graph.erase_node(norm)


def _as_image(edit: Edit, layer: Layer) -> None:
    """Make it a convolution over two dimensions: XNNPACK has no others."""
    node, x = layer.node, layer.node.args[0]
    grid = x.args[0].args[1:] if kind_of(x) == UNROUND else None
    x = edit.call(node, "aten.unsqueeze.default", x if grid is None else x.args[0].args[0], 2)
    sizes = [[0 if index == 1 else 1, *size] if isinstance(size, (list, tuple)) else size
             for index, size in enumerate(node.args[3:])]  # fmt: skip
    inputs = (x if grid is None else edit.rounded(node, x, grid), *(*node.args, None)[1:3])
    image = edit.call(node, ONE_DIMENSION[kind_of(node)], *inputs, *sizes)
    node.replace_all_uses_with(edit.call(node, "aten.squeeze.dim", image, 2))
    edit.graph.erase_node(node)
    layer.node, layer.codes = image, layer.codes._replace(values=layer.codes.values.unsqueeze(2))


def _share_rounding(edit: Edit) -> None:
    # Of one value on one grid, so that a layer's output has one reader
    seen: dict[Any, fx.Node] = {}
    for node in list(edit.graph.nodes):
        if kind_of(node) == ROUND and seen.setdefault(node.args, node) is not node:
            node.replace_all_uses_with(seen[node.args])
            edit.graph.erase_node(node)


def _part_decoding(edit: Edit) -> None:
    # For each reader: lowering leaves it out for a layer of integers, though another reader may compute in float
    for node in list(edit.graph.nodes):
        for reader in list(node.users)[1:] if kind_of(node) == UNROUND else ():
            reader.replace_input_with(node, edit.call(reader, UNROUND, *node.args))


def _spelling(layer: Layer, deploy: str) -> Callable[[Edit, Layer], None]:
    kind, sizes = kind_of(layer.node), layer.codes.values.shape[1:]
    if kind_of(layer.node.args[0]) != UNROUND:
        return _in_float
    stays_integer = _is_rounded_next(layer)
    if deploy == "fast" and stays_integer:
        return _from_int8_to_int8
    if kind in (LINEAR, CONV2D, SAME) and layer.groups == 1 and (kind != SAME or all(size % 2 for size in sizes[1:])):
        return _from_int8_to_float
    return _from_int8_to_int8 if stays_integer and (kind == TRANSPOSED or sizes[0] > 1) else _in_float


def _is_rounded_next(layer: Layer) -> bool:
    """Whether all that happens to the output is an activation and rounding, and XNNPACK has such a layer."""
    behind = only_user(layer.node)
    if kind_of(behind) in ACTIVATIONS:
        behind = only_user(behind)
    if kind_of(behind) != ROUND or (kind_of(layer.node) == TRANSPOSED and layer.groups > 1):
        return False
    product = layer.step * layer.node.args[0].args[1]
    bias = 0.0 if layer.bias is None else (layer.bias / product).abs().max().item()
    largest_sum = 2**14 * layer.codes.values.numel() / len(layer.step)
    return bias + largest_sum < 2**31 and product.max().item() < 256 * behind.args[1]


def _set(edit: Edit, layer: Layer, weight: fx.Node) -> None:
    bias = None if layer.bias is None else edit.constant(layer.node, layer.bias)
    layer.node.args = (layer.node.args[0], weight, bias, *layer.node.args[3:])


def _in_float(edit: Edit, layer: Layer) -> None:
    _set(edit, layer, edit.constant(layer.node, layer.codes.decoded()))


def _from_int8_to_int8(edit: Edit, layer: Layer) -> None:
    _set(edit, layer, edit.weight(layer.node, layer.codes.values, layer.step, layer.codes.axis))


def _from_int8_to_float(edit: Edit, layer: Layer) -> None:
    """A layer whose bias and output are in float, by the operators for a range that is found at run time."""
    node, values = layer.node, layer.codes.values
    x, family = _with_ends(edit, layer), "quantized_decomposed"
    found = edit.call(node, f"{family}.choose_qparams.tensor", x, *LIMITS[:2], TINY, LIMITS[2])
    with edit.graph.inserting_before(node):
        grid = [edit.graph.call_function(operator.getitem, (found, index)) for index in (0, 1)]
    codes = edit.call(node, f"{family}.quantize_per_tensor.tensor", x, *grid, *LIMITS)
    node.update_arg(0, edit.call(node, f"{family}.dequantize_per_tensor.tensor", codes, *grid, *LIMITS))
    wide = torch.cat([values, values.new_zeros(len(values), 2, *values.shape[2:])], 1)
    _set(edit, layer, edit.weight(node, wide, layer.step, 0))


def _with_ends(edit: Edit, layer: Layer) -> fx.Node:
    """The input and two channels that are at one end of its grid: layers of nothing but a bias beyond it."""
    node, (rounded, *grid) = layer.node, layer.node.args[0].args
    shape = (2, layer.codes.values.shape[1], *[1] * (layer.codes.values.ndim - 2))
    weight = edit.weight(node, torch.zeros(shape, dtype=torch.int8), torch.ones(2), 0)
    bias = edit.constant(node, torch.tensor([-1000.0, 1000.0]) * grid[0])
    ends = edit.call(node, CONV2D if len(shape) == 4 else LINEAR, node.args[0], weight, bias)
    beside = [edit.call(node, UNROUND, rounded, *grid), edit.rounded(node, ends, grid)]
    return edit.rounded(node, edit.call(node, "aten.cat.default", beside, 1 if len(shape) == 4 else -1), grid)
