"""Fake quantization that looks at its input once: it rounds to a range known before and finds the next one."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from lightslim.kernels.arguments import check
from lightslim.kernels.backend import kernels_of
from lightslim.kernels.chain import peaks
from lightslim.kernels.fake_quant import StraightThrough, fake_quant


def fake_quant_and_peak(x: Tensor, amax: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """``fake_quant(x, amax, bits)`` and the largest magnitude of ``x``; on a GPU both in one pass over ``x``.

    For ranges that move from step to step and may lag by one. The peak has the dtype of ``x`` and no gradient; it
    is NaN if ``x`` holds one, and zero if ``x`` is empty.

    Example:
        >>> fake_quant_and_peak(torch.tensor([0.2, -4.0]), torch.tensor(2.0), bits=2)
        (tensor([ 0., -2.]), tensor(4.))
    """
    check(x, amax, None, bits, None)
    if torch.compiler.is_compiling():
        return fake_quant(x, amax, bits), peaks(x, None)
    y, peak = FakeQuantAndPeak.apply(x, amax, bits)
    return y, peak


class FakeQuantAndPeak(Function):
    """The eager way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, amax: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """Quantize, note what was clipped, and take the peak."""
        ctx.kernels = kernels_of(x)
        y, kept, peak = ctx.kernels.quantize_and_peak(x, amax, bits)
        ctx.save_for_backward(*kept)
        ctx.strides = y.stride()
        ctx.mark_non_differentiable(peak)
        return y, peak

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        """Hand the gradient on where the input was not clipped."""
        return StraightThrough.apply(grad, ctx.kernels, None, ctx.strides, *ctx.saved_tensors), None, None
