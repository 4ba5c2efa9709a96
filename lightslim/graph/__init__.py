"""Look at a model: record one step, unify axes, find the groups of units that live or die together."""

from lightslim.graph.axes import Axis, count, factors, leaves
from lightslim.graph.groups import FrozenGroup, Graph, Group, Kept, Slot, kept_sizes, masks_of, record
from lightslim.graph.picture import dot
from lightslim.graph.trace import Made, ShapeTrace, disagreement, same_way

__all__ = [
    "Axis",
    "FrozenGroup",
    "Graph",
    "Group",
    "Kept",
    "Made",
    "ShapeTrace",
    "Slot",
    "count",
    "disagreement",
    "dot",
    "factors",
    "kept_sizes",
    "leaves",
    "masks_of",
    "record",
    "same_way",
]
