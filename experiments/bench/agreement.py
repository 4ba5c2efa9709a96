"""Do files predict what the model predicts? ``python -m experiments.bench.agreement --out agreement.md``.

Networks are trained for a moment on Fashion-MNIST, in float and then with 8-bit weights and inputs, and written for
each runtime that is installed; each file sees all 10,000 test images. What it gives is compared with what the model
gives, and, in ONNX Runtime, each integer that a layer reads with the one that the model's layer reads.
"""

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.bench.scale import Block
from experiments.bench.table import foot, markdown
from experiments.data import FashionMNIST
from experiments.models import MobileNetV1, MobileNetV2, ResNet20
from lightslim.errors import CompressionError
from lightslim.export import export
from lightslim.export.compare import differences
from lightslim.export.export import check_available
from lightslim.quantize import transform
from lightslim.quantize.integers import weight_codes
from lightslim.quantize.transform import INPUT, quantized_layers
from lightslim.registry import registry

FORMATS = {"int8": "ONNX Runtime", "openvino": "OpenVINO", "mobile": "ExecuTorch"}
COLUMNS = ("network", "accuracy %", "runtime", "accuracy %", "relative norm", "predictions that differ", "equal codes")
BATCH = 128


class SmallViT(nn.Module):
    """Patches of 4 by 4, three blocks."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patches, self.position = nn.Conv2d(1, width, 4, 4), nn.Parameter(torch.randn(1, 49, width) / 10)
        self.blocks, self.head = nn.Sequential(*(Block(width) for _ in range(3))), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images to the scores of each class."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.blocks(x).mean(1))


class Mixed(nn.Module):
    """A concatenation, a residual addition and a squeeze-excite gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = _layer(1, 16, 3, 2), _layer(16, 16, 3), _layer(16, 16, 5)
        self.join, self.body = _layer(32, 32, 1), _layer(32, 32, 3, 2)
        self.narrow, self.wide = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
        self.skip, self.head = _layer(32, 32, 3), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images to the scores of each class."""
        x = self.stem(x)
        x = self.body(self.join(torch.cat([self.left(x), self.right(x)], 1)))
        x = x * self.wide(self.narrow(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.head((x + self.skip(x)).mean((2, 3)))


def _layer(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-20": ResNet20,
    "MobileNet V1": lambda: MobileNetV1(width=0.375),
    "MobileNet V2": lambda: MobileNetV2(width=0.5),
    "a small ViT": SmallViT,
    "concatenation, residual, squeeze-excite": Mixed,
}


def batches(images: int | None = None, train: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Fashion-MNIST in batches."""
    data = FashionMNIST(BATCH, limit=images)
    data.prepare_data()
    data.setup()
    return list(data.train_dataloader() if train else data.val_dataloader())


def trained(name: str, images: int, weight_bits: int) -> nn.Module:
    """A network that has seen ``images`` in float, and a quarter of them again with fake quantization."""
    torch.manual_seed(0)
    net, data = NETWORKS[name](), batches(images, train=True)
    _train(net, data, 2e-3)
    transform(net, weight_bits)
    _train(net, data[: len(data) // 4], 2e-4)
    return net.eval()


def _train(net: nn.Module, data: list[tuple[Tensor, Tensor]], rate: float) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), rate)
    for x, labels in data:
        optimizer.zero_grad()
        F.cross_entropy(net(x), labels).backward()
        optimizer.step()


def answers(run: Callable[[Tensor], Tensor], data: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The scores of all images."""
    with torch.no_grad():
        return torch.cat([run(x) for x, _ in data])


def rows(name: str, net: nn.Module, data: list[tuple[Tensor, Tensor]], folder: Path) -> Iterator[tuple[str, ...]]:
    """One for each runtime that is here."""
    labels, expected = torch.cat([labels for _, labels in data]), answers(net, data)
    for format_, runtime in FORMATS.items():
        try:
            check_available(format_)
        except CompressionError as error:
            print(f"{runtime} left out: {error}", file=sys.stderr)
            continue
        path = folder / f"{name}.{format_}"
        export(net, data[0][0], path, format=format_)
        run = registry().get("exporter", format_).open(path)
        got = answers(lambda x, run=run: run(x)[0], data)
        found = differences([got], [expected])
        correct = [f"{100 * float((scores.argmax(1) == labels).double().mean()):.2f}" for scores in (expected, got)]
        equal = "" if format_ == "mobile" else str(all(equal_codes(net, path)))
        apart = f"{found['argmax_differs']} of {found['argmax_of']:,}"
        yield name, correct[0], runtime, correct[1], f"{found['rel_diff']:.1e}", apart, equal


def equal_codes(net: nn.Module, path: Path) -> Iterator[bool]:
    """Whether the integers in an ONNX file are those of the model, by layer; a batch norm may have turned signs."""
    constants = _constants(path)
    for name, layer in quantized_layers(net).items():
        stored, codes = constants[f"{name}.weight_codes"], weight_codes(layer).values.numpy().astype(np.int32)
        if stored.ndim == 2 and not np.array_equal(np.abs(stored), np.abs(codes)):
            stored = stored.T
        units = stored.shape[0]
        stored, codes = (part.astype(np.int32).reshape(units, -1) for part in (stored, codes))
        signs = np.sign((stored * codes).sum(1, keepdims=True))
        yield bool(np.array_equal(stored, codes * signs))


def codes_apart(net: nn.Module, path: Path, data: list[tuple[Tensor, Tensor]]) -> tuple[int, int]:
    """How many of the integers that layers read are others in ONNX Runtime than in the model, and of how many."""
    constants, run = _constants(path), _with_integers(path)
    layers: dict[str, Any] = quantized_layers(net)
    seen: dict[str, Tensor] = {}
    hooks = [getattr(layer, INPUT).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
             for name, layer in layers.items()]  # fmt: skip
    differing = total = 0
    for x, _ in data:
        with torch.no_grad():
            net(x)
        for name, integers in run(x).items():
            step, zero = (constants[f"{name}.input_{part}"] for part in ("scale", "zero_point"))
            model = np.rint(seen[name].numpy() / step)
            differing += int((integers.astype(np.float32) - zero.astype(np.float32) != model).sum())
            total += integers.size
    for hook in hooks:
        hook.remove()
    return differing, total


def _constants(path: Path) -> Mapping[str, Any]:
    import onnx

    return {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer}


def _with_integers(path: Path) -> Callable[[Tensor], dict[str, Any]]:
    """The file with what its QuantizeLinear nodes give as outputs, by the layer whose input that is."""
    import onnx
    import onnxruntime

    model = onnx.load(path)
    names = [node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    layers = [name.removesuffix(".input_quantizelinear") for name in names]
    (given,) = session.get_inputs()
    return lambda x: dict(zip(layers, session.run(names, {given.name: x.numpy()}), strict=True))


def main() -> None:
    """Measure, print the table and write it."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.agreement", description=__doc__)
    parser.add_argument("--images", type=int, default=16_000, help="to train on")
    parser.add_argument("--weight-bits", type=int, default=8, help="with 8, OpenVINO is right on CPUs with VNNI only")
    parser.add_argument("--out", type=Path, help="the file to write the table to")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    data, found, notes = batches(), [], []
    for name in NETWORKS:
        net = trained(name, options.images, options.weight_bits)
        with tempfile.TemporaryDirectory() as folder:
            found += rows(name, net, data, Path(folder))
            differing, total = codes_apart(net, Path(folder) / f"{name}.int8", data)
        notes.append(f"{name}: {differing:,} of {total:,}")
        print(found[-len(FORMATS) :], notes[-1], file=sys.stderr, flush=True)
    edges = "Integers read by layers that are others in ONNX Runtime: " + "; ".join(notes)
    text = f"{markdown(COLUMNS, found)}\n\n{edges}.\n\n{options.weight_bits}-bit weights. {foot()}.\n"
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
