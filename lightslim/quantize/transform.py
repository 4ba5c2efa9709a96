"""Put fake quantization into a model, and take it out again: the seed's passes as functions on a module."""

import contextlib
import copy
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from lightslim.errors import CompressionError
from lightslim.kernels import fake_quant_and_peak
from lightslim.quantize.layers import (
    INPUT,
    OUTPUT,
    WEIGHT,
    QuantizedInput,
    QuantizedOutput,
    QuantizedWeight,
    Unfused,
    fusing,
    mixins_of,
    swap,
)
from lightslim.quantize.plan import Settings, check_weights, plan_model, quantizable
from lightslim.quantize.ranges import Range
from lightslim.quantize.together import Together

M = TypeVar("M", bound=nn.Module)


class FakeQuantize(nn.Module):
    """Rounds a tensor to the grid that an integer of ``bits`` bits spans over its range; gradients pass inside it.

    ``y = round(clamp(x, -s, s) * R / s) * s / R`` with ``R = 2 ** (bits - 1) - 1`` and the range ``s``.

    Args:
        rule: says how far the tensor reaches, and how many bits there are.
        together: shared by the weights of a model, which it quantizes in one go.

    Attributes:
        rounds: False while the range only watches and the tensor goes through as it is.
    """

    def __init__(self, rule: Range, together: Together | None = None) -> None:
        super().__init__()
        self.rule = rule
        self.together = together if rule.exact else None
        self.rounds = True

    @property
    def bits(self) -> int:
        """Width of the integers, 2 to 16."""
        return self.rule.bits

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the grid, same shape and dtype."""
        rule = self.rule
        if not self.rounds:
            rule.watch(x)
            return x
        if self.together is not None and not torch.compiler.is_compiling():
            return self.together.take(rule, x)
        known = rule.before(x)
        if known is not None:
            y, peak = fake_quant_and_peak(x, known, rule.bits)
            rule.learn(peak)
            return y
        return rule.rounded(x)

    def extra_repr(self) -> str:
        """Shown in the module's text."""
        return f"bits={self.bits}"


def transform(
    model: M,
    weight_bits: int = 8,
    activation_bits: int | None = 8,
    weight_quantize_type: str = "channel_wise_abs_max",
    activation_quantize_type: str = "moving_average_abs_max",
    skip: Sequence[str] = (),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    weight_range: Mapping[str, Any] | None = None,
    activation_range: Mapping[str, Any] | None = None,
    outputs: Sequence[str] = (),
) -> M:
    """Quantize, in training and evaluation alike, the weight and the input of every convolution and linear layer.

    Works in place: parameters stay the same objects, in full precision and under their names; ``layer.weight`` gives
    the rounded one. The ranges are further entries in ``state_dict``.

    Args:
        model: any module.
        weight_bits: bits of a weight, 2 to 16.
        activation_bits: bits of an input, 2 to 16; None leaves inputs as they come, in float or rounded already.
        weight_quantize_type: name of the weights' range: ``abs_max`` or ``channel_wise_abs_max``.
        activation_quantize_type: name of the inputs' range: ``moving_average_abs_max``, ``moving_average_min_max``,
            ``abs_max``, ``range_abs_max`` or one of those for calibration, see :func:`quantize`.
        skip: patterns of layer names that stay in float.
        overrides: pattern of layer names to the settings that differ there, as ``{"head": {"weight_bits": 16}}``.
        weight_range: arguments of the weights' range.
        activation_range: arguments of the inputs' range, as ``{"rate": 0.99}``.
        outputs: patterns of the names of modules, of any kind, whose outputs are quantized too, with the inputs' range:
            those that an addition reads. ONNX Runtime's integer layers give integers, so that a layer whose output
            nothing rounds runs in float there.

    Returns:
        ``model`` itself.

    Raises:
        CompressionError: nothing to quantize, a pattern that fits nothing, an unknown range, bits out of bounds, a
            weight that holds only zeros or something that is no number; the model is untouched then.

    Example:
        >>> import torch
        >>> net = transform(nn.Sequential(nn.Linear(4, 3)), weight_bits=2)
        >>> len(net[0].weight[0].detach().abs().unique()) <= 2
        True
        >>> "0.weight" in net.state_dict()
        True
    """
    common = Settings(
        weight_bits,
        activation_bits,
        weight_quantize_type,
        activation_quantize_type,
        weight_range or {},
        activation_range or {},
    )
    plan, ends = plan_model(model, common, skip, overrides or {}, outputs, _unseen)
    check_weights(model, plan)
    return attach(model, plan, ends)


def _unseen(layers: Collection[str]) -> NoReturn:
    raise CompressionError("outputs: 'auto' has to see the model run, as quantize and QuantizationStrategy do")


def attach(model: M, plan: Mapping[str, Settings], outputs: Mapping[str, Settings]) -> M:
    """Put fake quantization into the layers that ``plan`` names and behind the modules of ``outputs``, in place."""
    layers = quantizable(model)
    together = Together()
    pairs = {name: _quantizers(layers[name], settings, together) for name, settings in plan.items()}
    ends = {name: FakeQuantize(settings.activation_rule()) for name, settings in outputs.items()}
    for name, (weight, inputs) in pairs.items():
        _attach(layers[name], weight, inputs)
    for name, end in ends.items():
        _attach_output(model, name, end)
    for fused in fusing(model):
        if quantized_modules(fused) and Unfused not in mixins_of(fused):
            swap(fused, *mixins_of(fused), Unfused)
    return model


def _quantizers(layer: nn.Module, settings: Settings, together: Together) -> tuple[FakeQuantize, FakeQuantize | None]:
    weight = settings.weight_rule(_channels(layer))
    inputs = FakeQuantize(settings.activation_rule()) if settings.rounds_inputs else None
    return FakeQuantize(weight, together), inputs


def _channels(layer: Any) -> int:
    """The dimension of a weight that holds the output channels, or their places in each group."""
    transposed = getattr(layer, "transposed", False)
    depthwise = transposed and layer.groups == layer.in_channels == layer.out_channels
    return 1 if transposed and not depthwise else 0


def _attach(layer: nn.Module, weight: FakeQuantize, inputs: FakeQuantize | None) -> None:
    device = next(layer.parameters()).device
    for name, quantizer in ((WEIGHT, weight), (INPUT, inputs)):
        if quantizer is not None:
            setattr(layer, name, quantizer.to(device).train(layer.training))
    swap(layer, *(() if inputs is None else (QuantizedInput,)), QuantizedWeight)


def _attach_output(model: nn.Module, name: str, quantizer: FakeQuantize) -> None:
    module = model.get_submodule(name)
    # Without parameters, as a ReLU, it works where the model does
    parameters = itertools.chain(module.parameters(), model.parameters())
    device = next((parameter.device for parameter in parameters), torch.device("cpu"))
    setattr(module, OUTPUT, quantizer.to(device).train(module.training))
    swap(module, QuantizedOutput, *mixins_of(module))


def quantizers(model: nn.Module) -> Iterator[tuple[str, FakeQuantize]]:
    """Every fake quantizer in ``model``, with its name."""
    for name, child in model.named_modules():
        if isinstance(child, FakeQuantize):
            yield name, child


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that :func:`transform` has quantized, by name."""
    return {name: child for name, child in model.named_modules() if isinstance(child, QuantizedWeight)}


def quantized_outputs(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose outputs :func:`transform` has quantized, by name."""
    return {name: child for name, child in model.named_modules() if isinstance(child, QuantizedOutput)}


def quantized_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All of both, by name."""
    return {**quantized_layers(model), **quantized_outputs(model)}


def quantized_values(model: nn.Module) -> list[tuple[str, nn.Module, str, str]]:
    """What is rounded but weights: the name of a module, itself, which end of it, and its quantizer's attribute."""
    inputs = ((name, layer, "input", INPUT) for name, layer in quantized_layers(model).items())
    outputs = ((name, module, "output", OUTPUT) for name, module in quantized_outputs(model).items())
    return [value for value in (*inputs, *outputs) if value[-1] in value[1]._modules]


@contextlib.contextmanager
def watching(model: nn.Module) -> Iterator[None]:
    """Meanwhile ``model`` computes in float: its ranges see what goes by, nothing is rounded."""
    with contextlib.ExitStack() as stack:
        for _, quantizer in quantizers(model):
            stack.callback(setattr, quantizer, "rounds", quantizer.rounds)
            quantizer.rounds = False
        yield


def untransform(model: M, rounded: bool = False) -> M:
    """Take fake quantization out again, in place.

    Args:
        model: a transformed module.
        rounded: whether weights keep the values on the grid; else they are the full-precision ones.
    """
    for layer in quantized_modules(model).values():
        detach(layer, rounded)
    for fused in fusing(model):
        swap(fused)
    return model


def detach(layer: Any, rounded: bool = False) -> None:
    """Take fake quantization out of one module; see :func:`untransform`."""
    weight = layer.weight.detach() if rounded and WEIGHT in layer._modules else None
    swap(layer, *(mixin for mixin in mixins_of(layer) if mixin is Unfused))  # for what else is quantized within
    if weight is not None:
        layer.weight.data = weight
    for name in {WEIGHT, INPUT, OUTPUT} & layer._modules.keys():
        delattr(layer, name)


def freeze(model: M) -> M:
    """A copy whose weights hold only values on the integer grid and whose inputs are quantized with the learned ranges.

    The live model is not touched: training can go on (in the seed it could not).

    Example:
        >>> import torch
        >>> frozen = freeze(transform(nn.Sequential(nn.Linear(4, 3))))
        >>> step = frozen[0].weight.abs().amax(1, keepdim=True) / 127
        >>> bool(((frozen[0].weight / step).round() * step - frozen[0].weight).abs().max() < 1e-6)
        True
    """
    frozen = copy.deepcopy(model).eval()
    layers: Iterable[Any] = quantized_layers(frozen).values()
    for layer in layers:
        weight = layer.weight.detach()
        swap(layer, *(mixin for mixin in mixins_of(layer) if mixin is not QuantizedWeight))
        # One of its own: whoever shares the old one may read it as it was
        layer.weight = nn.Parameter(weight, layer._parameters["weight"].requires_grad)
        delattr(layer, WEIGHT)
    return frozen
