"""How far a file's outputs are from those of the model it was written from."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightslim.errors import CompressionError


def differences(got: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, Any]:
    """The largest absolute difference, that in relative norm, and how many of the largest scores are elsewhere.

    Raises:
        CompressionError: the outputs cannot be compared: another number or shape, or not finite where they should be.

    Example:
        >>> found = differences([torch.tensor([[1.0, 2.5], [4.0, 3.0]])], [torch.tensor([[1.0, 2.0], [3.0, 4.0]])])
        >>> found["max_abs_diff"], round(found["rel_diff"], 3), found["argmax_differs"], found["argmax_of"]
        (1.0, 0.274, 1, 2)
    """
    shapes = [tuple(tensor.shape) for tensor in got], [tuple(tensor.shape) for tensor in expected]
    if shapes[0] != shapes[1]:
        raise CompressionError(f"the file's outputs have the shapes {shapes[0]}, the model's {shapes[1]}")
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(got, expected, strict=True)]
    if not all(bool((a.isfinite() == b.isfinite()).all()) for a, b in pairs):
        raise CompressionError("the file's outputs are not finite where the model's are")
    moved = [(a - b).nan_to_num() for a, b in pairs]
    return {
        "max_abs_diff": max((_peak(d) for d in moved), default=0.0),
        "rel_diff": max((_relative(d, b) for d, (_, b) in zip(moved, pairs, strict=True)), default=0.0),
        **_argmax(pairs),
    }


def _peak(moved: Tensor) -> float:
    return moved.abs().max().item() if moved.numel() else 0.0


def _relative(moved: Tensor, expected: Tensor) -> float:
    norm = float(expected.nan_to_num().norm())
    return float(moved.norm()) / (norm or 1.0)


def _argmax(pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, int]:
    """Predictions, taking the last dimension for the scores of the classes."""
    scores = [(a, b) for a, b in pairs if a.ndim > 1 and a.shape[-1] > 1]
    differing = [(a.argmax(-1) != b.argmax(-1)).flatten() for a, b in scores]
    joined = torch.cat(differing) if differing else torch.zeros(0)
    return {"argmax_differs": int(joined.sum()), "argmax_of": joined.numel()}
