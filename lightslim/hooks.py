"""The plugin interface: one hook, by which a package adds its components."""

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from lightslim.registry import Registry

hookspec = pluggy.HookspecMarker("lightslim")
hookimpl = pluggy.HookimplMarker("lightslim")


@hookspec
def lightslim_register(registry: "Registry") -> None:
    """Add components to ``registry``: ``registry.add(kind, component, name=None)``.

    Example:
        >>> @hookimpl
        ... def lightslim_register(registry):
        ...     registry.add("criterion", my_criterion)
    """
