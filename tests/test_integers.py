"""Integer codes, and the modules that compute from them."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import randomize
from tiny import TinyNet
from torch import nn

from lightslim import CompressionError
from lightslim.kernels import encode, fake_quant
from lightslim.quantize import for_mobile, freeze, to_int8, transform
from lightslim.quantize.integers import input_codes, weight_codes
from lightslim.quantize.transform import quantized_layers

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@given(
    seed=st.integers(0, 10_000),
    bits=st.integers(2, 16),
    affine=st.booleans(),
    axis=st.sampled_from([None, 0, 1, -1]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_decoded_codes_are_bit_equal_to_fake_quantization(seed, bits, affine, axis, dtype):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 7, generator=generator).to(dtype)
    shape = () if axis is None else (x.shape[axis],)
    amax, amin = torch.rand(shape, generator=generator) * 2, -torch.rand(shape, generator=generator) if affine else None
    codes = encode(x, amax, bits, axis, amin=amin)
    assert torch.equal(codes.decoded().to(dtype), fake_quant(x, amax, bits, axis, amin=amin))
    low, high = (0, 2**bits - 1) if affine else (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
    assert low <= codes.values.min()
    assert codes.values.max() <= high
    assert not codes.values.is_floating_point()


def trained(**settings):
    net = randomize(TinyNet())
    net.up = nn.ConvTranspose2d(4, 6, 2)
    transform(net, **settings)
    for _ in range(3):
        net(X)
    return net


AS_IT_COMES = {"body.0": {"activation_bits": None}}


@pytest.mark.parametrize("outputs", [(), ("stem", "body.3")])
@pytest.mark.parametrize("rule", ["abs_max", "channel_wise_abs_max"])
@pytest.mark.parametrize("inputs", ["abs_max", "moving_average_abs_max", "moving_average_min_max"])
def test_an_int8_model_computes_what_the_frozen_one_does(rule, inputs, outputs):
    net = trained(weight_quantize_type=rule, activation_quantize_type=inputs, outputs=outputs,
                  overrides=AS_IT_COMES)  # fmt: skip
    small, before = to_int8(net), copy.deepcopy(net.state_dict())
    assert torch.equal(small(X), freeze(net)(X))
    assert torch.equal(small(X), net.eval()(X))
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
    assert {small.state_dict()[f"{name}.weight"].dtype for name in quantized_layers(net)} == {torch.int8}
    assert small.state_dict().keys() >= TinyNet().state_dict().keys()


def test_an_int8_model_reads_its_own_state_dict():
    one, other = trained(), trained()
    with torch.no_grad():
        other.stem[0].weight.mul_(0.5)
    small, fresh = to_int8(one), to_int8(other)
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(fresh(X), small(X))


@pytest.mark.parametrize("outputs", [(), ("stem", "body.3")])
@pytest.mark.parametrize("inputs", ["moving_average_abs_max", "moving_average_min_max", "range_abs_max"])
def test_a_mobile_model_differs_by_rounding_edges_only(inputs, outputs):
    net = trained(activation_quantize_type=inputs, outputs=outputs, overrides=AS_IT_COMES)
    expected, actual = net.eval()(X), for_mobile(net)(X)
    assert (actual - expected).norm() < 1e-2 * expected.norm()
    exported = torch.export.export(for_mobile(net), (X,))
    names = [str(node.target) for node in exported.graph.nodes]
    assert any("quantized_decomposed.dequantize_per_channel" in name for name in names)
    assert sum("quantized_decomposed.quantize_per_tensor" in name for name in names) == 4 + len(outputs)
    torch.testing.assert_close(exported.module()(X), actual)


def test_codes_of_layers_are_those_they_compute_with():
    net = trained().eval()
    layer = net.stem[0]
    assert torch.equal(weight_codes(layer).decoded(), layer.weight)
    assert torch.equal(input_codes(layer, X).decoded(), layer.input_quantizer(X))


@pytest.mark.parametrize(
    ("convert", "settings", "message"),
    [
        (to_int8, {"overrides": {"stem*": {"weight_bits": 9}}}, r"weight of stem\.0 has 9 bits"),
        (for_mobile, {"overrides": {"stem*": {"activation_bits": 9}}}, r"input of stem\.0 has 9 bits"),
        (for_mobile, {"activation_quantize_type": "abs_max"}, "the tensor at hand"),
        (
            for_mobile,
            {"overrides": {"*": {"activation_bits": 8}}, "activation_bits": 9, "outputs": ["body"]},
            r"output of body\.3 has 9 bits",
        ),
    ],
)
def test_what_cannot_be_converted_is_named_and_untouched(convert, settings, message):
    net = transform(TinyNet(), **settings)
    said = repr(net)
    with pytest.raises(CompressionError, match=message):
        convert(net)
    assert repr(net) == said


def test_a_float_model_has_nothing_to_convert():
    with pytest.raises(CompressionError, match="transform the model first"):
        to_int8(TinyNet())
