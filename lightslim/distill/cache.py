"""Answers of a teacher on disk, for data that come in the same batches each epoch."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]


class Cache:
    """Keeps a teacher's answers in files of plain tensors, by the content of teacher and batch.

    Args:
        folder: where; other caches may share it.
        most: bytes that the folder may hold; what would not fit is not kept.
        context: everything else that an answer depends on.
    """

    def __init__(self, folder: Path, most: int, context: str) -> None:
        self.folder, self.most, self.context = folder, most, context
        self.hits = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._size = sum(path.stat().st_size for path in folder.glob("*.pt"))
        self._full = False

    def get(self, arguments: Arguments, compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        """The answer to ``arguments``, from disk if it is there, else from ``compute``."""
        path = self.folder / f"{digest(arguments, self.context)}.pt"
        device = next((x.device for x in pytree.tree_leaves(arguments) if isinstance(x, Tensor)), torch.device("cpu"))
        found = self._read(path, device)
        if found is None:
            found = compute()
            self._write(path, found)
        else:
            self.hits += 1
        return found

    def _read(self, path: Path, device: torch.device) -> list[Tensor] | None:
        if not path.exists():
            return None
        try:
            return [tensor.to(device) for tensor in torch.load(path, map_location="cpu", weights_only=True)]
        except Exception as error:  # torch raises half a dozen kinds for a damaged file
            rank_zero_warn(f"{path} is damaged and is written anew: {type(error).__name__}")
            self._size -= path.stat().st_size
            path.unlink(missing_ok=True)
            return None

    def _write(self, path: Path, answer: Sequence[Tensor]) -> None:
        if self._full:
            return
        size = sum(tensor.numel() * tensor.element_size() for tensor in answer)
        if self._size + size > self.most:
            self._full = True
            rank_zero_warn(f"{self.folder} is full, cache_bytes are {self.most:,}: further answers are not kept")
            return
        partial = path.with_suffix(f".{os.getpid()}.partial")
        torch.save([tensor.contiguous().cpu() for tensor in answer], partial)
        self._size += partial.stat().st_size
        partial.replace(path)


def fingerprint(network: nn.Module) -> str:
    """Of what ``network`` computes: its class and the content of its state.

    Example:
        >>> one, other = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> fingerprint(one) == fingerprint(one), fingerprint(one) == fingerprint(other)
        (True, False)
    """
    return digest(dict(network.state_dict()), f"{type(network).__module__}.{type(network).__qualname__} {network!r}")


def digest(tree: Any, context: str = "") -> str:
    """SHA-256 of the content of nested tensors and plain values.

    Example:
        >>> digest([torch.ones(2)]) == digest([torch.ones(2)]), digest(torch.ones(2)) == digest(torch.ones(2).int())
        (True, False)
    """
    leaves, structure = pytree.tree_flatten(tree)
    found = hashlib.sha256(f"{context}|{structure}".encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            data = leaf.detach().cpu().contiguous()
            found.update(f"|{data.dtype}{tuple(data.shape)}|".encode())
            found.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(f"|{leaf!r}|".encode())
    return found.hexdigest()
