"""What fake quantization accepts; anything else is named before a kernel sees it."""

import torch
from torch import Tensor

from lightslim.errors import CompressionError

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check(x: Tensor, amax: Tensor, amin: Tensor | None, bits: int, axis: int | None) -> None:
    """Raise :class:`CompressionError` unless the arguments of ``fake_quant`` fit together."""
    if type(bits) is int and amin is None and axis is None:  # each call takes its time: the usual arguments by one look
        fit = 2 <= bits <= 16 and x.dtype in DTYPES and amax.dtype in DTYPES and amax.numel() == 1
        if fit and amax.device == x.device:
            return
    check_bits(bits)
    check_values(x)
    check_range("amax", amax, x, axis)
    if amin is not None:
        check_range("amin", amin, x, axis)


def check_bits(bits: int) -> None:
    """Codes of one bit have no positive value; those beyond 16 no longer fit float32 arithmetic."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 16:
        raise CompressionError(f"bits is {bits!r}; it must be a whole number from 2 to 16")


def check_values(x: Tensor) -> None:
    """Only floating-point numbers can be rounded to a grid."""
    if x.dtype not in DTYPES:
        raise CompressionError(f"x is {_name(x.dtype)}; it must be one of {', '.join(map(_name, DTYPES))}")


def check_axis(x: Tensor, axis: int) -> None:
    """An axis counts from the front or, negative, from the back."""
    if not -x.ndim <= axis < x.ndim:
        raise CompressionError(f"axis is {axis}, but the tensor has shape {tuple(x.shape)}")


def check_range(name: str, values: Tensor, x: Tensor, axis: int | None) -> None:
    """One number for the whole tensor, or one for each position of the axis."""
    if not values.dtype.is_floating_point:
        raise CompressionError(f"{name} is {_name(values.dtype)}; it must be floating point")
    if values.device != x.device:
        raise CompressionError(f"{name} is on {values.device}, x on {x.device}")
    if axis is None:
        if values.numel() != 1:
            raise CompressionError(f"{name} has shape {tuple(values.shape)}; without axis it must hold one number")
        return
    check_axis(x, axis)
    if values.shape != (x.shape[axis],):
        expected = f"({x.shape[axis]},), one number per position of axis {axis}"
        raise CompressionError(f"{name} has shape {tuple(values.shape)}; it must have {expected}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
