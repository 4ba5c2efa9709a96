"""The formats ``mobile`` and ``pte``: ExecuTorch programs for XNNPACK, in the model's own integers or in float."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from lightslim.errors import CompressionError, did_you_mean
from lightslim.export.exporter import Exporter, Run
from lightslim.export.xnnpack.layers import with_integers
from lightslim.export.xnnpack.lower import by_channel, lowered, named, traced
from lightslim.quantize.integers import for_mobile
from lightslim.quantize.transform import untransform


def mobile(
    model: nn.Module,
    example_inputs: tuple[Tensor, ...],
    path: Path,
    *,
    deploy: str = "exact",
    batch_size: int | None = 1,
) -> None:
    """Write an ExecuTorch program whose weights are the integer codes that the model was trained with.

    A batch norm behind a layer is folded into its steps; what is not quantized stays in float.

    Args:
        model: a transformed module.
        example_inputs: tensors for its ``forward``.
        path: the file.
        deploy: ``exact``: each bias in float, as in training, so that hardly a code differs; depthwise convolutions,
            for which there are no such kernels, compute in float: they have few weights. ``fast``: integers from layer
            to layer wherever the output is rounded next, after depthwise convolutions too; biases are rounded.
        batch_size: how many samples the program takes at once, where the inputs agree on dimension 0; None for as many
            as the example inputs hold.

    Raises:
        CompressionError: nothing quantized, more than 8 bits, a range of the tensor at hand, or no way to lower it.

    Example:
        >>> from lightslim.quantize import transform
        >>> mobile(transform(nn.Sequential(nn.Linear(4, 3)), activation_bits=12), (torch.zeros(1, 4),), Path("net.pte"))
        Traceback (most recent call last):
            ...
        lightslim.errors.CompressionError: the input of 0 has 12 bits: mobile runtimes take up to 8
    """
    if deploy not in ("exact", "fast"):
        raise CompressionError(f"deploy is {deploy!r}; {did_you_mean(str(deploy), ('exact', 'fast'))}")
    inputs = _first_rows(example_inputs, batch_size)
    module = traced(by_channel(for_mobile(model)), inputs)
    path.write_bytes(lowered(with_integers(module, deploy), inputs))


def pte(model: nn.Module, example_inputs: tuple[Tensor, ...], path: Path, *, batch_size: int | None = 1) -> None:
    """Write an ExecuTorch program in float, without fake quantization: what a mobile file is measured against.

    Example:
        >>> pte_file.modules
        ('executorch',)
    """
    inputs = _first_rows(example_inputs, batch_size)
    path.write_bytes(lowered(traced(untransform(model), inputs), inputs))


def open_in_executorch(path: Path, model: nn.Module | None = None, threads: int | None = None) -> Run:
    """A program on the CPU by ExecuTorch; ``threads`` is for all of a process. It takes large batches in pieces.

    Raises:
        CompressionError: the file is missing, damaged or holds something else.
    """
    if not path.is_file():
        raise CompressionError(f"{path}: there is no such file")
    with named(f"{path} cannot be opened"):
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

        # What is loaded already would be left without its threads
        if threads and threads != portable_lib._threadpool_get_thread_count():
            portable_lib._unsafe_reset_threadpool(threads)
        method = Runtime.get().load_program(path).load_method("forward")
    shapes = [tuple(method.metadata.input_tensor_meta(i).sizes()) for i in range(method.metadata.num_inputs())]

    def execute(inputs: Iterable[Tensor]) -> list[Tensor]:
        try:
            return list(method.execute([x.contiguous() for x in inputs]))
        except RuntimeError as error:
            raise CompressionError(f"{path} does not run on these inputs: {error}") from error

    def run(*inputs: Tensor) -> list[Tensor]:
        if [tuple(x.shape) for x in inputs] == shapes:
            return execute(inputs)
        size, count = shapes[0][0], len(inputs[0])
        pieces = torch.arange(math.ceil(count / size) * size).clamp(max=count - 1).split(size)
        parts = [execute(x[piece] for x in inputs) for piece in pieces]
        return [torch.cat(part)[: len(part[0]) * count // size] for part in zip(*parts, strict=True)]

    return run


mobile_file = Exporter(mobile, open_in_executorch, ("executorch",), "lightslim[mobile]")
pte_file = Exporter(pte, open_in_executorch, ("executorch",), "lightslim[mobile]", rounds=False)


def _first_rows(inputs: tuple[Tensor, ...], size: int | None) -> tuple[Tensor, ...]:
    """The first ``size`` samples, if there is a dimension 0 that all inputs share."""
    rows = {tuple(x.shape[:1]) for x in inputs}
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise CompressionError(f"batch_size is {size!r}; it must be 1 or more, or None")
    if size is None or len(rows) != 1 or () in rows:
        return inputs
    if len(inputs[0]) < size:
        raise CompressionError(f"batch_size is {size}, but the example inputs hold {len(inputs[0])}")
    return tuple(x[:size].contiguous() for x in inputs)
