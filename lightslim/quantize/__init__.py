"""Quantization-aware training: weights and inputs rounded, while training, as their integers will be."""

from lightslim.quantize.analysis import signal_to_noise
from lightslim.quantize.bounds import Bounds
from lightslim.quantize.calibration import Entropy, LeastSquares, Max, Percentile
from lightslim.quantize.integers import for_mobile, to_int8
from lightslim.quantize.posttraining import quantize
from lightslim.quantize.ranges import (
    AbsMax,
    ChannelWiseAbsMax,
    MovingAverageAbsMax,
    MovingAverageMinMax,
    Range,
    RangeAbsMax,
)
from lightslim.quantize.strategy import QuantizationStrategy
from lightslim.quantize.transform import FakeQuantize, freeze, quantizers, transform, untransform

__all__ = [
    "AbsMax",
    "Bounds",
    "ChannelWiseAbsMax",
    "Entropy",
    "FakeQuantize",
    "LeastSquares",
    "Max",
    "MovingAverageAbsMax",
    "MovingAverageMinMax",
    "Percentile",
    "QuantizationStrategy",
    "Range",
    "RangeAbsMax",
    "for_mobile",
    "freeze",
    "quantize",
    "quantizers",
    "signal_to_noise",
    "to_int8",
    "transform",
    "untransform",
]
