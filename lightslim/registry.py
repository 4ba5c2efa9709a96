"""What there is to choose from, by kind and name, and which package brought it."""

import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from lightslim import hooks
from lightslim.errors import CompressionError, did_you_mean

KINDS = ("strategy", "pruner", "criterion", "distiller", "range", "exporter")
DISABLED = "LIGHTSLIM_DISABLED_PLUGINS"


@dataclass(frozen=True)
class Entry:
    """One component and where it comes from."""

    kind: str
    name: str
    component: Any
    distribution: str
    version: str


@dataclass(frozen=True)
class Problem:
    """A plugin, or a part of it, that could not be taken in."""

    plugin: str
    distribution: str
    reason: str


class Registry:
    """Components by kind and name.

    Args:
        distribution: the package whose components are being added.
        version: its version.

    Attributes:
        problems: plugins that did not load, and names that two packages claim.

    Example:
        >>> found = Registry()
        >>> found.add("criterion", max, name="largest")
        >>> found.get("criterion", "largest") is max
        True
    """

    def __init__(self, distribution: str = "", version: str = "") -> None:
        self.distribution = distribution
        self.version = version
        self.problems: list[Problem] = []
        self._entries: dict[tuple[str, str], Entry] = {}
        self._contested: dict[tuple[str, str], set[str]] = {}

    def add(self, kind: str, component: Any, name: str | None = None) -> None:
        """Add a component under ``name`` (default: its own).

        Raises:
            CompressionError: an unknown kind, or a name that is taken.
        """
        if kind not in KINDS:
            raise CompressionError(f"{kind!r} is not a kind of component; {did_you_mean(kind, KINDS)}")
        entry = Entry(kind, name or component.__name__, component, self.distribution, self.version)
        taken = self._entries.get((kind, entry.name))
        if taken is not None:
            raise CompressionError(_clash(kind, entry.name, {taken.distribution, entry.distribution}))
        self._entries[kind, entry.name] = entry

    def get(self, kind: str, name: str) -> Any:
        """The component of that name.

        Raises:
            CompressionError: there is none, or two packages claim the name.
        """
        if (kind, name) in self._contested:
            raise CompressionError(_clash(kind, name, self._contested[kind, name]))
        if (kind, name) not in self._entries:
            raise CompressionError(
                f"{name!r} is not a known {kind}; {did_you_mean(name, self.names(kind))}{self._lost()}"
            )
        return self._entries[kind, name].component

    def _lost(self) -> str:
        told = "; ".join(f"{p.plugin} of {p.distribution} did not load: {p.reason}" for p in self.problems)
        return f" ({told})" if told else ""

    def names(self, kind: str) -> list[str]:
        """The names of one kind, sorted."""
        return sorted(name for of_kind, name in self._entries if of_kind == kind)

    def entries(self) -> list[Entry]:
        """All components, by kind and name."""
        return [self._entries[key] for key in sorted(self._entries)]

    def merge(self, plugin: str, other: "Registry") -> None:
        """Take in what one plugin added; a name that both hold becomes unusable, whichever came first."""
        for key, entry in other._entries.items():
            taken = self._entries.setdefault(key, entry)
            if taken is not entry:
                claimed = self._contested.setdefault(key, {taken.distribution})
                claimed.add(entry.distribution)
                self.problems.append(Problem(plugin, entry.distribution, _clash(*key, claimed)))


def _clash(kind: str, name: str, distributions: Iterable[str]) -> str:
    claims = " and ".join(sorted(distributions))
    return f"{claims} both bring the {kind} {name!r}: uninstall one, or name a plugin in {DISABLED}"


@functools.cache
def registry() -> Registry:
    """The components of every installed plugin, ours included; read once per process.

    Raises:
        CompressionError: lightslim itself is not installed, so that its own components cannot be found.
    """
    return load(entry_points(group="lightslim"))


def load(points: Iterable[EntryPoint]) -> Registry:
    """Load plugins one at a time: one that breaks is reported, adds nothing, and hurts nobody else."""
    found = Registry()
    disabled = {name.strip() for name in os.environ.get(DISABLED, "").split(",")}
    # An editable install may be listed twice.
    unique = {(_distribution(point)[0], point.name, point.value): point for point in points}
    for key in sorted(unique, key=lambda key: (key[1] != "builtin", key)):
        if not {key[0], key[1]} & disabled:
            _load_one(found, unique[key])
    if not any(key[1] == "builtin" for key in unique):
        raise CompressionError("lightslim is not installed, its own components cannot be found: pip install -e .")
    return found


def _load_one(found: Registry, point: EntryPoint) -> None:
    distribution, version = _distribution(point)
    brought = Registry(distribution, version)
    try:
        manager = pluggy.PluginManager("lightslim")
        manager.add_hookspecs(hooks)
        manager.register(point.load(), point.name)
        manager.check_pending()
        manager.hook.lightslim_register(registry=brought)
    except (Exception, SystemExit) as error:  # a plugin is foreign code: anything may happen
        found.problems.append(Problem(point.name, distribution, f"{type(error).__name__}: {error}"))
    else:
        found.merge(point.name, brought)


def _distribution(point: EntryPoint) -> tuple[str, str]:
    return (point.dist.name, point.dist.version) if point.dist else ("unknown", "")
