"""One page of TensorBoard that tells the story: which charts, in which order."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_STAGE = re.compile(r"^(train|training|val|valid|validation|test)[_/]|_(step|epoch)$")
_OURS = {
    "FLOPs": "lightslim/flops",
    "parameters": "lightslim/params",
    "units kept, by layer": "lightslim/units/.*",
    "share of zeros, by layer": "lightslim/sparsity/.*",
    "ranges": "lightslim/ranges/.*",
    "signal to noise at the start of quantization, dB, by layer": "lightslim/signal_to_noise/.*",
}

Layout = dict[str, dict[str, list[Any]]]


def layout(logged: Iterable[str], ours: Iterable[str]) -> Layout:
    """Charts for the custom scalars page: what the module logs, what is alike together, then what compression did.

    Args:
        logged: the names of the module's own metrics.
        ours: the tags that the monitor has written.

    Example:
        >>> charts = layout(["train_loss", "val_loss", "val_acc"], ["lightslim/flops"])["lightslim"]
        >>> {title: chart[1] for title, chart in charts.items()}
        {'acc': ['^val_acc$'], 'loss': ['^train_loss$', '^val_loss$'], 'FLOPs': ['^lightslim/flops$']}
    """
    charts: dict[str, list[Any]] = {}
    for title, names in sorted(_together(logged).items(), key=lambda item: ("loss" in item[0], item[0])):
        charts[title] = ["Multiline", [f"^{re.escape(name)}$" for name in names]]
    for title, pattern in _OURS.items():
        if any(re.fullmatch(pattern, tag) for tag in ours):
            charts[title] = ["Multiline", [f"^{pattern}$"]]
    return {"lightslim": charts}


def _together(names: Iterable[str]) -> dict[str, list[str]]:
    """By title, the names that differ in their stage; all parts of a loss are one title, for they add up."""
    groups: dict[str, list[str]] = {}
    for name in sorted(set(names)):
        title = _STAGE.sub("", _STAGE.sub("", name))
        groups.setdefault("loss" if "loss" in title else title, []).append(name)
    return groups


def settings_by_path(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Plain values of nested settings, each under the names that lead to it.

    Example:
        >>> dict(settings_by_path({"model": {"width": 0.5}, "strategies": ["cut"]}))
        {'model.width': 0.5, 'strategies': "['cut']"}
    """
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from settings_by_path(value, f"{path}.{key}" if path else str(key))
    elif tree is not None:
        yield path, tree if isinstance(tree, (bool, int, float, str)) else str(tree)
