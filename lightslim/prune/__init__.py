"""Structural pruning: units leave the model for good, and it gets smaller and faster in every runtime."""

from lightslim.prune.analysis import sensitivity
from lightslim.prune.couplings import draw_groups
from lightslim.prune.criteria import bn_scale, fpgm, l1_norm, l2_norm, random
from lightslim.prune.pruner import StructurePruner
from lightslim.prune.report import PruneReport
from lightslim.prune.sensitive import SensitivePruneStrategy
from lightslim.prune.uniform import UniformPruneStrategy, find_groups, prune

__all__ = [
    "PruneReport",
    "SensitivePruneStrategy",
    "StructurePruner",
    "UniformPruneStrategy",
    "bn_scale",
    "draw_groups",
    "find_groups",
    "fpgm",
    "l1_norm",
    "l2_norm",
    "prune",
    "random",
    "sensitivity",
]
