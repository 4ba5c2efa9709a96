"""The format ``float``: weights on the integer grid as a plain checkpoint of torch, with the scales beside them."""

import copy
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightslim.errors import CompressionError
from lightslim.export.exporter import Exporter, Run
from lightslim.export.program import flat
from lightslim.kernels.codes import grid_of
from lightslim.loading import read_checkpoint, restore
from lightslim.quantize.integers import weight_codes, weight_quantizer
from lightslim.quantize.transform import FakeQuantize, quantized_layers, quantized_values, untransform
from lightslim.surgery import CHECKPOINT_KEY, structure


def write_weights(model: nn.Module, example_inputs: tuple[Tensor, ...], path: Path) -> None:
    """The float model: its weights rounded to the grid where it is quantized, under their plain names.

    ``load_compressed`` opens it, whatever was cut off on the way. ``quantization`` holds, layer by layer, the bits and
    the distance between two codes of the weight and of the input (and of the output, where that is quantized).

    Example:
        >>> import tempfile
        >>> from lightslim import load_compressed, quantize
        >>> path = Path(tempfile.mkdtemp()) / "rounded.pt"
        >>> net = quantize.transform(nn.Sequential(nn.Linear(4, 3)), weight_bits=2)
        >>> write_weights(net, (torch.zeros(1, 4),), path)
        >>> loaded = load_compressed(lambda: nn.Sequential(nn.Linear(4, 3)), path)
        >>> len(loaded[0].weight.detach().abs().unique()) <= 4
        True
    """
    numbers = {name: _numbers(layer) for name, layer in quantized_layers(model).items()}
    for name, module, end, role in quantized_values(model):
        numbers.setdefault(name, {}).update(_grid(end, getattr(module, role)))
    record = structure(model)
    weights = untransform(model, rounded=True).state_dict()
    content = {
        "state_dict": {name: value.detach().clone() for name, value in weights.items()},
        "hyper_parameters": {key: value for key, value in getattr(model, "hparams", {}).items() if _plain(value)},
        "quantization": numbers,
        CHECKPOINT_KEY: record,
    }
    buffer = io.BytesIO()  # so that a full disk is an OSError like any other
    torch.save(content, buffer)
    path.write_bytes(buffer.getbuffer())


def _numbers(layer: nn.Module) -> dict[str, Any]:
    codes = weight_codes(layer)
    return {
        "weight_bits": weight_quantizer(layer).bits,
        "weight_step": codes.step,
        "weight_axis": codes.axis,
    }


def _grid(end: str, quantizer: FakeQuantize) -> dict[str, Any]:
    if quantizer.rule.exact:
        return {f"{end}_bits": quantizer.bits, f"{end}_step": None, f"{end}_zero": None}
    bounds = quantizer.rule.eval()(torch.empty(0))
    grid = grid_of(bounds.amax, bounds.amin, quantizer.bits)
    zero = 0 if bounds.amin is None else -int(grid.low)
    return {f"{end}_bits": quantizer.bits, f"{end}_step": grid.step.item(), f"{end}_zero": zero}


def _plain(value: Any) -> bool:
    """Whether a file that executes nothing can hold it."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(_plain(item) for item in value)
    return value is None or type(value) in (bool, int, float, str, Tensor)


def open_weights(path: Path, model: nn.Module | None = None, threads: int | None = None) -> Run:
    """The weights, filled into a copy of ``model`` without its fake quantization, run by torch.

    Raises:
        CompressionError: no model, or the file is damaged, foreign or does not fit.
    """
    if model is None:
        raise CompressionError(f"{path} holds weights only: it runs with the model that it was written from")
    checkpoint = read_checkpoint(path)
    if "state_dict" not in checkpoint:
        raise CompressionError(f"{path} holds no state dict")
    plain = untransform(copy.deepcopy(model)).eval()
    restore(plain, checkpoint["state_dict"], checkpoint.get(CHECKPOINT_KEY), path)
    return _Torch(plain, threads)


class _Torch:
    def __init__(self, model: nn.Module, threads: int | None) -> None:
        self.model, self.threads = model, threads

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            return flat(self.model(*inputs))
        finally:
            torch.set_num_threads(before)


float_file = Exporter(write_weights, open=open_weights, name="float", cuts=False, rounds=False)
