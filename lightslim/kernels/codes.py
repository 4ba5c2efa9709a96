"""The integers behind fake quantization: what an integer model stores and computes with."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightslim.kernels.arguments import check
from lightslim.kernels.grid import Grid, along, levels, tensor_grid


class Codes(NamedTuple):
    """Integers and what they stand for: ``(values - zero) * step``, bit-equal to ``fake_quant``.

    Attributes:
        values: the narrowest type that holds them: int8 for symmetric codes of up to 8 bits, uint8 for affine ones,
            int16 for more, int32 for affine ones of 16 bits.
        step: the distance between two codes: 0-d, or one per channel.
        zero: the code of zero, likewise; 0 for a symmetric grid.
        axis: the dimension of the channels; None for one grid.
    """

    values: Tensor
    step: Tensor
    zero: Tensor
    axis: int | None

    def decoded(self) -> Tensor:
        """The values on the grid."""
        step, zero = (along(part, self.values, self.axis) for part in (self.step, self.zero))
        return (self.values.to(step.dtype) - zero) * step


def encode(x: Tensor, amax: Tensor, bits: int = 8, axis: int | None = None, *, amin: Tensor | None = None) -> Codes:
    """The integer codes of ``fake_quant(x, amax, bits, axis, amin=amin)``.

    Args:
        x: any floating-point tensor; half types are worked out in float32.
        amax: largest magnitude of the grid, one number or one per position of ``axis``.
        bits: width of the integers, 2 to 16.
        axis: the dimension of the channels.
        amin: makes the grid affine.

    Raises:
        CompressionError: the arguments do not fit, as in ``fake_quant``.

    Example:
        >>> codes = encode(torch.tensor([-1.0, 0.26, 5.0]), torch.tensor(1.5), bits=3)
        >>> codes.values.tolist(), codes.decoded().tolist()
        ([-2, 1, 3], [-1.0, 0.5, 1.5])
    """
    check(x, amax, amin, bits, axis)
    dtype = torch.promote_types(x.dtype, torch.float32)
    grid = grid_of(amax, amin, bits, dtype)
    inverse, low, high = (along(torch.as_tensor(part), x, axis) for part in (grid.inverse, grid.low, grid.high))
    values = (x.detach().to(dtype) * inverse).clamp(low, high).round()
    zero = torch.zeros_like(grid.step) if amin is None else -torch.as_tensor(grid.low)
    return Codes((values + along(zero, x, axis)).to(code_type(bits, amin is not None)), grid.step, zero, axis)


def grid_of(amax: Tensor, amin: Tensor | None, bits: int, dtype: torch.dtype = torch.float32) -> Grid[Tensor]:
    """The grid, as tensors shaped like ``amax``."""
    return tensor_grid(amax.detach().to(dtype), None if amin is None else amin.detach().to(dtype), bits, dtype)


def code_type(bits: int, affine: bool) -> torch.dtype:
    """The narrowest integers for the codes.

    Example:
        >>> code_type(8, affine=False), code_type(8, affine=True), code_type(12, affine=False)
        (torch.int8, torch.uint8, torch.int16)
    """
    largest = levels(bits, affine)
    if affine and largest <= torch.iinfo(torch.uint8).max:
        return torch.uint8
    fitting = (kind for kind in (torch.int8, torch.int16, torch.int32) if largest <= torch.iinfo(kind).max)
    return next(fitting)
