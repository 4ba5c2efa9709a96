"""One row per registered component: how to build it so that it acts on the tiny module of ``tiny.py``.

A strategy's row makes a fresh one that acts at epoch 1; a new component without a row fails ``test_components.py``.
"""

from collections.abc import Callable
from typing import Any

from tiny import TinyModule

from lightslim import (
    DistillationStrategy,
    FSPDistiller,
    L2Distiller,
    QuantizationStrategy,
    SensitivePruneStrategy,
    SoftLabelDistiller,
    StructurePruner,
    UniformPruneStrategy,
    export,
    prune,
    quantize,
)
from lightslim.prune import l1_norm

ROWS: dict[tuple[str, str], Callable[[], Any]] = {
    ("strategy", "UniformPruneStrategy"): lambda: UniformPruneStrategy(target_ratio=0.5, start_epoch=1),
    ("strategy", "SensitivePruneStrategy"): lambda: SensitivePruneStrategy(
        target_ratio=0.5, start_epoch=1, metric_name="val_acc"
    ),
    ("pruner", "StructurePruner"): lambda: StructurePruner({"*": 0}, {"*": "l1_norm"}),
    ("criterion", "l1_norm"): lambda: l1_norm,
    ("criterion", "l2_norm"): lambda: prune.l2_norm,
    ("criterion", "bn_scale"): lambda: prune.bn_scale,
    ("criterion", "fpgm"): lambda: prune.fpgm,
    ("criterion", "random"): lambda: prune.random,
    ("strategy", "QuantizationStrategy"): lambda: QuantizationStrategy(
        start_epoch=1, activation_quantize_type="moving_average_abs_max"
    ),
    ("range", "abs_max"): quantize.AbsMax,
    ("range", "channel_wise_abs_max"): quantize.ChannelWiseAbsMax,
    ("range", "range_abs_max"): lambda: quantize.RangeAbsMax(window_size=100),
    ("range", "moving_average_abs_max"): quantize.MovingAverageAbsMax,
    ("range", "moving_average_min_max"): quantize.MovingAverageMinMax,
    ("range", "max"): quantize.Max,
    ("range", "percentile"): quantize.Percentile,
    ("range", "mse"): quantize.LeastSquares,
    ("range", "entropy"): quantize.Entropy,
    ("strategy", "DistillationStrategy"): lambda: DistillationStrategy(
        [SoftLabelDistiller(), L2Distiller("net.stem", "net.stem")], teacher=TinyModule(), start_epoch=1
    ),
    ("distiller", "FSPDistiller"): lambda: FSPDistiller([("net.stem", "net.body")], [("net.stem", "net.body")]),
    ("distiller", "L2Distiller"): lambda: L2Distiller("net.stem", "net.stem"),
    ("distiller", "SoftLabelDistiller"): SoftLabelDistiller,
    ("exporter", "float"): lambda: export.float_file,
    ("exporter", "int8"): lambda: export.int8_file,
    ("exporter", "onnx"): lambda: export.onnx_file,
    ("exporter", "openvino"): lambda: export.openvino_file,
    ("exporter", "mobile"): lambda: export.mobile_file,
    ("exporter", "pte"): lambda: export.pte_file,
}
