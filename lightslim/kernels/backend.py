"""Which kernels serve a tensor: Triton on a GPU, else the chain of torch operations."""

from functools import cache
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from lightslim.kernels import chain


class Kernels(Protocol):
    """What a module of kernels offers."""

    def quantize(
        self, x: Tensor, amax: Tensor, amin: Tensor | None, bits: int, axis: int | None, clips: bool = True
    ) -> Tensor:
        """``x`` on the grid of its range; unless it ``clips``, nothing lies outside the range."""

    def quantize_and_keep(
        self, x: Tensor, amax: Tensor, amin: Tensor | None, bits: int, axis: int | None
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """The same, and the tensors that its backward pass needs."""

    def quantize_and_peak(self, x: Tensor, amax: Tensor, bits: int) -> tuple[Tensor, tuple[Any, ...], Tensor]:
        """The same with one symmetric range, and the largest magnitude of ``x``."""

    def straight_through(
        self, grad: Tensor, kept: tuple[Any, ...], axis: int | None, strides: tuple[int, ...]
    ) -> Tensor:
        """``grad`` where the input was not clipped, zero where it was.

        ``kept`` is what :meth:`quantize_and_keep` gave, or simply ``(x, amax, amin)``; ``strides`` are
        those of the quantized tensor, for kernels that walk memory.
        """


def kernels_of(x: Tensor) -> Kernels:
    """The module that serves the device and dtype of ``x``."""
    on_gpu = x.is_cuda and x.dtype != torch.float64
    kernels: Any = (triton_kernels() if on_gpu else None) or chain
    return kernels  # type: ignore[no-any-return]


@cache
def triton_kernels() -> ModuleType | None:
    """The Triton launchers, imported at the first GPU tensor; None where Triton isn't installed."""
    try:
        from lightslim.kernels import launch
    except ImportError:
        return None
    return launch
