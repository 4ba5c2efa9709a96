"""Small steps on an ONNX graph: new constants and nodes, and the marks in it."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lightslim.export.qdq.marks import DOMAIN

Array = NDArray[Any]

# Runtimes move rounding up past these, and what is monotone may change places with them
MOVES_PAST = ("MaxPool", "Reshape", "Transpose", "Flatten")


def marks(graph: ir.Graph, role: str) -> Iterator[tuple[ir.Node, str]]:
    """The marks of one role and the names of their tensors, in the graph's order."""
    for node in list(graph):
        if node.domain == DOMAIN and node.op_type == role:
            yield node, node.attributes["tensor"].as_string()


def only_consumer(value: ir.Value) -> ir.Node | None:
    """The one node that reads ``value``, if nothing else does."""
    readers = value.consumers()
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


def constant(value: ir.Value | None) -> Array | None:
    """What a constant holds; None for anything else."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def new_constant(graph: ir.Graph, name: str, content: Array) -> ir.Value:
    """An initializer called ``name``, or nearly so where the name is taken."""
    taken, number = name, 1
    while taken in graph.initializers:
        taken, number = f"{name}_{number}", number + 1
    value = ir.val(taken, const_value=ir.tensor(np.asarray(content, order="C"), name=taken))
    graph.register_initializer(value)
    return value


class Before:
    """Puts new nodes before ``place``.

    Args:
        place: a node of ``graph``.
        graph: the graph.
        prefix: of the new values' names.
    """

    def __init__(self, place: ir.Node, graph: ir.Graph, prefix: str) -> None:
        self.place, self.graph, self.prefix = place, graph, prefix

    def constant(self, name: str, content: Any) -> ir.Value:
        """A new initializer."""
        return new_constant(self.graph, f"{self.prefix}_{name}", np.asarray(content))

    def node(self, operator: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """A new node's output."""
        node = ir.node(operator, inputs, attributes)
        node.outputs[0].name = f"{self.prefix}_{operator.lower()}"
        self.graph.insert_before(self.place, node)
        return node.outputs[0]


def replace(node: ir.Node, value: ir.Value) -> None:
    """Let everything read ``value`` instead of the output of ``node``, and drop the node."""
    node.outputs[0].replace_all_uses_with(value, replace_graph_outputs=True)
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    graph.remove(node, safe=True)


def is_plain_product(node: ir.Node, weight: ir.Value | None) -> bool:
    """Whether a Gemm node is what a linear layer computes with ``weight`` and a bias that is a constant."""
    factors = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0), attribute(node, "transB", 0)
    plain = node.op_type == "Gemm" and factors == (1.0, 1.0, 1) and node.inputs[1] is weight
    return plain and (len(node.inputs) < 3 or constant(node.inputs[2]) is not None)


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """The value of an attribute."""
    found: Mapping[str, Any] = node.attributes
    return found[name].value if name in found else default
