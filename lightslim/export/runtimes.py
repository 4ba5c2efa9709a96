"""Files run by the runtimes that they are meant for."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightslim.errors import CompressionError
from lightslim.export.exporter import Run


def open_in_onnxruntime(path: Path, model: nn.Module | None = None, threads: int | None = None) -> Run:
    """An ONNX file on the CPU by ONNX Runtime, with all its optimisations.

    Raises:
        CompressionError: the file is missing, damaged or holds something else.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    session = _opened(path, lambda: onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]))
    names = [one.name for one in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        feeds = {name: tensor.detach().numpy() for name, tensor in zip(names, inputs, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, feeds)]

    return run


def open_in_openvino(path: Path, model: nn.Module | None = None, threads: int | None = None) -> Run:
    """An ONNX file on the CPU by OpenVINO.

    Raises:
        CompressionError: the file is missing, damaged or holds something else.
    """
    import openvino

    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    core = openvino.Core()
    compiled = _opened(path, lambda: core.compile_model(core.read_model(path), "CPU", settings))
    request = compiled.create_infer_request()

    def run(*inputs: Tensor) -> list[Tensor]:
        results = request.infer([tensor.detach().numpy() for tensor in inputs])
        return [torch.from_numpy(results[port].copy()) for port in compiled.outputs]

    return run


def _opened(path: Path, load: Any) -> Any:
    if not path.is_file():
        raise CompressionError(f"{path}: there is no such file")
    try:
        return load()
    except Exception as error:  # each runtime has kinds of its own
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CompressionError(f"{path} cannot be opened: {reason}") from error
