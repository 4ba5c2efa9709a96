"""The chain as one pass, made by Inductor on request: it needs a C++ compiler and half a minute at first use."""

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightslim.kernels.grid import Grid

LARGE = 2**16
"""Elements; below it the call costs more than the passes it saves."""

ASKED_FOR = os.environ.get("LIGHTSLIM_COMPILE") == "1"
"""Read once: a look into the environment at each call takes longer than the way to the kernel."""


def compiles(x: Tensor) -> bool:
    """Whether ``LIGHTSLIM_COMPILE=1`` asks for it and ``x`` is worth it."""
    return ASKED_FOR and x.numel() >= LARGE and x.device.type == "cpu"


def quantize(x: Tensor, grid: Grid[Any]) -> Tensor:
    """``x`` on its grid."""
    work = torch.promote_types(x.dtype, torch.float32)
    # Tensors, since a compiled function would be compiled anew for every number
    return _compiled(_quantize)(x, *(torch.as_tensor(part, dtype=work) for part in grid))


def straight_through(grad: Tensor, x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """``grad`` where ``x`` lies within its bounds."""
    return _compiled(_straight_through)(grad, x, lower, upper)


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=True)


def _quantize(x: Tensor, inverse: Tensor, step: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return ((x.to(inverse.dtype) * inverse).clamp(low, high).round() * step).to(x.dtype)


def _straight_through(grad: Tensor, x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    full = x.to(lower.dtype)
    return torch.where((full < lower) | (full > upper), 0, grad)
