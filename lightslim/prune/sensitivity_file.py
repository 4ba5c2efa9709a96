"""The file of a sensitivity analysis: written after every point, so that a killed analysis goes on at the next one."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightslim.errors import CompressionError
from lightslim.files import replacing

FORMAT = 2
Sensitivities = dict[str, dict[str, Any]]


class SensitivityFile:
    """Points measured so far, in memory and on disk.

    The file is JSON: ``fingerprint`` says what was measured, ``baseline`` the metric without any mask, and
    ``sensitivities`` is ``{parameter: {"pruned_percent": [...], "loss": [...], "size": units}}``. ``sha256`` is that of
    the rest: a digit that the disk has changed would be a curve like any other.

    Args:
        path: where the file is or will be; None for memory alone.
        fingerprint: of model, data, metric and code, as plain values; a file with another one is not taken.

    Raises:
        CompressionError: the file is damaged, or was made of something else; it says what differs.

    Example:
        >>> points = SensitivityFile(None, {"metric": "val_acc"})
        >>> points.add("conv.weight", 16, 0.5, 0.25)
        >>> points.sensitivities
        {'conv.weight': {'pruned_percent': [0.5], 'loss': [0.25], 'size': 16}}
    """

    def __init__(self, path: Path | None, fingerprint: Mapping[str, Any]) -> None:
        self.path, self.fingerprint = path, dict(fingerprint)
        self.baseline: float | None = None
        self.sensitivities: Sensitivities = {}
        if path is not None and path.exists():
            content = read(path)
            check(path, content["fingerprint"], self.fingerprint)
            self.baseline, self.sensitivities = content["baseline"], content["sensitivities"]

    def add(self, parameter: str, size: int, ratio: float, loss: float) -> None:
        """Keep a point, on disk too."""
        curve = self.sensitivities.setdefault(parameter, {"pruned_percent": [], "loss": [], "size": size})
        curve["pruned_percent"].append(ratio)
        curve["loss"].append(loss)
        self.save()

    def save(self) -> None:
        """Write the file, whole or not at all."""
        if self.path is not None:
            content = {
                "format": FORMAT,
                "fingerprint": self.fingerprint,
                "baseline": self.baseline,
                "sensitivities": self.sensitivities,
            }
            content["sha256"] = _digest(content)
            with replacing(self.path) as partial:
                partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """The content of a file of sensitivities.

    Raises:
        CompressionError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CompressionError(f"{path} cannot be read: {error}; delete it to measure anew") from error
    fault = _fault(content)
    if fault is not None:
        raise CompressionError(f"{path} is no file of sensitivities that can be used: {fault}; delete it")
    return dict(content)


def _fault(content: Any) -> str | None:
    """What is wrong with what a file holds; None if nothing is."""
    if not isinstance(content, dict) or "sensitivities" not in content:
        return "it holds no sensitivities"
    if content.get("format") != FORMAT:
        return f"its format is {content.get('format')!r}, not {FORMAT}"
    if content.get("sha256") != _digest(content):
        return "it has changed since it was written"
    return None


def _digest(content: Mapping[str, Any]) -> str:
    signed = {name: value for name, value in content.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(signed, sort_keys=True).encode()).hexdigest()


def check(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise if a file was made of something else than is wanted; only what ``wanted`` names is compared."""
    differing = [name for name in wanted if found.get(name) != wanted[name]]
    if differing:
        said = "; ".join(f"{name}: {_short(found.get(name))} there, {_short(wanted[name])} here" for name in differing)
        raise CompressionError(f"{path} was measured for something else ({said}); delete it or name another file")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def model_fingerprint(module: nn.Module) -> str:
    """A digest of the names, shapes and values of all parameters and buffers that checkpoints hold.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> before = model_fingerprint(net)
        >>> with torch.no_grad():
        ...     _ = net.bias.add_(1)
        >>> before == model_fingerprint(net)
        False
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
