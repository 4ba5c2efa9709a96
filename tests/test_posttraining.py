"""Quantization without training."""

import copy

import pytest
import torch
from nets import randomize
from tiny import TinyModule, TinyNet, images, loaders
from torch import nn
from torch.utils.data import DataLoader

from lightslim import CompressionError
from lightslim.quantize import quantize, quantizers, to_int8
from lightslim.registry import registry

BATCHES = [torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
RULES = ["max", "percentile", "mse", "entropy", "moving_average_abs_max", "moving_average_min_max", "abs_max"]


@pytest.mark.parametrize("rule", RULES)
def test_the_copy_is_close_and_the_original_untouched(rule):
    net = randomize(TinyNet())
    weights, mode = copy.deepcopy(net.state_dict()), net.training
    torch.manual_seed(5)
    state = torch.get_rng_state()
    small = quantize(net, BATCHES, activation_quantize_type=rule)
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training == mode
    assert not small.training
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in weights.items())
    expected, actual = net.eval()(BATCHES[0]), small(BATCHES[0])
    assert 0 < (actual - expected).norm() < 0.1 * expected.norm()
    again = small(BATCHES[1])
    assert torch.equal(small(BATCHES[1]), again), "ranges stay"
    assert all(quantizer.rounds for _, quantizer in quantizers(small))


def test_max_is_the_largest_input_in_float():
    net = randomize(TinyNet()).eval()
    seen = []
    net.body[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].abs().max().item()))
    for batch in BATCHES:
        net(batch)
    small = quantize(net, BATCHES, activation_quantize_type="max")
    assert small.body[0].input_quantizer.rule.amax.item() == max(seen[:4])


def test_it_takes_labelled_batches_dicts_and_whole_modules():
    module = TinyModule()
    loader = DataLoader(images(32), batch_size=8)
    one = quantize(module, loader, batches=2)
    two = quantize(module.net, ({"x": x} for x, _ in loader), batches=2)
    three = quantize(module.net, loader, 2, forward=lambda net, batch: net(batch[0]))
    x = next(iter(loader))[0]
    assert torch.equal(one(x), two(x))
    assert torch.equal(two(x), three(x))
    assert not torch.equal(one(x), quantize(module, loader)(x)), "more batches, other ranges"


def test_accuracy_is_kept_on_a_trained_net(tmp_path):
    from tiny import trainer

    module = TinyModule("adam")
    trainer(tmp_path, max_epochs=8).fit(module, *loaders())
    x, y = images(96, seed=3).tensors

    def accuracy(net):
        return (net.eval()(x).argmax(1) == y).float().mean().item()

    for rule in RULES:
        small = quantize(module.net, loaders()[0], activation_quantize_type=rule)
        assert accuracy(to_int8(small)) >= accuracy(module.net) - 0.02
    assert accuracy(module.net) > 0.9


class Divide(nn.Module):
    def forward(self, x):
        return x / 0


def test_layers_that_nothing_reaches_stay_in_float_and_are_named():
    class Partial(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.never, self.zeros = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.relu, self.spare = nn.ReLU(), nn.ReLU()

        def forward(self, x):
            return self.relu(self.used(x)) + self.zeros(0 * x)

    with pytest.warns(UserWarning, match="never, zeros, spare: no batch"):
        small = quantize(Partial(), torch.randn(2, 8, 4).unbind(), outputs=["relu", "spare", "zeros"])
    assert [name for name, _ in quantizers(small)] == [
        "used.weight_quantizer", "used.input_quantizer", "relu.output_quantizer"
    ]  # fmt: skip
    small(torch.randn(8, 4))


@pytest.mark.parametrize(
    ("net", "loader", "settings", "message"),
    [
        (nn.Linear(4, 4), [], {}, "gave no batch"),
        (nn.Linear(4, 4), [torch.full((2, 4), torch.nan)], {}, "the input of the model holds nan"),
        (nn.Sequential(nn.Linear(4, 4)), [torch.full((2, 4), torch.inf)], {}, "the input of 0 holds inf"),
        (nn.Sequential(nn.Linear(4, 4), Divide()), [torch.ones(2, 4)], {"outputs": ["1"]}, "the output of 1 holds inf"),
        (nn.Sequential(nn.ReLU()), [torch.ones(2, 4)], {}, "nothing to quantize"),
        (nn.Sequential(nn.Linear(4, 4)), [torch.ones(2, 4)], {"activation_quantize_type": "entropi"}, "'entropy'"),
        (nn.Sequential(nn.Linear(4, 4)), [torch.ones(2, 4)], {"activation_range": {"percentil": 9}}, "'percentil'"),
        (
            nn.Sequential(nn.Linear(4, 4)),
            [torch.ones(2, 4)],
            {"activation_quantize_type": "channel_wise_abs_max"},
            "which is for weights",
        ),
    ],
)
def test_what_cannot_be_quantized_is_named(net, loader, settings, message):
    said = repr(net)
    with pytest.raises(CompressionError, match=message):
        quantize(net, loader, **settings)
    assert repr(net) == said


@pytest.mark.parametrize(("value", "message"), [(0.0, "all zeros"), (float("nan"), "holds nan")])
def test_weights_without_a_range_are_named(value, message):
    net = nn.Sequential(nn.Linear(4, 4))
    nn.init.constant_(net[0].weight, value)
    with pytest.raises(CompressionError, match=message):
        quantize(net, [torch.ones(2, 4)])


def test_every_range_can_be_calibrated():
    for name in registry().names("range"):
        if not registry().get("range", name).per_channel:
            quantize(TinyNet(), BATCHES[:1], activation_quantize_type=name)(BATCHES[0])
