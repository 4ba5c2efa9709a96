"""Groups that could be cut but stay: widths of embeddings, and all but one factor where two multiply."""

from collections.abc import Iterator, Sequence

from lightslim.graph import Axis, Graph, Group, factors, leaves

EMBEDDING = "the width of an embedding (several layers write it, a layer norm reads it); embeddings=True cuts it"
_NORMS = {"native_layer_norm", "_fused_rms_norm", "rms_norm"}


def without_embeddings(graph: Graph) -> Graph:
    """The same graph in which the residual stream of a transformer stays whole.

    A layer norm's statistics are over all units of it, so each unit that goes changes all the others; and every layer
    reads it. What several weights write (dimension 0) and a layer norm or RMS norm runs over counts as one.
    """
    made = (made for trace in graph.traces.values() for made in trace if made.op in _NORMS)
    normalised = graph.normalised | {leaf for one in made for axis in one.outputs[0] for leaf in leaves(axis)}
    wide = [group for group in graph if group.axis in normalised and len({*_writers(group)}) > 1]
    return graph.without(wide, EMBEDDING) if wide else graph


def _writers(group: Group) -> Iterator[str]:
    return (slot.tensor for slot in group.weights if slot.dim == 0)


def one_factor_each(graph: Graph, groups: Sequence[Group]) -> list[Group]:
    """Where the units of two groups multiply along one dimension of a weight, only one of the two is cut.

    Heads go rather than the width of a head, since that sets the scale of the attention; else the larger factor goes.
    """
    chosen = {group.axis for group in groups}
    spared: set[Axis] = set()
    for slot in graph.slots:
        for parts in factors(slot.axis):
            rivals = [part for part in ({*leaves(part)} & chosen - spared for part in parts) if part]
            if len(rivals) > 1:
                rivals.sort(key=lambda part: (not part & graph.heads, -sum(leaf.size for leaf in part)))
                spared |= set().union(*rivals[1:]) - rivals[0]
    return [group for group in groups if group.axis not in spared]
