"""How important is a unit? A criterion is a function of one weight: ``f(weight, axis=0) -> scores``."""

from torch import Tensor


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
    others = [d for d in range(weight.ndim) if d != axis % weight.ndim]
    magnitude = weight.detach().float().abs() if weight.element_size() < 4 else weight.detach().abs()
    return magnitude.sum(others) if others else magnitude
