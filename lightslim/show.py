"""Results as text for people."""

from collections.abc import Mapping
from typing import Any

from lightslim.tables import table


def result_table(result: Mapping[str, Any]) -> str:
    """The content of ``result.json`` as a table: before, after, change."""
    before, after = flat(result["before"]), flat(result["after"])
    rows = [
        (name, number(before[name]), number(after[name]), _change(before[name], after[name]))
        for name in before
        if name in after
    ]
    return table(("", "before", "after", "change"), rows)


def exports_table(exports: Mapping[str, Mapping[str, Any]]) -> str:
    """The files that a run has written, with what each gives on the validation data in its own runtime; may be empty.

    Example:
        >>> print(exports_table({"int8": {"path": "m.onnx", "bytes": 1024, "metrics": {"val_acc": 0.5}}}))
        file    format  bytes  val_acc
        m.onnx  int8    1,024   0.5000
    """
    if not exports:
        return ""
    metrics = list(dict.fromkeys(name for file in exports.values() for name in file["metrics"]))
    rows = [
        (file["path"], format_, number(file["bytes"]), *(number(file["metrics"][m]) if m in file["metrics"] else ""
         for m in metrics)) for format_, file in exports.items()
    ]  # fmt: skip
    return table(("file", "format", "bytes", *metrics), rows, left=2)


def sensitivity_table(sensitivities: Mapping[str, Mapping[str, Any]]) -> str:
    """What a metric loses by layer and share of units masked.

    Example:
        >>> print(sensitivity_table({"conv.weight": {"pruned_percent": [0.5], "loss": [0.25], "size": 16}}))
        parameter    units     50%
        conv.weight     16  0.2500
    """
    shares = sorted({share for curve in sensitivities.values() for share in curve["pruned_percent"]})
    rows = []
    for name, curve in sensitivities.items():
        losses = dict(zip(curve["pruned_percent"], curve["loss"], strict=True))
        rows.append((name, number(curve["size"]), *(number(losses[s]) if s in losses else "" for s in shares)))
    return table(("parameter", "units", *(f"{share:.0%}" for share in shares)), rows)


def flat(measured: Mapping[str, Any]) -> dict[str, float]:
    """A measurement with its metrics beside its costs.

    Example:
        >>> flat({"metrics": {"acc": 0.9}, "flops": 10})
        {'acc': 0.9, 'flops': 10}
    """
    return {**measured.get("metrics", {}), **{name: value for name, value in measured.items() if name != "metrics"}}


def number(value: float) -> str:
    """A number for a table: whole ones with separators, others to four digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _change(before: float, after: float) -> str:
    return (
        f"{after - before:+.4f}" if isinstance(before, float) else f"{(after - before) / before:+.1%}" if before else ""
    )
