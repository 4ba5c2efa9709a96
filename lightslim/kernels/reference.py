"""What every kernel is tested against: the formulas as one would write them down, in float64."""

import torch
from torch import Tensor

from lightslim.kernels.grid import TINY, along, bounds


def fake_quant_reference(
    x: Tensor, amax: Tensor, bits: int = 8, axis: int | None = None, amin: Tensor | None = None
) -> Tensor:
    """Each element of ``x`` as the nearest value on the grid of its range, float64.

    Example:
        >>> fake_quant_reference(torch.tensor([0.3, 9.0]), torch.tensor(3.0), bits=3).tolist()
        [0.0, 3.0]
    """
    step, low, high = steps(
        along(amax.double(), x, axis), amin if amin is None else along(amin.double(), x, axis), bits
    )
    codes = torch.where(step > 0, x.double() / step, x.double() * 0).round().clamp(low, high)
    return torch.where(x.isnan() | step.isnan(), torch.nan, codes.nan_to_num() * step)


def steps(amax: Tensor, amin: Tensor | None, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The distance between neighbours on the grid, its lowest and its highest integer code."""
    levels = 2 ** (bits - 1) - 1 if amin is None else 2**bits - 1
    lower, upper = bounds(amax, amin)
    span = amax if amin is None else upper - lower
    step = torch.where(span < TINY, 0.0, span / levels)
    if amin is None:
        return step, torch.full_like(step, -levels), torch.full_like(step, levels)
    zero = (-lower * (span.new_tensor(levels) / span.clamp(min=TINY))).round()
    return step, -zero, levels - zero


def straight_through_reference(
    grad: Tensor, x: Tensor, amax: Tensor, axis: int | None = None, amin: Tensor | None = None
) -> Tensor:
    """``grad`` where ``x`` lies in its range, bounds included, or is NaN; zero where it was clipped.

    Example:
        >>> x = torch.tensor([-4.0, -3.0, 0.0, 3.5])
        >>> straight_through_reference(torch.ones(4), x, torch.tensor(3.0)).tolist()
        [0.0, 1.0, 1.0, 0.0]
    """
    lower, upper = bounds(along(amax.double(), x, axis), amin if amin is None else along(amin.double(), x, axis))
    x = x.double()
    return grad.masked_fill((x < lower) | (x > upper), 0)


def l1_reference(x: Tensor, dim: int = 0) -> Tensor:
    """The sum of magnitudes at each position of ``dim``, float64.

    Example:
        >>> l1_reference(torch.tensor([[1.0, -2.0], [0.5, 0.0]])).tolist()
        [3.0, 0.5]
    """
    return x.double().abs().movedim(dim, 0).flatten(1).sum(1) if x.ndim > 1 else x.double().abs()
