"""Files that are there whole or not at all, whatever ends the process or fills the disk."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightslim.errors import CompressionError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to; the file takes the place of ``path`` if nothing goes wrong inside.

    Raises:
        CompressionError: the file cannot be written; what ``path`` held before is still there then.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "model.onnx"
        >>> with replacing(path) as partial:
        ...     _ = partial.write_text("new")
        >>> path.read_text(), partial.exists()
        ('new', False)
    """
    # The suffix stays: some runtimes go by it
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise CompressionError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
