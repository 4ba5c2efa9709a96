"""How important is a unit? A criterion is a function of one weight: ``f(weight, axis=0) -> scores``.

One that has an attribute ``reads = "norm"`` is given the scale of the norm behind the layer instead of its weight. One
with ``reads = "gradient"`` finds the gradient of the training loss in ``weight.grad``: inside a fit it is the mean over
some training batches, which the pruner takes; on a plain module it is what the user's ``backward()`` left there.
"""

import torch
from torch import Tensor

from lightslim.kernels import l1_norms


def l1_norm(weight: Tensor, axis: int = 0) -> Tensor:
    """The sum of absolute weights of each slice along ``axis``.

    Source: Li et al. 2017, "Pruning Filters for Efficient ConvNets".

    Args:
        weight: any floating-point tensor.
        axis: the dimension whose positions are scored.

    Returns:
        One non-negative score per position of ``axis``, float32 or wider.

    Example:
        >>> import torch
        >>> l1_norm(torch.tensor([[1.0, -2.0], [0.5, 0.0]])).tolist()
        [3.0, 0.5]
    """
    return l1_norms([weight], axis)[0]


def l2_norm(weight: Tensor, axis: int = 0) -> Tensor:
    """The Euclidean norm of each slice along ``axis``.

    Source: He et al. 2018, "Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks".

    Args:
        weight: any floating-point tensor.
        axis: the dimension whose positions are scored.

    Returns:
        One non-negative score per position of ``axis``, float32 or wider.

    Example:
        >>> l2_norm(torch.tensor([[3.0, -4.0], [0.5, 0.0]])).tolist()
        [5.0, 0.5]
    """
    return _slices(weight, axis).square().sum(1).sqrt()


def fpgm(weight: Tensor, axis: int = 0) -> Tensor:
    """The sum of Euclidean distances from each slice to all others: what others can replace goes first.

    A slice of zeros scores least whatever its distance, since nothing can be lost with it.

    Source: He et al. 2019, "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration".

    Args:
        weight: any floating-point tensor.
        axis: the dimension whose positions are scored.

    Returns:
        One non-negative score per position of ``axis``, float32 or wider.

    Example:
        >>> fpgm(torch.tensor([[1.0], [2.0], [6.0]])).tolist()
        [6.0, 5.0, 9.0]
    """
    slices = _slices(weight, axis)
    return torch.cdist(slices, slices).sum(1).where(slices.any(1), 0)


def random(weight: Tensor, axis: int = 0) -> Tensor:
    """Scores drawn at random, the same for the same weights: a baseline for the others.

    The largest weight is the seed, so that runs repeat; torch's own generator is not touched.

    Args:
        weight: any floating-point tensor.
        axis: the dimension whose positions are scored.

    Returns:
        One score in [0, 1) per position of ``axis``; 0 for a slice of zeros.

    Example:
        >>> weight = torch.tensor([[1.0], [2.0]])
        >>> bool((random(weight) == random(weight)).all())
        True
    """
    slices = _slices(weight, axis)
    bits = slices.abs().max().double().cpu().view(torch.int64)
    scores = torch.rand(len(slices), generator=torch.Generator().manual_seed(int(bits))).to(weight.device)
    return scores.where(slices.any(1), 0)


def bn_scale(weight: Tensor, axis: int = 0) -> Tensor:
    """The magnitude of the factor by which the batch norm after the layer scales each unit.

    The pruner hands it that factor in place of the layer's weight; a layer without a norm is ranked by the root mean
    square of its own slices.

    Source: Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming".

    Args:
        weight: the norm's scale (1-D), or a weight.
        axis: the dimension whose positions are scored.

    Returns:
        One non-negative score per position of ``axis``, float32 or wider.

    Example:
        >>> bn_scale(torch.tensor([-2.0, 0.5])).tolist()
        [2.0, 0.5]
    """
    return _slices(weight, axis).square().mean(1).sqrt()


bn_scale.reads = "norm"  # type: ignore[attr-defined]


def _slices(weight: Tensor, axis: int) -> Tensor:
    """One row per position of ``axis``, in float32 or wider."""
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    return wide.movedim(axis, 0).flatten(1) if weight.ndim > 1 else wide[:, None]
