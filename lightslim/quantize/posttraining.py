"""Quantization without training: look at some data, choose the ranges, done."""

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

import torch
from pytorch_lightning.utilities import move_data_to_device
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightslim.errors import CompressionError
from lightslim.quantize.numbers import has_seen
from lightslim.quantize.plan import Outputs, Settings, check_weights, plan_model
from lightslim.quantize.transform import attach, detach, quantized_values, quantizers, watching
from lightslim.quantize.wiring import between

M = TypeVar("M", bound=nn.Module)


def quantize(
    model: M,
    loader: Iterable[Any],
    batches: int | None = None,
    forward: Callable[[M, Any], Any] | None = None,
    *,
    weight_bits: int = 8,
    activation_bits: int | None = 8,
    weight_quantize_type: str = "channel_wise_abs_max",
    activation_quantize_type: str = "mse",
    skip: Sequence[str] = (),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    weight_range: Mapping[str, Any] | None = None,
    activation_range: Mapping[str, Any] | None = None,
    outputs: Outputs = (),
) -> M:
    """A quantized copy of a trained model, its input ranges chosen on batches of real data; no training, no labels.

    A few hundred samples do. The copy rounds weights and inputs as :func:`transform` does, with the ranges fixed; it
    can be frozen, turned to integers, exported, or trained on.

    Args:
        model: any trained module; it is not touched.
        loader: yields batches.
        batches: how many of them to use; None for all.
        forward: runs the model on a batch; by default ``model(batch)``, ``model(batch[0])`` for a tuple or list
            (inputs before labels), ``model(**batch)`` for a dict.
        weight_bits: see :func:`transform`, as all that follow.
        activation_bits: see :func:`transform`.
        weight_quantize_type: see :func:`transform`.
        activation_quantize_type: ``mse``, ``percentile``, ``entropy`` or ``max``, or one of those for training.
        skip: see :func:`transform`.
        overrides: see :func:`transform`.
        weight_range: see :func:`transform`.
        activation_range: see :func:`transform`, as in ``{"percentile": 99.9}``.
        outputs: see :func:`transform`; or "auto" for all that lets convolutions, and additions and concatenations of
            what they give, run in integers. Layers that read such an output do not round it again.

    Returns:
        A copy of ``model`` in evaluation mode. Layers that no batch reached, or only with zeros, stay in float, which a
        warning says.

    Raises:
        CompressionError: as :func:`transform`; no batch, or a layer whose input is not finite.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> data = torch.randn(64, 4).split(16)
        >>> small = quantize(net, data, activation_quantize_type="percentile")
        >>> bool((small(data[0]) - net(data[0])).abs().max() < 0.05)
        True
    """
    quantized = copy.deepcopy(model).eval()
    common = Settings(weight_bits, activation_bits, weight_quantize_type, activation_quantize_type,
                      weight_range or {}, activation_range or {})  # fmt: skip
    drawn = itertools.islice(loader, batches)
    first = list(itertools.islice(drawn, 1))

    def run(within: AbstractContextManager[None]) -> None:
        with torch.no_grad(), within:
            _run_all(quantized, first, forward or _call)

    plan, ends = plan_model(quantized, common, skip, overrides or {}, outputs, partial(between, quantized, run))
    check_weights(quantized, plan)
    attach(quantized, plan, ends)
    calibrate(quantized, lambda: _run_all(quantized, itertools.chain(first, drawn), forward or _call))
    values = quantized_values(quantized)
    blind = list(dict.fromkeys(name for name, module, _, role in values if not has_seen(getattr(module, role))))
    for name in blind:
        detach(quantized.get_submodule(name))
    if blind:
        rank_zero_warn(f"{', '.join(blind)}: no batch gave values other than zeros; left in float")
    return quantized


def calibrate(model: nn.Module, run: Callable[[], Any]) -> None:
    """Let the ranges of a transformed model learn from what ``run`` puts through it, in float; see :func:`quantize`.

    Raises:
        CompressionError: an input that is not finite, naming its layer.
    """
    with torch.no_grad(), watching(model), _learning(model), _finite_inputs(model):
        run()


def _run_all(model: M, batches: Iterable[Any], forward: Callable[[M, Any], Any]) -> None:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    count = 0
    for count, batch in enumerate(batches, 1):  # noqa: B007
        forward(model, move_data_to_device(batch, device))
    if not count:
        raise CompressionError("the loader gave no batch to calibrate with")


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


@contextlib.contextmanager
def _learning(model: nn.Module) -> Iterator[None]:
    modes = [(quantizer.rule, quantizer.rule.training) for _, quantizer in quantizers(model)]
    for rule, _ in modes:
        rule.train()
    yield
    for rule, training in modes:
        rule.train(training)


@contextlib.contextmanager
def _finite_inputs(model: nn.Module) -> Iterator[None]:
    """Meanwhile an input that is not finite is an error that names the layer."""

    def check(name: str, inputs: Any) -> None:
        peak = float(inputs[0].abs().max()) if inputs[0].numel() else 0.0
        if not math.isfinite(peak):
            raise CompressionError(f"{name} holds {peak}: its range cannot be chosen")

    with contextlib.ExitStack() as stack:
        for name, module, end, role in quantized_values(model):
            of = f"the {end} of {name or 'the model'}"
            hook = getattr(module, role).register_forward_pre_hook(lambda _, inputs, of=of: check(of, inputs))
            stack.callback(hook.remove)
        yield
