"""From YAML text to nodes, within caps: nothing is constructed, and a bomb of aliases costs nothing.

Scalars follow the core schema of YAML 1.2: only ``true`` and ``false`` are booleans (``no`` and ``off`` are text), and
``1e-3`` is a number.
"""

import re
from collections.abc import Callable
from typing import Any

import yaml

VALUES, DEPTH = 10_000, 50
TAG = "tag:yaml.org,2002:"

Weight = tuple[int, int]  # how many values, how many levels


def _number(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


# A whole number of more than 18 digits fits no tensor, and one that begins with 0 differs between versions of YAML:
# both stay text, which nothing that wants a number takes.
SCALARS: dict[str, tuple[re.Pattern[str], Callable[[str], Any]]] = {
    "null": (re.compile(r"(?:~|null|Null|NULL|)\Z"), lambda _: None),
    "bool": (re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), lambda text: text.lower() == "true"),
    "int": (
        re.compile(r"(?:[-+]?(?:0|[1-9][0-9]{0,17})|0o[0-7]{1,18}|0x[0-9a-fA-F]{1,15})\Z"),
        lambda text: int(text, 0),
    ),
    "float": (
        re.compile(
            r"(?:[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))"
            r"|\.(?:nan|NaN|NAN))\Z"
        ),
        _number,
    ),
    "str": (re.compile(r".*\Z", re.DOTALL), str),
}


def compose(text: str, headings: frozenset[str] = frozenset()) -> yaml.Node | None:
    """The root node of the one document in ``text``; None if there is nothing in it.

    Args:
        text: YAML.
        headings: keys that, alone on a line that the grammar refuses because it stands one space too far right, are
            read as if it did not. The text that fixed the recipe format prints `` compressor:`` so.

    Raises:
        yaml.YAMLError: it is malformed, too large or too deep, or an alias stands for something that holds it.

    Example:
        >>> compose("a: [1, two]").value[0][1].value[0].tag
        'tag:yaml.org,2002:int'
    """
    try:
        root = _Loader(text).get_single_node()
    except yaml.parser.ParserError as error:
        start = error.problem_mark.index if error.problem_mark and error.problem_mark.column == 1 else len(text)
        heading = re.compile(r"(\w+):[ \t]*(?:#.*)?\r?$", re.MULTILINE).match(text, start)
        if heading is None or heading[1] not in headings:
            raise
        return compose(text[: start - 1] + text[start:], headings - {heading[1]})
    if root is not None:
        _weigh(root, {})
    return root


def dump(tree: Any) -> str:
    """Write plain values as YAML that reads back as the same values.

    Example:
        >>> print(dump({"text": ["1e-3", "no"], "number": 1e-3}), end="")
        text:
        - '1e-3'
        - no
        number: 0.001
    """
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """Gives up as soon as there is too much."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - declared so in the base class
    values = depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.values, self.depth = self.values + 1, self.depth + 1
        _check_weight((self.values, self.depth), self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes text that the reader would take for something else."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - declared so in the base class

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # Other styles write some line breaks of Unicode as they are, to be read as spaces.
        return self.represent_scalar(TAG + "str", data, None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


for _kind, (_pattern, _) in SCALARS.items():
    if _kind != "str":
        _Loader.add_implicit_resolver(TAG + _kind, _pattern, None)
        _Dumper.add_implicit_resolver(TAG + _kind, _pattern, None)


def _weigh(node: yaml.Node, known: dict[yaml.Node, Weight | None]) -> Weight:
    # With every alias written out, yet visiting each node once.
    if node not in known:
        known[node] = None
        below = [_weigh(child, known) for child in _children(node)]
        weight = 1 + sum(values for values, _ in below), 1 + max((depth for _, depth in below), default=0)
        _check_weight(weight, node.start_mark)
        known[node] = weight
    found = known[node]
    if found is None:
        raise _error("an alias stands for something that holds it", node.start_mark)
    return found


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _check_weight(weight: Weight, mark: yaml.Mark) -> None:
    for count, most, what in zip(weight, (VALUES, DEPTH), ("values", "levels"), strict=True):
        if count > most:
            raise _error(f"there are more than {most:,} {what}", mark)


def _error(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.composer.ComposerError(None, None, problem, mark)
