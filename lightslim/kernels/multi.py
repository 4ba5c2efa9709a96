"""All weights of a model fake-quantized at once: on a GPU one launch per step instead of several per layer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from lightslim.kernels.arguments import check_axis, check_bits, check_values
from lightslim.kernels.backend import triton_kernels
from lightslim.kernels.chain import peaks, quantize_many
from lightslim.kernels.fake_quant import fake_quant
from lightslim.memory import keep_freed_memory


def fake_quant_many(tensors: Sequence[Tensor], bits: int = 8, axis: int | None = 0) -> list[Tensor]:
    """Each tensor on symmetric grids whose ranges are its own largest magnitudes, of each channel or of all of it.

    Equal to ``fake_quant(x, largest magnitudes, bits, axis, clips=False)`` one by one; since nothing is clipped, the
    gradient passes as it is.

    Args:
        tensors: weights, of at least one dimension.
        bits: width of the integers, 2 to 16.
        axis: the dimension of the channels, None for one range of all of a tensor; on a GPU, axis 0 of contiguous
            tensors goes in one launch per dtype.

    Raises:
        CompressionError: bits, dtype or axis do not fit.

    Example:
        >>> weight = torch.tensor([[1.0, 0.4], [3.0, -9.0]])
        >>> fake_quant_many([weight], bits=2)
        [tensor([[ 1.,  0.],
                [ 0., -9.]])]
    """
    check_bits(bits)
    for tensor in tensors:
        check_values(tensor)
        if axis is not None:
            check_axis(tensor, axis)
    if not torch.compiler.is_compiling():
        keep_freed_memory()
        if _one_chain(tensors):
            return quantize_many(tensors, bits, axis)
        if _one_launch(tensors, axis):
            return list(FakeQuantMany.apply(bits, *tensors))
    return [fake_quant(x, peaks(x, axis), bits, axis, clips=False) for x in tensors]


class FakeQuantMany(Function):
    """One launch for all; the gradients are handed on."""

    @staticmethod
    def forward(ctx: Any, bits: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Find each row's range and round the row to its grid."""
        launch = triton_kernels()
        assert launch is not None
        return tuple(launch.quantize_many(tensors, bits))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Nothing was clipped."""
        return None, *grads


def _one_chain(tensors: Sequence[Tensor]) -> bool:
    """Whether their ranges can be worked out together, and without a gradient, for which a Function costs time."""
    plain = all(type(x) is Tensor and not x.requires_grad and x.numel() for x in tensors)
    return plain and {(x.device.type, x.dtype) for x in tensors} == {("cpu", torch.float32)}


def _one_launch(tensors: Sequence[Tensor], axis: int | None) -> bool:
    if axis is None or not tensors:
        return False
    fits = all(x.is_cuda and x.dtype != torch.float64 and axis % x.ndim == 0 and x.is_contiguous() for x in tensors)
    return fits and triton_kernels() is not None
