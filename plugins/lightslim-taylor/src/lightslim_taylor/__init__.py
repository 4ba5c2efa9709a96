"""How much would the loss change without a unit? A criterion for lightslim, from one backward pass."""

import torch
from torch import Tensor

from lightslim import CompressionError, hookimpl
from lightslim.registry import Registry


def taylor(weight: Tensor, axis: int = 0) -> Tensor:
    """The magnitude of the sum of weight times gradient of each slice along ``axis``.

    To first order it is by how much the loss changes when the slice becomes zero.

    Source: Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning".

    Args:
        weight: any floating-point tensor that has a ``.grad``.
        axis: the dimension whose positions are scored.

    Returns:
        One non-negative score per position of ``axis``, float32 or wider.

    Raises:
        CompressionError: the weight has no gradient.

    Example:
        >>> weight = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
        >>> weight.grad = torch.tensor([[1.0, 1.0], [0.0, 4.0]])
        >>> taylor(weight).tolist()
        [1.0, 2.0]
    """
    if weight.grad is None:
        raise CompressionError("taylor ranks by weight times gradient: call loss.backward() first")
    wide = torch.promote_types(weight.dtype, torch.float32)
    change = weight.detach().to(wide) * weight.grad.to(wide)
    return change.movedim(axis, 0).reshape(weight.shape[axis], -1).sum(1).abs()


taylor.reads = "gradient"  # type: ignore[attr-defined]


@hookimpl
def lightslim_register(registry: Registry) -> None:
    """Add the criterion."""
    registry.add("criterion", taylor)
