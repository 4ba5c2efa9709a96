"""Which weights become zero: the schedule, the ranking and the pattern, as functions of tensors."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from lightslim import CompressionError

RANKINGS = ("layer", "global")
Masks = dict[str, Tensor]  # by parameter, True where it is zero


def cubic(progress: float, initial: float, final: float) -> float:
    """The sparsity at a point of the schedule, ``final + (initial - final) (1 - progress)^3``: Zhu and Gupta, 2017.

    Example:
        >>> [round(cubic(p, 0.0, 0.8), 3) for p in (0.0, 0.5, 1.0, 7.0)]
        [0.0, 0.7, 0.8, 0.8]
    """
    return final + (initial - final) * (1 - min(max(progress, 0.0), 1.0)) ** 3


def parse_pattern(pattern: str) -> tuple[int, int]:
    """``"2:4"`` as numbers.

    Raises:
        CompressionError: it is written otherwise, or leaves nothing to keep or to prune.
    """
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    kept, of = (int(number) for number in found.groups()) if found else (0, 0)
    if not 0 < kept < of:
        raise CompressionError(f"pattern is {pattern!r}; it must say how many of how many to keep, as '2:4'")
    return kept, of


def spared(weight: Tensor, kept: int, of: int, axis: int = 1) -> Tensor:
    """Where a weight is among the ``kept`` largest of its ``of`` neighbours along ``axis``, as a bool mask.

    Example:
        >>> spared(torch.tensor([[1.0, -4.0, 3.0, 2.0]]), 2, 4)
        tensor([[False,  True,  True, False]])
    """
    groups = weight.detach().abs().movedim(axis, -1).unflatten(-1, (-1, of))
    order = groups.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :kept], True)
    return mask.flatten(-2).movedim(-1, axis)


def masks_for(
    weights: Mapping[str, Tensor],
    sparsity: float,
    ranking: str = "layer",
    pattern: str | None = None,
    axes: Mapping[str, int] | None = None,
    before: Mapping[str, Tensor] | None = None,
) -> Masks:
    """The weights of least magnitude, as masks that are True where a weight goes.

    Exactly ``round(sparsity * n)`` go, ties by position; no tensor loses its largest weight.

    Args:
        weights: by name, of any shapes.
        sparsity: share that goes, from 0 to below 1: of each tensor, or of all together.
        ranking: "layer" takes that share of each tensor, "global" all below one bar.
        pattern: as "2:4": of 4 neighbours along the input axis, 2 at most go.
        axes: the input axis of each tensor; 1 where it is not said.
        before: masks of what has gone already, and goes first.

    Example:
        >>> masks_for({"w": torch.tensor([3.0, -1.0, 2.0, 0.5])}, 0.5)
        {'w': tensor([False,  True, False,  True])}
    """
    scores = {}
    for name, weight in weights.items():
        score = weight.detach().abs().float()
        stays = torch.zeros_like(score, dtype=torch.bool)
        if pattern:
            stays = spared(score, *parse_pattern(pattern), (axes or {}).get(name, 1))
        elif before and name in before:
            score = score.masked_fill(before[name], -1.0)
        stays[torch.unravel_index(score.argmax(), score.shape)] = True
        scores[name] = score.masked_fill(stays, torch.inf).flatten()
    if ranking == "global" and scores:
        everything = _lowest(torch.cat(list(scores.values())), sparsity).split([len(s) for s in scores.values()])
        return {name: mask.view_as(weights[name]) for name, mask in zip(scores, everything, strict=True)}
    return {name: _lowest(score, sparsity).view_as(weights[name]) for name, score in scores.items()}


def _lowest(scores: Tensor, share: float) -> Tensor:
    """A mask of so many of the lowest; what is infinite stays."""
    count = min(round(share * len(scores)), int(scores.isfinite().sum()))
    # Not topk: it does not say which of equal ones it takes
    chosen = scores.argsort(stable=True)[:count]
    return torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, chosen, True)
