"""Ranges, transform and freeze, and quantization-aware training in a running fit."""

import copy
import math

import pytest
import torch
from nets import randomize
from tiny import TinyNet
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightslim import CompressionError
from lightslim.quantize import (
    MovingAverageAbsMax,
    RangeAbsMax,
    freeze,
    quantizers,
    signal_to_noise,
    transform,
    untransform,
)

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def on_grid(weight: torch.Tensor, bits: int, axis: int | None) -> bool:
    """Whether every value is a whole multiple of its channel's step."""
    others = [d for d in range(weight.ndim) if d != axis]
    step = weight.abs().amax(others, keepdim=True) / (2 ** (bits - 1) - 1)
    return bool(((weight / step).round() * step - weight).abs().max() <= 1e-6 * weight.abs().max())


def test_ranges_learn_in_training_only():
    moving, window = MovingAverageAbsMax(rate=0.9), RangeAbsMax(window_size=3)
    seen = [1.0, 5.0, 2.0, 3.0]
    accum = state = 0.0
    for value in seen:
        accum, state = 0.9 * accum + value, 0.9 * state + 1
        assert moving(torch.tensor([value, -value / 2])).amax.item() == pytest.approx(accum / state)
        window(torch.tensor([value]))
    assert window.window.tolist() == [3.0, 5.0, 2.0]
    before = copy.deepcopy(moving.state_dict())
    assert moving.eval()(torch.tensor([99.0])).amax.item() == pytest.approx(accum / state)
    assert window.eval()(torch.tensor([99.0])).amax.item() == 5.0
    assert moving.state_dict() == before


@pytest.mark.parametrize("rule", ["abs_max", "channel_wise_abs_max"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_are_on_the_grid_and_parameters_stay(rule, bits):
    net = randomize(TinyNet())
    net.up = nn.ConvTranspose2d(4, 6, 2)
    parameters = {id(p) for p in net.parameters()}
    transform(net, weight_bits=bits, weight_quantize_type=rule)
    assert {id(p) for p in net.parameters()} == parameters
    for layer in (net.stem[0], net.depthwise, net.head[3], net.up):
        axis = None if rule == "abs_max" else 1 if layer is net.up else 0
        assert on_grid(layer.weight.detach(), bits, axis)
    frozen = freeze(net)
    assert on_grid(frozen.stem[0].weight.detach(), bits, None if rule == "abs_max" else 0)
    torch.testing.assert_close(frozen(X), net.eval()(X), rtol=0, atol=0)


def test_float_checkpoints_load_and_plain_names_stay():
    net = randomize(TinyNet())
    weights = copy.deepcopy(net.state_dict())
    transform(net)
    assert set(weights) <= set(net.state_dict())
    assert all(torch.equal(net.state_dict()[name], value) for name, value in weights.items())
    other = transform(TinyNet())
    other.load_state_dict(net.state_dict())
    torch.testing.assert_close(other.eval()(X), net.eval()(X), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["stem.1", "stem", "body.3", "body"])  # some end in a quantized layer
def test_outputs_are_on_the_grid_of_their_range(name):
    net = randomize(TinyNet())
    plain = copy.deepcopy(net)
    transform(net, outputs=[name], activation_bits=4)
    seen = {}
    net.get_submodule(name).register_forward_hook(lambda *call: seen.update(output=call[-1]))
    net(X)
    net.eval()(X).sum().backward()
    (quantizer,) = [quantizer for each, quantizer in quantizers(net) if each.endswith("output_quantizer")]
    step = quantizer.rule.amax / 7
    codes = seen["output"] / step
    torch.testing.assert_close(codes, codes.round().clamp(-7, 7), rtol=0, atol=1e-5)
    assert codes.unique().numel() > 4
    assert net.stem[0]._parameters["weight"].grad.abs().sum() > 0
    frozen = freeze(net)
    torch.testing.assert_close(frozen(X), net(X), rtol=0, atol=0)
    untransform(net)
    assert repr(net) == repr(plain.eval())
    assert set(net.state_dict()) == set(plain.state_dict())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("delayed", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant, delayed):
    def trained(call):
        torch.manual_seed(0)
        net = transform(nn.Sequential(TinyNet(), nn.Linear(4, 2)).train(), activation_range={"delayed": delayed})
        net[0].head[2].p = 0.0
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for scale in (1.0, 3.0, 0.5, 2.0):
            optimizer.zero_grad()
            views = [net[1](call(net[0], (each * scale * X).requires_grad_())) for each in (1.0, -0.5, 1.5)]
            sum(view.square().mean() for view in views).backward()
            optimizer.step()
        return net.state_dict()

    def checkpointed(module, inputs):
        return checkpoint(module, inputs, use_reentrant=reentrant)

    plain, again = trained(lambda module, inputs: module(inputs)), trained(checkpointed)
    of_batch_norm = "running", "tracked"  # which sees its inputs twice
    other = [name for name in plain if not torch.equal(plain[name], again[name])]
    assert other
    assert all(any(part in name for part in of_batch_norm) for name in other), other


def test_inputs_can_be_left_as_they_come():
    net = transform(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), overrides={"1": {"activation_bits": None}})
    assert [name for name, _ in quantizers(net)] == ["0.weight_quantizer", "0.input_quantizer", "1.weight_quantizer"]
    x = torch.randn(4, 8)
    torch.testing.assert_close(net[1](x), nn.functional.linear(x, net[1].weight, net[1].bias), rtol=0, atol=0)
    torch.testing.assert_close(freeze(net)[1](x), net[1](x), rtol=0, atol=0)
    assert set(signal_to_noise(net, lambda: net(x))) == {"0", "1"}
    assert type(untransform(net)[1]) is nn.Linear


def test_untransform_leaves_no_trace():
    net = randomize(TinyNet()).eval()
    before, said = net(X), repr(net)
    untransform(transform(net))
    assert repr(net) == said
    assert torch.equal(net(X), before)
    assert all(not m._forward_pre_hooks and not m._state_dict_hooks for m in net.modules())
    assert set(net.state_dict()) == set(TinyNet().state_dict())


def test_layers_can_be_skipped_and_set_apart():
    net = transform(TinyNet(), skip=["stem*"], overrides={"head*": {"weight_bits": 4}})
    bits = {name: quantizer.bits for name, quantizer in quantizers(net)}
    assert not any(name.startswith("stem") for name in bits)
    assert bits["head.3.weight_quantizer"] == 4
    assert bits["body.0.weight_quantizer"] == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_bits": 1}, "weight_bits is 1"),
        ({"activation_bits": 17}, "activation_bits is 17"),
        ({"weight_quantize_type": "absmax"}, "did you mean 'abs_max'"),
        ({"skip": ["nothing"]}, "skip: 'nothing' matches none"),
        ({"skip": ["*"]}, "nothing to quantize"),
        ({"overrides": {"head*": {"weight_bit": 4}}}, "did you mean 'weight_bits'"),
        ({"outputs": ["stem"], "activation_bits": None}, "activation_bits is None"),
        ({"outputs": ["empty"]}, "outputs: empty is a Sequential: name the module in it"),
        ({"outputs": ["stem.9"]}, "outputs: 'stem.9' matches none"),
        ({"outputs": "auto"}, "'auto' has to see the model run"),
    ],
)
def test_bad_settings_leave_the_model_alone(arguments, message):
    net = TinyNet()
    net.empty = nn.Sequential()
    said = repr(net)
    with pytest.raises(CompressionError, match=message):
        transform(net, **arguments)
    assert repr(net) == said


def test_the_noise_of_each_layer_is_that_of_its_weight_and_its_input():
    net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    exact = [layer.weight.detach().double().clone() for layer in (net[0], net[2])]
    transform(net, activation_quantize_type="abs_max", overrides={"2": {"weight_bits": 3}})
    x = torch.randn(32, 16)
    found = signal_to_noise(net, lambda: net(x))
    assert list(found) == ["2", "0"]

    def ratio(tensor, bits, axis=None):
        others = [d for d in range(tensor.ndim) if d != axis] if axis is not None else list(range(tensor.ndim))
        step = tensor.abs().amax(others, keepdim=True) / (2 ** (bits - 1) - 1)
        return (((tensor / step).round() * step - tensor).square().sum() / tensor.square().sum()).item()

    by_hand = -10 * math.log10(ratio(exact[0], 8, 0) + ratio(x.double(), 8))
    assert found["0"] == pytest.approx(by_hand, abs=0.05)
    assert found["0"] - found["2"] > 20
