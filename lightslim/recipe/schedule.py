"""What the ``compressor`` section says: which strategies run, for how long, and whether that order makes sense."""

import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from lightslim.errors import did_you_mean
from lightslim.recipe.arguments import bind
from lightslim.recipe.blueprint import Blueprint
from lightslim.recipe.drafts import section
from lightslim.strategy import CompressionStrategy
from lightslim.yamlfile import Document, Where

SECTIONS = ("compressor", "compress_pass")

_ENDLESS = sys.maxsize
_ALLOWED = {"epoch": range(1, _ENDLESS), "eval_epoch": range(1, _ENDLESS), "seed": range(2**32)}


def compressor(
    epoch: int,
    strategies: Sequence[str] | None = None,
    checkpoint_path: str | None = None,
    init_model: str | None = None,
    eval_epoch: int = 1,
    seed: int | None = None,
) -> None:
    """The signature is the schema of the section; :class:`lightslim.recipe.Recipe` tells what the settings mean."""


def schedule(document: Document, strategies: Mapping[str, Blueprint]) -> dict[str, Any]:
    """The settings of the section, by the names of :func:`compressor`; no strategies if there is no such section.

    Args:
        document: the recipe.
        strategies: all that are defined.

    Raises:
        CompressionError: a setting is wrong, a strategy is not defined, never acts, or stands in the wrong order.
    """
    given = [name for name in SECTIONS if document.tree.get(name) is not None]
    if not given:
        return {"strategies": []}
    where = document.where(given[0])
    if len(given) > 1:
        raise document.where(given[1]).error(f"is another word for {given[0]!r}, which is given at {where.place}")
    settings = bind(compressor, section(document, given[0]), where)
    for name, allowed in _ALLOWED.items():
        if settings.get(name) is not None and settings[name] not in allowed:
            most = "" if allowed.stop == _ENDLESS else f" and at most {allowed.stop - 1}"
            raise (where / name).error(f"must be {allowed.start} or more{most}, not {settings[name]}")
    names = settings["strategies"] = settings.get("strategies") or []
    _check_names(names, strategies, where / "strategies")
    _check_order([(strategies[name].build(), strategies[name].where) for name in names], settings["epoch"])
    return settings


def _check_names(names: Sequence[str], strategies: Mapping[str, Blueprint], where: Where) -> None:
    for index, name in enumerate(names):
        if name not in strategies:
            raise (where / index).error(f"there is no strategy {name!r}; {did_you_mean(name, strategies)}")
        if name in names[:index]:
            raise (where / index).error(f"{name!r} is listed twice")


def _check_order(listed: Sequence[tuple[CompressionStrategy, Where]], epochs: int) -> None:
    for strategy, where in listed:
        if strategy.start_epoch >= epochs:
            message = f"is {strategy.start_epoch}, but training ends after {epochs} epochs: it would never act"
            raise (where / "start_epoch").error(message)
    names = [strategy.name for strategy, _ in listed]
    for index, (strategy, where) in enumerate(listed):
        if strategy.name in names[:index]:
            raise (where / "name").error(f"another strategy is named {strategy.name!r} too")
    by_start = sorted(listed, key=lambda entry: entry[0].start_epoch)
    for (strategy, where), (follower, _) in pairwise(by_start):
        if strategy.must_be_last:
            raise where.error(f"{type(strategy).__name__} must be the last to act, but {follower.name!r} acts after it")
