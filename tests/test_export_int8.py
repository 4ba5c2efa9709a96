"""Integer files: the codes in them, what they compute, and how a runtime fuses them."""

import collections

import onnx
import onnxruntime
import pytest
import torch
from export_nets import EXACT, NETS, trained
from onnx import numpy_helper
from torch import nn

from lightslim import CompressionError
from lightslim.export import export
from lightslim.export.runtimes import open_in_onnxruntime
from lightslim.quantize import transform
from lightslim.quantize.integers import weight_codes
from lightslim.quantize.transform import quantized_layers

RANGES = ["moving_average_abs_max", "moving_average_min_max", "abs_max"]


def constants(path):
    return {one.name: numpy_helper.to_array(one).copy() for one in onnx.load(path).graph.initializer}


def stored_codes(path, layer):
    """The codes of a layer as its file holds them and their scales."""
    found = constants(path)
    zero = found.get(f"{layer}.weight_zero_point")
    assert zero is None or not zero.any()
    return tuple(torch.tensor(found[f"{layer}.weight_{part}"]) for part in ("codes", "scale"))


def operators(path, optimized=False):
    if optimized:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(path) + ".optimized"
        options.log_severity_level = 3
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        path = str(path) + ".optimized"
    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


WAYS = {
    "exact": ({}, {"format": "int8"}),
    "x86": ({"weight_bits": 7}, {"format": "int8", "deploy": "x86"}),
    "openvino": ({"weight_bits": 7}, {"format": "openvino"}),
}


@pytest.mark.parametrize("deploy", WAYS)
@pytest.mark.parametrize("name", NETS)
def test_codes_are_the_fake_quantized_ones_and_outputs_agree(tmp_path, name, deploy):
    settings, way = WAYS[deploy]
    net, x = trained(name, activation_quantize_type=RANGES[list(NETS).index(name) % 2], **settings)
    manifest = export(net, x, tmp_path / "net.onnx", **way)
    assert manifest["rel_diff"] < (2e-2 if deploy == "x86" else EXACT)
    assert manifest["argmax_differs"] <= (deploy == "x86")
    for layer, module in quantized_layers(net).items():
        stored, _ = stored_codes(tmp_path / "net.onnx", layer)
        assert stored.dtype == torch.int8
        codes = weight_codes(module).values
        channels = 1 if getattr(module, "transposed", False) else 0
        if codes.ndim == 2 and not torch.equal(stored.abs(), codes.abs()):  # a matrix that is multiplied from the right
            codes, channels = codes.t(), 1
        others = [d for d in range(codes.ndim) if d != channels]
        signs = (stored.int() * codes).sum(others, keepdim=True).sign().char()
        assert torch.equal(stored, codes * signs), layer
        assert bool((signs == 1).all()) or name != "vit"


@pytest.mark.parametrize("way", [{"format": "int8", "deploy": "x86"}, {"format": "openvino"}])
def test_layers_that_only_vnni_computes_right_are_named(tmp_path, way):
    net, x = trained("linears", overrides={"plain": {"weight_bits": 7}})
    with pytest.warns(UserWarning, match=r"only on CPUs with VNNI.*for 2 layers \(first, wide\); with weight_bits 7"):
        export(net, x, tmp_path / "net.onnx", **way)


@pytest.mark.parametrize("weights", ["abs_max", "channel_wise_abs_max"])
def test_a_range_of_the_moment_is_computed_in_the_graph_by_the_same_arithmetic(tmp_path, weights):
    net, x = trained("tiny", activation_quantize_type="abs_max", weight_quantize_type=weights)
    export(net, x, tmp_path / "net.onnx", format="int8")
    run = open_in_onnxruntime(tmp_path / "net.onnx")
    for images in (x, 3 * x[:5]):
        off = (run(images)[0] - net(images).detach()).abs().amax(1) > 1e-4
        assert off.sum() <= 1, "one image may hold a value between two codes, which goes either way"
    assert torch.equal(run(torch.zeros_like(x))[0].isfinite(), torch.ones(len(x), 4, dtype=torch.bool))


def test_batch_norm_with_negative_gammas_folds_into_scales_and_signs(tmp_path):
    net, x = trained("tiny")
    norm, conv = net.stem[1], net.stem[0]
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    norm.weight.data[0] = factor.data[0] = 0.0
    assert bool((factor < 0).any())
    assert export(net, x, tmp_path / "net.onnx", format="int8")["rel_diff"] < 2e-2
    codes, scale = stored_codes(tmp_path / "net.onnx", "stem.0")
    expected = weight_codes(conv)
    assert torch.equal(codes, expected.values * factor.sign().char().view(-1, 1, 1, 1))
    assert torch.allclose(scale.flatten()[1:], (expected.step * factor.abs())[1:].detach(), rtol=1e-6)
    assert bool((scale > 0).all())
    assert "BatchNormalization" not in operators(tmp_path / "net.onnx")


def test_batch_norm_elsewhere_stays(tmp_path):
    net, x = trained("odd")
    assert export(net, x, tmp_path / "net.onnx", format="int8")["rel_diff"] < 2e-2
    assert operators(tmp_path / "net.onnx")["BatchNormalization"] == 3


def test_layers_left_out_stay_in_float(tmp_path):
    net, x = trained("tiny", skip=["body.*", "head*"])
    assert export(net, x, tmp_path / "net.onnx", format="int8")["rel_diff"] < 2e-2
    assert {name for name in constants(tmp_path / "net.onnx") if name.endswith("weight_codes")} == {
        "stem.0.weight_codes",
        "depthwise.weight_codes",
    }


@pytest.mark.parametrize("bits", [3, 7])
def test_fewer_bits_are_stored_as_int8_and_clip_where_they_did(tmp_path, bits):
    net, x = trained("squeeze_excite", weight_bits=bits, activation_bits=bits)
    assert export(net, 3 * x, tmp_path / "net.onnx", format="int8")["rel_diff"] < (2e-2 if bits > 4 else 0.1)
    codes, _ = stored_codes(tmp_path / "net.onnx", "head")
    assert codes.abs().max() == 2 ** (bits - 1) - 1


def test_inputs_of_more_bits_are_rounded_in_float(tmp_path):
    net, x = trained("tiny", activation_bits=12)
    assert export(net, x, tmp_path / "net.onnx", format="int8")["rel_diff"] < 2e-3


def test_weights_of_more_bits_are_refused_by_name(tmp_path):
    net, x = trained("tiny", overrides={"body.0": {"weight_bits": 12}})
    with pytest.raises(CompressionError, match=r"the weight of body\.0 has 12 bits: an int8 file holds up to 8"):
        export(net, x, tmp_path / "net.onnx", format="int8")
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_fake_quantization_is_refused(tmp_path):
    with pytest.raises(CompressionError, match="nothing quantized"):
        export(nn.Linear(4, 3), torch.zeros(2, 4), tmp_path / "net.onnx", format="int8")


def test_an_input_that_was_always_zero_gives_zeros(tmp_path):
    net = transform(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    net(torch.zeros(2, 4))
    assert export(net, torch.randn(8, 4), tmp_path / "net.onnx", format="int8")["max_abs_diff"] == 0


@pytest.mark.parametrize("deploy", ["exact", "x86", "openvino", "tensorrt", "xnnpack"])
def test_each_preset_computes_the_same(tmp_path, deploy):
    net, x = trained("squeeze_excite", weight_bits=7)  # so that no CPU saturates
    assert export(net, x, tmp_path / "net.onnx", format="int8", deploy=deploy)["rel_diff"] < 2e-2
    types = {constants(tmp_path / "net.onnx")[f"{name}.input_zero_point"].dtype.name for name in ("stem.0", "head")}
    assert types == {"int8" if deploy in ("tensorrt", "xnnpack") else "uint8"}


def test_a_target_without_zero_points_takes_no_affine_inputs(tmp_path):
    net, x = trained("tiny", activation_quantize_type="moving_average_min_max")
    with pytest.raises(CompressionError, match=r"stem\.0\.input has an affine range"):
        export(net, x, tmp_path / "net.onnx", format="int8", deploy="tensorrt")


def sequence(ranges, **settings):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU6(),
              nn.MaxPool2d(2), nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(64, 12),
              nn.ReLU(), nn.Linear(12, 4)]  # fmt: skip
    net = transform(nn.Sequential(*layers), activation_quantize_type=ranges, **settings)
    for _ in range(3):
        net(torch.randn(16, 3, 8, 8))
    return net.eval(), torch.randn(16, 3, 8, 8)


@pytest.mark.parametrize("ranges", RANGES[:2])
def test_onnx_runtime_fuses_whole_layers_into_integer_operations(tmp_path, ranges):
    net, x = sequence(ranges, weight_bits=7)
    assert export(net, x, tmp_path / "net.onnx", format="int8", deploy="x86")["rel_diff"] < 2e-2
    found = operators(tmp_path / "net.onnx", optimized=True)
    assert (found["QLinearConv"], found["QGemm"]) == (3, 2)
    assert not set(found) & {"Conv", "FusedConv", "Gemm", "MatMul", "DequantizeLinear"}, found


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)

    def forward(self, x):
        return (x + self.norm(self.conv(x))).relu()


class Residual(nn.Module):
    """A block whose branch ends in a batch norm and whose shortcut is a layer of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.shortcut, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)

    def forward(self, x):
        branch = self.norm2(self.second(self.norm1(self.first(x)).relu()))
        return self.head((branch + self.shortcut(x)).relu().mean((2, 3)))


@pytest.mark.parametrize("ranges", RANGES[:2])
@pytest.mark.parametrize("outputs", [(), ("norm2", "shortcut")])
def test_layers_before_an_addition_are_integer_operations_where_their_outputs_are_quantized(tmp_path, ranges, outputs):
    torch.manual_seed(0)
    net = transform(Residual(), weight_bits=7, activation_quantize_type=ranges, outputs=outputs)
    for _ in range(3):
        net(torch.randn(16, 3, 8, 8))
    net, x = net.eval(), torch.randn(64, 3, 8, 8)
    for deploy, tolerance in (("x86", 2e-2), ("exact", 2e-3), ("openvino", 2e-3)):
        path = tmp_path / f"{deploy}.onnx"
        assert export(net, x, path, format="int8", deploy=deploy)["rel_diff"] < tolerance
    found = operators(tmp_path / "x86.onnx", optimized=True)
    assert (found["QLinearConv"], found["Conv"]) == ((3, 0) if outputs else (1, 2))


def test_additions_of_what_is_rounded_once_are_integer_operations(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), Skip(), Skip(), nn.Conv2d(3, 4, 1))
    transform(net, 7, activation_quantize_type="moving_average_min_max", outputs=["1", "[23]", "*.norm"],
              overrides={"[23].conv": {"activation_bits": None}, "4": {"activation_bits": None}})  # fmt: skip
    for _ in range(3):
        net(torch.randn(16, 3, 8, 8))
    manifest = export(net, torch.randn(64, 3, 8, 8), tmp_path / "net.onnx", format="int8", deploy="x86")
    assert manifest["rel_diff"] < 2e-2
    found = operators(tmp_path / "net.onnx", optimized=True)
    assert (found["QLinearConv"], found["QLinearAdd"], found["Add"], found["Conv"]) == (3, 2, 0, 1), found
    assert found["QuantizeLinear"] == 1, "of the input"


@pytest.mark.parametrize(("ranges", "bits", "integer"), [(RANGES[0], 8, 2), (RANGES[1], 8, 0), (RANGES[1], 7, 2)])
def test_exact_layers_are_integer_operations_only_where_16_bits_hold_two_products(tmp_path, ranges, bits, integer):
    net, x = sequence(ranges, weight_bits=bits)
    assert export(net, x, tmp_path / "net.onnx", format="int8")["rel_diff"] < EXACT
    found = operators(tmp_path / "net.onnx", optimized=True)
    assert found["MatMulIntegerToFloat"] == integer
    assert not found["QLinearConv"]


@pytest.mark.parametrize("deploy", ["exact", "x86"])
def test_no_weight_is_decoded_at_each_run(tmp_path, deploy):
    net, x = trained("squeeze_excite", weight_bits=7)
    export(net, x, tmp_path / "net.onnx", format="int8", deploy=deploy)
    operators(tmp_path / "net.onnx", optimized=True)
    graph = onnx.load(tmp_path / "net.onnx.optimized").graph
    kept = {one.name for one in graph.initializer}
    assert not [node.name for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in kept]


def test_onnx_runtime_multiplies_the_matrices_of_a_transformer_as_integers(tmp_path):
    net, x = trained("vit", weight_bits=7)
    export(net, x, tmp_path / "net.onnx", format="int8")
    assert operators(tmp_path / "net.onnx", optimized=True)["MatMulIntegerToFloat"] == 9


@pytest.mark.parametrize("opset", [19, 21, 23])
def test_opsets(tmp_path, opset):
    net, x = trained("linears")
    assert export(net, x, tmp_path / "net.onnx", format="int8", opset=opset)["rel_diff"] < 2e-2
    assert onnx.load(tmp_path / "net.onnx").opset_import[0].version == opset


def test_the_batch_is_free_unless_told(tmp_path):
    net, x = trained("vit")
    export(net, x[:1], tmp_path / "free.onnx", format="int8")
    assert torch.allclose(open_in_onnxruntime(tmp_path / "free.onnx")(x[:7])[0], net(x[:7]).detach(), atol=2e-2)
    export(net, x[:3], tmp_path / "fixed.onnx", format="int8", dynamic_batch=False)
    with pytest.raises(Exception, match="INVALID_ARGUMENT"):
        open_in_onnxruntime(tmp_path / "fixed.onnx")(x[:7])


def test_a_batch_that_cannot_be_free_is_told_with_the_way_out(tmp_path):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            return self.linear(x.expand(len(x), 4)) if len(x) == 5 else x

    net = transform(Fixed())
    net(torch.randn(5, 4))
    with pytest.raises(CompressionError, match=r"torch cannot export this model: .*static.*dynamic_batch=False"):
        export(net, torch.randn(5, 4), tmp_path / "net.onnx", format="int8")
    assert export(net, torch.randn(5, 4), tmp_path / "net.onnx", format="int8", dynamic_batch=False)["bytes"]


def test_no_path_of_this_machine_is_in_the_file(tmp_path):
    net, x = trained("tiny")
    export(net, x, tmp_path / "net.onnx", format="int8")
    assert b".py" not in (tmp_path / "net.onnx").read_bytes()


def test_a_float_file_to_measure_against(tmp_path):
    net, x = trained("tiny")
    small = export(net, x, tmp_path / "int8.onnx", format="int8")
    large = export(net, x, tmp_path / "float.onnx", format="onnx")
    assert large["rel_diff"] < 0.1
    assert small["bytes"] < 0.55 * large["bytes"]
    assert not set(operators(tmp_path / "float.onnx")) & {"QuantizeLinear", "BatchNormalization"}
