"""Check plain values against type hints, and put hints in words."""

import contextlib
import math
import os
import reprlib
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, MutableSequence, Sequence
from inspect import Parameter
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from lightslim.errors import CompressionError, did_you_mean
from lightslim.recipe.blueprint import Blueprint
from lightslim.yamlfile import Where

Named = Mapping[str, Blueprint]

_LISTS = (list, tuple, Sequence, MutableSequence, Collection, Iterable)
_MAPPINGS = (dict, Mapping, MutableMapping)
_SCALARS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    types.NoneType: ("null", lambda value: value is None),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: ("a whole number", lambda value: _is_number(value, int)),
    float: ("a number", lambda value: _is_number(value, int | float)),
    str: ("text", lambda value: isinstance(value, str)),
}


def fit(value: Any, hint: Any, where: Where, named: Named | None = None) -> Any:
    """The value as a type hint wants it.

    Args:
        value: a plain value, an object, or the blueprint of one.
        hint: a type hint.
        where: the spot of the value, for the message.
        named: objects that text may stand for.

    Raises:
        CompressionError: it does not fit.

    Example:
        >>> fit(["a", 3], list[str], Where(("names",)))
        Traceback (most recent call last):
            ...
        lightslim.errors.CompressionError: names.1: must be text, not 3
    """
    hint = getattr(hint, "__supertype__", getattr(hint, "__value__", hint))  # of a NewType, of a type alias
    kind = get_origin(hint) or hint
    if kind in (Any, object, Parameter.empty) or isinstance(kind, typing.TypeVar):
        return value
    if kind in (Union, types.UnionType):
        return _fit_union(value, hint, where, named)
    if kind in _LISTS and isinstance(value, list):
        return _fit_list(value, hint, where, named)
    if kind in _MAPPINGS and isinstance(value, dict):
        return _fit_mapping(value, hint, where, named)
    if isinstance(kind, type) and issubclass(kind, os.PathLike) and isinstance(value, str):
        return Path(value)
    if named is not None and isinstance(value, str) and _names_object(kind):
        value = _lookup(value, named, where)
    if not _is_a(value, kind, hint):
        raise where.error(f"must be {describe(hint)}, not {reprlib.repr(value)}")
    return None if kind is types.NoneType else value


def _fit_union(value: Any, hint: Any, where: Where, named: Named | None) -> Any:
    options = [option for option in get_args(hint) if option is not types.NoneType]
    if len(options) < len(get_args(hint)) and _means_none(value, options):
        return None
    if len(options) == 1:
        return fit(value, options[0], where, named)
    for option in options:
        with contextlib.suppress(CompressionError):
            return fit(value, option, where, named)
    raise where.error(f"must be {describe(hint)}, not {reprlib.repr(value)}")


def _means_none(value: Any, options: list[Any]) -> bool:
    literals = [choice for option in options if get_origin(option) is Literal for choice in get_args(option)]
    return value is None or (isinstance(value, str) and value.lower() == "none" and value not in literals)


def _fit_list(value: list[Any], hint: Any, where: Where, named: Named | None) -> Any:
    inner = get_args(hint)
    is_tuple = (get_origin(hint) or hint) is tuple
    if is_tuple and inner and inner[-1] is not Ellipsis:
        if len(inner) != len(value):
            raise where.error(f"must be {describe(hint)}, not {reprlib.repr(value)}")
    else:
        inner = (inner or (Any,))[:1] * len(value)
    items = [fit(item, one, where / at, named) for at, (item, one) in enumerate(zip(value, inner, strict=True))]
    return tuple(items) if is_tuple else items


def _fit_mapping(value: dict[Any, Any], hint: Any, where: Where, named: Named | None) -> dict[Any, Any]:
    key_hint, item_hint = get_args(hint) or (Any, Any)
    return {fit(key, key_hint, where / key): fit(item, item_hint, where / key, named) for key, item in value.items()}


def _names_object(kind: Any) -> bool:
    return kind not in _SCALARS and kind is not Literal and kind not in (*_LISTS, *_MAPPINGS)


def _lookup(name: str, named: Named, where: Where) -> Blueprint:
    if name not in named:
        raise where.error(f"nothing is named {name!r}; {did_you_mean(name, named)}")
    return named[name]


def _is_a(value: Any, kind: Any, hint: Any) -> bool:
    if kind in _SCALARS:
        return _SCALARS[kind][1](value)
    if kind is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(hint))
    if kind in _LISTS and isinstance(value, str | dict):
        return False
    try:
        if isinstance(value, Blueprint):
            return not isinstance(value.target, type) or issubclass(value.target, kind)
        return isinstance(value, kind)
    except TypeError:  # a protocol, or another hint that only a type checker can decide
        return True


def _is_number(value: Any, kinds: Any) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)


def describe(hint: Any) -> str:
    """A type hint in words.

    Example:
        >>> describe(list[int] | Literal["auto", "all"] | None)
        "a list, each item a whole number or 'auto' or 'all' or null"
        >>> describe(dict[str, float]), describe(Where)
        ('a mapping, each value a number', 'a Where object')
    """
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in _SCALARS:
        return _SCALARS[kind][0]
    if kind in (Union, types.UnionType):
        return " or ".join(describe(option) for option in inner)
    if kind is Literal:
        return " or ".join(map(repr, inner))
    if kind in _MAPPINGS:
        return f"a mapping, each value {describe(inner[1])}" if inner else "a mapping"
    if kind is tuple and Ellipsis not in inner and inner:
        return f"a list of {len(inner)}: {', '.join(describe(item) for item in inner)}"
    if kind in _LISTS:
        return f"a list, each item {describe(inner[0])}" if inner else "a list"
    return "anything" if kind is Any else f"a {getattr(kind, '__name__', kind)} object"
