"""Rounding whose step has a gradient."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from lightslim.kernels import fake_quant


def round_by_step(x: Tensor, step: Tensor, bits: int = 8, unsigned: bool = False, scale: float = 1.0) -> Tensor:
    """``x`` rounded to multiples of ``step``; gradients reach both: Esser et al., ICLR 2020.

    ``y = clamp(round(x / s), -Qn, Qp) s``, with ``Qn = Qp = 2^(bits-1) - 1``, or ``Qn = 0`` and ``Qp = 2^bits - 1``.
    Where ``x / s`` lies strictly between ``-Qn`` and ``Qp``, ``dy/dx = 1`` and ``dy/ds = round(x / s) - x / s``; else
    ``dy/dx = 0``, and ``dy/ds`` is the bound that holds.

    Args:
        x: of any shape, float32, float16, bfloat16 or float64.
        step: positive, 0-d.
        bits: width of the integers, 2 to 16.
        unsigned: whether negative numbers become zero.
        scale: what the step's gradient is multiplied with.

    Returns:
        A tensor like ``x``.

    Example:
        >>> x, step = torch.tensor([0.3, 1.2, 9.0]), torch.tensor(1.0, requires_grad=True)
        >>> y = round_by_step(x, step, bits=3)
        >>> y.sum().backward()
        >>> y.tolist(), round(step.grad.item(), 4)  # -0.3 - 0.2 + 3
        ([0.0, 1.0, 3.0], 2.5)
    """
    rounded: Tensor = _Round.apply(x, step, bits, unsigned, scale)
    return rounded


def top(bits: int, unsigned: bool) -> int:
    """The largest code.

    Example:
        >>> top(4, unsigned=False), top(4, unsigned=True)
        (7, 15)
    """
    return int(2**bits - 1 if unsigned else 2 ** (bits - 1) - 1)


class _Round(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, bits: int, unsigned: bool, scale: float) -> Tensor:
        amax = step.detach() * top(bits, unsigned)
        y = fake_quant(x, amax, bits, amin=torch.zeros_like(amax) if unsigned else None)
        # Not the step itself: a layer may be called again, and the step be written to, before the way back
        ctx.save_for_backward(x, y, amax)
        ctx.top, ctx.unsigned, ctx.scale = top(bits, unsigned), unsigned, scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, amax = ctx.saved_tensors
        inside = (x > (0 if ctx.unsigned else -amax)) & (x < amax)
        slopes = (y - x.masked_fill(~inside, 0)).to(amax.dtype) / (amax / ctx.top)
        of_step = (grad.to(amax.dtype) * slopes).sum() * ctx.scale
        return grad.masked_fill(~inside, 0), of_step.reshape(amax.shape), None, None, None
