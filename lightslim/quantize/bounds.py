"""What ranges give, and what they gave: a layer that runs again has to round as it did the first time.

Activation checkpointing drops what a layer computed and runs it again within the backward pass. By then the step may
have called the layer on other tensors (the second view of a contrastive loss, a block that stands in several places),
and its range has moved on.
"""

import functools
from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

CALLS = 32
"""How many calls are kept, a few numbers each."""


class Bounds(NamedTuple):
    """Where the grid of a tensor ends.

    Attributes:
        amax: the largest value of the grid, 0-d or one per channel, without gradient.
        amin: the smallest one; None for ``-amax``.
        clips: whether values may lie outside; False makes the backward pass free.
    """

    amax: Tensor
    amin: Tensor | None = None
    clips: bool = True


class Given:
    """The bounds of the latest calls, told apart by what the range saw of each tensor: its largest magnitude, say.

    Where that is the same for all (images that reach to 1, ReLU6), so are the ranges, but for the first steps.

    Example:
        >>> given = Given()
        >>> for peak in (1.0, 3.0):
        ...     given.note(peak, Bounds(torch.tensor(peak / 2)))
        >>> given.find(1.0).amax, given.find(2.0)
        (tensor(0.5000), None)
    """

    def __init__(self) -> None:
        self._calls: deque[tuple[Tensor | float, Any]] = deque(maxlen=CALLS)

    def note(self, seen: Tensor | float, bounds: Bounds) -> None:
        """Keep what was given for a tensor of which this was seen.

        Beside a Python number, numbers are kept: to copy a buffer costs a small layer more than all of this.
        """
        self._calls.appendleft((seen, _numbers(bounds) if isinstance(seen, float) else bounds))

    def find(self, seen: Tensor | float) -> Bounds | None:
        """What was given for it, the latest of several; of tensors, the latest of all where none fits."""
        if isinstance(seen, Tensor):
            return self._find_by_tensors(seen)
        return next((_bounds(*kept) for known, kept in self._calls if known == seen), None)

    def _find_by_tensors(self, seen: Tensor) -> Bounds | None:
        """Without looking at a number, for which a GPU would have to stop."""
        tensors = ((known, bounds) for known, bounds in self._calls if isinstance(known, Tensor))
        calls = [(known, bounds) for known, bounds in tensors if known.device == seen.device]
        if not calls:
            return None
        fits = torch.stack([known for known, _ in calls]) == seen
        at = fits.byte().argmax(0, keepdim=True)
        amax = [bounds.amax for _, bounds in calls]
        amin = [bounds.amin for _, bounds in calls if bounds.amin is not None]
        return Bounds(_at(at, amax), _at(at, amin) if amin else None, calls[0][1].clips)

    def __reduce__(self) -> tuple[Any, ...]:
        return Given, ()


def _at(index: Tensor, values: list[Tensor]) -> Tensor:
    return torch.stack(values).index_select(0, index)[0]


def _numbers(bounds: Bounds) -> tuple[Any, ...]:
    amax, amin, clips = bounds
    return amax.tolist(), None if amin is None else amin.tolist(), clips, amax.dtype


def _bounds(amax: Any, amin: Any, clips: bool, dtype: torch.dtype) -> Bounds:
    of_numbers = functools.partial(torch.tensor, dtype=dtype, device="cpu")
    return Bounds(of_numbers(amax), None if amin is None else of_numbers(amin), clips)
