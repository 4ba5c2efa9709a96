"""Quantization-aware training: weights and inputs rounded, while training, as their integers will be."""

from lightslim.quantize.analysis import signal_to_noise
from lightslim.quantize.ranges import AbsMax, ChannelWiseAbsMax, MovingAverageAbsMax, Range, RangeAbsMax
from lightslim.quantize.strategy import QuantizationStrategy
from lightslim.quantize.transform import FakeQuantize, freeze, quantizers, transform, untransform

__all__ = [
    "AbsMax",
    "ChannelWiseAbsMax",
    "FakeQuantize",
    "MovingAverageAbsMax",
    "QuantizationStrategy",
    "Range",
    "RangeAbsMax",
    "freeze",
    "quantizers",
    "signal_to_noise",
    "transform",
    "untransform",
]
