"""Checkpoint files that are whole or not there: written beside their place, synced and renamed; checked when read."""

import io
import sys
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightslim.errors import CompressionError
from lightslim.files import replacing, sweep
from lightslim.loading import check_sums, read_checkpoint
from lightslim.rundir import saved_in


class AtomicCheckpointIO(TorchCheckpointIO):
    """For ``Trainer(plugins=[AtomicCheckpointIO()])``; ``lightslim run`` has it.

    Lightning writes to the system's folder for temporary files and moves that to its place: a copy where they are on
    two disks, which a kill or a power cut leaves in halves. And torch does not look at the checksums in its own files.

    Raises:
        CompressionError: a checkpoint cannot be written (what was there before still is), or is damaged.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "last.ckpt"
        >>> AtomicCheckpointIO().save_checkpoint({"epoch": 3}, path)
        >>> AtomicCheckpointIO().load_checkpoint(path, weights_only=True)
        {'epoch': 3}
    """

    def __init__(self) -> None:
        super().__init__()
        # A Trainer of lightning.pytorch looks for a class of its own
        twin = sys.modules.get("lightning.fabric.plugins.io.checkpoint_io")
        if twin is not None:
            twin.CheckpointIO.register(type(self))

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if storage_options is not None or _elsewhere(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()  # so that a full disk is an OSError like any other
        torch.save(checkpoint, buffer)
        sweep(Path(path).parent)
        with replacing(Path(path)) as partial:
            partial.write_bytes(buffer.getbuffer())

    @override
    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if not _elsewhere(path) and Path(path).is_file():
            check_sums(path)
        try:
            return super().load_checkpoint(path, *args, **kwargs)
        except FileNotFoundError:
            raise
        except Exception as error:  # torch raises half a dozen kinds for damaged and for unsafe files
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CompressionError(f"{path} cannot be read as a checkpoint: {reason}") from error


def _elsewhere(path: object) -> bool:
    """Whether a path is an address of remote storage."""
    return "://" in str(path)


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint to go on from: ``last.ckpt``, else the newest file, else, where those are damaged, one before.

    Raises:
        CompressionError: there are checkpoints, and all of them are damaged.
    """
    found = saved_in(folder)
    for path in reversed(found):
        try:
            read_checkpoint(path)
        except CompressionError as error:
            rank_zero_warn(f"{error}; looking for the one before")
        else:
            return path
    if found:
        raise CompressionError(f"{folder}: none of the {len(found)} checkpoints there can be read")
    return None
