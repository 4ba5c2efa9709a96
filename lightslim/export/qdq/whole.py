"""Which layers a runtime can run as one integer operation, with the same result."""

import onnx_ir as ir

from lightslim.export.qdq.graph import MOVES_PAST, is_plain_product, marks, only_consumer
from lightslim.export.qdq.marks import DOMAIN, OF_VALUE, OF_WEIGHT
from lightslim.export.qdq.presets import Encoding
from lightslim.export.qdq.spelling import Spelling
from lightslim.export.qdq.values import Wanted
from lightslim.kernels.codes import Codes

TWO_PRODUCTS = 2**15 - 1


def whole_layers(graph: ir.Graph, wanted: Wanted, weights: dict[str, Codes], encoding: Encoding) -> set[ir.Node]:
    """The nodes that are to stand between DequantizeLinear nodes; the others compute in float with decoded weights."""
    found: set[ir.Node] = set()
    for mark, layer in marks(graph, OF_WEIGHT):
        node = only_consumer(mark.outputs[0])
        if not encoding.folds:
            found.update(mark.outputs[0].consumers())
        elif node is not None and _whole(node, wanted, weights[layer], encoding):
            found.add(node)
    return found


def overflowing(graph: ir.Graph, wanted: Wanted, weights: dict[str, Codes], whole: set[ir.Node]) -> list[str]:
    """The layers among ``whole`` that are wrong on CPUs without VNNI: 16 bits do not hold two of their products."""
    found = []
    for mark, layer in marks(graph, OF_WEIGHT):
        read = [spelling_of(node, wanted) for node in mark.outputs[0].consumers() if node in whole]
        if any(spelling is not None and not _fits(spelling, weights[layer]) for spelling in read):
            found.append(layer)
    return found


def in_float(graph: ir.Graph, wanted: Wanted, whole: set[ir.Node]) -> list[str]:
    """The convolutions that read integers and are not among ``whole``."""
    found = []
    for mark, layer in marks(graph, OF_WEIGHT):
        nodes = (node for node in mark.outputs[0].consumers() if node.op_type == "Conv" and node not in whole)
        if any(spelling_of(node, wanted) and not node.outputs[0].is_graph_output() for node in nodes):
            found.append(layer)
    return found


def _whole(node: ir.Node, wanted: Wanted, codes: Codes, encoding: Encoding) -> bool:
    spelling = spelling_of(node, wanted)
    if spelling is None or not (encoding.overflows or _fits(spelling, codes)):
        return False
    if node.op_type == "Gemm":
        return is_plain_product(node, node.inputs[1])
    exact = encoding.rounds_bias or len(node.inputs) < 3
    return node.op_type == "MatMul" or (node.op_type == "Conv" and exact and is_rounded(node.outputs[0], wanted))


def spelling_of(node: ir.Node, wanted: Wanted) -> Spelling | None:
    """The integers that a layer reads, if it does."""
    mark = node.inputs[0].producer() if node.inputs[0] is not None else None
    found = wanted.get(mark) if mark is not None and mark.op_type == OF_VALUE else None
    return found if isinstance(found, Spelling) else None


def _fits(spelling: Spelling, codes: Codes) -> bool:
    """Whether the sum of two products stays in 16 bits, as CPUs without VNNI add them."""
    return 2 * spelling.high * int(codes.values.int().abs().max()) <= TWO_PRODUCTS


def is_rounded(value: ir.Value, wanted: Wanted) -> bool:
    """Whether nothing reads ``value`` but rounding to integers, if a runtime moves that up to here."""
    reader = only_consumer(value)
    while reader is not None and reader.op_type in MOVES_PAST:
        reader = only_consumer(reader.outputs[0])
    return reader is not None and reader.domain == DOMAIN and isinstance(wanted.get(reader), Spelling)
