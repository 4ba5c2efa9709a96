"""Check keyword arguments against the signature of what they are meant for."""

import inspect
import typing
from collections.abc import Callable, Hashable, Mapping
from inspect import Parameter
from typing import Any

from lightslim.errors import did_you_mean
from lightslim.recipe.hints import Named, fit
from lightslim.yamlfile import Where

_BY_NAME = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


def bind(
    target: Callable[..., Any], values: Mapping[Any, Any], where: Where | None = None, named: Named | None = None
) -> dict[str, Any]:
    """Check keyword arguments for a class or function, and convert them to what its type hints want.

    Whole numbers pass for numbers, truth values and NaN do not; text ``none`` passes for None where that is
    allowed; a hint that names a class takes an object of that class, or the :class:`Blueprint` of one.

    Args:
        target: what they are arguments of.
        values: argument name to plain value or blueprint.
        where: the spot of ``values`` in a recipe.
        named: objects that text may stand for where a hint wants an object.

    Raises:
        CompressionError: an argument is unknown, missing or of the wrong type.

    Example:
        >>> def prune(target_ratio: float, metric_name: str | None = None): ...
        >>> bind(prune, {"target_ratio": 0.5, "metric_name": "none"})
        {'target_ratio': 0.5, 'metric_name': None}
        >>> bind(prune, {"target_ratoi": 0.5})
        Traceback (most recent call last):
            ...
        lightslim.errors.CompressionError: target_ratoi: prune has no such argument; did you mean 'target_ratio'?
    """
    where = where or Where()
    parameters = _parameters(target)
    known = {parameter.name: parameter for parameter in parameters if parameter.kind in _BY_NAME}
    label = getattr(target, "__name__", str(target))
    if all(parameter.kind is not Parameter.VAR_KEYWORD for parameter in parameters):
        for name in [name for name in values if name not in known]:
            raise (where / name).error(f"{label} has no such argument; {did_you_mean(str(name), known)}")
    for name, parameter in known.items():
        if parameter.default is Parameter.empty and name not in values:
            raise where.error(f"{label} needs the argument {name!r}")
    hints = _hints(target, parameters)
    return {name: fit(value, hints.get(name, Any), where / name, named) for name, value in values.items()}


def takes(target: Callable[..., Any], name: str) -> bool:
    """Whether a class or function has an argument of this name.

    Example:
        >>> takes(sorted, "key"), takes(sorted, "kee")
        (True, False)
    """
    return name in {parameter.name for parameter in _parameters(target) if parameter.kind in _BY_NAME}


def _parameters(target: Callable[..., Any]) -> list[Parameter]:
    try:
        return list(inspect.signature(target).parameters.values())
    except (ValueError, TypeError):  # some classes written in C do not tell
        return [Parameter("anything", Parameter.VAR_KEYWORD)]


def _hints(target: Callable[..., Any], parameters: list[Parameter]) -> dict[str, Any]:
    optional = {parameter.name for parameter in parameters if parameter.default is None}
    try:
        hints = typing.get_type_hints(target.__init__ if isinstance(target, type) else target)  # type: ignore[misc]
        hints = {name: hint for name, hint in hints.items() if isinstance(hint, Hashable)}
        return {name: hint | None if name in optional else hint for name, hint in hints.items()}
    except Exception:  # a hint may be any expression, also one that only a type checker can resolve
        return {}
