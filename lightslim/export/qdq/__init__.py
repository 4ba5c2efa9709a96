"""From a module with fake quantization to an ONNX graph with integers in it; needs the extra ``onnx``."""
