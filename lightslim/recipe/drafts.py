"""From the sections of a recipe to blueprints of what they name."""

from collections.abc import Callable
from typing import Any

from lightslim.errors import CompressionError
from lightslim.recipe.arguments import bind, takes
from lightslim.recipe.blueprint import Blueprint, imported
from lightslim.recipe.hints import Named, fit
from lightslim.registry import registry
from lightslim.yamlfile import Document, Where


def section(document: Document, name: str) -> dict[Any, Any]:
    """The content of a section; empty if the recipe does not have it.

    Raises:
        CompressionError: it is no mapping.
    """
    return fit(document.tree.get(name), dict | None, document.where(name)) or {}


def instances(document: Document, name: str, kind: str, named: Named | None = None) -> dict[str, Blueprint]:
    """Blueprints of the named instances in a section.

    Args:
        document: the recipe.
        name: the section.
        kind: what the registry calls such components.
        named: instances that their arguments may name.

    Raises:
        CompressionError: an instance has no class, one that is not registered, or arguments that do not fit it.
    """
    found = section(document, name)
    for key in found:
        fit(key, str, document.where(name, key))
    return {key: instance(content, document.where(name, key), kind, named) for key, content in found.items()}


def instance(content: Any, where: Where, kind: str | None = None, named: Named | None = None) -> Blueprint:
    """The blueprint that ``{class: Name, argument: value ...}`` describes.

    Args:
        content: the mapping.
        where: its spot.
        kind: where the registry is to look for the class; without, it must be given as ``pkg.mod:Name``.
        named: instances that arguments may name.

    Raises:
        CompressionError: there is no class, it cannot be found, or the arguments do not fit it.
    """
    if not isinstance(content, dict) or "class" not in content:
        raise where.error("must be a mapping that says its 'class'")
    target = _found(fit(content["class"], str, where / "class"), where / "class", kind)
    arguments = {key: drafted(value, where / key) for key, value in content.items() if key != "class"}
    if kind == "strategy" and takes(target, "name"):
        arguments.setdefault("name", where.keys[-1])
    return Blueprint(target, bind(target, arguments, where, named), where)


def _found(name: str, where: Where, kind: str | None) -> Callable[..., Any]:
    if kind is None or ":" in name:
        return imported(name, where)
    try:
        return registry().get(kind, name)  # type: ignore[no-any-return]
    except CompressionError as error:
        raise where.error(str(error)) from None


def drafted(value: Any, where: Where) -> Any:
    """The value with a blueprint in place of every mapping in it that says its ``class``."""
    if isinstance(value, dict) and "class" in value:
        return instance(value, where)
    if isinstance(value, dict):
        return {key: drafted(item, where / key) for key, item in value.items()}
    if isinstance(value, list):
        return [drafted(item, where / index) for index, item in enumerate(value)]
    return value
