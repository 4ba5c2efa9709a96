"""What an act changed, as numbers by tag and as a table for people."""

from collections.abc import Iterator, Mapping
from typing import Any

from lightslim.prune import curves

Change = tuple[str, float, float]


def lasting(record: Mapping[str, Any]) -> Iterator[Change]:
    """What the act changed for good: tag, before, after."""
    for key in ("flops", "params"):
        if key in record:
            yield (key, *record[key])
    for key in ("units", "sparsity"):
        for layer, (before, after) in record.get(key, {}).items():
            yield f"{key}/{layer}", before, after


def _worst(record: Mapping[str, Any]) -> list[str]:
    """Layers by how much of their signal quantization keeps, the worst first, as the end of a table."""
    noise = record.get("signal_to_noise", {})
    rows = [f"| {layer} | {decibels:.1f} |" for layer, decibels in noise.items()]
    return ["", "| layer | signal to noise, dB |", "|---|---:|", *rows] if rows else []


def _chosen(record: Mapping[str, Any]) -> list[str]:
    """What share of each layer went, the most sensitive layer first, as the end of a table."""
    rows = [f"| {' | '.join(row)} |" for row in curves.rows(record)] if "sensitivities" in record else []
    return ["", f"| {' | '.join(curves.HEADER)} |", "|---|---:|---:|---:|", *rows] if rows else []


def measured(record: Mapping[str, Any]) -> Iterator[Change]:
    """What was measured right before and right after the act."""
    metrics = record.get("metrics", {"before": {}, "after": {}})
    for name in sorted(metrics["before"].keys() & metrics["after"].keys()):
        yield f"at_act/{name}", metrics["before"][name], metrics["after"][name]


def markdown(record: Mapping[str, Any]) -> str:
    """A record as a Markdown table of before and after.

    Example:
        >>> print(markdown({"act": "prune", "epoch": 3, "flops": [100, 50]}))
        **prune**, epoch 3
        <BLANKLINE>
        | | before | after |
        |---|---:|---:|
        | flops | 100 | 50 |
    """
    changes = [*lasting(record), *measured(record)]
    rows = [f"| {tag} | {before:,} | {after:,} |" for tag, before, after in changes]
    return "\n".join(
        [
            f"**{record['act']}**, epoch {record['epoch']}",
            "",
            "| | before | after |",
            "|---|---:|---:|",
            *rows,
            *_worst(record),
            *_chosen(record),
        ]
    )
