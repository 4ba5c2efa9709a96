"""How far a tensor reaches: small stateful parts that say from where to where its grid spans.

A range is called with the tensor and returns its :class:`Bounds`. Those that learn do so in training mode, and stay as
they are in evaluation mode; exact ones look at the tensor at hand each time. What they learn are buffers, or
parameters, which a strategy hands to the optimizer that trains the layer.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightslim.errors import CompressionError
from lightslim.kernels import fake_quant
from lightslim.kernels.chain import peaks
from lightslim.quantize.bounds import Bounds, Given


class Range(nn.Module):
    """The base of all ranges.

    Args:
        axis: the dimension with a range for each of its positions; None for one range of the whole tensor.
        bits: width of the integers, which some ranges weigh: 2 to 16.

    Attributes:
        exact: whether the bounds are always the largest magnitudes of the tensor at hand, in use as in training.
        per_channel: whether it is made for the channels of a weight.
        calibrated: whether it learns in calibration only, and knows nothing without one.
    """

    exact: ClassVar[bool] = False
    calibrated: ClassVar[bool] = False
    per_channel: ClassVar[bool] = False

    def __init__(self, axis: int | None = None, bits: int = 8) -> None:
        super().__init__()
        self.axis = axis
        self.bits = bits
        self._given = Given()

    @property
    def learns(self) -> bool:
        """Whether the tensor at hand is new: in training, but not where activation checkpointing runs a layer again.

        That happens within the backward pass, must teach nothing, and has to give what :meth:`given` remembers.
        """
        return self.training and (torch.compiler.is_compiling() or torch._C._current_graph_task_id() < 0)

    def given(self, seen: Tensor | float, bounds: Bounds) -> Bounds:
        """``bounds`` where the tensor at hand is new; where a layer runs again, those of the first time.

        Args:
            seen: what tells the tensor from others, as its largest magnitude: 0-d, or a Python number.
            bounds: what the range gives now; beside a 0-d ``seen`` no buffer itself, which would move on.
        """
        if torch.compiler.is_compiling() or not self.training:
            return bounds
        if self.learns:
            self._given.note(seen, bounds)
            return bounds
        return self._given.find(seen) or bounds

    def magnitude(self, x: Tensor) -> Tensor:
        """The largest magnitude in ``x``, without gradient: 0-d, or 1-D along ``axis``; 0 where there is nothing."""
        return peaks(x, self.axis)

    def _peak(self, x: Tensor) -> Tensor | float:
        """The largest magnitude in all of ``x``: a Python number where reading it stops nothing."""
        if not readable(x):
            return self.magnitude(x)
        low, high = torch.aminmax(x.detach())
        return max(-low.item(), high.item())

    def rounded(self, x: Tensor) -> Tensor:
        """``x`` on the grid within its bounds; a range that is trained gives itself a gradient here.

        The values must be those of the bounds, by which codes are written: only the way back may differ.
        """
        bounds: Bounds = self.forward(x)  # a small layer would feel the way of a module's call
        return fake_quant(x, bounds.amax, self.bits, self.axis, amin=bounds.amin, clips=bounds.clips)

    def watch(self, x: Tensor) -> None:
        """Learn from ``x`` in training mode, while the model is calibrated and nothing is rounded."""
        self(x)

    def before(self, x: Tensor) -> Tensor | None:
        """The range to round ``x`` to where it does not depend on ``x``, symmetric; the default is that it does."""
        return None

    def learn(self, peak: Tensor | float) -> None:
        """Take in the largest magnitude of a tensor that was rounded to what :meth:`before` gave."""

    def agreed(self) -> list[Tensor]:
        """The buffers of which all processes of a distributed run take the largest values after each step."""
        return [buffer for buffer in self.buffers() if buffer.is_floating_point()]


class AbsMax(Range):
    """The largest magnitude of the tensor at hand, at every step and in use: ``s = max |x|``.

    Example:
        >>> AbsMax()(torch.tensor([1.0, -3.0])).amax.item()
        3.0
    """

    exact = True

    def forward(self, x: Tensor) -> Bounds:
        """The bounds of ``x``."""
        return Bounds(self.magnitude(x), clips=False)


class ChannelWiseAbsMax(AbsMax):
    """The same for each channel of a weight: ``s_c = max |x_c|``. The layer says which dimension holds the channels.

    Example:
        >>> ChannelWiseAbsMax(axis=0)(torch.tensor([[1.0, -3.0], [0.5, 0.2]])).amax.tolist()
        [3.0, 0.5]
    """

    per_channel = True

    def __init__(self, axis: int | None = 0, bits: int = 8) -> None:
        super().__init__(axis, bits)


class MovingAverageAbsMax(Range):
    """An average of the magnitudes seen in training, the latest weighing most.

    ``state = rate * state + 1``, ``s = s + (max |x| - s) / state``: the seed's ``accum / state``, but both start at 0,
    so that the first step's range is that step's magnitude (the seed starts at 1, which pulls early ranges towards it).
    What is not finite teaches nothing, so one overflow in half precision does no lasting harm.

    Args:
        axis: must be None.
        bits: see :class:`Range`.
        rate: how much of the past stays, in (0, 1).
        delayed: round to the average before this step's magnitude has joined it. On a GPU the input is then read once
            and not twice; the first step of all is not delayed.

    Example:
        >>> rule = MovingAverageAbsMax(rate=0.5)
        >>> [rule(torch.tensor([x])).amax.item() for x in (4.0, 1.0)], rule.eval()(torch.tensor([9.0])).amax.item()
        ([4.0, 2.0], 2.0)
    """

    def __init__(self, axis: int | None = None, bits: int = 8, rate: float = 0.9, delayed: bool = False) -> None:
        super().__init__(axis, bits)
        check_whole(axis, "moving_average_abs_max")
        self.rate = check_rate(rate)
        self.delayed = delayed
        self._known: Tensor | None = None
        self.state: Tensor
        self.amax: Tensor
        self.register_buffer("state", torch.zeros(()))
        self.register_buffer("amax", torch.zeros(()))

    def forward(self, x: Tensor) -> Bounds:
        """The bounds, after learning from ``x`` in training mode."""
        if not self.training or not x.numel():
            return Bounds(self.amax.clone())
        peak = self._peak(x)
        self._take_in(peak)
        clips = may_exceed(peak, self.amax)
        # The backward pass needs the range as it is now if it clips; a copy of it would be felt
        return self.given(peak, Bounds(self.amax.clone() if clips else self.amax, clips=clips))

    def before(self, x: Tensor) -> Tensor | None:
        """The range to round to if it is ``delayed``; :meth:`learn` is then called with the magnitude."""
        if not self.delayed or not self.training or not x.numel():
            return None
        if not self.learns:
            return self.given(self._peak(x), Bounds(self.amax)).amax
        # The state is asked until something is known and no longer, since looking at a number stops a GPU
        begun = self._known is not None or bool(self.state > 0)
        self._known = self.amax.clone() if begun else self.magnitude(x).float().nan_to_num(0.0, posinf=0.0)
        return self._known

    def learn(self, peak: Tensor | float) -> None:
        """Take in the largest magnitude of one more tensor."""
        if self._known is not None:
            self.given(number(peak), Bounds(self._known))
        self._take_in(number(peak))

    def _take_in(self, peak: Tensor | float) -> None:
        if self.learns:
            average(self.amax, peak, advance(self.state, self.rate, isinstance(peak, float)))


class MovingAverageMinMax(Range):
    """The same for the smallest and the largest value: an affine grid, which spends no codes where no values are.

    Behind a ReLU all ``2**bits`` codes serve positive numbers. Zero is always on the grid.

    Args:
        axis: must be None.
        bits: see :class:`Range`.
        rate: how much of the past stays, in (0, 1).

    Example:
        >>> bounds = MovingAverageMinMax()(torch.tensor([-1.0, 3.0]))
        >>> bounds.amin.item(), bounds.amax.item()
        (-1.0, 3.0)
    """

    def __init__(self, axis: int | None = None, bits: int = 8, rate: float = 0.9) -> None:
        super().__init__(axis, bits)
        check_whole(axis, "moving_average_min_max")
        self.rate = check_rate(rate)
        self.state: Tensor
        self.amax: Tensor
        self.negative_amin: Tensor
        self.register_buffer("state", torch.zeros(()))
        self.register_buffer("amax", torch.zeros(()))
        # Negative, so that the wider range is the larger number wherever processes agree on one
        self.register_buffer("negative_amin", torch.zeros(()))

    def forward(self, x: Tensor) -> Bounds:
        """The bounds, after learning from ``x`` in training mode."""
        if not self.training or not x.numel():
            return self._bounds()
        low, high = map(number, torch.aminmax(x.detach()))
        if self.learns:
            state = advance(self.state, self.rate, isinstance(low, float))
            # Zero times what is not finite is NaN: an end that is not finite keeps the other from teaching
            average(self.amax, high + 0 * low, state)
            average(self.negative_amin, -low + 0 * high, state)
        return self.given(high - low, self._bounds())

    def _bounds(self) -> Bounds:
        return Bounds(self.amax.clone(), -self.negative_amin)


class RangeAbsMax(Range):
    """The largest magnitude of the last ``window_size`` training steps.

    Args:
        axis: a window keeps one range of the whole tensor, so it must be None.
        bits: see :class:`Range`.
        window_size: how many steps count.

    Example:
        >>> rule = RangeAbsMax(window_size=2)
        >>> [rule(torch.tensor([x])).amax.item() for x in (3.0, 1.0, 2.0)]
        [3.0, 3.0, 2.0]
    """

    def __init__(self, axis: int | None = None, bits: int = 8, window_size: int = 10000) -> None:
        super().__init__(axis, bits)
        check_whole(axis, "range_abs_max")
        if window_size < 1:
            raise CompressionError(f"window_size is {window_size}; it must be 1 or more")
        self.window: Tensor
        self.seen: Tensor
        self.register_buffer("window", torch.zeros(window_size))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Bounds:
        """The bounds, after learning from ``x`` in training mode: nothing of this very ``x`` is clipped then."""
        if not self.training:
            return Bounds(self.window.amax())
        peak = self.magnitude(x).float()
        if self.learns:
            position = (self.seen % self.window.numel()).reshape(1)
            self.window.index_copy_(0, position, peak.nan_to_num(0.0, posinf=0.0).reshape(1).to(self.window))
            self.seen += 1
        amax = self.window.amax()
        return self.given(number(peak), Bounds(amax, clips=may_exceed(number(peak), amax)))


def readable(value: Tensor) -> bool:
    """Whether reading a number of ``value`` stops nothing: tiny tensor operations cost more than all else."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def number(value: Tensor | float) -> Tensor | float:
    """``value`` as a Python number where it is readable."""
    return value.item() if isinstance(value, Tensor) and readable(value) else value


def advance(state: Tensor, rate: float, plain: bool) -> Tensor | float:
    """``state * rate + 1``, kept and returned, as a Python number if ``plain``."""
    if plain:
        return state.fill_(state.item() * rate + 1.0).item()
    return state.mul_(rate).add_(1.0)


def average(value: Tensor, new: Tensor | float, state: Tensor | float) -> None:
    """Move ``value`` by ``(new - value) / state`` in place, unless ``new`` is not finite.

    Example:
        >>> value = torch.tensor(1.0)
        >>> average(value, 3.0, 2.0), average(value, math.nan, 2.0), value
        (None, None, tensor(2.))
    """
    if isinstance(new, float):
        now = value.item()
        value.fill_(now + (new - now) / state if math.isfinite(new) else now)
    else:
        value.add_(torch.where(new.isfinite(), new - value, 0.0) / state)


def may_exceed(peak: Tensor | float, amax: Tensor) -> bool:
    """Whether a tensor with this ``peak`` may be clipped; yes where the numbers cannot be looked at."""
    return not (isinstance(peak, float) and peak <= amax.item())


def check_rate(rate: float) -> float:
    """Raise unless ``rate`` is a share of the past that can be kept."""
    if not 0 < rate < 1:
        raise CompressionError(f"rate is {rate}; it must lie between 0 and 1")
    return rate


def check_whole(axis: int | None, name: str) -> None:
    """Raise if there is an axis: the range called ``name`` is one of the whole tensor."""
    if axis is not None:
        raise CompressionError(f"{name} keeps one range of the whole tensor; use channel_wise_abs_max")
