"""The weights of a model quantized together, when the first of them is asked for.

One after the other, each between two large convolutions, small operations run from cold caches on a CPU and launch one
kernel each on a GPU: several times the cost of doing them in one go.
"""

import threading
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lightslim.kernels import fake_quant_many
from lightslim.kernels.through import handed_on
from lightslim.quantize.ranges import Range


class Together:
    """Hands out each quantized weight once; when one is asked for again, all that were ever asked for are made anew.

    A weight that was written to since the round began starts a new one. Writing through ``.data`` shows nowhere, but
    those that are not trained, as target networks that are written to so, have rounds of their own.

    Example:
        >>> from lightslim.quantize import ChannelWiseAbsMax
        >>> rule, weight = ChannelWiseAbsMax(axis=0, bits=2), torch.tensor([[1.0, 0.4]]).requires_grad_()
        >>> Together().take(rule, weight)
        tensor([[1., 0.]], grad_fn=<UnsafeViewBackward0>)
    """

    def __init__(self) -> None:
        # Weak, so that a layer that leaves the model leaves here too
        self._weights: WeakKeyDictionary[Range, Tensor] = WeakKeyDictionary()
        self._ready: dict[Range, tuple[Any, Tensor]] = {}
        self._lock = threading.Lock()

    def take(self, rule: Range, weight: Tensor) -> Tensor:
        """``weight`` on the grid of its exact ``rule``; the gradient is handed on to it."""
        state, rounded = self._ready.pop(rule, (None, weight))
        if state != _state(weight):
            # Several threads may use the model at once: what this one needs passes no shared place
            ready = _round(self._round_of(rule, weight))
            _, rounded = ready.pop(rule)
            self._ready.update(ready)
        return rounded

    def _round_of(self, rule: Range, weight: Tensor) -> dict[Range, Tensor]:
        """All that are trained, or not, as this one is; a weight that was never asked for comes alone."""
        with self._lock:
            known = self._weights.get(rule) is weight
            self._weights[rule] = weight
            alike = {rule: one for rule, one in self._weights.items() if one.requires_grad == weight.requires_grad}
        return alike if known else {rule: weight}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Together":
        # A copy of one layer must not drag the others along
        memo[id(self)] = fresh = Together()
        return fresh

    def __reduce__(self) -> tuple[Any, ...]:
        return Together, ()


def _state(weight: Tensor) -> tuple[Any, ...]:
    """Changes whenever the weight is written to, moved, converted or frozen, and between training and evaluation.

    Averaging callbacks exchange weights for evaluation by ``data.copy_``, which a version counter does not notice.
    """
    modes = weight.requires_grad, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    version = None if weight.is_inference() else weight._version
    return weight.data_ptr(), version, weight.dtype, weight.shape, modes


def _round(weights: Mapping[Range, Tensor]) -> dict[Range, tuple[Any, Tensor]]:
    groups: dict[tuple[int, int | None], list[tuple[Range, Tensor]]] = {}
    for rule, weight in weights.items():
        groups.setdefault((rule.bits, rule.axis), []).append((rule, weight))
    rounded: dict[Range, tuple[Any, Tensor]] = {}
    for (bits, axis), members in groups.items():
        values = fake_quant_many([weight.detach() for _, weight in members], bits, axis)
        for (rule, weight), value in zip(members, values, strict=True):
            rounded[rule] = _state(weight), handed_on(weight, value)
    return rounded
