"""How a recipe names parameters and layers: one rule for globs and regular expressions."""

import difflib
import fnmatch
import functools
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from lightslim.errors import CompressionError

T = TypeVar("T")

_REGEX_ONLY = re.compile(r"\.[*+?]|[\\^$+(){}|]")


def match(pattern: str, name: str) -> bool:
    r"""Whether the whole of ``name`` fits ``pattern``.

    A pattern that starts with ``re:`` or holds something only a regular expression can hold (``.*``, ``|``, ``\d``,
    ``+``, ``^`` ...) is a regular expression; any other is a glob (``*``, ``?``, ``[abc]``). Both must fit it whole.

    Raises:
        CompressionError: the regular expression is malformed.

    Example:
        >>> match("conv*", "conv1.weight"), match("*", "fc.bias"), match(".*_sep_weights", "conv2_1_sep_weights")
        (True, True, True)
        >>> match("conv", "conv1.weight")
        False
    """
    return _compiled(pattern).fullmatch(name) is not None


@functools.lru_cache(maxsize=512)
def _compiled(pattern: str) -> re.Pattern[str]:
    explicit = pattern.startswith("re:")
    body = pattern.removeprefix("re:")
    source = body if explicit or _REGEX_ONLY.search(body) else fnmatch.translate(body)
    try:
        return re.compile(source)
    except re.error as error:
        raise CompressionError(f"the pattern {pattern!r} is not a valid regular expression: {error}") from None


def check_pattern(pattern: str, argument: str) -> None:
    """Raise if ``pattern``, given as ``argument``, is a malformed regular expression."""
    try:
        _compiled(pattern)
    except CompressionError as error:
        raise CompressionError(f"{argument}: {error}") from None


def select(pattern: str, names: Iterable[str], what: str) -> list[str]:
    """The names that fit ``pattern``; an error when none does.

    Args:
        pattern: a glob or regular expression, see :func:`match`.
        names: what it may match.
        what: the argument that holds the pattern, for the message.

    Raises:
        CompressionError: nothing fits; the message lists the nearest names.

    Example:
        >>> select("*.weight", ["conv.weight", "conv.bias"], "pruned_params")
        ['conv.weight']
    """
    names = list(names)
    found = [name for name in names if match(pattern, name)]
    if not found:
        near = sorted(names, key=functools.partial(_likeness, _plain(pattern)), reverse=True)[:5]
        raise CompressionError(f"{what}: {pattern!r} matches none of {len(names)} names; nearest: {', '.join(near)}")
    return found


def _plain(pattern: str) -> str:
    """What is left of a pattern without its special characters."""
    return re.sub(r"[^\w.]+", "", pattern.removeprefix("re:")).strip(".")


def _likeness(text: str, name: str) -> float:
    """How much ``text`` is like some run of the dotted parts of ``name``, from 0 to 1."""
    parts = name.split(".")
    runs = (".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1))
    return max(difflib.SequenceMatcher(None, text, run).ratio() for run in runs)


def lookup(table: Mapping[str, T], name: str) -> T | None:
    """The value of the first pattern in ``table`` that fits ``name``; exact names win, ``'*'`` comes last.

    Example:
        >>> lookup({"*": 0, "deconv*": 1}, "deconv.weight")
        1
    """
    if name in table:
        return table[name]
    ordered = sorted(table, key=lambda pattern: pattern == "*")
    return next((table[pattern] for pattern in ordered if match(pattern, name)), None)
