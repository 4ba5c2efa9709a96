"""Exported files in their runtimes, beside what the runtimes' own quantizers make of the float file: time and bytes.

What a preset is good for depends on the CPU's integer instructions, which the foot of the table names.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.bench.paired import Row, Step, measure, row
from experiments.bench.qat_step import resnet18, warmed
from experiments.models import MobileNetV2
from lightslim.errors import CompressionError
from lightslim.export import export
from lightslim.export.export import check_available
from lightslim.export.runtimes import open_in_onnxruntime, open_in_openvino
from lightslim.quantize import quantize
from lightslim.registry import registry

PEER, NNCF, OPENVINO = "uint8 x int8 by ONNX Runtime", "int8 by NNCF", "int8 OpenVINO"
FLOAT = "float OpenVINO"
ENDS = ", additions too"
FILES: dict[str, tuple[str, dict[str, str]]] = {
    "float": ("onnx", {}),
    "int8 exact": ("int8", {"deploy": "exact"}),
    "int8 x86": ("int8", {"deploy": "x86"}),
    f"int8 x86{ENDS}": ("int8", {"deploy": "x86"}),
    OPENVINO: ("openvino", {}),
    f"{OPENVINO}{ENDS}": ("openvino", {}),
}
GOALS = {"int8 x86": 1.0, f"int8 x86{ENDS}": 1.0}
FASTER = {"mobilenet_v2": 1.8, "resnet18": 2.5}  # than float in OpenVINO


class Published(MobileNetV2):
    """With all strides of the paper: 224 pixels become 7."""

    PLAN = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self) -> None:
        super().__init__(3, 1000)
        self.stem.stride = (2, 2)


def mobilenet_v2() -> tuple[nn.Module, Tensor]:
    """For 3 x 224 x 224."""
    return Published(), torch.randn(4, 3, 224, 224)


def resnet() -> tuple[nn.Module, Tensor]:
    """ResNet-18 for 3 x 224 x 224."""
    _, *layers = resnet18()[0].children()
    stem = (nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(*stem, *layers), torch.randn(4, 3, 224, 224)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {"mobilenet_v2": mobilenet_v2, "resnet18": resnet}


def installed() -> dict[str, tuple[str, dict[str, str]]]:
    """The files whose runtime is here; says which is not."""
    found = {}
    for name, (format_, options) in FILES.items():
        try:
            check_available(format_)
        except CompressionError as error:
            print(f"{name} left out: {error}", file=sys.stderr)
        else:
            found[name] = format_, options
    return found


def written(net: nn.Module, x: Tensor, folder: Path) -> dict[str, Path]:
    """One file for each way to write the network; the ranges are those of one batch."""
    ranges = {"weight_quantize_type": "channel_wise_abs_max", "activation_quantize_type": "moving_average_min_max"}
    models = {"": quantize(net, [x], **ranges), ENDS: quantize(net, [x], **ranges, outputs="auto")}
    paths = {}
    for name, (format_, options) in installed().items():
        paths[name] = folder / f"{name.replace(' ', '_')}.onnx"
        quantized = models[ENDS if name.endswith(ENDS) else ""]
        export(net if name == "float" else quantized, x, paths[name], format=format_, **options)
    paths[PEER] = by_onnxruntime(paths["float"], x, folder / "peer.onnx")
    if OPENVINO in paths:
        paths[FLOAT] = paths["float"]
    if OPENVINO in paths and find_spec("nncf"):
        paths[NNCF] = by_nncf(paths["float"], x, folder / "nncf.xml")
    return paths


def by_onnxruntime(path: Path, x: Tensor, out: Path) -> Path:
    """The float file quantized by ONNX Runtime: static, uint8 inputs, weights per channel, the same batch."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Batch(CalibrationDataReader):
        def __init__(self, name: str) -> None:
            self.batches = iter([{name: x.numpy()}])

        def get_next(self) -> Mapping[str, object] | None:
            return next(self.batches, None)

    quant_pre_process(path, out)
    name = onnx.load(path).graph.input[0].name
    encoding = {"quant_format": QuantFormat.QDQ, "activation_type": QuantType.QUInt8}
    quantize_static(out, out, Batch(name), per_channel=True, **encoding)
    return out


def by_nncf(path: Path, x: Tensor, out: Path) -> Path:
    """The float file quantized by NNCF for OpenVINO, as it does by default, calibrated on the same batch."""
    import nncf
    import openvino

    model = openvino.Core().read_model(path)
    openvino.save_model(nncf.quantize(model, nncf.Dataset([x.numpy()])), out, compress_to_fp16=False)
    return out


def opened(paths: Mapping[str, Path], x: Tensor) -> dict[str, Step]:
    """A run of each file in its runtime, on one sample."""
    threads = torch.get_num_threads()
    others = {PEER: open_in_onnxruntime, NNCF: open_in_openvino, FLOAT: open_in_openvino}
    runs = {}
    for name, path in paths.items():
        open_ = others.get(name) or registry().get("exporter", FILES[name][0]).open
        runs[name] = open_(path, threads=threads)
    return {name: partial(run, x[:1]) for name, run in runs.items()}


def rows(rounds: int, quick: bool) -> Iterator[Row]:
    """Each file beside the peer's, latency and bytes."""
    for model in ["mobilenet_v2"] if quick else MODELS:
        net, x = MODELS[model]()
        x = x[..., :64, :64] if quick else x
        with tempfile.TemporaryDirectory() as folder:
            paths = written(warmed(net, x).eval(), x, Path(folder))
            steps = opened(paths, x)
            again = open_in_onnxruntime(paths[PEER], threads=torch.get_num_threads())
            seconds = measure({**steps, "again": partial(again, x[:1])}, rounds, repeats=2 if quick else 20)
            size = {name: path.stat().st_size for name, path in paths.items()}
        yield row(f"{model}, {PEER} again", seconds, "again", PEER, control=True)
        for name in (name for name in FILES if name in paths):
            ratio = size[name] / size[PEER]
            yield row(f"{model}, {name} / {PEER}", seconds, name, PEER, GOALS.get(name))
            goal = None if name == "float" else 1.0
            spread = ratio, ratio
            yield Row(f"{model}, {name} / {PEER}", size[name], size[PEER], ratio, spread, goal, unit="bytes")
        for name in (name for name in (OPENVINO, f"{OPENVINO}{ENDS}") if name in paths):
            yield row(f"{model}, {name} / {FLOAT}", seconds, name, FLOAT, 1 / FASTER[model])
            if NNCF in paths:
                yield row(f"{model}, {name} / {NNCF}", seconds, name, NNCF, 1)
