"""The formats ``int8`` and ``onnx``: ONNX files, with integer weights or without."""

from pathlib import Path

from torch import Tensor, nn

from lightslim.errors import CompressionError
from lightslim.export.exporter import Exporter
from lightslim.export.runtimes import open_in_onnxruntime, open_in_openvino
from lightslim.quantize.transform import quantized_layers, untransform

ONNX = ("onnx", "onnxscript")


def int8(
    model: nn.Module,
    example_inputs: tuple[Tensor, ...],
    path: Path,
    *,
    opset: int = 18,
    dynamic_batch: bool = True,
    deploy: str = "exact",
) -> None:
    """Write an ONNX file whose weights are the integer codes that the model was trained with.

    Each quantized layer reads QuantizeLinear and DequantizeLinear nodes with the learned steps, which runtimes fuse
    into integer operations. A batch norm behind a layer is folded into its steps; what is not quantized stays in float.

    Args:
        model: a transformed module; it is used up.
        example_inputs: tensors for its ``forward``.
        path: the file.
        opset: of ONNX, 18 to 23.
        dynamic_batch: whether dimension 0 of the inputs may have any size.
        deploy: how the codes are spelled. ``exact``: so that they are right on every CPU in ONNX Runtime; ``x86``: int8
            weights throughout, faster; ``openvino``. Both are right on CPUs with VNNI, and on all with weights of up to
            7 bits: a warning names the layers that have more. ``tensorrt`` and ``xnnpack``: signed inputs.

    Raises:
        CompressionError: nothing is quantized, a weight has more than 8 bits, an option out of bounds, or torch cannot
            export the model.

    Example:
        >>> import tempfile, torch
        >>> from lightslim.quantize import transform
        >>> net, x = transform(nn.Sequential(nn.Linear(4, 3))), torch.randn(8, 4)
        >>> path, expected = Path(tempfile.mkdtemp()) / "net.onnx", net(x)
        >>> int8(net.eval(), (x,), path)
        >>> bool((open_in_onnxruntime(path)(x)[0] - expected).abs().max() < 0.01)
        True
    """
    from lightslim.export.qdq.write import write_integers

    if not quantized_layers(model):
        raise CompressionError("there is nothing quantized in this model: transform it first, or write 'onnx'")
    write_integers(model, example_inputs, path, opset, dynamic_batch, deploy)


def onnx(
    model: nn.Module, example_inputs: tuple[Tensor, ...], path: Path, *, opset: int = 18, dynamic_batch: bool = True
) -> None:
    """Write an ONNX file in float, without fake quantization: what an integer file is measured against.

    Example:
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "net.onnx"
        >>> onnx(nn.Linear(4, 3).eval(), (torch.randn(8, 4),), path)
        >>> open_in_onnxruntime(path)(torch.zeros(5, 4))[0].shape
        torch.Size([5, 3])
    """
    from lightslim.export.qdq.write import write_floats

    write_floats(untransform(model), example_inputs, path, opset, dynamic_batch)


def openvino(
    model: nn.Module, example_inputs: tuple[Tensor, ...], path: Path, *, opset: int = 18, dynamic_batch: bool = True
) -> None:
    """The same as ``int8``, spelled for OpenVINO and checked by running it there.

    Example:
        >>> from lightslim.export.int8 import openvino_file
        >>> openvino_file.modules
        ('openvino', 'onnx', 'onnxscript')
    """
    int8(model, example_inputs, path, opset=opset, dynamic_batch=dynamic_batch, deploy="openvino")


int8_file = Exporter(int8, open_in_onnxruntime, ("onnxruntime", *ONNX), "lightslim[onnx]")
onnx_file = Exporter(onnx, open_in_onnxruntime, ("onnxruntime", *ONNX), "lightslim[onnx]", rounds=False)
openvino_file = Exporter(openvino, open_in_openvino, ("openvino", *ONNX), "lightslim[onnx,openvino]")
