"""The section ``plugins``: the distributions that bring what a recipe names, so that one that is missing is named.

``plugins: [lightslim-taylor==0.1.0]``; the version tells which one was there, another one will do. A run writes the
section into the recipe that it keeps.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from lightslim.recipe.hints import fit
from lightslim.registry import DISABLED, Entry, disabled, registry
from lightslim.yamlfile import Document

SECTION = "plugins"
_NEED = re.compile(r"([A-Za-z0-9][\w.-]*)\s*(==\s*\S+)?")


def check_plugins(document: Document) -> None:
    """Look whether all that a recipe asks for is there.

    Raises:
        CompressionError: it isn't; says how to get it, or why it could not be taken in. Or what stands there is neither
            NAME nor NAME==VERSION.
    """
    where = document.where(SECTION)
    for index, needed in enumerate(fit(document.tree.get(SECTION), list[str] | None, where) or []):
        match = _NEED.fullmatch(needed.strip())
        if match is None:
            raise (where / index).error(f"{needed!r} is no plugin: NAME or NAME==VERSION")
        name = match[1]
        if _plain(name) not in {_plain(entry.distribution) for entry in registry().entries()}:
            raise (where / index).error(_absence(name))


def plugins_named(tree: Mapping[str, Any]) -> dict[str, str]:
    """The plugins, and their versions, that bring components with names that occur in a recipe.

    Args:
        tree: the recipe; names count in its pruners, distillers and strategies.
    """
    texts = {text for section in ("pruners", "distillers", "strategies") for text in _texts(tree.get(section))}
    found = [entry for entry in registry().entries() if entry.name in texts and _foreign(entry)]
    return {entry.distribution: entry.version for entry in sorted(found, key=lambda one: one.distribution)}


def with_plugins(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with what :func:`plugins_named` says in its section, beside what is there already."""
    given = {_plain(one.partition("==")[0].strip()): one for one in tree.get(SECTION) or []}
    named = {_plain(name): f"{name}=={version}" for name, version in plugins_named(tree).items()}
    needed = {**given, **named}
    return {**tree, SECTION: list(needed.values())} if needed else dict(tree)


def _absence(name: str) -> str:
    for problem in registry().problems:
        if _plain(problem.distribution) == _plain(name):
            return f"the plugin {name!r} cannot be taken in: {problem}"
    if _plain(name) in map(_plain, disabled()):
        return f"the plugin {name!r} is disabled: take it out of {DISABLED}"
    return f"the plugin {name!r} is not installed: pip install {name}"


def _foreign(entry: Entry) -> bool:
    return entry.distribution != "lightslim"


def _plain(name: str) -> str:
    """How distributions are compared: Lightslim_Taylor is lightslim-taylor."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for item in value.values() for text in _texts(item))
    elif isinstance(value, list | tuple):
        yield from (text for item in value for text in _texts(item))
