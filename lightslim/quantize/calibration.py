"""Ranges chosen from what a calibration saw: where to cut off the few large values so that the many keep fine steps.

They learn while the model is calibrated, by ``quantize`` or by a strategy before its first step, and stay as they are
in training. One range for the whole tensor.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor

from lightslim.errors import CompressionError
from lightslim.kernels.grid import levels
from lightslim.quantize.bounds import Bounds
from lightslim.quantize.ranges import Range, check_whole, number

BINS = 2048
CANDIDATES = 200
"""Ranges that ``mse`` compares, from a 200th of the largest magnitude to all of it."""


class Max(Range):
    """The largest magnitude ever seen, in calibration or training.

    Example:
        >>> rule = Max()
        >>> [rule(torch.tensor([x])).amax.item() for x in (1.0, 3.0, 2.0)]
        [1.0, 3.0, 3.0]
    """

    def __init__(self, axis: int | None = None, bits: int = 8) -> None:
        super().__init__(axis, bits)
        check_whole(axis, "max")
        self.amax: Tensor
        self.register_buffer("amax", torch.zeros(()))

    def forward(self, x: Tensor) -> Bounds:
        """The bounds, after learning from ``x`` in training mode."""
        if not self.training:
            return Bounds(self.amax.clone())
        peak = self.magnitude(x).float()
        if self.learns:
            self.amax.copy_(torch.where(peak.isfinite(), torch.maximum(self.amax, peak), self.amax))
        return self.given(number(peak), Bounds(self.amax.clone()))


class Histogram(Range):
    """The base of ranges chosen from a histogram of magnitudes; subclasses choose.

    The bins reach from 0 to a ``top`` that doubles when something larger comes, two bins becoming one.
    """

    calibrated: ClassVar[bool] = True

    def __init__(self, axis: int | None = None, bits: int = 8) -> None:
        super().__init__(axis, bits)
        check_whole(axis, type(self).__name__.lower())
        self.counts: Tensor
        self.top: Tensor
        self.largest: Tensor
        self.amax: Tensor
        self.register_buffer("counts", torch.zeros(BINS, dtype=torch.float64))
        for name in ("top", "largest", "amax"):
            self.register_buffer(name, torch.zeros(()))

    def choose(self, counts: Tensor, centers: Tensor, largest: float) -> float:
        """Where to cut off.

        Args:
            counts: how many magnitudes fell in each bin, float64, on the CPU.
            centers: the middle of each bin, likewise.
            largest: the largest magnitude.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Bounds:
        """The bounds that were chosen."""
        return Bounds(self.amax.clone())

    def watch(self, x: Tensor) -> None:
        """Count the magnitudes of ``x``, in training mode."""
        peak = float(self.magnitude(x))
        if not self.training or not 0 < peak < math.inf:
            return
        self._reach(peak)
        top = float(self.top)
        self.counts += torch.histc(x.detach().abs().flatten().float(), BINS, 0, top).to(self.counts)
        centers = (torch.arange(BINS, dtype=torch.float64) + 0.5) * top / BINS
        largest = float(self.largest)
        self.amax.fill_(min(self.choose(self.counts.cpu(), centers, largest), largest))

    def _reach(self, peak: float) -> None:
        """Make room for ``peak``."""
        self.largest.fill_(max(float(self.largest), peak))
        if not self.top:
            self.top.fill_(peak)
        while self.top < peak:
            self.top *= 2
            pairs = self.counts.view(-1, 2).sum(1)
            self.counts.zero_()[: BINS // 2] = pairs

    def agreed(self) -> list[Tensor]:
        """The range; each process keeps its own counts."""
        return [self.amax]


class Percentile(Histogram):
    """As far as so many percent of all magnitudes reach.

    Args:
        axis: must be None.
        bits: width of the integers.
        percentile: above 0, up to 100; the rest is clipped.

    Example:
        >>> rule = Percentile(percentile=90.0)
        >>> rule.watch(torch.arange(1001.0))
        >>> round(rule(torch.zeros(1)).amax.item(), -1)
        900.0
    """

    def __init__(self, axis: int | None = None, bits: int = 8, percentile: float = 99.99) -> None:
        super().__init__(axis, bits)
        if not 0 < percentile <= 100:
            raise CompressionError(f"percentile is {percentile}; it must lie above 0 and not above 100")
        self.percentile = percentile

    def choose(self, counts: Tensor, centers: Tensor, largest: float) -> float:
        """The upper end of the bin in which that share is reached."""
        cumulated = counts.cumsum(0)
        index = int(torch.searchsorted(cumulated, cumulated[-1] * self.percentile / 100))
        return float(centers[min(index, BINS - 1)] + centers[0])


class LeastSquares(Histogram):
    """Where the squares of all rounding and clipping errors sum to the least.

    Example:
        >>> rule = LeastSquares(bits=4)
        >>> rule.watch(torch.cat([torch.linspace(0, 1, 10_000), torch.tensor([9.0])]))
        >>> 0.9 < rule(torch.zeros(1)).amax.item() < 1.2
        True
    """

    def choose(self, counts: Tensor, centers: Tensor, largest: float) -> float:
        """The best of evenly spaced candidates."""
        filled = counts > 0
        counts, centers = counts[filled], centers[filled]
        amax = largest * torch.arange(1, CANDIDATES + 1, dtype=torch.float64) / CANDIDATES
        step = (amax / levels(self.bits, affine=False))[:, None]
        rounded = (centers.clamp(max=amax[:, None]) / step).round() * step
        errors = ((rounded - centers).square() * counts).sum(1)
        return float(amax[int(errors.argmin())])


class Entropy(Histogram):
    """Where the integers' distribution diverges least (Kullback-Leibler) from the clipped one, as TensorRT does.

    Migacz, *8-bit Inference with TensorRT*, GTC 2017. The first bin counts like its neighbour: zeros cost nothing.

    Example:
        >>> rule = Entropy()
        >>> rule.watch(torch.cat([torch.randn(100_000), torch.tensor([40.0])]))
        >>> 2 < rule(torch.zeros(1)).amax.item() < 20
        True
    """

    def choose(self, counts: Tensor, centers: Tensor, largest: float) -> float:
        """The best of all cuts at every 16th bin that leave a bin for each level, and of none."""
        counts = torch.cat([counts[1:2], counts[1:]])
        if levels(self.bits, affine=False) >= BINS:
            return largest
        cuts = [*range(levels(self.bits, affine=False) + 1, BINS, 16), BINS]
        divergences = [divergence(counts, cut, cuts[0]) for cut in cuts]
        best = cuts[min(range(len(cuts)), key=divergences.__getitem__)]
        return float(2 * centers[0] * best)


def divergence(counts: Tensor, cut: int, count: int) -> float:
    """How far the first ``cut`` bins, the rest clipped into the last, are from their own version of ``count`` levels.

    Infinity where the cut leaves nothing.

    Example:
        >>> divergence(torch.ones(8, dtype=torch.float64), cut=8, count=4)
        0.0
    """
    inside = counts[:cut]
    if not inside.any():
        return math.inf
    clipped = inside.clone()
    clipped[-1] += counts[cut:].sum()
    level = torch.arange(cut) * count // cut
    filled = (inside > 0).double()
    sums, shares = (torch.zeros(count, dtype=torch.float64).index_add_(0, level, part) for part in (inside, filled))
    coarse = (sums / shares.clamp(min=1))[level] * filled
    p, q = clipped / clipped.sum(), coarse / coarse.sum()
    # What the coarse version lost altogether weighs like its smallest share
    q = q.clamp(min=1e-12)
    return float(torch.where(p > 0, p * (p / q).log(), 0.0).sum())
