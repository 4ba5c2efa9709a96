"""Read YAML strictly: plain values only, each with the place where it stands.

Scalars follow the core schema of YAML 1.2: only ``true`` and ``false`` are booleans (``no`` and ``off`` are text) and
``1e-3`` is a number. Tags, duplicate keys, merge keys and cycles are refused; anchors are welcome, within the caps.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from lightslim.errors import CompressionError

BYTES, VALUES, DEPTH = 1_000_000, 10_000, 50

Keys = tuple[str | int, ...]
Weight = tuple[int, int]  # how many values, how deep


@dataclass(frozen=True)
class Place:
    """Where a value stands: a file (or an option of the command line) and, if it has lines, the line.

    Example:
        >>> print(Place("recipe.yaml", 7))
        recipe.yaml:7
    """

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Where:
    """A key path in a document; knows the place to name when something is wrong there.

    Example:
        >>> where = Where(("strategies",), {("strategies",): Place("recipe.yaml", 7)})
        >>> print(where / "halve" / "target_ratio")
        recipe.yaml:7: strategies.halve.target_ratio
    """

    keys: Keys = ()
    places: dict[Keys, Place] = field(default_factory=dict, repr=False)

    def __truediv__(self, key: str | int) -> "Where":
        return Where((*self.keys, key), self.places)

    def __str__(self) -> str:
        return ": ".join(filter(None, [str(self.place or ""), ".".join(map(str, self.keys))]))

    @property
    def place(self) -> Place | None:
        """The place of the value, or of the nearest thing around it that has one."""
        ancestors = (self.keys[:length] for length in range(len(self.keys), -1, -1))
        return next((self.places[keys] for keys in ancestors if keys in self.places), None)

    def error(self, message: str) -> CompressionError:
        """An error that begins with the place and the key path.

        Example:
            >>> Where(("epoch",)).error("must be a whole number")
            CompressionError('epoch: must be a whole number')
        """
        return CompressionError(": ".join(filter(None, [str(self), message])))


@dataclass(frozen=True)
class Document:
    """Plain values as YAML gives them, and beside them the place of each."""

    tree: Any
    places: dict[Keys, Place]

    def where(self, *keys: str | int) -> Where:
        """The spot of a value, for messages about it."""
        return Where(keys, self.places)


def read(path: str | PathLike[str], headings: Collection[str] = (), asked: Where | None = None) -> Document:
    """Read a YAML file.

    Args:
        path: the file.
        headings: top-level keys that may stand one space too far right, see :func:`parse`.
        asked: where the file is asked for, if another file does.

    Raises:
        CompressionError: it cannot be read, is empty, or is not the YAML that :func:`parse` takes.
    """
    source = str(path)
    try:
        content = _content(Path(path))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise (asked or Where()).error(f"{source}: cannot be read: {reason}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise _refusal(source, line, "is not UTF-8 text") from None
    document = parse(text, source, headings)
    if document.tree is None:
        raise _refusal(source, None, "is empty")
    return document


def _content(path: Path) -> bytes:
    # A pipe or a device might never end.
    if path.exists() and not path.is_file():
        raise OSError("it is not a file")
    with path.open("rb") as stream:
        return stream.read(BYTES + 1)


def parse(text: str, source: str, headings: Collection[str] = (), numbered: bool = True) -> Document:
    r"""Parse YAML text.

    Args:
        text: one YAML document.
        source: its name in messages.
        headings: keys that, alone on a line that YAML refuses because it stands one space too far right, are read as if
            it did not. The text that fixed the recipe format prints `` compressor:`` so.
        numbered: whether places have lines.

    Raises:
        CompressionError: the text is malformed, too large, or uses more of YAML than plain values.

    Example:
        >>> parse("a: {b: [1e-3, no]}", "x.yaml").tree
        {'a': {'b': [0.001, 'no']}}
        >>> parse("a: 1\nb: 2\na: 3", "x.yaml")
        Traceback (most recent call last):
            ...
        lightslim.errors.CompressionError: x.yaml:3: a: is given twice, first at x.yaml:1
    """
    if len(text) > BYTES:
        raise _refusal(source, None, f"is larger than {BYTES:,} bytes")
    try:
        root = _compose(text, frozenset(headings))
    except yaml.reader.ReaderError as error:
        line = 1 + text.count("\n", 0, error.position)
        raise _refusal(source, line if numbered else None, f"the character {error.character} is not allowed") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise _refusal(source, mark.line + 1 if mark and numbered else None, _explained(error)) from None
    except (ValueError, OverflowError) as error:  # an escape or a version with an absurd number in it
        raise _refusal(source, None, f"is not valid YAML: {error}") from None
    unfolding = _Unfolding(source, numbered)
    return Document(unfolding.value(root, ()) if root else None, unfolding.places)


def dump(tree: Any) -> str:
    """Write plain values as YAML that :func:`parse` reads back as the same values.

    Example:
        >>> print(dump({"text": ["1e-3", "no"], "number": 1e-3}), end="")
        text:
        - '1e-3'
        - no
        number: 0.001
    """
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _refusal(source: str, line: int | None, message: str) -> CompressionError:
    return CompressionError(f"{Place(source, line)}: {message}")


def _explained(error: yaml.MarkedYAMLError) -> str:
    context = f" ({error.context})" if error.context else ""
    hint = "; quote a name that begins with '*'" if "alias" in f"{context}{error.problem}" else ""
    return f"{error.problem}{context}{hint}"


def _number(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


_TAG = "tag:yaml.org,2002:"
# A whole number of more than 18 digits fits no tensor, and one that begins with 0 is two things in two versions of YAML:
# both stay text, which nothing that wants a number takes.
_SCALARS: dict[str, tuple[re.Pattern[str], Callable[[str], Any]]] = {
    "null": (re.compile(r"(?:~|null|Null|NULL|)\Z"), lambda _: None),
    "bool": (re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), lambda text: text.lower() == "true"),
    "int": (re.compile(r"(?:[-+]?(?:0|[1-9]\d{0,17})|0o[0-7]{1,18}|0x[\da-fA-F]{1,15})\Z"), lambda text: int(text, 0)),
    "float": (
        re.compile(
            r"(?:[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN))\Z"
        ),
        _number,
    ),
    "str": (re.compile(r".*\Z", re.DOTALL), str),
}


class _Loader(yaml.SafeLoader):
    """Composes nodes, constructs nothing, and gives up early on what is too large."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - declared so in the base class
    values = depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.values, self.depth = self.values + 1, self.depth + 1
        _check_weight((self.values, self.depth), self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes what the reader would take for something else than text."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - declared so in the base class

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _kind in ("null", "bool", "int", "float"):
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(_TAG + _kind, _SCALARS[_kind][0], None)


def _compose(text: str, headings: frozenset[str]) -> yaml.Node | None:
    try:
        root = _Loader(text).get_single_node()
    except yaml.parser.ParserError as error:
        mark = error.problem_mark
        heading = _shifted_heading(text, mark)
        if heading not in headings:
            raise
        return _compose(text[: mark.index - 1] + text[mark.index :], headings - {heading})
    if root is not None:
        _weigh(root, {})
    return root


def _shifted_heading(text: str, mark: yaml.Mark) -> str | None:
    found = re.compile(r"(\w+):[ \t]*(?:#.*)?\r?$", re.MULTILINE).match(text, mark.index)
    return found[1] if found and mark.column == 1 else None


def _weigh(node: yaml.Node, known: dict[yaml.Node, Weight | None]) -> Weight:
    # With every alias written out, yet each node is visited once: a bomb of aliases costs nothing.
    if node not in known:
        known[node] = None
        below = [_weigh(child, known) for child in _children(node)]
        weight = 1 + sum(values for values, _ in below), 1 + max((depth for _, depth in below), default=0)
        _check_weight(weight, node.start_mark)
        known[node] = weight
    if (found := known[node]) is None:
        raise yaml.composer.ComposerError(None, None, "an alias stands for something that holds it", node.start_mark)
    return found


def _check_weight(weight: Weight, mark: yaml.Mark) -> None:
    for count, most, what in zip(weight, (VALUES, DEPTH), ("values", "levels"), strict=True):
        if count > most:
            raise yaml.composer.ComposerError(None, None, f"there are more than {most:,} {what}", mark)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


class _Unfolding:
    """Turns nodes into plain values and notes the place of each."""

    def __init__(self, source: str, numbered: bool) -> None:
        self.source, self.numbered = source, numbered
        self.places = {(): Place(source)}

    def value(self, node: yaml.Node, keys: Keys) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, keys)
        if isinstance(node, yaml.SequenceNode):
            return self._list(node, keys)
        return self._scalar(node, keys)

    def _mapping(self, node: yaml.MappingNode, keys: Keys) -> dict[str | int, Any]:
        self._check_tag(node, keys, "map")
        mapping: dict[str | int, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node, keys)
            path = (*keys, key)
            if key in mapping:
                raise self._at(key_node, path).error(f"is given twice, first at {self.places[path]}")
            self.places[path] = self._place(key_node)
            mapping[key] = self.value(value_node, path)
        return mapping

    def _key(self, node: yaml.Node, keys: Keys) -> str | int:
        key = self._scalar(node, keys) if isinstance(node, yaml.ScalarNode) else None
        if isinstance(key, bool) or not isinstance(key, str | int):
            raise self._at(node, keys).error("a key must be text (quote it) or a whole number")
        if key == "<<" and node.style is None:
            raise self._at(node, keys).error("merge keys ('<<') are not supported")
        return key

    def _list(self, node: yaml.SequenceNode, keys: Keys) -> list[Any]:
        self._check_tag(node, keys, "seq")
        paths = [(*keys, index) for index in range(len(node.value))]
        self.places |= {path: self._place(item) for path, item in zip(paths, node.value, strict=True)}
        return [self.value(item, path) for path, item in zip(paths, node.value, strict=True)]

    def _scalar(self, node: yaml.Node, keys: Keys) -> Any:
        self._check_tag(node, keys, *_SCALARS)
        pattern, convert = _SCALARS[node.tag.removeprefix(_TAG)]
        if not pattern.match(node.value):
            raise self._at(node, keys).error(f"{node.value!r} does not fit its tag")
        return convert(node.value)

    def _check_tag(self, node: yaml.Node, keys: Keys, *kinds: str) -> None:
        if node.tag not in {_TAG + kind for kind in kinds}:
            shown = node.tag.replace(_TAG, "!!")
            raise self._at(node, keys).error(f"the tag {shown} is not allowed: values are plain")

    def _place(self, node: yaml.Node) -> Place:
        return Place(self.source, node.start_mark.line + 1 if self.numbered else None)

    def _at(self, node: yaml.Node, keys: Keys) -> Where:
        return Where(keys, {keys: self._place(node)})
