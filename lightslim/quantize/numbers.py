"""The numbers that ranges have learned: on their way into a strategy's state, to copies, and to an optimizer."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightslim.quantize.layers import INPUT, OUTPUT, WEIGHT
from lightslim.quantize.transform import FakeQuantize, quantized_layers, quantized_outputs


def numbers(quantizer: FakeQuantize) -> dict[str, Tensor]:
    """What a quantizer's range has learned, the tensors themselves: its buffers and its parameters."""
    return {**dict(quantizer.named_buffers()), **dict(quantizer.named_parameters())}


def fill(quantizer: FakeQuantize, learned: Mapping[str, Tensor]) -> None:
    """Give a quantizer's range what another has learned."""
    with torch.no_grad():
        for name, number in numbers(quantizer).items():
            if name in learned:
                number.copy_(learned[name])


def unsaved(quantizer: FakeQuantize) -> None:
    """Leave a range's numbers out of state dicts, and let it keep them when one is loaded."""
    quantizer.register_state_dict_post_hook(_left_out)
    quantizer.register_load_state_dict_pre_hook(_kept)


def _left_out(quantizer: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in numbers(quantizer):
        state.pop(prefix + name, None)


def _kept(quantizer: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    state.update({prefix + name: number for name, number in numbers(quantizer).items()})


def trained(module: nn.Module, idle: Collection[str] = ()) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """The parameters of the ranges in ``module``, each with the weight of its layer, or of some layer for outputs.

    Args:
        module: quantized.
        idle: layers whose inputs are not quantized, so that nothing trains the ranges of these: they are frozen.
    """
    layers = quantized_layers(module)
    some: Any = next(iter(layers.values()), None)
    for name, layer in {**layers, **quantized_outputs(module)}.items():
        weight = layers.get(name, some)._parameters["weight"]
        for role in filter(layer._modules.__contains__, (WEIGHT, INPUT, OUTPUT)):
            for parameter in getattr(layer, role).parameters():
                if role == INPUT and name in idle:
                    parameter.requires_grad_(False)
                else:
                    yield parameter, weight


def in_steps(layer: Any) -> Tensor:
    """The weight of a quantized layer, in steps of its grid: rounding takes each number to the nearest whole one."""
    rule, weight = layer.weight_quantizer.rule, layer._parameters["weight"].detach()
    learning = rule.training
    try:
        amax = rule.eval()(weight).amax.detach()
    finally:
        rule.train(learning)
    shape = [1] * weight.ndim
    if amax.ndim:
        shape[rule.axis % weight.ndim] = -1
    steps: Tensor = weight / (amax.reshape(shape) / (2 ** (rule.bits - 1) - 1)).clamp_min(
        torch.finfo(weight.dtype).tiny
    )
    return steps
