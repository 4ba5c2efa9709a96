"""The public names, which ``lightslim`` hands on."""

from lightslim.checkpoints import AtomicCheckpointIO
from lightslim.compressor import Compressor
from lightslim.distill import DistillationStrategy, FSPDistiller, L2Distiller, SoftLabelDistiller
from lightslim.errors import CompressionError
from lightslim.hooks import hookimpl
from lightslim.loading import load_compressed
from lightslim.monitor import CompressionMonitor
from lightslim.prune import SensitivePruneStrategy, StructurePruner, UniformPruneStrategy
from lightslim.quantize import QuantizationStrategy
from lightslim.strategy import CompressionStrategy

__all__ = [
    "AtomicCheckpointIO",
    "CompressionError",
    "CompressionMonitor",
    "CompressionStrategy",
    "Compressor",
    "DistillationStrategy",
    "FSPDistiller",
    "L2Distiller",
    "QuantizationStrategy",
    "SensitivePruneStrategy",
    "SoftLabelDistiller",
    "StructurePruner",
    "UniformPruneStrategy",
    "hookimpl",
    "load_compressed",
]
