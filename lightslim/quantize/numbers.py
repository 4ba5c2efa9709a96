"""The numbers that ranges have learned: on their way into a strategy's state, to copies, and to an optimizer."""

import contextlib
import itertools
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightslim.quantize.layers import INPUT, OUTPUT, WEIGHT
from lightslim.quantize.transform import FakeQuantize, quantized_layers, quantized_modules


def numbers(quantizer: FakeQuantize) -> dict[str, Tensor]:
    """What a quantizer's range has learned, the tensors themselves: its buffers and its parameters."""
    return {**dict(quantizer.named_buffers()), **dict(quantizer.named_parameters())}


def fill(quantizer: FakeQuantize, learned: Mapping[str, Tensor]) -> None:
    """Give a quantizer's range what another has learned."""
    with torch.no_grad():
        for name, number in numbers(quantizer).items():
            if name in learned:
                number.copy_(learned[name])


def learned_by(named: Mapping[str, FakeQuantize]) -> dict[str, dict[str, Tensor]]:
    """Copies of what the quantizers of these names have learned."""
    return {name: {key: t.detach().clone() for key, t in numbers(each).items()} for name, each in named.items()}


@contextlib.contextmanager
def learning(named: Mapping[str, FakeQuantize], into: dict[str, dict[str, Tensor]]) -> Iterator[None]:
    """Let the ranges learn, in layers in evaluation mode, too, and put into ``into`` what they know at the end."""
    for quantizer in named.values():
        quantizer.rule.train()
    yield
    into.update(learned_by(named))


def has_seen(quantizer: FakeQuantize) -> bool:
    """Whether the range is one to work with: that of the tensor at hand, or one that has learned something."""
    rule = quantizer.rule
    if rule.exact:
        return True
    mode = rule.training
    try:
        bounds = rule.eval()(next(rule.buffers(), torch.zeros(1)).new_zeros(1).float())
    finally:
        rule.train(mode)
    return any(bool((bound != 0).any()) for bound in (bounds.amax, bounds.amin) if isinstance(bound, Tensor))


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
    """The parameters of the ranges in ``module``, each with a weight: of its layer, or the one that gives the output.

    Args:
        module: quantized.
        idle: layers whose inputs are not quantized, so that nothing trains the ranges of these: they are frozen.
    """
    layers: Mapping[str, Any] = quantized_layers(module)
    for name, child in quantized_modules(module).items():
        weight = layers[_layer_of(name, module, layers)]._parameters["weight"]
        for role in filter(child._modules.__contains__, (WEIGHT, INPUT, OUTPUT)):
            for parameter in getattr(child, role).parameters():
                if role == INPUT and name in idle:
                    parameter.requires_grad_(False)
                else:
                    yield parameter, weight


def _layer_of(name: str, module: nn.Module, layers: Collection[str]) -> str:
    """The quantized layer that the module called ``name`` is, or the last in it, or the last before it."""
    inside = [layer for layer in layers if f"{layer}.".startswith(f"{name}.")]
    before = itertools.takewhile(lambda each: each != name, (each for each, _ in module.named_modules()))
    return (inside or [each for each in before if each in layers] or list(layers))[-1]


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
