"""How far a tensor reaches: small stateful parts that give the largest magnitude to quantize up to.

A range is called with the tensor and returns ``amax``: a 0-d tensor, or one value per position of ``axis``. Static
ranges learn in training mode and stay as they are in evaluation mode; dynamic ones look at the tensor each time.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from lightslim.errors import CompressionError


class Range(nn.Module):
    """The base of all ranges.

    Args:
        axis: the dimension with a range for each of its positions; None for one range of the whole tensor.

    Attributes:
        exact: whether ``amax`` is always that of the very tensor, so that nothing is ever clipped.
    """

    exact: ClassVar[bool] = False

    def __init__(self, axis: int | None = None) -> None:
        super().__init__()
        self.axis = axis

    def magnitude(self, x: Tensor) -> Tensor:
        """The largest magnitude in ``x``, without gradient: 0-d, or 1-D along ``axis``; 0 where there is nothing."""
        x = x.detach()
        if x.numel() == 0:
            return x.new_zeros(() if self.axis is None else x.shape[self.axis])
        if self.axis is None:
            low, high = torch.aminmax(x)
            return torch.maximum(-low, high)
        others = [d for d in range(x.ndim) if d != self.axis % x.ndim]
        return torch.maximum(x.amax(others), -x.amin(others)) if others else x.abs()


class AbsMax(Range):
    """The largest magnitude of the tensor at hand, at every step and in use: ``s = max |x|``.

    Example:
        >>> AbsMax()(torch.tensor([1.0, -3.0])).item()
        3.0
    """

    exact = True

    def forward(self, x: Tensor) -> Tensor:
        """``amax`` of ``x``."""
        return self.magnitude(x)


class ChannelWiseAbsMax(AbsMax):
    """The same for each channel of a weight: ``s_c = max |x_c|``. The layer says which dimension holds the channels.

    Example:
        >>> ChannelWiseAbsMax(axis=0)(torch.tensor([[1.0, -3.0], [0.5, 0.2]])).tolist()
        [3.0, 0.5]
    """

    def __init__(self, axis: int | None = 0) -> None:
        super().__init__(axis)


class MovingAverageAbsMax(Range):
    """An average of the magnitudes seen in training, the latest weighing most.

    ``state = rate * state + 1``, ``accum = rate * accum + max |x|``, ``s = accum / state``. Both start at 0, so that
    the first step's range is that step's magnitude (the seed starts at 1, which pulls early ranges towards it).

    Args:
        axis: see :class:`Range`.
        rate: how much of the past stays, in (0, 1).

    Example:
        >>> rule = MovingAverageAbsMax(rate=0.5)
        >>> rule(torch.tensor([4.0])).item(), rule(torch.tensor([1.0])).item(), rule.eval()(torch.tensor([9.0])).item()
        (4.0, 2.0, 2.0)
    """

    def __init__(self, axis: int | None = None, rate: float = 0.9) -> None:
        super().__init__(axis)
        if not 0 < rate < 1:
            raise CompressionError(f"rate is {rate}; it must lie between 0 and 1")
        self.rate = rate
        self.state: Tensor
        self.accum: Tensor
        self.register_buffer("state", torch.zeros(()))
        self.register_buffer("accum", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """``amax``, after learning from ``x`` in training mode."""
        if self.training:
            self.state.mul_(self.rate).add_(1.0)
            self.accum = self.accum * self.rate + self.magnitude(x).float()
        return self.accum / self.state.clamp_min(1e-12)


class RangeAbsMax(Range):
    """The largest magnitude of the last ``window_size`` training steps.

    Args:
        axis: see :class:`Range`; a window keeps one range of the whole tensor, so it must be None.
        window_size: how many steps count.

    Example:
        >>> rule = RangeAbsMax(window_size=2)
        >>> [rule(torch.tensor([x])).item() for x in (3.0, 1.0, 2.0)]
        [3.0, 3.0, 2.0]
    """

    def __init__(self, axis: int | None = None, window_size: int = 10000) -> None:
        super().__init__(axis)
        if axis is not None:
            raise CompressionError("range_abs_max keeps one range of the whole tensor; use channel_wise_abs_max")
        if window_size < 1:
            raise CompressionError(f"window_size is {window_size}; it must be 1 or more")
        self.window: Tensor
        self.seen: Tensor
        self.register_buffer("window", torch.zeros(window_size))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """``amax``, after learning from ``x`` in training mode."""
        if self.training:
            position = (self.seen % self.window.numel()).reshape(1)
            self.window.index_copy_(0, position, self.magnitude(x).float().reshape(1))
            self.seen += 1
        return self.window.amax()
