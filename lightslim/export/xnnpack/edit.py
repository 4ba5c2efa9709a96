"""Small steps on a traced graph, and the operators in it that matter."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

ROUND, UNROUND = (f"quantized_decomposed.{name}_per_tensor.default" for name in ("quantize", "dequantize"))
DECODE = "quantized_decomposed.dequantize_per_channel.default"
NORM = "aten._native_batch_norm_legit_no_training.default"
HARDTANH, MEAN = "aten.hardtanh.default", "aten.mean.dim"
ACTIVATIONS = {"aten.relu.default": (0.0, math.inf), "aten.relu6.default": (0.0, 6.0), HARDTANH: (-1.0, 1.0)}
LINEAR, CONV2D, SAME = "aten.linear.default", "aten.conv2d.default", "aten.conv2d.padding"
TRANSPOSED = "aten.conv_transpose2d.input"
ONE_DIMENSION = {"aten.conv1d.default": CONV2D, "aten.conv1d.padding": SAME}
LIMITS = (-128, 127, torch.int8)


def kind_of(node: Any) -> str:
    """The operator that a node calls, as ``aten.relu.default``; nothing for other nodes."""
    return str(node.target) if isinstance(node, fx.Node) and node.op == "call_function" else ""


def only_user(node: Any) -> Any:
    """The node that reads this one, if it is the only one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


class Edit:
    """Small steps on a graph: new nodes and constants.

    Args:
        module: it is changed in place.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.graph, self.made = module, module.graph, 0

    def call(self, before: fx.Node, kind: str, *arguments: Any) -> fx.Node:
        """A new node of operator ``kind``."""
        with self.graph.inserting_before(before):
            return self.graph.call_function(operator.attrgetter(kind)(torch.ops), arguments)

    def rounded(self, before: fx.Node, x: Any, grid: Sequence[Any]) -> fx.Node:
        """``x`` rounded to a grid and decoded again."""
        return self.call(before, UNROUND, self.call(before, ROUND, x, *grid), *grid)

    def constant(self, before: fx.Node, value: Tensor) -> fx.Node:
        """A new constant, floats as float32."""
        self.made += 1
        name = f"constant_{self.made}"
        self.module.register_buffer(name, (value.float() if value.is_floating_point() else value).contiguous())
        with self.graph.inserting_before(before):
            return self.graph.get_attr(name)

    def weight(self, before: fx.Node, values: Tensor, step: Tensor, axis: int | None) -> fx.Node:
        """Integers that are decoded with a step for each channel."""
        parts = (self.constant(before, part) for part in (values, step, torch.zeros(len(step), dtype=torch.int64)))
        return self.call(before, DECODE, *parts, axis, -127, 127, torch.int8)

    def content(self, node: Any) -> Any:
        """What a constant holds, in double precision; None for what is no constant."""
        if getattr(node, "op", None) != "get_attr":
            return None
        value = operator.attrgetter(str(node.target))(self.module).detach()
        return value.double() if value.is_floating_point() else value

    def done(self) -> fx.GraphModule:
        """The module that the graph is now, without what nothing reads."""
        self.graph.eliminate_dead_code()
        return fx.GraphModule(self.module, self.graph).requires_grad_(False)
