"""The IDX format that MNIST made common: read it, and fetch a file of it safely."""

import gzip
import hashlib
import math
import os
import struct
import tempfile
import urllib.request
import zlib
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lightslim.errors import CompressionError

_UNSIGNED_BYTES = 0x08


def read_idx(path: Path) -> Tensor:
    """The array of unsigned bytes in a gzipped IDX file, in its shape.

    Raises:
        CompressionError: the file is damaged, or holds something else.
    """
    content = _unpack(path)
    shape, start = _header(content, path)
    if len(content) - start != math.prod(shape):
        raise CompressionError(f"{path}: {len(content) - start} bytes of data, {math.prod(shape)} expected for {shape}")
    # a bytearray because torch warns about buffers it could not write to
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[start:].view(shape)


def _unpack(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise CompressionError(f"{path} cannot be read: {error}; delete it and fetch it again") from error


def _header(content: bytes, path: Path) -> tuple[tuple[int, ...], int]:
    """The shape that the header tells, and where the data start."""
    zeros, kind, ndim = struct.unpack_from(">HBB", content.ljust(4, b"\xff"))
    start = 4 + 4 * ndim
    if zeros != 0 or kind != _UNSIGNED_BYTES or len(content) < start:
        raise CompressionError(f"{path} is not an IDX file of unsigned bytes")
    return struct.unpack_from(f">{ndim}I", content, 4), start


def fetch(url: str, path: Path, sha256: str) -> None:
    """Download ``url`` to ``path``, which appears only once its content is known to be right.

    Args:
        url: a gzipped file.
        path: where it goes; its folder is made when missing.
        sha256: the checksum of the *unpacked* content, the same however the file was packed.

    Raises:
        CompressionError: the download failed, or its content is not the one expected.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    part = Path(name)
    try:
        _download(url, part)
        found = hashlib.sha256(_unpack(part)).hexdigest()
        if found != sha256:
            raise CompressionError(f"{url}: the content's SHA-256 is {found}, not {sha256}")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _download(url: str, path: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer, path.open("wb") as out:
            total = int(answer.headers.get("Content-Length", 0)) or None
            with tqdm(total=total, unit="B", unit_scale=True, desc=url.rpartition("/")[2]) as bar:
                while block := answer.read(1 << 16):
                    bar.update(out.write(block))
    except OSError as error:
        raise CompressionError(f"{url} cannot be downloaded: {error}") from error
