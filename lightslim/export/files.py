"""What lies beside a written model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightslim.files import replacing


def manifest_path(path: Path) -> Path:
    """Where the manifest of ``path`` lies: beside it.

    Example:
        >>> manifest_path(Path("out/model.onnx")).as_posix()
        'out/model.onnx.json'
    """
    return path.with_name(path.name + ".json")


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write what is known about ``path`` beside it."""
    with replacing(manifest_path(path)) as partial:
        partial.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
