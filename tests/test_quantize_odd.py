"""Fake quantization of modules that do something of their own with their weights, their inputs or their calls."""

import copy
import sys
import threading

import pytest
import torch
from torch import nn

from lightslim import CompressionError
from lightslim.kernels import fake_quant
from lightslim.quantize import for_mobile, freeze, quantize, to_int8, transform, untransform
from lightslim.quantize.transform import detach

X = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))


def encoder(**options):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, **options)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("build", [encoder, lambda: encoder().layers[0]])
def test_transformers_round_their_inputs_in_evaluation_too(build, padded):
    net = transform(build(), activation_bits=3)
    mask = torch.arange(3).expand(4, 3) >= torch.tensor([[3], [3], [2], [1]]) if padded else None
    net(X)
    net.eval()
    expected = net(X, src_key_padding_mask=mask)
    for each in (net, freeze(net), copy.deepcopy(net)):
        with torch.no_grad():
            torch.testing.assert_close(each(X, src_key_padding_mask=mask), expected.detach(), rtol=0, atol=1e-5)
    plain = untransform(net)
    assert not any(type(child).__name__.startswith("Quantized") for child in plain.modules())
    first = plain.layers[0] if isinstance(plain, nn.TransformerEncoder) else plain
    assert first.activation_relu_or_gelu == 1


def test_a_transformer_may_be_quantized_in_two_steps_and_in_part():
    layer = transform(encoder().layers[0], skip=["linear2"], activation_bits=3)
    transform(layer, skip=["linear1", "*out_proj"], activation_bits=3)
    layer(X)
    for _ in range(2):
        expected = layer.eval()(X)
        with torch.no_grad():
            torch.testing.assert_close(layer(X), expected.detach(), rtol=0, atol=1e-5)
        detach(layer.linear2)


def test_freezing_leaves_alone_who_shares_the_weight():
    embedding, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = embedding.weight
    net = transform(nn.Sequential(embedding, head), weight_bits=3, activation_quantize_type="abs_max").eval()
    words = torch.arange(5)
    assert torch.equal(freeze(net)(words), net(words))
    assert torch.equal(to_int8(net)(words), net(words))


def test_target_networks_that_are_written_to_by_data_are_not_stale():
    online, target = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
    both = transform(nn.ModuleList([online, target]), activation_bits=None)
    for _ in range(3):
        both[0](torch.ones(1, 4))
        target._parameters["weight"].data.mul_(0.5).add_(online._parameters["weight"].data, alpha=0.5)
        weight = target._parameters["weight"]
        assert torch.equal(both[1].weight, fake_quant(weight, weight.abs().amax(1), axis=0, clips=False))


def test_several_threads_may_use_a_model_at_once():
    nets = [transform(nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)])).eval() for _ in range(20)]
    x, wrong, together = torch.ones(1, 4), [], threading.Barrier(4)
    expected = [copy.deepcopy(net)(x) for net in nets]

    def work():
        for net, output in zip(nets, expected, strict=True):
            together.wait()
            for _ in range(20):
                try:
                    if not torch.equal(net(x), output):
                        wrong.append("another result")
                except Exception as error:
                    wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rule", ["range_abs_max", "moving_average_abs_max", "max", "moving_average_min_max"])
def test_models_of_other_types_train_freeze_and_become_integers(dtype, rule):
    net, x = transform(nn.Sequential(nn.Linear(8, 3)).to(dtype), activation_quantize_type=rule), X.to(dtype)
    net(x).sum().backward()
    assert net[0]._parameters["weight"].grad.dtype == dtype
    net.eval()
    assert torch.equal(freeze(net)(x), net(x))
    assert torch.equal(to_int8(net)(x), net(x))
    with pytest.raises(CompressionError, match="mobile runtimes take float32"):
        for_mobile(net)
    cast = transform(nn.Sequential(nn.Linear(8, 3)), activation_quantize_type=rule).to(dtype)
    assert cast(x).dtype == dtype


def test_what_mobile_runtimes_do_not_know_is_refused_and_zeros_give_zeros():
    with pytest.raises(CompressionError, match="affine range"):
        for_mobile(transform(nn.Sequential(nn.Linear(8, 3)), weight_quantize_type="moving_average_min_max"))
    untaught = transform(nn.Sequential(nn.Linear(8, 3))).eval()
    assert torch.equal(for_mobile(untaught)(X), untaught(X))


def test_inference_mode_is_no_obstacle():
    with torch.inference_mode():
        net = transform(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)))
        first = net(X)
        assert torch.equal(first, net.eval()(X))
        assert quantize(nn.Sequential(nn.Linear(8, 4)), [X])(X).shape == (4, 3, 4)


def test_layers_may_call_their_input_otherwise():
    class Own(nn.Linear):
        def forward(self, x, scale=1.0):
            return super().forward(x) * scale

    net = transform(nn.Sequential(Own(8, 3)))
    torch.testing.assert_close(net.eval()[0](x=X, scale=2.0), 2 * net[0](X), rtol=0, atol=0)


@pytest.mark.parametrize("channels", [4, 6])
def test_depthwise_transposed_convolutions_have_a_range_for_each_channel(channels):
    layer = nn.ConvTranspose2d(channels, channels, 2, groups=channels, bias=False)
    factors = 10.0 ** -torch.arange(channels)
    layer.weight.data.copy_(layer.weight.detach() * factors.reshape(-1, 1, 1, 1))
    exact = layer.weight.detach().clone()
    net = transform(nn.Sequential(layer), activation_bits=None).eval()
    errors = (net[0].weight - exact).detach().abs().amax((1, 2, 3)) / exact.abs().amax((1, 2, 3))
    assert errors.max() < 0.5 / 127 + 1e-6
    x = torch.randn(2, channels, 3, 3)
    assert torch.equal(to_int8(net)(x), net(x))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), "is computed"),
        (lambda: masked(nn.Linear(3, 3)), "is computed"),
        (lambda: nn.Linear(3, 3, dtype=torch.complex64), "complex64, and only floats"),
        (lambda: patched(nn.Linear(3, 3)), "one of the object"),
    ],
)
def test_layers_that_cannot_be_extended_are_named(build, message):
    with pytest.raises(CompressionError, match=message):
        transform(nn.Sequential(build()))
    transform(nn.Sequential(build(), nn.Linear(3, 3)), skip=["0"])


def test_a_forward_of_the_object_is_no_obstacle_to_rounding_weights():
    layer = nn.Linear(3, 3)
    own = type(layer).forward
    layer.forward = lambda x: own(layer, x)
    net = transform(nn.Sequential(layer), weight_bits=2, activation_bits=None)
    assert torch.equal(net(torch.eye(3)), nn.functional.linear(torch.eye(3), net[0].weight, layer.bias))
    assert net[0].weight.unique().numel() < 9


def masked(layer):
    nn.utils.prune.l1_unstructured(layer, "weight", 0.5)
    return layer


def patched(layer):
    layer.forward = lambda x: x
    return layer


def test_outputs_of_a_compiled_module_are_refused_by_name():
    net = nn.Sequential(torch.compile(nn.Sequential(nn.Linear(3, 3)), backend="eager"), nn.Linear(3, 3))
    with pytest.raises(CompressionError, match="compiled"):
        transform(net, outputs=["0"])


RANGES = {
    "one range": {"amax": torch.tensor(0.8)},
    "channels": {"amax": torch.tensor([0.5, 1.0, 0.7, 0.2]), "axis": 0},
    "affine": {"amax": torch.tensor(0.8), "amin": torch.tensor(-0.3)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("of", RANGES)
def test_gradients_have_gradients(of, dtype):
    options = RANGES[of]
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    y = fake_quant(x, bits=4, **options)
    (grad,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    grad.square().sum().backward()
    upper = options["amax"].reshape(-1, 1) if "axis" in options else options["amax"]
    inside = (x <= upper) & (x >= options.get("amin", -upper))
    assert 0 < inside.sum() < inside.numel()
    torch.testing.assert_close(x.grad, (2 * 3 * y**2 * 6 * y * inside).detach(), rtol=1e-3, atol=0)


def test_what_lies_beyond_a_bound_of_zero_gets_no_gradient():
    for options in ({"amax": torch.tensor(0.0)}, {"amax": torch.tensor(1.0), "amin": torch.tensor(0.0)}):
        x = torch.tensor([-5e-8, -1e-40, 0.0], requires_grad=True)
        fake_quant(x, **options).sum().backward()
        assert x.grad.tolist() == [0.0, 0.0, 1.0]


def test_the_largest_range_of_all():
    largest = torch.finfo(torch.float32).max
    assert fake_quant(torch.tensor([-largest / 2, 1.0]), torch.tensor(largest)).tolist() == [
        pytest.approx(-64 / 127 * largest, rel=1e-6), 0.0,
    ]  # fmt: skip


def test_a_step_of_training_leaves_what_evaluation_keeps_for_its_gradient():
    net = transform(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))).bfloat16()
    x = X.bfloat16()
    net(x)
    y = net.eval()(2 * x)
    net.train()(3 * x).sum().backward()
    y.sum().backward()
