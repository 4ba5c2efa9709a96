"""Our own plugin: everything lightslim brings enters by the same door as a third party's."""

from lightslim import prune
from lightslim.hooks import hookimpl
from lightslim.registry import Registry


@hookimpl
def lightslim_register(registry: Registry) -> None:
    """Add the built-in components."""
    registry.add("strategy", prune.UniformPruneStrategy)
    registry.add("pruner", prune.StructurePruner)
    registry.add("criterion", prune.l1_norm)
