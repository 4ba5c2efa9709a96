"""Read YAML strictly: plain values only, each with the place where it stands.

Tags, duplicate keys, merge keys and cycles are refused; anchors are welcome, within the caps.
"""

from collections.abc import Collection
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from lightslim.errors import CompressionError
from lightslim.yamlfile.nodes import SCALARS, TAG, compose
from lightslim.yamlfile.places import Keys, Place, Places, Where

BYTES = 1_000_000


@dataclass(frozen=True)
class Document:
    """Plain values as YAML gives them, and beside them the place of each."""

    tree: Any
    places: Places

    def where(self, *keys: str | int) -> Where:
        """The spot of a value, for messages about it."""
        return Where(keys, self.places)


def read(path: str | PathLike[str], headings: Collection[str] = (), asked: Where | None = None) -> Document:
    """Read a YAML file.

    Args:
        path: the file.
        headings: top-level keys that may stand one space too far right, see :func:`parse`.
        asked: the spot that names this file, if another file does.

    Raises:
        CompressionError: it cannot be read, is empty, or is not the YAML that :func:`parse` takes.
    """
    try:
        content = _content(Path(path))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise (asked or Where()).error(f"{path}: cannot be read: {reason}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise _refusal(Place(str(path), line), "is not UTF-8 text") from None
    document = parse(text, str(path), headings)
    if document.tree is None:
        raise _refusal(Place(str(path)), "is empty")
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
        headings: top-level keys that may stand one space too far right, see :func:`lightslim.yamlfile.nodes.compose`.
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
    reading = _Reading(source, numbered)
    if len(text) > BYTES:
        raise _refusal(Place(source), f"is larger than {BYTES:,} bytes")
    try:
        root = compose(text, frozenset(headings))
    except yaml.reader.ReaderError as error:
        place = reading.place(text.count("\n", 0, error.position))
        raise _refusal(place, f"the character {error.character:#x} is not allowed") from None
    except yaml.MarkedYAMLError as error:
        place = reading.place(error.problem_mark.line) if error.problem_mark else Place(source)
        raise _refusal(place, _explained(error)) from None
    except (ValueError, OverflowError) as error:  # an escape or a version with an absurd number in it
        raise _refusal(Place(source), f"is not valid YAML: {error}") from None
    return Document(reading.value(root, ()) if root else None, reading.places)


def _refusal(place: Place, message: str) -> CompressionError:
    return CompressionError(f"{place}: {message}")


def _explained(error: yaml.MarkedYAMLError) -> str:
    context = f" ({error.context})" if error.context else ""
    hint = "; quote a name that begins with '*'" if "alias" in f"{error.problem}{context}" else ""
    return f"{error.problem}{context}{hint}"


class _Reading:
    """Turns the nodes of one source into plain values and notes the place of each."""

    def __init__(self, source: str, numbered: bool) -> None:
        self.source, self.numbered = source, numbered
        self.places: Places = {(): Place(source)}

    def place(self, row: int) -> Place:
        return Place(self.source, row + 1 if self.numbered else None)

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
            self.places[path] = self.place(key_node.start_mark.line)
            mapping[key] = self.value(value_node, path)
        return mapping

    def _key(self, node: yaml.Node, keys: Keys) -> str | int:
        key = self._scalar(node, keys) if isinstance(node, yaml.ScalarNode) else None
        if isinstance(key, bool) or not isinstance(key, str | int):
            raise self._at(node, keys).error("a key must be text (quote it) or a whole number")
        if key == "<<":
            raise self._at(node, keys).error("merge keys ('<<') are not supported")
        return key

    def _list(self, node: yaml.SequenceNode, keys: Keys) -> list[Any]:
        self._check_tag(node, keys, "seq")
        items = [(item, (*keys, index)) for index, item in enumerate(node.value)]
        self.places |= {path: self.place(item.start_mark.line) for item, path in items}
        return [self.value(item, path) for item, path in items]

    def _scalar(self, node: yaml.Node, keys: Keys) -> Any:
        self._check_tag(node, keys, *SCALARS)
        pattern, convert = SCALARS[node.tag.removeprefix(TAG)]
        if not pattern.match(node.value):
            raise self._at(node, keys).error(f"{node.value!r} does not fit its tag")
        return convert(node.value)

    def _check_tag(self, node: yaml.Node, keys: Keys, *kinds: str) -> None:
        if node.tag not in {TAG + kind for kind in kinds}:
            raise self._at(node, keys).error(f"the tag {node.tag.replace(TAG, '!!')} is not allowed: values are plain")

    def _at(self, node: yaml.Node, keys: Keys) -> Where:
        return Where(keys, {keys: self.place(node.start_mark.line)})
