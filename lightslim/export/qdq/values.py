"""Inputs of layers, and outputs, rounded to their grids, by nodes that runtimes know."""

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir

from lightslim.export.qdq.bounds import clip_limits, interval
from lightslim.export.qdq.graph import MOVES_PAST, Before, marks, only_consumer, replace
from lightslim.export.qdq.marks import OF_VALUE, ValueGrid
from lightslim.export.qdq.presets import Encoding
from lightslim.export.qdq.spelling import Spelling, spelled
from lightslim.kernels.grid import TINY

Wanted = dict[ir.Node, Spelling | ValueGrid]


def plan_values(graph: ir.Graph, grids: Mapping[str, ValueGrid], encoding: Encoding) -> Wanted:
    """How each mark of a value is to be rounded: as integers, or in float where eight bits or one step do not do.

    A ReLU that rounding does anyway for all who read it is dropped: runtimes fuse a layer with rounding only.
    """
    by_source: dict[ir.Value, list[ir.Node]] = {}
    wanted: Wanted = {}
    for mark, tensor in marks(graph, OF_VALUE):
        source = mark.inputs[0]
        assert source is not None
        by_source.setdefault(source, []).append(mark)
        grid, positive = grids[tensor], interval(source)[0] >= 0
        wanted[mark] = spelled(grid, positive, encoding, tensor) if grid.fits else grid
    for source, readers in by_source.items():
        if len(source.uses()) == len(readers) and not source.is_graph_output():
            _drop_activation(source, [wanted[mark] for mark in readers])
    return wanted


def _drop_activation(source: ir.Value, wanted: Iterable[Spelling | ValueGrid]) -> None:
    node = source.producer()
    while node is not None and node.op_type in MOVES_PAST and node.inputs[0] and only_consumer(node.inputs[0]) is node:
        node = node.inputs[0].producer()
    if node is None or node.op_type not in ("Relu", "Clip"):
        return
    floor, ceiling = clip_limits(node) if node.op_type == "Clip" else (0.0, np.inf)
    implied = (
        isinstance(grid, Spelling) and grid.floors_at_zero and ceiling >= grid.highest * (1 - 1e-6) for grid in wanted
    )
    if floor == 0 and node.inputs[0] is not None and all(implied):
        replace(node, node.inputs[0])


def encode_values(graph: ir.Graph, wanted: Wanted, whole: set[ir.Node], encoding: Encoding) -> None:
    """Replace the marks of values by nodes that round; layers that read one value on one grid share them.

    Args:
        graph: with marks.
        wanted: from :func:`plan_values`.
        whole: the layers that are to be one integer operation.
        encoding: what the target wants.
    """
    made: dict[tuple[ir.Value | None, Spelling | ValueGrid, bool], ir.Value] = {}
    for mark, tensor in marks(graph, OF_VALUE):
        source, grid = mark.inputs[0], wanted[mark]
        assert source is not None
        integers = any(node in whole for node in mark.outputs[0].consumers())
        key = (source, grid, integers)
        if key not in made:
            place = Before(mark, graph, tensor)
            if isinstance(grid, Spelling):
                made[key] = _integers(place, source, grid, encoding.clips)
            else:
                made[key] = _floats(place, source, grid)
        replace(mark, made[key])


def repeat_behind_splits(graph: ir.Graph) -> None:
    """Round the parts of what was rounded once more, to the same integers: ONNX Runtime takes no other hint."""
    for node in list(graph):
        decode = node.inputs[0].producer() if node.op_type == "Split" and node.inputs[0] else None
        coded = decode.inputs[0].producer() if decode is not None and decode.inputs[0] is not None else None
        if decode is None or decode.op_type != "DequantizeLinear" or coded is None:
            continue
        for part in (part for part in node.outputs if part.uses() and not part.is_graph_output()):
            codes = ir.node("QuantizeLinear", [part, *decode.inputs[1:]])
            again = ir.node("DequantizeLinear", [codes.outputs[0], *decode.inputs[1:]])
            part.replace_all_uses_with(again.outputs[0])
            codes.replace_input_with(0, part)
            graph.insert_after(node, [codes, again])


def _integers(place: Before, source: ir.Value, wanted: Spelling, clips: str | None) -> ir.Value:
    """Round and decode.

    Where ``clips`` is ``decoded``, the Clip also keeps ONNX Runtime from taking the layer for one of integers: it would
    round the layer's weight and bias anew.
    """
    low, high = wanted.overshoot(interval(source))
    outside = high or (low and (clips is not None or wanted.low > wanted.limits[0] + 1))
    if outside and clips in ("values", None):
        source = place.node("Clip", source, *_limits(place, wanted, decoded=True))
    scale = place.constant("scale", np.float32(wanted.step))
    zero = place.constant("zero_point", wanted.dtype(wanted.zero))
    codes = place.node("QuantizeLinear", source, scale, zero)
    if outside and clips == "codes":
        codes = place.node("Clip", codes, *_limits(place, wanted, decoded=False))
    values = place.node("DequantizeLinear", codes, scale, zero)
    return place.node("Clip", values, *_limits(place, wanted, decoded=True)) if clips == "decoded" else values


def _limits(place: Before, wanted: Spelling, decoded: bool) -> list[ir.Value]:
    ends = np.array([wanted.low, wanted.high])
    ends = ((ends - wanted.zero) * wanted.step).astype(np.float32) if decoded else ends.astype(wanted.dtype)
    return [place.constant(name, end) for name, end in zip(("from", "to"), ends, strict=True)]


def _floats(place: Before, x: ir.Value, grid: ValueGrid) -> ir.Value:
    """The same arithmetic in float, where eight bits do not hold the codes or a range is only known at run time."""
    if grid.inverse is None or grid.step is None:
        return _floats_of_the_moment(place, x, grid.levels)
    names = ("inverse", "step", "low", "high")
    numbers = (grid.inverse, grid.step, grid.low, grid.high)
    inverse, step, low, high = map(place.constant, names, map(np.float32, numbers))
    codes = place.node("Round", place.node("Clip", place.node("Mul", x, inverse), low, high))
    return place.node("Mul", codes, step)


def _floats_of_the_moment(place: Before, x: ir.Value, levels: int) -> ir.Value:
    count, tiny, none = map(place.constant, ("levels", "tiny", "none"), map(np.float32, (levels, TINY, 0)))
    peak = place.node("ReduceMax", place.node("Abs", x), keepdims=0)
    inverse = place.node("Div", count, place.node("Max", peak, tiny))
    step = place.node("Div", place.node("Where", place.node("Less", peak, tiny), none, peak), count)
    return place.node("Mul", place.node("Round", place.node("Mul", x, inverse)), step)
