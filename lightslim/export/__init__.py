"""Files that runtimes open: a format is a function that writes it, with another that runs it again."""

from lightslim.export.export import check_available, export
from lightslim.export.exporter import Exporter, Run
from lightslim.export.int8 import int8_file, onnx_file, openvino_file
from lightslim.export.mobile import mobile_file, pte_file
from lightslim.export.weights import float_file

__all__ = [
    "Exporter",
    "Run",
    "check_available",
    "export",
    "float_file",
    "int8_file",
    "mobile_file",
    "onnx_file",
    "openvino_file",
    "pte_file",
]
