"""Other people's quantization-aware training, each as near as its package gets to what ours does.

A peer takes a float network, whose batch norms have seen data, and a batch, and returns a network that trains with
int8 weights, one range per output channel, and int8 activations, one range per tensor. It may change what it was given.
"""

import importlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Peer = Callable[[nn.Module, Tensor], nn.Module]
Fake = Callable[[Tensor, int | None], Tensor]


def modelopt(net: nn.Module, x: Tensor) -> nn.Module:
    """NVIDIA ModelOpt: weights and inputs of layers, with ranges of inputs that stay as calibrated."""
    import modelopt.torch.quantization as mtq

    return mtq.quantize(net, mtq.INT8_DEFAULT_CFG, lambda model: model(x))


def nncf(net: nn.Module, x: Tensor) -> nn.Module:
    """NNCF's post-training quantization, then trained: it learns its ranges, and quantizes what is added, too."""
    import nncf as package

    # It hangs a child of its own on the root, which a Sequential would call as one more layer
    return package.quantize(_Root(net), package.Dataset([x]), subset_size=1)


class _Root(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def brevitas(net: nn.Module, x: Tensor) -> nn.Module:
    """Brevitas: weights and inputs of layers, by the magnitudes of the batch; their moving average is for use."""
    from brevitas import nn as quantized
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.inject.enum import ScalingImplType, StatsOp
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

    inputs = Int8ActPerTensorFloat.let(scaling_impl_type=ScalingImplType.STATS, scaling_stats_op=StatsOp.MAX)
    settings: dict[str, Any] = {"weight_quant": Int8WeightPerChannelFloat, "input_quant": inputs}
    swaps = {nn.Conv2d: (quantized.QuantConv2d, settings), nn.Linear: (quantized.QuantLinear, settings)}
    return layerwise_quantize(net, swaps)


def torch_ao(net: nn.Module, x: Tensor) -> nn.Module:
    """Eager torch.ao: weights, the first input and outputs of layers (inputs it has no place for); unfused."""
    from torch.ao import quantization as ao

    config = ao.get_default_qat_qconfig("onednn")
    for layer in layers(net):
        layer.qconfig = config
    return nn.Sequential(config.activation(), ao.prepare_qat(net, inplace=True))


def chain(net: nn.Module, x: Tensor) -> nn.Module:
    """The bare operations of a dynamic abs_max in one autograd function, and nothing around them."""
    return by_hand(net, _Chain.apply)


def native(net: nn.Module, x: Tensor) -> nn.Module:
    """The operators that torch itself has, with a dynamic abs_max."""
    return by_hand(net, _native)


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: int | None) -> Tensor:
        step = _step(x, axis)
        return (x / step).round_().mul_(step)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _native(x: Tensor, axis: int | None) -> Tensor:
    step = _step(x.detach(), axis)
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(x, step, torch.zeros((), dtype=torch.int32), -127, 127)
    zeros = torch.zeros(step.numel(), dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(x, step.flatten(), zeros, axis, -127, 127)


def _step(x: Tensor, axis: int | None) -> Tensor:
    if axis is None:
        low, high = torch.aminmax(x)
    else:
        others = [d for d in range(x.ndim) if d != axis]
        low, high = x.amin(others, keepdim=True), x.amax(others, keepdim=True)
    return torch.maximum(-low, high).clamp_(min=1e-12).div_(127)


def by_hand(net: nn.Module, fake: Fake) -> nn.Module:
    """Put ``fake`` before the weight and the input of every layer."""
    for layer in layers(net):
        run = F.linear if isinstance(layer, nn.Linear) else layer._conv_forward
        layer.forward = partial(_forward, layer, run, fake)
    return net


def _forward(layer: nn.Module, run: Callable[..., Tensor], fake: Fake, x: Tensor) -> Tensor:
    return run(fake(x, None), fake(layer.weight, 0), layer.bias)


def layers(net: nn.Module) -> list[nn.Module]:
    """What is quantized: convolutions and linear layers."""
    return [child for child in net.modules() if isinstance(child, nn.Conv2d | nn.Linear)]


PEERS: dict[str, tuple[str, Peer]] = {
    "bare chain": ("torch", chain),
    "torch.fake_quantize_*": ("torch", native),
    "torch.ao eager": ("torch.ao.quantization", torch_ao),
    "ModelOpt": ("modelopt.torch.quantization", modelopt),
    "NNCF": ("nncf.torch", nncf),
    "Brevitas": ("brevitas.graph.quantize", brevitas),
}


def installed() -> dict[str, Peer]:
    """The peers whose package imports; says which don't."""
    found = {}
    for name, (package, peer) in PEERS.items():
        try:
            importlib.import_module(package)
        except ImportError as error:
            print(f"{name} left out: {error}", file=sys.stderr)
        else:
            found[name] = peer
    return found
