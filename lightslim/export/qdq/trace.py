"""From a module to an ONNX graph, by torch's own exporter."""

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn

from lightslim.errors import CompressionError

OPSETS = range(18, 24)


def trace(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    input_names: tuple[str, ...],
    output_names: tuple[str, ...],
    opset: int,
    dynamic_batch: bool,
) -> ir.Model:
    """The graph of ``model``; dimension 0 of every input is free if ``dynamic_batch``.

    Raises:
        CompressionError: an opset out of bounds, or a model that torch cannot export.
    """
    if opset not in OPSETS:
        raise CompressionError(f"opset is {opset!r}; it must lie between {OPSETS[0]} and {OPSETS[-1]}")
    # Of a batch of 1 torch takes it that it always is 1
    wide = tuple(torch.cat([x, x]) if dynamic_batch and x.ndim and len(x) == 1 else x for x in inputs)
    shapes: Any = tuple({0: "batch"} if dynamic_batch and x.ndim else None for x in inputs)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                model,
                wide,
                verbose=False,
                opset_version=opset,
                dynamic_shapes=(shapes,) if _variadic(model) else shapes,
                input_names=input_names,
                output_names=output_names,
            )
    except Exception as error:
        hint = "; its batch size need not be free with dynamic_batch=False" if dynamic_batch else ""
        raise CompressionError(f"torch cannot export this model: {_told(error.__cause__ or error)}{hint}") from error
    assert program is not None
    # Stack traces, with the paths of this machine
    ClearMetadataAndDocStringPass()(program.model)
    return program.model


def _variadic(model: nn.Module) -> bool:
    return any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(model.forward).parameters.values())


def _told(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says about torchvision not being there, and about its own deprecations."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)
