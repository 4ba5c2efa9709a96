"""Load a compressed model without a Trainer: build it, give it the structure of its checkpoint, fill in the weights."""

import inspect
import zipfile
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lightslim.errors import CompressionError
from lightslim.surgery import CHECKPOINT_KEY, conform

M = TypeVar("M", bound=nn.Module)


def load_compressed(
    build: Callable[..., M], path: str | PathLike[str], map_location: Any = "cpu", **arguments: Any
) -> M:
    """Build a module and load a checkpoint into it, whatever was cut off on the way.

    Args:
        build: the class of the module (or a function that makes the uncut one).
        path: a Lightning checkpoint, or a file that holds a state dict.
        map_location: where the weights go, as in ``torch.load``.
        **arguments: for ``build``; they win over the hyperparameters saved in the checkpoint.

    Returns:
        The module in evaluation mode.

    Raises:
        CompressionError: the file is missing, damaged or holds something else, or does not fit the module.

    Example:
        >>> import tempfile
        >>> from lightslim.prune import prune
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = prune(net, torch.zeros(2, 4), target_ratio=0.5)
        >>> path = Path(tempfile.mkdtemp()) / "small.pt"
        >>> torch.save(net.state_dict(), path)
        >>> load_compressed(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), path)[0].out_features
        4
    """
    checkpoint = read_checkpoint(path, map_location)
    weights = checkpoint.get("state_dict", checkpoint)
    module = build(**{**_saved_arguments(build, checkpoint), **arguments})
    restore(module, weights, checkpoint.get(CHECKPOINT_KEY), path)
    return module.eval()


def restore(module: nn.Module, weights: Mapping[str, Any], record: Mapping[str, Any] | None, path: object) -> None:
    """Give ``module`` the structure and the values of ``weights``.

    Raises:
        CompressionError: names or shapes do not fit.
    """
    conform(module, weights, record)
    fill(module, weights, path)


def fill(module: nn.Module, weights: Mapping[str, Any], path: object) -> None:
    """Load ``weights`` into a module of just this structure.

    Raises:
        CompressionError: names or shapes do not fit.
    """
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise CompressionError(f"{path} does not fit {type(module).__name__}: {error}") from error


def read_checkpoint(path: str | PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint of plain types and tensors; nothing in it is executed.

    Raises:
        CompressionError: the file is missing, damaged, or holds anything else.
    """
    if not Path(path).is_file():
        raise CompressionError(f"{path}: there is no such checkpoint")
    check_sums(path)
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for damaged and for unsafe files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CompressionError(f"{path} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict):
        raise CompressionError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint")
    return checkpoint


def check_sums(path: str | PathLike[str]) -> None:
    """Compare a checkpoint's content with its own checksums, which torch does not.

    Raises:
        CompressionError: it is damaged.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
            if broken:
                raise zipfile.BadZipFile(f"{broken} in it has changed since it was written")
    except Exception as error:  # zipfile raises half a dozen kinds
        raise CompressionError(f"{path} cannot be read as a checkpoint: {error}") from error


def _saved_arguments(build: Callable[..., Any], checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    saved = checkpoint.get("hyper_parameters", {})
    parameters = inspect.signature(build).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(saved)
    return {name: value for name, value in saved.items() if name in parameters}
