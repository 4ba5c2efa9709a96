"""The range: a step that is a parameter, where it begins, and how fast it learns."""

import math

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightslim import CompressionError
from lightslim.quantize import Bounds, Range
from lightslim_lsq.gradient import round_by_step, top

LEAST = 2.0**-8
"""The share of its first size below which no step falls: an optimizer must not push it through zero."""


class LearnedStepSize(Range):
    """The distance between two codes as a parameter, trained by the layer's own optimizer: Esser et al., ICLR 2020.

    It begins at ``2 mean|x| / sqrt(Qp)`` of the first tensor, and its gradient is multiplied with ``1 / sqrt(N Qp)``:
    ``N`` numbers in a weight, or in one sample of an input. An input whose first tensor has no negative number is
    unsigned, with codes from 0 to ``2^bits - 1``; all else has codes from ``-Qp`` to ``Qp = 2^(bits-1) - 1``.

    Args:
        axis: must be None: one step for the whole tensor.
        bits: width of the integers, 2 to 16.

    Raises:
        CompressionError: there is an axis.

    Example:
        >>> rule = LearnedStepSize(bits=3)
        >>> rule.rounded(torch.tensor([[-1.0, 0.2, 0.9, 1.5]])).tolist()  # a step of 2 * 0.9 / sqrt(3)
        [[-1.03923..., 0.0, 1.03923..., 1.03923...]]
    """

    def __init__(self, axis: int | None = None, bits: int = 8) -> None:
        super().__init__(axis, bits)
        if axis is not None:
            raise CompressionError("lsq learns one step for the whole tensor; use channel_wise_abs_max")
        self.step = nn.Parameter(torch.zeros(()))
        self.first: Tensor
        self.signed: Tensor
        self.register_buffer("first", torch.zeros(()))
        self.register_buffer("signed", torch.zeros(()))
        self._unsigned: bool | None = None

    @override
    def forward(self, x: Tensor) -> Bounds:
        """Where the grid ends now; the first tensor in training mode gives the step its first size."""
        unsigned = self._is_unsigned(x)
        amax = torch.maximum(self.step.detach(), self.first * LEAST) * top(self.bits, unsigned)
        return Bounds(amax, torch.zeros_like(amax) if unsigned else None)

    @override
    def rounded(self, x: Tensor) -> Tensor:
        """``x`` on the grid, with a gradient for the step."""
        if not (torch.is_grad_enabled() and self.step.requires_grad):
            return super().rounded(x)
        unsigned = self._is_unsigned(x)
        with torch.no_grad():
            self.step.copy_(torch.maximum(self.step, self.first * LEAST))
        count = x.numel() if isinstance(x, nn.Parameter) else x.numel() / max(len(x), 1)
        scale = 1 / math.sqrt(max(count, 1) * top(self.bits, unsigned))
        return round_by_step(x, self.step, self.bits, unsigned, scale)

    @override
    def agreed(self) -> list[Tensor]:
        """The step and how it began: processes that are trained together keep one."""
        return [self.step.detach(), self.first, self.signed]

    def _is_unsigned(self, x: Tensor) -> bool:
        # Kept only once it is certain, since looking at a number stops a GPU
        if self._unsigned is None and self.first > 0:
            self._unsigned = not self.signed
        if self._unsigned is not None:
            return self._unsigned
        if self.training and x.numel():
            self._start(x.detach().float(), isinstance(x, nn.Parameter))
        return not self.signed

    def _start(self, x: Tensor, weight: bool) -> None:
        signed = weight or bool((x < 0).any())
        size = 2 * float(x.abs().mean()) / math.sqrt(top(self.bits, not signed))
        if 0 < size < math.inf:
            for number, value in ((self.step, size), (self.first, size), (self.signed, float(signed))):
                number.data.fill_(value)
