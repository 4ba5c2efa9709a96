"""From a module to a traced graph, and from there to a program."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightslim.errors import CompressionError
from lightslim.export.xnnpack.clip import bounded, bounds
from lightslim.export.xnnpack.edit import ACTIVATIONS, MEAN, Edit, kind_of
from lightslim.quantize.layers import DECODER


def by_channel(model: nn.Module) -> nn.Module:
    """Give each channel of each weight its own step in what ``for_mobile`` made, in place."""
    for name, layer in model.named_modules():
        decoder = getattr(layer, DECODER, None)
        if decoder is not None:
            codes: Any = layer._buffers["weight"]
            if codes.dtype != torch.int8:
                raise CompressionError(f"the weight of {name} has an affine range: a mobile file holds symmetric ones")
            if decoder.axis is None:
                decoder.axis = int(getattr(layer, "transposed", False))
            decoder.step = decoder.step.expand(codes.shape[decoder.axis]).clone()
            decoder.zero = torch.zeros_like(decoder.step, dtype=torch.int64)
    return model


def traced(model: nn.Module, inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    """The module as one graph of ATen operators.

    Raises:
        CompressionError: torch cannot export it.
    """
    with named("torch cannot export this model"):
        module: Any = torch.export.export(model, inputs).run_decompositions({}).module()
    edit = Edit(module)
    for node in list(module.graph.nodes):
        if node.op == "call_module" or kind_of(node) == "aten._assert_tensor_metadata.default":
            module.graph.erase_node(node)
        elif kind_of(node) in ACTIVATIONS and kind_of(node.args[0]) in ACTIVATIONS:
            node.replace_all_uses_with(bounded(edit, node, node.args[0], *bounds(node)))
        elif kind_of(node) == MEAN and not node.kwargs and sorted(node.args[1] or ()) in ([2, 3], [-2, -1]):
            # XNNPACK averages whole images, but drops no dimension while doing so
            mean = edit.call(node, MEAN, *node.args[:2], True)
            node.replace_all_uses_with(edit.call(node, "aten.view.default", mean, list(node.meta["val"].shape)))
    return edit.done()


def lowered(module: fx.GraphModule, inputs: tuple[Tensor, ...]) -> bytes:
    """The program, in XNNPACK where it can be, in ExecuTorch's own kernels elsewhere.

    Raises:
        CompressionError: it cannot be lowered, or an operator has no kernel.
    """
    with named("ExecuTorch cannot lower this model"):
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
        from executorch.runtime import Runtime

        program = torch.export.export(module, inputs)
        lower = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
        kinds = [node.target for node in lower.exported_program().graph.nodes if hasattr(node.target, "_schema")]
        needed = {f"{kind._schema.name}.{kind._schema.overload_name}".removesuffix(".") for kind in kinds}
        missing = sorted(needed - Runtime.get().operator_registry.operator_names)
    if missing:
        raise CompressionError(f"ExecuTorch has no kernel for {', '.join(missing)}")
    return bytes(lower.buffer)


@contextlib.contextmanager
def named(what: str) -> Iterator[None]:
    """Turn whatever goes wrong in a library into an error that says what could not be done."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec|.* is deprecated|This API is experimental")
            yield
    except Exception as error:  # of many kinds
        reason = next(iter(str(error.__cause__ or error).strip().splitlines()), type(error).__name__)
        raise CompressionError(f"{what}: {reason}") from error
