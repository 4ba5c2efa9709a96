"""Weights quantized in one go: the same values and gradients as one by one, and never stale."""

import copy
import gc

import pytest
import torch
from nets import randomize
from tiny import TinyNet
from torch import nn

from lightslim.kernels import fake_quant_many
from lightslim.quantize import ChannelWiseAbsMax, quantizers, transform, untransform
from lightslim.quantize import together as module

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def alone(net):
    """The same net with each weight quantized by itself."""
    for _, quantizer in quantizers(net):
        quantizer.together = None
    return net


@pytest.mark.parametrize("rule", ["abs_max", "channel_wise_abs_max"])
def test_values_and_gradients_are_those_of_weights_quantized_alone(rule):
    net = transform(randomize(TinyNet()).eval(), weight_quantize_type=rule, overrides={"head*": {"weight_bits": 4}})
    nets = [net, alone(copy.deepcopy(net))]
    for _ in range(3):
        outputs = [each(X) for each in nets]
        assert torch.equal(*outputs)
        for output, each in zip(outputs, nets, strict=True):
            output.square().sum().backward()
            with torch.no_grad():
                for parameter in each.parameters():
                    parameter -= 0.01 * parameter.grad
    for one, other in zip(*(each.parameters() for each in nets), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one.grad, other.grad)


@pytest.fixture
def rounds(monkeypatch):
    """How many weights each round served."""
    sizes = []

    def counted(tensors, bits, axis):
        sizes.append(len(tensors))
        return fake_quant_many(tensors, bits, axis)

    monkeypatch.setattr(module, "fake_quant_many", counted)
    return sizes


def test_from_the_second_pass_on_there_is_one_round(rounds):
    net = transform(TinyNet())
    net(X)
    assert rounds == [1] * 5
    for _ in range(2):
        rounds.clear()
        net(X)
        assert rounds == [5]


def test_a_weight_that_is_unfrozen_in_mid_round_gets_its_gradient():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
    transform(nn.Sequential(first, second))
    _ = first.weight, second.weight
    _ = first.weight  # a new round, in which the second is made and not taken
    second.requires_grad_()
    second.weight.sum().backward()
    assert torch.equal(second._parameters["weight"].grad, torch.ones(4, 4))


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.mul_(2.0),
        lambda weight: setattr(weight, "data", weight.data * 2.0),
        lambda weight: torch.optim.SGD([weight], lr=1.0).step(),
        lambda weight: weight.copy_(2.0 * weight),
    ],
)
def test_a_weight_written_to_in_mid_round_is_not_stale(write):
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    net = transform(nn.Sequential(first, second))
    net(X[0, 0, :, :4])
    _ = first.weight, second.weight, first.weight
    second._parameters["weight"].grad = torch.ones(4, 4)
    with torch.no_grad():
        write(second._parameters["weight"])
    with torch.no_grad():
        expected = second.weight_quantizer.rule(second._parameters["weight"]).amax
        assert torch.allclose(second.weight.abs().amax(1), expected)


def test_weights_exchanged_behind_the_version_counter_are_seen_in_evaluation():
    net = transform(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    x = torch.randn(2, 4)
    net(x)
    _ = net[0].weight
    for layer in net:
        layer._parameters["weight"].data.copy_(torch.eye(4))
    with torch.no_grad():
        assert torch.equal(net[1].weight, torch.eye(4))


def test_a_layer_that_leaves_is_forgotten_and_a_copy_stands_alone(rounds):
    net = transform(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)))
    x = torch.randn(2, 4)
    net(x)
    lone = copy.deepcopy(net[1])
    del net[1]
    gc.collect()
    net(x)
    rounds.clear()
    net(x)
    assert rounds == [2]
    lone(x)
    rounds.clear()
    lone(x)
    assert rounds == [1]


def test_a_pickled_model_computes_the_same():
    net = transform(TinyNet()).eval()
    again = copy.copy(net)
    assert torch.equal(copy.deepcopy(again)(X), net(X))
    untransform(again)
    assert type(net.stem[0]) is nn.Conv2d


def test_a_layer_called_twice_gets_both_gradients():
    net = transform(nn.Sequential(nn.Linear(4, 4)), activation_quantize_type="abs_max")
    x = torch.randn(2, 4)
    net(net(x)).sum().backward()
    grad = net[0]._parameters["weight"].grad.clone()
    net.zero_grad()
    y = net(x)
    net(y.detach().requires_grad_()).sum().backward()
    assert not torch.equal(grad, net[0]._parameters["weight"].grad)


def test_rules_are_told_apart():
    bank = module.Together()
    rules = [ChannelWiseAbsMax(0), ChannelWiseAbsMax(0, bits=2)]
    weight = torch.randn(3, 4)
    one, other = (bank.take(rule, weight) for rule in rules)
    assert not torch.equal(one, other)


def test_the_gradient_of_a_gradient_passes_a_quantized_weight_too():
    layer, x = transform(nn.Linear(3, 2, bias=False), weight_bits=4, activation_bits=None), torch.randn(5, 3)
    weight = layer._parameters["weight"]
    (first,) = torch.autograd.grad((layer(x) ** 2).sum(), weight, create_graph=True)
    assert torch.allclose(first, 2 * layer.weight @ x.T @ x)
    (second,) = torch.autograd.grad(first.sum(), weight)
    assert torch.allclose(second, (2 * x.T @ x).sum(1).expand(2, 3))
