"""Straight-through gradients by operators of torch's own, whose values are changed where autograd does not see it.

A function of Python's in the graph costs a small layer more time than all of its arithmetic.
"""

import torch
from torch import Tensor

from lightslim.kernels import fused
from lightslim.kernels.chain import HALVES, is_whole, just_above, wide
from lightslim.kernels.grid import scalar_grid


def handed_on(x: Tensor, y: Tensor) -> Tensor:
    """``y`` in the place of ``x``: whatever gradient it gets is that of ``x``.

    Example:
        >>> x = torch.tensor([0.3, 5.0], requires_grad=True)
        >>> handed_on(x, torch.tensor([0.0, 5.0])).square().sum().backward()
        >>> x.grad
        tensor([ 0., 10.])
    """
    # Not a view for autograd, which would have to follow what is written to it
    place: Tensor = torch.ops.aten._unsafe_view.default(x, x.shape)
    place.data = y
    return place


def serves(x: Tensor, amin: Tensor | None, axis: int | None) -> bool:
    """Whether :func:`clamped` does: on a CPU, with one symmetric range, as a whole and in its own precision."""
    if axis is not None or amin is not None or x.dtype in HALVES or x.device.type != "cpu":
        return False
    return is_whole(x) and not fused.compiles(x)


def clamped(x: Tensor, amax: Tensor, bits: int) -> Tensor:
    """``x`` on its grid; the gradient passes where it lies in the range.

    Example:
        >>> x = torch.tensor([-1.0, 0.3, 5.0], requires_grad=True)
        >>> y = clamped(x, torch.tensor(2.0), bits=2)
        >>> y.sum().backward()
        >>> y.detach(), x.grad
        (tensor([-0., 0., 2.]), tensor([1., 1., 0.]))
    """
    reach = wide(x, amax, None)[0].item()
    bound, grid = just_above(reach, x.dtype), scalar_grid(reach, None, bits)
    y: Tensor = torch.ops.aten.hardtanh.default(x, -bound, bound)
    # The backward pass reads ``x`` alone
    y.data.mul_(grid.inverse).round_().mul_(grid.step)
    return y
