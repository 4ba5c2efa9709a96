"""The L1 norms of all slices of many weights at once: what filter pruning ranks by."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightslim.kernels.arguments import check_axis, check_values
from lightslim.kernels.backend import triton_kernels


def l1_norms(tensors: Sequence[Tensor], dim: int = 0) -> list[Tensor]:
    """The sum of magnitudes at each position of ``dim``, for each tensor; on a GPU in one launch per dtype.

    Args:
        tensors: floating point, of at least one dimension.
        dim: the dimension whose positions are scored.

    Returns:
        One 1-D tensor per tensor, float32 or wider, without a gradient.

    Raises:
        CompressionError: a tensor has no such dimension or is not floating point.

    Example:
        >>> import torch
        >>> [norms.tolist() for norms in l1_norms([torch.tensor([[1.0, -2.0], [0.5, 0.0]])], dim=1)]
        [[1.5, 2.0]]
    """
    for tensor in tensors:
        check_values(tensor)
        check_axis(tensor, dim)
    launch = triton_kernels() if any(tensor.is_cuda for tensor in tensors) else None
    if launch is None:
        return [_norms(tensor.detach(), dim) for tensor in tensors]
    return launch.l1_norms([tensor.detach() for tensor in tensors], dim)  # type: ignore[no-any-return]


def _norms(tensor: Tensor, dim: int) -> Tensor:
    others = [d for d in range(tensor.ndim) if d != dim % tensor.ndim]
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.abs().sum(others, dtype=wide) if others else tensor.abs().to(wide)
