"""A trained linear map between a student's width and its teacher's."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightslim.rng import isolated_rng


class Projection(nn.Module):
    """Maps one dimension of a tensor to another size, as a 1x1 convolution does with channels; no bias.

    Equal arguments give equal weights, in every process and run, and no random number is drawn.

    Args:
        dim: the dimension.
        into: its size.
        out: its size afterwards.

    Example:
        >>> Projection(1, 4, 6)(torch.zeros(2, 4, 3, 3)).shape
        torch.Size([2, 6, 3, 3])
    """

    def __init__(self, dim: int, into: int, out: int) -> None:
        super().__init__()
        self.dim = dim
        with isolated_rng():
            torch.manual_seed(0)
            self.weight = nn.Linear(into, out, bias=False).weight

    @override
    def forward(self, x: Tensor) -> Tensor:
        """``x`` with its dimension ``dim`` mapped."""
        return nn.functional.linear(x.movedim(self.dim, -1), self.weight).movedim(-1, self.dim)

    def saved(self) -> dict[str, Any]:
        """Plain values to build it from again."""
        return {"dim": self.dim, "weight": self.weight.detach().clone()}

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> "Projection":
        """The inverse of :meth:`saved`."""
        out, into = saved["weight"].shape
        made = cls(saved["dim"], into, out)
        made.weight.data = saved["weight"].to(made.weight.device).clone()
        return made
