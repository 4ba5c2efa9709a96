"""Marks where a traced graph is quantized, and the numbers that belong there.

A mark is one node of a domain of our own, with a tensor's name: the tracer passes it on as it is, whatever the layer
is called by (several times, not at all, its weight alone), and the graph is rewritten where the marks are.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightslim.errors import CompressionError
from lightslim.kernels.codes import Codes, grid_of
from lightslim.kernels.grid import levels
from lightslim.quantize.integers import weight_codes, weight_quantizer
from lightslim.quantize.layers import WEIGHT
from lightslim.quantize.transform import FakeQuantize, quantized_layers, quantized_values

DOMAIN = "lightslim"
OF_WEIGHT, OF_VALUE = "Weight", "Value"


class ValueGrid(NamedTuple):
    """How an input or output is rounded: ``round(clamp(x * inverse, low, high)) * step``.

    Attributes:
        levels: the largest code of a symmetric grid, the number of steps of an affine one.
        affine: whether zero may have any code.
        inverse: None where the range is that of the tensor at hand.
        step: likewise.
        low: the smallest code.
        high: the largest code.
    """

    levels: int
    affine: bool
    inverse: float | None
    step: float | None
    low: int
    high: int

    @property
    def fits(self) -> bool:
        """Whether eight bits and one fixed step say it all."""
        return self.high - self.low <= 255 and bool(self.step)


@dataclass
class Marked:
    """The numbers of all weights, by the name of their layer, and of all values, as ``conv1.input``."""

    weights: dict[str, Codes] = field(default_factory=dict)
    values: dict[str, ValueGrid] = field(default_factory=dict)


class Mark(nn.Module):
    """Stands in for a fake quantizer while a model is traced.

    Args:
        role: ``Weight`` or ``Value``.
        tensor: its name.
    """

    def __init__(self, role: str, tensor: str) -> None:
        super().__init__()
        self.role, self.tensor = role, tensor

    def forward(self, x: Tensor) -> Tensor:
        """A tensor like ``x``; its values mean nothing."""
        symbolic: Any = torch.onnx.ops.symbolic
        marked: Tensor = symbolic(
            f"{DOMAIN}::{self.role}", (x,), {"tensor": self.tensor}, dtype=x.dtype, shape=x.shape, version=1
        )
        return marked


def mark(model: nn.Module) -> Marked:
    """Put marks in the place of the fake quantizers of ``model`` and return the numbers behind them.

    Raises:
        CompressionError: a weight has more than 8 bits, or codes that are not symmetric about zero.

    Example:
        >>> from lightslim.quantize import transform
        >>> found = mark(transform(nn.Sequential(nn.Linear(4, 3)), weight_bits=4))
        >>> found.weights["0"].values.dtype, found.values["0.input"].levels
        (torch.int8, 127)
    """
    marked = Marked()
    for name, layer in quantized_layers(model).items():
        marked.weights[name] = _weight(name, layer)
    for name, layer in quantized_layers(model).items():
        setattr(layer, WEIGHT, Mark(OF_WEIGHT, name))
    for name, module, end, role in quantized_values(model):
        marked.values[f"{name}.{end}"] = value_grid(getattr(module, role))
        setattr(module, role, Mark(OF_VALUE, f"{name}.{end}"))
    return marked


def _weight(name: str, layer: nn.Module) -> Codes:
    bits = weight_quantizer(layer).bits
    if bits > 8:
        raise CompressionError(f"the weight of {name} has {bits} bits: an int8 file holds up to 8")
    codes = weight_codes(layer)
    if codes.values.dtype != torch.int8:
        raise CompressionError(f"the weight of {name} has an affine range: an int8 file holds symmetric ones")
    return codes


def value_grid(quantizer: FakeQuantize) -> ValueGrid:
    """The grid that a quantizer has learned."""
    if quantizer.rule.exact:
        count = levels(quantizer.bits, affine=False)
        return ValueGrid(count, False, None, None, -count, count)
    bounds = quantizer.rule.eval()(torch.empty(0))
    affine = bounds.amin is not None
    grid = grid_of(bounds.amax.float(), bounds.amin, quantizer.bits)
    low, high = int(grid.low), int(grid.high)
    return ValueGrid(levels(quantizer.bits, affine), affine, float(grid.inverse), float(grid.step), low, high)
