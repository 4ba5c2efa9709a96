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

    def __str__(self) -> str:
        return f"{self.plugin} of {self.distribution}: {self.reason}"


class Registry:
    """Components by kind and name.

    Args:
        distribution: the package whose components are being added.
        version: the version of that package.

    Attributes:
        problems: plugins that did not load, and names that more than one of them claims.

    Example:
        >>> found = Registry()
        >>> found.add("criterion", max, name="largest")
        >>> found.get("criterion", "largest") is max
        True
    """

    def __init__(self, distribution: str = "this program", version: str = "") -> None:
        self.distribution = distribution
        self.version = version
        self.problems: list[Problem] = []
        self._claims: dict[tuple[str, str], list[Entry]] = {}  # more than one: nobody gets the name

    def add(self, kind: str, component: Any, name: str | None = None) -> None:
        """Add a component under ``name`` (default: its own).

        Raises:
            CompressionError: an unknown kind, or a name that is taken.
        """
        if kind not in KINDS:
            raise CompressionError(f"{kind!r} is not a kind of component; {did_you_mean(kind, KINDS)}")
        entry = Entry(kind, name or component.__name__, component, self.distribution, self.version)
        claims = self._claims.setdefault((kind, entry.name), [])
        if claims:
            owner = claims[0].distribution
            raise CompressionError(f"{self.distribution} adds the {kind} {entry.name!r}, but {owner} already has")
        claims.append(entry)

    def get(self, kind: str, name: str) -> Any:
        """The component of that name.

        Raises:
            CompressionError: there is none, or more than one plugin claims the name.
        """
        claims = self._claims.get((kind, name), [])
        if not claims:
            # A plugin that failed may have been meant to bring it.
            lost = "".join(f" (not taken in: {problem})" for problem in self.problems)
            raise CompressionError(f"{name!r} is not a known {kind}; {did_you_mean(name, self.names(kind))}{lost}")
        if len(claims) > 1:
            raise CompressionError(_clash(claims))
        return claims[0].component

    def names(self, kind: str) -> list[str]:
        """The names of one kind, sorted."""
        return sorted(name for of_kind, name in self._claims if of_kind == kind)

    def entries(self) -> list[Entry]:
        """All components, by kind and name; a name in dispute is there once for each who claims it."""
        return [entry for key in sorted(self._claims) for entry in self._claims[key]]

    def merge(self, plugin: str, brought: "Registry") -> None:
        """Take in what one plugin brought; a name that is claimed already becomes unusable, whoever came first."""
        for key, entries in brought._claims.items():
            claims = self._claims.setdefault(key, [])
            claims.extend(entries)
            if len(claims) > 1:
                self.problems.append(Problem(plugin, brought.distribution, _clash(claims)))


def _clash(claims: list[Entry]) -> str:
    first, last = claims[0], claims[-1]  # the first may be ours, so the cure names the last
    owners = " and ".join(sorted({entry.distribution for entry in claims}))
    cure = f"uninstall one or disable it, as in {DISABLED}={last.distribution}"
    return f"the {first.kind} {first.name!r} is claimed more than once, by {owners}: {cure}"


@functools.cache
def registry() -> Registry:
    """The components of every installed plugin, ours included; read once per process.

    Raises:
        CompressionError: lightslim itself is not installed, so that its own components cannot be found.
    """
    return load(entry_points(group="lightslim"))


def load(points: Iterable[EntryPoint]) -> Registry:
    """Load plugins one at a time: one that breaks is reported, adds nothing, and hurts nobody else."""
    # Ours first and the rest by name, so that what is reported doesn't depend on the order of sys.path.
    points = sorted(points, key=lambda point: (point.name != "builtin", point.name, _source(point)))
    if not any(point.name == "builtin" for point in points):
        raise CompressionError("lightslim is not installed, its own components cannot be found: pip install -e .")
    found = Registry()
    for point in points:
        if not _is_disabled(point):
            _load_one(found, point)
    return found


def disabled() -> set[str]:
    """The installed distributions of which a plugin is left out because the environment says so."""
    return {_source(point)[0] for point in entry_points(group="lightslim") if _is_disabled(point)}


def _is_disabled(point: EntryPoint) -> bool:
    names = {name.strip() for name in os.environ.get(DISABLED, "").split(",")}
    return bool({point.name, _source(point)[0]} & names)


def _load_one(found: Registry, point: EntryPoint) -> None:
    brought = Registry(*_source(point))
    try:
        _call(point, brought)
    except (Exception, SystemExit) as error:  # a plugin is foreign code: anything may happen
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # pluggy's messages have several lines
        found.problems.append(Problem(point.name, brought.distribution, reason))
    else:
        found.merge(point.name, brought)


def _call(point: EntryPoint, brought: Registry) -> None:
    """Let one plugin add its components, under a manager of its own."""
    manager = pluggy.PluginManager("lightslim")
    manager.add_hookspecs(hooks)
    manager.register(point.load(), point.name)
    manager.check_pending()
    if not manager.hook.lightslim_register.get_hookimpls():
        raise CompressionError("it has no lightslim_register marked with @hookimpl")
    manager.hook.lightslim_register(registry=brought)


def _source(point: EntryPoint) -> tuple[str, str]:
    """The name and version of the distribution that a plugin comes with."""
    return (point.dist.name, point.dist.version) if point.dist else ("unknown", "")
