"""Fake quantization: round to the grid of an integer type and stay floating point, so that training feels the loss."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.nn import Parameter

from lightslim.kernels.arguments import check
from lightslim.kernels.backend import kernels_of
from lightslim.kernels.through import clamped, handed_on, serves
from lightslim.memory import keep_freed_memory


def fake_quant(
    x: Tensor,
    amax: Tensor,
    bits: int = 8,
    axis: int | None = None,
    *,
    amin: Tensor | None = None,
    clips: bool = True,
) -> Tensor:
    """Each element of ``x`` as the nearest value that a ``bits``-bit integer and a scale can hold.

    Symmetric as in PaddleSlim: ``round(clamp(x, -amax, amax) * R / amax) * amax / R`` with ``R = 2**(bits-1) - 1``,
    halves rounded to even, half types worked out in float32. The gradient is straight-through: it passes where ``x``
    lies in the range, bounds included, and is zero where ``x`` was clipped; the range itself gets none.

    NaN stays NaN; whether its gradient passes is left to the device. A range of zero (or below ``2**-100``) gives
    zeros; one of NaN or infinity gives NaN.

    On a CPU, ``LIGHTSLIM_COMPILE=1`` in the environment turns the chain of torch operations into one compiled pass over
    large tensors: faster, once the compiler has run for half a minute.

    Args:
        x: float32, float16, bfloat16 or float64, of any shape.
        amax: the largest magnitude of the grid: one number, or one per position of ``axis``.
        bits: width of the integers, 2 to 16.
        axis: the dimension that has a range of its own at each position; None for one range.
        amin: makes the range affine, ``min(amin, 0)`` to ``max(amax, 0)`` in ``2**bits - 1`` steps with zero on the
            grid; zeros make it unsigned.
        clips: False promises that no element lies outside the range, as when it was taken from ``x``. The
            backward pass is then free: nothing is kept, the gradient is handed on.

    Returns:
        A tensor like ``x``.

    Raises:
        CompressionError: bits, dtype, axis or the shape of the range are not as above.

    Example:
        >>> x = torch.tensor([-1.0, 0.26, 0.74, 5.0])
        >>> fake_quant(x, torch.tensor(1.5), bits=3)
        tensor([-1.0000,  0.5000,  0.5000,  1.5000])
        >>> fake_quant(x, torch.tensor(3.0), bits=2, amin=torch.tensor(0.0))
        tensor([-0., 0., 1., 3.])
    """
    check(x, amax, amin, bits, axis)
    # The operator is one node of a graph; in eager mode it costs several times as much per call
    if torch.compiler.is_compiling() or type(x) not in (Tensor, Parameter):
        captured: Tensor = operator(x, amax, amin, bits, axis, clips)
        return captured
    keep_freed_memory()
    if not clips:
        return handed_on(x, kernels_of(x).quantize(x.detach(), amax.detach(), amin, bits, axis, clips=False))
    if serves(x, amin, axis):
        return clamped(x, amax, bits)
    y: Tensor = FakeQuant.apply(x, amax, amin, bits, axis)
    return y


class FakeQuant(Function):
    """The eager way of all others: keeps what the kernels of the device need for the backward pass, and no more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, amax: Tensor, amin: Tensor | None, bits: int, axis: int | None) -> Tensor:
        """Quantize, and note what was clipped."""
        kernels = kernels_of(x)
        y, kept = kernels.quantize_and_keep(x, amax, amin, bits, axis)
        ctx.axis, ctx.kernels = axis, kernels
        ctx.save_for_backward(*kept)
        ctx.strides = y.stride()
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Hand the gradient on where the input was not clipped."""
        passed = StraightThrough.apply(grad, ctx.kernels, ctx.axis, ctx.strides, *ctx.saved_tensors)
        return passed, None, None, None, None


class StraightThrough(Function):
    """The way back, which has one of its own, for penalties on gradients: the same, where nothing was clipped."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, kernels: Any, axis: int | None, strides: tuple[int, ...], *kept: Tensor | None
    ) -> Tensor:
        """``grad``, zero where the input was clipped."""
        ctx.kernels, ctx.axis, ctx.strides = kernels, axis, strides
        ctx.save_for_backward(*kept)
        passed: Tensor = kernels.straight_through(grad, kept, axis, strides)
        return passed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The same of what comes back."""
        kept = ctx.saved_tensors
        passed = StraightThrough.apply(grad, ctx.kernels, ctx.axis, ctx.strides, *kept)
        return passed, None, None, None, *([None] * len(kept))


@torch.library.custom_op("lightslim::fake_quant", mutates_args=())
def operator(
    x: Tensor, amax: Tensor, amin: Tensor | None = None, bits: int = 8, axis: int | None = None, clips: bool = True
) -> Tensor:
    """:func:`fake_quant` without its checks, as one node of a captured graph."""
    return kernels_of(x).quantize(x, amax, amin, bits, axis, clips)


@torch.library.custom_op("lightslim::fake_quant_backward", mutates_args=())
def operator_backward(
    grad: Tensor, x: Tensor, amax: Tensor, amin: Tensor | None = None, axis: int | None = None
) -> Tensor:
    """The straight-through gradient, likewise; laid out in memory as ``x`` is."""
    like = torch.empty_like(x)
    passed = kernels_of(x).straight_through(grad, (x, amax, amin), axis, like.stride())
    return passed if passed.stride() == like.stride() else like.copy_(passed)


@operator.register_fake
def _shape_of_output(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(x)


@operator_backward.register_fake
def _shape_of_gradient(grad: Tensor, x: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, amax, amin, _, ctx.axis, ctx.clips = inputs
    if ctx.clips:
        ctx.save_for_backward(x, amax, amin)


def _pass_on(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    passed = operator_backward(grad, *ctx.saved_tensors, ctx.axis) if ctx.clips else grad
    return passed, None, None, None, None, None


operator.register_autograd(_pass_on, setup_context=_keep)
