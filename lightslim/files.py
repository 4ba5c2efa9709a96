"""Files that are there whole or not at all, whatever ends the process or fills the disk."""

import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from lightslim.errors import CompressionError

PARTIAL = ".partial"


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
    partial = path.with_name(f".{path.stem}{PARTIAL}{path.suffix}")
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


def check_apart(paths: Iterable[str]) -> None:
    """Raise if two exported files, or the manifests beside them, would lie in one place.

    Example:
        >>> check_apart(["out/a.onnx", "out/../out/a.onnx"])
        Traceback (most recent call last):
        ...
        lightslim.errors.CompressionError: out/../out/a.onnx: another file is written there already
    """
    taken: set[str] = set()
    for path in paths:
        places = {os.path.normpath(path + end) for end in ("", ".json")}
        if places & taken:
            raise CompressionError(f"{path}: another file is written there already")
        taken |= places


def check_writable(path: Path) -> None:
    """Make sure, as far as one can before the time, that a file can be written.

    Raises:
        CompressionError: something is in the way of ``path``, or this user may not write there.

    Example:
        >>> check_writable(Path("/dev/null/a.onnx"))
        Traceback (most recent call last):
        ...
        lightslim.errors.CompressionError: /dev/null is in the way of /dev/null/a.onnx: name a file that can be written
    """
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if path.is_dir() or not (there == path or there.is_dir()):
        raise CompressionError(f"{there} is in the way of {path}: name a file that can be written")
    folder = path.absolute().parent if there == path else there
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise CompressionError(f"{path} cannot be written: nothing may be written in {folder}")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else who asks for it has ``folder`` meanwhile; the lock goes with the process, however that ends.

    Raises:
        CompressionError: somebody else has it.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with locked(folder), contextlib.suppress(CompressionError), locked(folder):
        ...     print("never reached")
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CompressionError(f"{folder}: another process is writing there") from None
        yield
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Remove what killed processes have left half written in ``folder``."""
    for stale in folder.glob(f".*{PARTIAL}*"):
        with contextlib.suppress(OSError):
            stale.unlink()
