"""The steps from a module to a file."""

from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightslim.export.program import program_of
from lightslim.export.qdq.fold import fold_batch_norms
from lightslim.export.qdq.marks import DOMAIN, mark
from lightslim.export.qdq.presets import encoding_for
from lightslim.export.qdq.trace import trace
from lightslim.export.qdq.values import encode_values, plan_values, repeat_behind_splits
from lightslim.export.qdq.weights import add_biases_in_float, encode_weights, turn_matrices
from lightslim.export.qdq.whole import in_float, overflowing, whole_layers


def write_integers(
    model: nn.Module, inputs: tuple[Tensor, ...], path: Path, opset: int, dynamic_batch: bool, deploy: str
) -> None:
    """Write ``model`` with its weights as integers."""
    encoding = encoding_for(deploy)
    program = program_of(model, inputs)
    marked = mark(model)
    traced = trace(model, inputs, program.input_names, program.output_names, opset, dynamic_batch)
    graph = traced.graph
    fold_batch_norms(graph, marked.weights)
    turn_matrices(graph, marked.weights)
    wanted = plan_values(graph, marked.values, encoding)
    if not encoding.rounds_bias:
        add_biases_in_float(graph, marked.weights)
    whole = whole_layers(graph, wanted, marked.weights, encoding)
    if encoding.vnni:
        _tell_of_overflows(overflowing(graph, wanted, marked.weights, whole), deploy)
    if encoding.rounds_bias:
        _tell_of_floats(in_float(graph, wanted, whole), len(marked.weights), deploy)
    encode_weights(graph, marked.weights, wanted, whole, encoding)
    encode_values(graph, wanted, whole, encoding)
    if encoding.rounds_bias:
        repeat_behind_splits(graph)
    save(traced, path)


def _tell_of_overflows(layers: list[str], deploy: str) -> None:
    if layers:
        rank_zero_warn(
            f"deploy {deploy!r} is right only on CPUs with VNNI: others add two products in 16 bits, too few for "
            f"{len(layers)} layers ({_first(layers)}); with weight_bits 7 it is right on every CPU"
        )


def _tell_of_floats(layers: list[str], count: int, deploy: str) -> None:
    if layers:
        rank_zero_info(
            f"deploy {deploy!r}: {len(layers)} of {count} layers run in float ({_first(layers)}), since nothing rounds "
            "what they give; quantization with outputs='auto' rounds it where it can"
        )


def _first(layers: list[str]) -> str:
    return ", ".join(layers[:3]) + (", ..." if len(layers) > 3 else "")


def write_floats(model: nn.Module, inputs: tuple[Tensor, ...], path: Path, opset: int, dynamic_batch: bool) -> None:
    """Write ``model`` as it is."""
    program = program_of(model, inputs)
    save(trace(model, inputs, program.input_names, program.output_names, opset, dynamic_batch), path)


def save(model: ir.Model, path: Path) -> None:
    """Write a graph without what nothing reads."""
    RemoveUnusedNodesPass()(model)
    NameFixPass()(model)
    model.opset_imports.pop(DOMAIN, None)
    model.producer_name, model.producer_version = "lightslim", version("lightslim")
    path.write_bytes(ir.to_proto(model).SerializeToString())
