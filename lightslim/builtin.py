"""Our own plugin: everything lightslim brings enters by the same door as a third party's."""

from lightslim import distill, export, prune, quantize
from lightslim.hooks import hookimpl
from lightslim.registry import Registry


@hookimpl
def lightslim_register(registry: Registry) -> None:
    """Add the built-in components."""
    registry.add("strategy", prune.UniformPruneStrategy)
    registry.add("strategy", prune.SensitivePruneStrategy)
    registry.add("pruner", prune.StructurePruner)
    registry.add("criterion", prune.l1_norm)
    registry.add("criterion", prune.l2_norm)
    registry.add("criterion", prune.bn_scale)
    registry.add("criterion", prune.fpgm)
    registry.add("criterion", prune.random)
    registry.add("strategy", quantize.QuantizationStrategy)
    registry.add("range", quantize.AbsMax, "abs_max")
    registry.add("range", quantize.ChannelWiseAbsMax, "channel_wise_abs_max")
    registry.add("range", quantize.RangeAbsMax, "range_abs_max")
    registry.add("range", quantize.MovingAverageAbsMax, "moving_average_abs_max")
    registry.add("range", quantize.MovingAverageMinMax, "moving_average_min_max")
    registry.add("range", quantize.Max, "max")
    registry.add("range", quantize.Percentile, "percentile")
    registry.add("range", quantize.LeastSquares, "mse")
    registry.add("range", quantize.Entropy, "entropy")
    registry.add("strategy", distill.DistillationStrategy)
    registry.add("distiller", distill.FSPDistiller)
    registry.add("distiller", distill.L2Distiller)
    registry.add("distiller", distill.SoftLabelDistiller)
    registry.add("exporter", export.float_file)
    registry.add("exporter", export.int8_file)
    registry.add("exporter", export.onnx_file)
    registry.add("exporter", export.openvino_file)
    registry.add("exporter", export.mobile_file)
    registry.add("exporter", export.pte_file)
