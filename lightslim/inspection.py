"""Checkpoints as text for people."""

from collections.abc import Mapping
from typing import Any

from lightslim.errors import CompressionError
from lightslim.loading import read_checkpoint
from lightslim.show import number
from lightslim.surgery import CHECKPOINT_KEY, Cut
from lightslim.tables import table


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
