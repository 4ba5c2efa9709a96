"""Codes as the integers of a runtime."""

from typing import Any, NamedTuple

import numpy as np

from lightslim.errors import CompressionError
from lightslim.export.qdq.bounds import Interval
from lightslim.export.qdq.marks import ValueGrid
from lightslim.export.qdq.presets import Encoding


class Spelling(NamedTuple):
    """A grid of values as a runtime's integers.

    Attributes:
        step: the distance between two codes.
        zero: the integer that stands for zero.
        low: the smallest integer on the grid.
        high: the largest.
        signed: whether they are int8.
    """

    step: float
    zero: int
    low: int
    high: int
    signed: bool

    @property
    def limits(self) -> tuple[int, int]:
        """What the type can hold."""
        return (-128, 127) if self.signed else (0, 255)

    @property
    def floors_at_zero(self) -> bool:
        """Whether the type itself keeps out what is below zero."""
        return self.zero == self.limits[0]

    @property
    def highest(self) -> float:
        """The largest value on the grid."""
        return (self.high - self.zero) * self.step

    def overshoot(self, reach: Interval) -> tuple[bool, bool]:
        """Whether values between these bounds would get integers of the type that are below and above the grid."""
        smallest, largest = self.limits
        low = max(smallest, reach[0] / self.step + self.zero)
        high = min(largest, reach[1] / self.step + self.zero)
        return low < self.low - 0.5, high > self.high + 0.5

    @property
    def dtype(self) -> type[np.integer[Any]]:
        """The type."""
        return np.int8 if self.signed else np.uint8


def spelled(grid: ValueGrid, positive: bool, encoding: Encoding, tensor: str) -> Spelling:
    """The integers for a value.

    Args:
        grid: one that fits eight bits.
        positive: whether no value is below zero.
        encoding: what the target wants.
        tensor: named in the error, as ``conv1.input``.

    Raises:
        CompressionError: the target has no affine inputs.
    """
    if grid.affine and not encoding.moves_zero:
        raise CompressionError(
            f"{tensor} has an affine range, which this deploy preset does not take: train with a symmetric "
            "one, as moving_average_abs_max"
        )
    smallest = -128 if encoding.signed else 0
    middle = 0 if encoding.signed or positive else 128
    zero = smallest - grid.low if grid.affine else middle
    assert grid.step is not None
    return Spelling(grid.step, zero, max(grid.low + zero, smallest), grid.high + zero, encoding.signed)
