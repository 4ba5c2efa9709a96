"""The weights of a model quantized together, when the first of them is asked for.

One after the other, each between two large convolutions, small operations run from cold caches on a CPU and launch one
kernel each on a GPU: several times the cost of doing them in one go.
"""

from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.function import Function

from lightslim.kernels import fake_quant_many
from lightslim.quantize.ranges import Range


class Together:
    """Hands out each quantized weight once; when one is asked for again, all that were ever asked for are made anew.

    None is handed out stale: a weight that was written to since the round began starts a new one.

    Example:
        >>> from lightslim.quantize import ChannelWiseAbsMax
        >>> rule, weight = ChannelWiseAbsMax(axis=0, bits=2), torch.tensor([[1.0, 0.4]]).requires_grad_()
        >>> Together().take(rule, weight)
        tensor([[1., 0.]], grad_fn=<HandOnBackward>)
    """

    def __init__(self) -> None:
        # Weak, so that a layer that leaves the model leaves here too
        self._weights: WeakKeyDictionary[Range, Tensor] = WeakKeyDictionary()
        self._ready: dict[Range, tuple[Any, Tensor]] = {}

    def take(self, rule: Range, weight: Tensor) -> Tensor:
        """``weight`` on the grid of its exact ``rule``; the gradient is handed on to it."""
        state, value = self._ready.pop(rule, (None, weight))
        if state != _state(weight):
            known = self._weights.get(rule) is weight
            self._weights[rule] = weight
            self._ready.update(_round(self._weights if known else {rule: weight}))
            _, value = self._ready.pop(rule)
        taken: Tensor = HandOn.apply(weight, value)
        return taken

    def __deepcopy__(self, memo: dict[int, Any]) -> "Together":
        # A copy of one layer must not drag the others along
        memo[id(self)] = fresh = Together()
        return fresh

    def __reduce__(self) -> tuple[Any, ...]:
        return Together, ()


class HandOn(Function):
    """Stands for a weight with a value computed apart from it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: Tensor) -> Tensor:
        """The value."""
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Nothing was clipped."""
        return grad, None


def _state(weight: Tensor) -> tuple[Any, ...]:
    """Changes whenever the weight is written to, moved or converted, and between training and evaluation.

    Averaging callbacks exchange weights for evaluation by ``data.copy_``, which a version counter does not notice.
    """
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return weight.data_ptr(), weight._version, weight.dtype, weight.shape, modes


def _round(weights: Mapping[Range, Tensor]) -> dict[Range, tuple[Any, Tensor]]:
    states = {rule: _state(weight) for rule, weight in weights.items()}
    with torch.no_grad():
        return {rule: (states[rule], value) for rule, value in _quantized(weights)}


def _quantized(weights: Mapping[Range, Tensor]) -> Iterator[tuple[Range, Tensor]]:
    groups: dict[tuple[int, int | None], list[Range]] = {}
    for rule in weights:
        groups.setdefault((rule.bits, rule.axis), []).append(rule)
    for (bits, axis), rules in groups.items():
        yield from zip(rules, fake_quant_many([weights[rule].detach() for rule in rules], bits, axis), strict=True)
