"""Fake quantization to one range whose gradient is that of an operator of torch's own.

A function of Python's in the graph costs a small layer more time than all of its arithmetic.
"""

import torch
from torch import Tensor

from lightslim.kernels import fused
from lightslim.kernels.chain import HALVES, is_whole, just_outside
from lightslim.kernels.grid import scalar_grid


def serves(x: Tensor, amin: Tensor | None, axis: int | None) -> bool:
    """Whether ``x`` is on a CPU, worked on as a whole and in its own precision, and its range is one symmetric one."""
    if axis is not None or amin is not None or x.dtype in HALVES or x.device.type != "cpu":
        return False
    return is_whole(x) and not fused.compiles(x)


def quantize(x: Tensor, amax: Tensor, bits: int) -> Tensor:
    """``x`` on its grid; the gradient passes where it lies in the range.

    Example:
        >>> x = torch.tensor([-1.0, 0.3, 5.0], requires_grad=True)
        >>> y = quantize(x, torch.tensor(2.0), bits=2)
        >>> y.sum().backward()
        >>> y.detach(), x.grad
        (tensor([-0., 0., 2.]), tensor([1., 1., 0.]))
    """
    y: Tensor = torch.ops.aten.hardtanh(x, *just_outside(x, amax, None))
    grid = scalar_grid(amax.to(x.dtype).item(), None, bits)
    # The backward pass reads ``x`` alone, so what the values become is not for autograd to see
    y.data.mul_(grid.inverse).round_().mul_(grid.step)
    return y
