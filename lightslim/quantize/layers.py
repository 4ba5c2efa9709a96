"""Layers that compute with quantized tensors: another class, the same object with the same parameters.

The class of a layer is swapped for a subclass made on the spot, whose ``weight`` is a property and whose ``forward``
takes a quantized input. The parameter itself stays where it was, so that its name, the order of parameters and state
dicts, optimizers and averaged copies all stay as they were. (``torch.nn.utils.parametrize`` moves and renames it.)
"""

import functools
import inspect
from typing import Any, ClassVar

from torch import Tensor, nn

WEIGHT, INPUT, OUTPUT, DECODER = "weight_quantizer", "input_quantizer", "output_quantizer", "weight_decoder"


class Mixin(nn.Module):
    """The base of what a layer's class can be extended by."""

    plain: ClassVar[type[nn.Module]]
    mixins: ClassVar[tuple[type["Mixin"], ...]]

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, (self.plain, self.mixins), self.__dict__


class QuantizedInput(Mixin):
    """The first argument of ``forward`` goes through ``input_quantizer``."""

    def forward(self, input: Tensor | None = None, *rest: Any, **options: Any) -> Any:
        """As the layer's own, which may call its input otherwise."""
        if input is None:
            name = next(iter(inspect.signature(super().forward).parameters))
            if name not in options:
                return super().forward(*rest, **options)  # says what is missing
            input = options.pop(name)
        quantizer: Any = self.input_quantizer
        return super().forward(quantizer(input), *rest, **options)


class QuantizedOutput(Mixin):
    """What ``forward`` returns goes through ``output_quantizer``; of any module that returns one tensor."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """As the module's own."""
        quantizer: Any = self.output_quantizer
        return quantizer(super().forward(*inputs, **options))


class QuantizedWeight(Mixin):
    """``weight`` is the parameter of that name, seen through ``weight_quantizer``."""

    @property
    def weight(self: Any) -> Tensor:
        """The weight to compute with."""
        return self.weight_quantizer(self._parameters["weight"])  # type: ignore[no-any-return]


class Unfused(Mixin):
    """Torch's transformer layers, one by one in evaluation, too: their fused way through it rounds no input.

    Both properties stand for what the layers ask before they go that way.
    """

    @property
    def use_nested_tensor(self) -> bool:
        """Of an encoder: whether it may pack its input for fused layers."""
        return False

    @property
    def activation_relu_or_gelu(self) -> int:
        """Of a layer: which activation the fused way has to take; it knows none of this number."""
        return 0


class CodedWeight(Mixin):
    """``weight`` is what the integers in the buffer of that name stand for."""

    @property
    def weight(self: Any) -> Tensor:
        """The weight to compute with."""
        return self.weight_decoder(self._buffers["weight"])  # type: ignore[no-any-return]


def swap(layer: nn.Module, *mixins: Any) -> None:
    """Extend the class of ``layer`` by ``mixins``, instead of those it may have; by none, it is its own again.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> layer.input_quantizer = nn.ReLU()
        >>> swap(layer, QuantizedInput)
        >>> type(layer).__name__, isinstance(layer, nn.Linear)
        ('QuantizedLinear', True)
        >>> swap(layer)
        >>> type(layer).__name__
        'Linear'
    """
    kind: Any = getattr(type(layer), "plain", type(layer))
    layer.__class__ = extended(kind, mixins) if mixins else kind


def fusing(model: nn.Module) -> list[nn.Module]:
    """The modules in ``model`` that :class:`Unfused` is for."""
    return [each for each in model.modules() if isinstance(each, (nn.TransformerEncoder, nn.TransformerEncoderLayer))]


def mixins_of(layer: nn.Module) -> tuple[type[Mixin], ...]:
    """What the class of ``layer`` is extended by."""
    return getattr(type(layer), "mixins", ())


@functools.cache
def extended(kind: Any, mixins: Any) -> Any:
    """The class ``kind`` with ``mixins`` before it."""
    return type(f"Quantized{kind.__name__}", (*mixins, kind), {"plain": kind, "mixins": mixins})


def _blank(kind: Any, mixins: Any) -> nn.Module:
    layer: nn.Module = nn.Module.__new__(extended(kind, mixins))
    return layer
