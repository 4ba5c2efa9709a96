"""Where the accuracy goes: how much of each layer's signal its quantization keeps."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lightslim.errors import CompressionError
from lightslim.quantize.layers import INPUT, OUTPUT, WEIGHT
from lightslim.quantize.transform import FakeQuantize, quantized_layers, quantized_modules
from lightslim.steps import Probe


def signal_to_noise(model: nn.Module, run: Callable[[], Any]) -> dict[str, float]:
    """The ratio of signal to quantization noise of each quantized layer, in decibels, the worst layer first.

    Noise is the difference between a tensor and its quantized self; that of a layer's weight and its input (and its
    output, where that is quantized) add up:
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

    found = {name: _quantizers(module) for name, module in quantized_modules(model).items()}
    handles = [quantizer.register_forward_hook(add) for each in found.values() for quantizer in each]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    ratios = {n: sum(_noise(*sums[q]) for q in each) for n, each in found.items() if all(q in sums for q in each)}
    return {n: _decibels(ratio) for n, ratio in sorted(ratios.items(), key=lambda item: -item[1])}


def _quantizers(module: nn.Module) -> list[FakeQuantize]:
    """Those of a module's weight, its input and its output, as far as there are."""
    return [getattr(module, role) for role in (WEIGHT, INPUT, OUTPUT) if role in module._modules]


def _noise(noise: float, signal: float) -> float:
    return noise / signal if signal else 0.0


def _decibels(ratio: float) -> float:
    return -10 * math.log10(ratio) if ratio else math.inf


def unreached(probe: Probe, module: nn.Module) -> list[str]:
    """The quantized layers whose inputs pass no hook in one step: their weights are used from outside."""
    layers = quantized_layers(module)
    given = _given(probe, layers)
    return [name for name in layers if name not in given]


def check_outputs(probe: Probe, module: nn.Module, outputs: Iterable[str]) -> None:
    """Raise unless one step gets a tensor of floats from each of the modules called ``outputs``."""
    modules = {name: module.get_submodule(name) for name in outputs}
    given = _given(probe, modules)
    for name in modules:
        if name not in given:
            raise CompressionError(f"outputs: the step never calls {name}")
        if not (isinstance(given[name], Tensor) and given[name].is_floating_point()):
            raise CompressionError(f"outputs: {name} gives a {type(given[name]).__name__}, not one tensor of floats")


def _given(probe: Probe, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """What those of ``modules`` return that one step calls, by name."""
    given: dict[str, Any] = {}
    handles = [
        module.register_forward_hook(lambda *call, name=name: given.update({name: call[-1]}))
        for name, module in modules.items()
    ]
    try:
        probe.run()
        probe.run(training=True)
    finally:
        for handle in handles:
            handle.remove()
    return given
