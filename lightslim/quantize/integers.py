"""From a trained model to integers: what a runtime stores and computes with, as plain modules.

The seed's last two passes. Both give a copy for evaluation; :func:`freeze` is the first.
"""

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightslim.errors import CompressionError
from lightslim.kernels.codes import Codes, encode, grid_of
from lightslim.quantize.layers import DECODER, INPUT, WEIGHT, CodedWeight, QuantizedWeight, mixins_of, swap
from lightslim.quantize.transform import FakeQuantize, quantized_layers, quantized_values

M = TypeVar("M", bound=nn.Module)


def weight_codes(layer: Any) -> Codes:
    """The integer codes of a quantized layer's weight; decoded they are the very weight it computes with.

    Example:
        >>> from lightslim.quantize import transform
        >>> layer = transform(nn.Sequential(nn.Linear(4, 3)))[0]
        >>> codes = weight_codes(layer)
        >>> codes.values.dtype, bool((codes.decoded() == layer.weight).all())
        (torch.int8, True)
    """
    quantizer = weight_quantizer(layer)
    weight = layer._parameters["weight"].detach()
    bounds = quantizer.rule(weight)
    return encode(weight, bounds.amax, quantizer.bits, quantizer.rule.axis, amin=bounds.amin)


def input_codes(layer: nn.Module, x: Tensor) -> Codes:
    """The integer codes of ``x`` as the input of a quantized layer."""
    quantizer = input_quantizer(layer)
    bounds = quantizer.rule(x)
    return encode(x, bounds.amax, quantizer.bits, amin=bounds.amin)


def weight_quantizer(layer: Any) -> FakeQuantize:
    """What rounds the weight of a quantized layer."""
    quantizer: FakeQuantize = getattr(layer, WEIGHT)
    return quantizer


def input_quantizer(layer: nn.Module) -> FakeQuantize:
    """What rounds the input of a quantized layer."""
    quantizer = getattr(layer, INPUT)
    assert isinstance(quantizer, FakeQuantize)
    return quantizer


def to_int8(model: M) -> M:
    """A copy that stores its weights as int8 codes with their scales and computes what the frozen model computes.

    About a quarter of the bytes, and bit-equal in evaluation: ``w = codes * s / R``, worked out at each call. It is
    what an int8 file holds, not a faster model: speed comes from a runtime with integer kernels.

    Args:
        model: a transformed module; it is not touched.

    Returns:
        A module for evaluation. In its state dict ``weight`` holds the codes.

    Raises:
        CompressionError: the model is not quantized, or a weight has more than 8 bits.

    Example:
        >>> from lightslim.quantize import transform
        >>> net = transform(nn.Sequential(nn.Linear(4, 3)))
        >>> small, x = to_int8(net), torch.randn(2, 4)
        >>> small.state_dict()["0.weight"].dtype, torch.equal(small(x), net.eval()(x))
        (torch.int8, True)
    """
    return _converted(model, Decode, lambda quantizer, tensor: quantizer)


def for_mobile(model: M) -> M:
    """The same, spelled in the operators that mobile runtimes look for and replace by integer kernels.

    ``quantize_per_tensor`` and ``dequantize_per_tensor`` around each input, ``dequantize_per_channel`` (or
    ``_per_tensor``) behind each weight: torch's ``quantized_decomposed`` operators, with the scales that were learned.
    They multiply by ``1 / step``, so one input in some millions lands on the code beside.

    Raises:
        CompressionError: as :func:`to_int8`, an input has more than 8 bits, or its range is one of the tensor at hand
            (``abs_max``), which has no scale to write down; or a weight is not float32 or not symmetric.

    Example:
        >>> from lightslim.quantize import transform
        >>> net, x = transform(nn.Sequential(nn.Linear(4, 3))), torch.randn(8, 4)
        >>> _ = net(x)
        >>> bool((for_mobile(net)(x) - net.eval()(x)).abs().max() < 1e-6)
        True
    """
    # Importing it registers the operators
    import torch.ao.quantization.fx._decomposed  # noqa: F401

    for name, layer in quantized_layers(model).items():
        _check_mobile(name, layer)
    return _converted(model, DecodeForMobile, _mobile)


def _check_mobile(name: str, layer: Any) -> None:
    """Raise unless the weight of ``layer`` has what the operators of mobile runtimes know."""
    weight = layer._parameters["weight"]
    if weight.dtype != torch.float32:
        raise CompressionError(f"the weight of {name} is {weight.dtype}: mobile runtimes take float32; model.float()?")
    if copy.deepcopy(weight_quantizer(layer).rule).eval()(weight.detach()).amin is not None:
        raise CompressionError(f"the weight of {name} has an affine range: mobile runtimes take symmetric ones")


class Decode(nn.Module):
    """Gives the weight that integer codes stand for.

    Args:
        codes: of the weight; the codes themselves are kept by the layer.
        dtype: of the weight.
    """

    def __init__(self, codes: Codes, dtype: torch.dtype) -> None:
        super().__init__()
        self.axis = codes.axis
        self.step: Tensor
        self.zero: Tensor
        self.like: Tensor
        # Holds nothing but the type, which goes along when the model is converted
        self.register_buffer("like", codes.step.new_empty(0, dtype=dtype), persistent=False)
        self.register_buffer("step", codes.step)
        self.register_buffer("zero", codes.zero)

    def forward(self, values: Tensor) -> Tensor:
        """Codes to the weight."""
        return Codes(values, self.step, self.zero, self.axis).decoded().to(self.like.dtype)


class DecodeForMobile(Decode):
    """The same by the operators of mobile runtimes."""

    def forward(self, values: Tensor) -> Tensor:
        """Codes to the weight, float32."""
        operators: Any = torch.ops.quantized_decomposed
        limits = (-127, 127, values.dtype)
        if self.axis is None:
            return operators.dequantize_per_tensor(values, self.step.item(), 0, *limits)  # type: ignore[no-any-return]
        return operators.dequantize_per_channel(values, self.step, self.zero.long(), self.axis, *limits)  # type: ignore[no-any-return]


class Requantize(nn.Module):
    """Rounds an input to its learned grid, by the operators of mobile runtimes.

    Args:
        step: the distance between two codes.
        zero: the code of zero.
        low: the smallest code.
        high: the largest code.
        dtype: of the codes.
    """

    def __init__(self, step: float, zero: int, low: int, high: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.grid = (step, zero, low, high, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the grid, float32."""
        operators: Any = torch.ops.quantized_decomposed
        codes = operators.quantize_per_tensor(x, *self.grid)
        return operators.dequantize_per_tensor(codes, *self.grid)  # type: ignore[no-any-return]


def _mobile(quantizer: FakeQuantize, tensor: str) -> nn.Module:
    if quantizer.bits > 8:
        raise CompressionError(f"{tensor} has {quantizer.bits} bits: mobile runtimes take up to 8")
    if quantizer.rule.exact:
        raise CompressionError(
            f"{tensor} has the range of the tensor at hand (abs_max): train or calibrate with one that is "
            "learned, such as moving_average_abs_max"
        )
    bounds = quantizer.rule.eval()(torch.empty(0))
    grid = grid_of(bounds.amax, bounds.amin, quantizer.bits)
    low, high = int(grid.low), int(grid.high)
    if not grid.step:
        return Requantize(1.0, 0, 0, 0, torch.int8)  # gives zeros, as such a range does
    if bounds.amin is None:
        return Requantize(grid.step.item(), 0, low, high, torch.int8)
    return Requantize(grid.step.item(), -low, 0, high - low, torch.uint8)


def _converted(model: M, decode: type[Decode], convert: Callable[[FakeQuantize, str], nn.Module]) -> M:
    if not quantized_layers(model):
        raise CompressionError("there is nothing to convert: transform the model first")
    model = copy.deepcopy(model).eval()
    for name, module, end, role in quantized_values(model):
        setattr(module, role, convert(getattr(module, role), f"the {end} of {name}"))
    for name, layer in quantized_layers(model).items():
        bits = weight_quantizer(layer).bits
        if bits > 8:
            raise CompressionError(f"the weight of {name} has {bits} bits: int8 holds up to 8")
        _store_codes(layer, decode)
    return model


def _store_codes(layer: Any, decode: type[Decode]) -> None:
    codes, dtype = weight_codes(layer), layer._parameters["weight"].dtype
    mixins = [CodedWeight if mixin is QuantizedWeight else mixin for mixin in mixins_of(layer)]
    swap(layer)
    for name in ("weight", WEIGHT):
        delattr(layer, name)
    layer.register_buffer("weight", codes.values)
    setattr(layer, DECODER, decode(codes, dtype))
    swap(layer, *mixins)
