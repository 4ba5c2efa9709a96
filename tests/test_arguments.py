import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NewType, Protocol, TypedDict, TypeVar

import pytest

from lightslim.errors import CompressionError
from lightslim.recipe.arguments import bind
from lightslim.recipe.blueprint import Blueprint, imported, realize
from lightslim.recipe.hints import describe, fit
from lightslim.yamlfile import Where

T = TypeVar("T")
Ratio = NewType("Ratio", float)


class Likes(Protocol):
    def like(self) -> None: ...


class Options(TypedDict):
    width: int


FITS = [
    (3, int, 3), (3, float, 3), (0.5, float, 0.5), (True, bool, True), ("3", str, "3"), (None, None, None),
    (3, int | float, 3), (1.0, int | float, 1.0), (True, int | bool, True),
    ("NONE", str | None, None), (None, int | None, None), ("none", str, "none"),
    ("none", Literal["none", 1] | None, "none"),
    ("none", Any, "none"),
    ("a", Literal["a", 2], "a"), (2, Literal["a", 2], 2),
    ([1, 2], list[int], [1, 2]), ([1], Sequence[float], [1]), ([1], Iterable[int], [1]),
    ([1, "a"], list, [1, "a"]),
    ([1, 2], tuple[int, ...], (1, 2)), ([1, "a"], tuple[int, str], (1, "a")),
    ([[1, 2]], list[tuple[int, int]], [(1, 2)]),
    ({"a": 1}, dict[str, int], {"a": 1}), ({"a": [1]}, Mapping[str, Sequence[int]], {"a": [1]}), ({}, dict, {}),
    ("a/b", Path, Path("a/b")), ("a/b", str | Path, "a/b"), (3, Ratio, 3),
    (3, Any, 3), ("x", T, "x"), ("x", object, "x"), ({"width": 1}, Options, {"width": 1}), (3, Likes, 3), (3, "odd", 3),
    ("x", list[int] | str, "x"), ([1], list[int] | str, [1]), (len, Callable[..., int], len),
]  # fmt: skip


@pytest.mark.parametrize(("value", "hint", "result"), FITS)
def test_what_fits(value, hint, result):
    found = fit(value, hint, Where(("a",)))
    assert (type(found), found) == (type(result), result)


MISFITS = [
    (True, int, "a: must be a whole number, not True"),
    (1.0, int, "a: must be a whole number, not 1.0"),
    (True, float, "a: must be a number, not True"),
    (float("inf"), float, "a: must be a number, not inf"),
    ("3", int, "a: must be a whole number, not '3'"),
    (3, str, "a: must be text, not 3"),
    ("no", bool, "a: must be true or false, not 'no'"),
    (1, bool, "a: must be true or false, not 1"),
    (None, int, "a: must be a whole number, not None"),
    (True, Literal[1, "a"], "a: must be 1 or 'a', not True"),
    ("x", int | bool | None, "a: must be a whole number or true or false or null, not 'x'"),
    ("ab", Sequence[str], "a: must be a list, each item text, not 'ab'"),
    ({"x": 1}, Iterable[str], "a: must be a list, each item text, not {'x': 1}"),
    ([1, "x"], list[int], "a.1: must be a whole number, not 'x'"),
    ([1, "x"], list[int] | None, "a.1: must be a whole number, not 'x'"),
    ([1], tuple[int, str], "a: must be a list of 2: a whole number, text, not [1]"),
    ({"x": [1, None]}, dict[str, list[int]], "a.x.1: must be a whole number, not None"),
    ({1: 1}, dict[str, int], "a.1: must be text, not 1"),
    ("x", Where, "a: must be a Where object, not 'x'"),
    (3, Path, "a: must be a Path object, not 3"),
    ("x" * 999, int, "a: must be a whole number, not 'xxxxxxxxxxxx...xxxxxxxxxxxxx'"),
]


@pytest.mark.parametrize(("value", "hint", "message"), MISFITS)
def test_what_does_not_fit(value, hint, message):
    with pytest.raises(CompressionError) as caught:
        fit(value, hint, Where(("a",)))
    assert str(caught.value) == message


def test_a_blueprint_fits_where_its_objects_would():
    point = Blueprint(complex, {"real": 1}, Where())
    assert fit(point, complex, Where()) is point
    assert fit(Blueprint(len, {}, Where()), complex, Where())  # what a function returns is not known
    with pytest.raises(CompressionError, match="must be a Where object, not a complex object"):
        fit(point, Where, Where())


def test_names_stand_for_objects_only_where_an_object_is_wanted():
    named = {"one": Blueprint(complex, {"real": 1}, Where())}
    assert fit(["one"], list[complex], Where(), named) == [named["one"]]
    assert fit("one", complex | None, Where(), named) is named["one"]
    assert fit("one", str | complex, Where(), named) == fit("one", Any, Where(), named) == "one"
    with pytest.raises(CompressionError, match=r"a\.0: nothing is named 'on'; did you mean 'one'\?"):
        fit(["on"], list[complex], Where(("a",)), named)


def test_a_blueprint_is_built_once_for_all_who_share_it():
    point = Blueprint(complex, {"real": 1}, Where())
    both = realize([Blueprint(list, {}, Where()), (point, {"a": point})], {})
    assert both == [[], (1, {"a": 1})]
    assert both[1][0] is both[1][1]["a"]
    assert point.build() is not point.build()


def plain(a: int, b=None, *rest: int, c: "float" = 1.0, d: int = None): ...  # noqa: RUF013


def open_ended(a: int, **others): ...


def unresolvable(a: "Nowhere", b: int = 1): ...  # noqa: F821


def odd(a: [int], b: 3 = None): ...


class Old:
    def __init__(self, a, b: int = 1):
        pass


def test_arguments_are_bound_by_the_signature():
    assert bind(plain, {"a": 1, "b": "x", "c": 2}) == {"a": 1, "b": "x", "c": 2}
    assert bind(plain, {"a": 1, "b": "none", "d": None}) == {"a": 1, "b": "none", "d": None}
    assert bind(open_ended, {"a": 1, "z": "none"}) == {"a": 1, "z": "none"}
    assert bind(unresolvable, {"a": 3, "b": "x"}) == {"a": 3, "b": "x"}
    assert bind(odd, {"a": "x", "b": "y"}) == {"a": "x", "b": "y"}
    assert bind(Old, {"a": object, "b": 2}) == {"a": object, "b": 2}
    assert bind(dict, {"anything": 1}) == {"anything": 1}


@pytest.mark.parametrize(
    ("target", "values", "message"),
    [
        (plain, {"b": 1}, "at: plain needs the argument 'a'"),
        (plain, {"a": 1, "rest": []}, "at.rest: plain has no such argument; choose from: a, b, c, d"),
        (plain, {"a": 1, 2: 3}, "at.2: plain has no such argument; choose from: a, b, c, d"),
        (plain, {"a": 1, "c": "x"}, "at.c: must be a number, not 'x'"),
        (Old, {"a": 1, "self": 1}, "at.self: Old has no such argument; choose from: a, b"),
        (Old, {"a": 1, "b": None}, "at.b: must be a whole number, not None"),
    ],
)
def test_arguments_that_do_not_bind(target, values, message):
    with pytest.raises(CompressionError) as caught:
        bind(target, values, Where(("at",)))
    assert str(caught.value) == message


@pytest.mark.parametrize("hint", [typing.Callable, list[Any], int | None, T, Likes, Callable[[int], str], "odd", 3])
def test_every_hint_has_words(hint):
    assert describe(hint)


@pytest.mark.parametrize(
    "name", ["math", ":pi", "math:", "math:pi", ".x:y", "a b:c", "math:.", "math:sqrt.x", "a\0b:c"]
)
def test_what_cannot_be_imported(name):
    with pytest.raises(CompressionError, match=r"^class: "):
        imported(name, Where(("class",)))
