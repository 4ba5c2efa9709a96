"""Results and checkpoints as text for people."""

from collections.abc import Mapping
from typing import Any

from lightslim.errors import CompressionError
from lightslim.loading import read_checkpoint
from lightslim.surgery import CHECKPOINT_KEY, Cut
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


def inspection(path: str) -> str:
    """What a checkpoint holds: where training stood, what each strategy did, which tensors lost units."""
    checkpoint = read_checkpoint(path)
    try:
        return _inspection(path, checkpoint)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CompressionError(f"{path} is no checkpoint that lightslim can read: {error!r}") from error


def _inspection(path: str, checkpoint: Mapping[str, Any]) -> str:
    weights = checkpoint.get("state_dict", checkpoint)
    numbers = sum(tensor.numel() for tensor in weights.values() if hasattr(tensor, "numel"))
    where = f"epoch {checkpoint['epoch']}, step {checkpoint['global_step']}, " if "epoch" in checkpoint else ""
    lines = [f"{path}: {where}{numbers:,} numbers in {len(weights)} tensors"]
    for state in checkpoint.get("callbacks", {}).values():
        lines += [_act(record) for record in state.get("history", ())] if isinstance(state, dict) else []
    cuts = [Cut.from_state(state) for state in checkpoint.get(CHECKPOINT_KEY, {}).get("cuts", ())]
    lines += [f"cut {i}: {len({item.tensor for item in cut.slices})} tensors" for i, cut in enumerate(cuts, 1)]
    return "\n".join(lines)


def _act(record: Mapping[str, Any]) -> str:
    pairs = {name: record[name] for name in ("flops", "params") if name in record} | record.get("units", {})
    rows = [(name, number(before), number(after)) for name, (before, after) in pairs.items()]
    title = f"{record['act']} at epoch {record['epoch']}"
    noise = [(layer, f"{decibels:.1f}") for layer, decibels in record.get("signal_to_noise", {}).items()]
    if noise:
        return table((title, "signal to noise, dB"), noise)
    return table((title, "before", "after"), rows)
