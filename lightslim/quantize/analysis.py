"""Where the accuracy goes: how much of each layer's signal its quantization keeps."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lightslim.quantize.layers import INPUT, WEIGHT
from lightslim.quantize.transform import FakeQuantize, quantized_layers
from lightslim.steps import Probe


def signal_to_noise(model: nn.Module, run: Callable[[], Any]) -> dict[str, float]:
    """The ratio of signal to quantization noise of each quantized layer, in decibels, the worst layer first.

    Noise is the difference between a tensor and its quantized self; that of a layer's weight and its input add up:
    ``-10 log10(N_w / S_w + N_x / S_x)`` with sums of squares ``N`` and ``S``. Each bit is worth about 6 dB.

    Args:
        model: a transformed module.
        run: runs it, on as much data as should count.

    Returns:
        Layer name to decibels; infinity for a layer without noise, and no entry for one that ``run`` never called.

    Example:
        >>> import torch
        >>> from lightslim.quantize import transform
        >>> net = transform(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), overrides={"1": {"weight_bits": 2}})
        >>> worst = signal_to_noise(net, lambda: net(torch.randn(16, 8)))
        >>> list(worst)
        ['1', '0']
    """
    sums: dict[FakeQuantize, list[float]] = {}

    def add(quantizer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(quantizer, FakeQuantize)
        signal, exact = output.detach().double(), inputs[0].detach().double()
        kept = sums.setdefault(quantizer, [0.0, 0.0])
        kept[0] += float((exact - signal).square().sum())
        kept[1] += float(exact.square().sum())

    layers = quantized_layers(model)
    pairs = {name: _both(layer) for name, layer in layers.items()}
    handles = [quantizer.register_forward_hook(add) for pair in pairs.values() for quantizer in pair]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    ratios = {n: sum(_noise(*sums[q]) for q in pair) for n, pair in pairs.items() if all(q in sums for q in pair)}
    return {n: _decibels(ratio) for n, ratio in sorted(ratios.items(), key=lambda item: -item[1])}


def _both(layer: nn.Module) -> tuple[FakeQuantize, FakeQuantize]:
    """The quantizers of a layer's weight and of its input."""
    return getattr(layer, WEIGHT), getattr(layer, INPUT)


def _noise(noise: float, signal: float) -> float:
    return noise / signal if signal else 0.0


def _decibels(ratio: float) -> float:
    return -10 * math.log10(ratio) if ratio else math.inf


def unreached(probe: Probe, module: nn.Module) -> list[str]:
    """The quantized layers whose inputs pass no hook in one step: their weights are used from outside."""
    called: set[str] = set()
    layers = quantized_layers(module)
    handles = [layer.register_forward_hook(lambda *_, name=name: called.add(name)) for name, layer in layers.items()]
    try:
        probe.run()
        probe.run(training=True)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in layers if name not in called]
