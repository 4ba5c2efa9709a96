"""Inputs of layers rounded to their grids, by nodes that runtimes know."""

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir

from lightslim.export.qdq.bounds import clip_limits, interval
from lightslim.export.qdq.graph import Before, drop_if_unread, marks, replace
from lightslim.export.qdq.marks import OF_INPUT, InputGrid
from lightslim.export.qdq.presets import Encoding
from lightslim.export.qdq.spelling import Spelling, spelled
from lightslim.kernels.grid import TINY

Uses = list[tuple[ir.Node, str]]


def encode_inputs(graph: ir.Graph, grids: Mapping[str, InputGrid], encoding: Encoding) -> dict[ir.Value, Spelling]:
    """Replace the marks of inputs by nodes that round.

    Returns:
        The values that a runtime can keep as integers, and how those are spelled.
    """
    by_source: dict[ir.Value, Uses] = {}
    for mark, layer in marks(graph, OF_INPUT):
        assert mark.inputs[0] is not None
        by_source.setdefault(mark.inputs[0], []).append((mark, layer))
    found: dict[ir.Value, Spelling] = {}
    for source, uses in by_source.items():
        positive = interval(source)[0] >= 0
        wanted = {layer: _wanted(grids[layer], positive, encoding, layer) for _, layer in uses}
        found.update(_encode(graph, _without_activation(source, uses, wanted.values()), uses, wanted, encoding))
        drop_if_unread(source)
    return found


def _wanted(grid: InputGrid, positive: bool, encoding: Encoding, layer: str) -> Spelling | InputGrid:
    return spelled(grid, positive, encoding, layer) if grid.fits else grid


def _encode(
    graph: ir.Graph, source: ir.Value, uses: Uses, wanted: Mapping[str, Spelling | InputGrid], encoding: Encoding
) -> dict[ir.Value, Spelling]:
    """Layers that read one value on one grid share its integers."""
    made: dict[Spelling | InputGrid, ir.Value] = {}
    for mark, layer in uses:
        grid = wanted[layer]
        if grid not in made:
            place = Before(mark, graph, f"{layer}.input")
            if isinstance(grid, Spelling):
                made[grid] = _integers(place, source, grid, encoding)
            else:
                made[grid] = _floats(place, source, grid)
        replace(mark, made[grid])
    return {value: grid for grid, value in made.items() if isinstance(grid, Spelling)}


def _without_activation(source: ir.Value, uses: Uses, wanted: Iterable[Spelling | InputGrid]) -> ir.Value:
    """What comes before a ReLU that rounding does anyway for all who read it: runtimes fuse a layer with rounding."""
    node = source.producer()
    if node is None or node.op_type not in ("Relu", "Clip") or source.is_graph_output():
        return source
    floor, ceiling = clip_limits(node) if node.op_type == "Clip" else (0.0, np.inf)
    needless = len(source.uses()) == len(uses) and floor == 0
    for grid in wanted:
        implied = isinstance(grid, Spelling) and grid.floors_at_zero and ceiling >= grid.highest * (1 - 1e-6)
        needless = needless and implied
    before = node.inputs[0]
    return before if needless and before is not None else source


def _integers(place: Before, source: ir.Value, wanted: Spelling, encoding: Encoding) -> ir.Value:
    low, high = wanted.overshoot(interval(source))
    if encoding.clips is None and not high and wanted.low == wanted.limits[0] + 1:
        low = False
    if encoding.clips != "codes" and (low or high):
        values = [np.float32((code - wanted.zero) * wanted.step) for code in (wanted.low, wanted.high)]
        source = place.node("Clip", source, *map(place.constant, ("from", "to"), values))
    scale = place.constant("scale", np.float32(wanted.step))
    zero = place.constant("zero_point", wanted.dtype(wanted.zero))
    codes = place.node("QuantizeLinear", source, scale, zero)
    if encoding.clips == "codes" and (low or high):
        limits = [wanted.dtype(code) for code in (wanted.low, wanted.high)]
        codes = place.node("Clip", codes, *map(place.constant, ("from", "to"), limits))
    return place.node("DequantizeLinear", codes, scale, zero)


def _floats(place: Before, x: ir.Value, grid: InputGrid) -> ir.Value:
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
