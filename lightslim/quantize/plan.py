"""Which layers of a model are quantized, and how: settings, patterns, and what cannot be."""

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from lightslim.errors import CompressionError, did_you_mean
from lightslim.patterns import select
from lightslim.quantize.layers import Mixin, Unfused, mixins_of
from lightslim.quantize.ranges import Range
from lightslim.quantize.wiring import Between
from lightslim.registry import registry

Outputs = Literal["auto"] | Sequence[str]


@dataclass(frozen=True)
class Settings:
    """How one layer is quantized; ranges by their registered names, with arguments of theirs.

    Raises:
        CompressionError: bits out of bounds, an unknown range or argument, or a range where it does not belong.
    """

    weight_bits: int = 8
    activation_bits: int | None = 8
    weight_quantize_type: str = "channel_wise_abs_max"
    activation_quantize_type: str = "moving_average_abs_max"
    weight_range: Mapping[str, Any] = field(default_factory=dict)
    activation_range: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits") if self.rounds_inputs else ("weight_bits",):
            bits = getattr(self, name)
            if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 16:
                raise CompressionError(f"{name} is {bits!r}; a quantized number has 2 to 16 bits")
        self.weight_rule(0)
        if self.rounds_inputs and self.activation_rule().per_channel:
            raise CompressionError(
                f"activation_quantize_type is {self.activation_quantize_type!r}, which is for weights: the channels "
                "of an input share one range"
            )

    @property
    def rounds_inputs(self) -> bool:
        """Whether an input is quantized at all."""
        return self.activation_bits is not None

    @property
    def of_inputs(self) -> tuple[Any, ...]:
        """What is said of inputs."""
        return self.activation_bits, self.activation_quantize_type, self.activation_range

    def weight_rule(self, channels: int) -> Range:
        """A new range for a weight whose dimension ``channels`` holds the output channels."""
        kind = registry().get("range", self.weight_quantize_type)
        axis = channels if kind.per_channel else None
        return _built("weight_range", kind, self.weight_range, axis=axis, bits=self.weight_bits)

    def activation_rule(self) -> Range:
        """A new range for an input or output."""
        kind = registry().get("range", self.activation_quantize_type)
        return _built("activation_range", kind, self.activation_range, axis=None, bits=self.activation_bits)


def _built(argument: str, kind: type[Range], options: Mapping[str, Any], **common: Any) -> Range:
    known = [name for name in inspect.signature(kind).parameters if name not in common]
    for name in options:
        if name not in known:
            raise CompressionError(f"{argument}: {kind.__name__} has no {name!r}; {did_you_mean(name, known)}")
    return kind(**common, **options)


def quantizable(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that can be quantized, convolutions and linear ones, by name."""
    return {name: child for name, child in model.named_modules() if isinstance(child, (_ConvNd, nn.Linear))}


def plan_layers(
    model: nn.Module, common: Settings, skip: Sequence[str], overrides: Mapping[str, Mapping[str, Any]]
) -> dict[str, Settings]:
    """Which layers are to be quantized, and how; see ``transform`` for the arguments and errors."""
    layers = quantizable(model)
    skipped = {name for pattern in skip for name in select(pattern, layers, "skip")}
    left = [name for name in layers if name not in skipped]
    if not left:
        raise CompressionError("there is nothing to quantize: no convolution or linear layer is left")
    for name in left:
        _check_layer(name, layers[name])
    plan = dict.fromkeys(left, common)
    for pattern, changes in overrides.items():
        for name in select(pattern, left, "overrides"):
            plan[name] = _changed(plan[name], changes)
    for name in (name for name, settings in plan.items() if settings.rounds_inputs):
        _check_own(name, layers[name], "skip it")
    return plan


def _check_layer(name: str, layer: Any) -> None:
    """Raise unless the weight of ``layer`` can be seen through a quantizer."""
    if isinstance(layer, Mixin):
        raise CompressionError(f"{name} is quantized already")
    if parametrize.is_parametrized(layer) or layer._parameters.get("weight") is None:
        raise CompressionError(f"the weight of {name} is computed (weight norm? a mask?): remove that or skip it")
    if isinstance(layer.weight, nn.UninitializedParameter):
        raise CompressionError(f"{name} has no shape yet: run the model on a batch first")
    if not layer.weight.dtype.is_floating_point:
        raise CompressionError(f"the weight of {name} is {layer.weight.dtype}, and only floats are rounded: skip it")


def plan_outputs(model: nn.Module, common: Settings, outputs: Sequence[str]) -> dict[str, Settings]:
    """Which modules have their outputs quantized, and how; see ``transform`` for the arguments and errors."""
    modules = {name: child for name, child in model.named_modules() if name}
    names = [_last(name, modules) for pattern in outputs for name in select(pattern, modules, "outputs")]
    for name in names:
        if set(mixins_of(modules[name])) - {Unfused}:
            raise CompressionError(f"{name} is quantized already")
        _check_own(name, modules[name], "name what is within, or what comes before")
    return dict.fromkeys(names, common)


def _check_own(name: str, module: nn.Module, instead: str) -> None:
    """Raise if the class of ``module`` does not say what its call does: extending it would do nothing."""
    if "forward" in vars(module):
        raise CompressionError(f"the forward of {name} is one of the object, not of its class (compiled?): {instead}")


def _last(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The module that gives the output of the one called ``name``: of a Sequential, its last.

    A quantizer must not become a child of what runs its children one by one.
    """
    module = modules[name]
    if type(module).forward is nn.Sequential.forward and len(module._modules):
        return _last(f"{name}.{next(reversed(module._modules))}", modules)
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        raise CompressionError(f"outputs: {name} is a {type(module).__name__}: name the module in it that comes last")
    return name


def plan_model(
    model: nn.Module,
    common: Settings,
    skip: Sequence[str],
    overrides: Mapping[str, Mapping[str, Any]],
    outputs: Outputs,
    look: Callable[[Collection[str]], Between],
) -> tuple[dict[str, Settings], dict[str, Settings]]:
    """How the layers of a model are quantized, and how the outputs of modules; see ``transform`` and ``quantize``.

    Args:
        model: not quantized yet.
        common: what holds where nothing else is said.
        skip: patterns of layers.
        overrides: layers that round their inputs in their own way do so even where these come rounded.
        outputs: patterns of modules; or "auto", to have them found.
        look: finds them, given the names of the layers.

    Raises:
        CompressionError: see ``transform``.
    """
    layers = plan_layers(model, common, skip, overrides)
    if outputs and not common.rounds_inputs:
        raise CompressionError("outputs have the bits of inputs, and activation_bits is None")
    if isinstance(outputs, str) and outputs != "auto":
        raise CompressionError(f"outputs is {outputs!r}; it takes a list of patterns, or 'auto'")
    if outputs != "auto":
        return layers, plan_outputs(model, common, outputs)
    found = look(layers)
    # What a checkpoint knows may be of other settings, or of another model
    for name in layers.keys() & set(found.fed):
        if layers[name].of_inputs == common.of_inputs:
            layers[name] = replace(layers[name], activation_bits=None)
    modules = dict(model.named_modules())
    return layers, dict.fromkeys((name for name in found.outputs if name in modules), common)


def _changed(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    unknown = next((key for key in changes if key not in vars(settings)), None)
    if unknown is not None:
        raise CompressionError(f"overrides: {unknown!r} is no setting; {did_you_mean(unknown, vars(settings))}")
    return replace(settings, **changes)


def check_weights(model: nn.Module, plan: Collection[str], zeros_allowed: bool = False) -> None:
    """Raise if a weight of the layers in ``plan`` has no range: it is not finite, or all of it is zero."""
    for name in plan:
        weight = model.get_parameter(f"{name}.weight")
        if weight.is_meta or not weight.numel():
            continue
        peak = weight.detach().abs().amax().item()
        if not math.isfinite(peak):
            raise CompressionError(f"the weight of {name} holds {peak}: it cannot be quantized")
        if peak == 0 and not zeros_allowed:
            raise CompressionError(
                f"the weight of {name} is all zeros, it has no range yet: skip it, or quantize once it has learned"
            )


def check_nodes(module: nn.Module, names: Sequence[str] | None, argument: str) -> None:
    """Raise unless each of ``names`` is an input of ``forward`` or a submodule.

    Example:
        >>> check_nodes(nn.Sequential(nn.Linear(2, 2)), ["input", "0"], "save_in_nodes")
    """
    known = [*inspect.signature(module.forward).parameters, *(name for name, _ in module.named_modules() if name)]
    for name in names or ():
        if name not in known:
            raise CompressionError(f"{argument}: there is no {name!r}; {did_you_mean(name, known)}")
