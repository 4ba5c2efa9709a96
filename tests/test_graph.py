"""Recording: what is coupled, what is frozen and why, and that a cut model equals the masked one."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from nets import DenseNet, SENet, masked, outputs, random_nets, randomize
from torch.utils.flop_counter import FlopCounterMode

from experiments import models
from lightslim.cost import cost
from lightslim.prune import prune
from lightslim.surgery import cuts_of

NETS = {
    "resnet20": (models.ResNet20, (2, 1, 28, 28)),
    "mobilenet_v1": (models.MobileNetV1, (2, 1, 28, 28)),
    "mobilenet_v2": (models.MobileNetV2, (2, 1, 28, 28)),
    "densenet": (DenseNet, (2, 3, 8, 8)),
    "squeeze-excite": (SENet, (2, 3, 8, 8)),
}


@pytest.fixture(params=NETS, ids=list(NETS))
def net_and_input(request):
    build, shape = NETS[request.param]
    return randomize(build()), torch.randn(shape, generator=torch.Generator().manual_seed(0))


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))


def test_a_cut_model_equals_the_masked_model(net_and_input):
    net, x = net_and_input
    original = copy.deepcopy(net)
    report = prune(net, x, target_ratio=0.5, round_to=1)
    assert report.flops_removed == pytest.approx(0.5, abs=0.01)
    assert relative_error(outputs(net, x), outputs(masked(original, cuts_of(net)[-1]), x)) < 1e-5


def test_predicted_flops_are_measured_flops(net_and_input):
    net, x = net_and_input
    before = cost(net, x).flops
    report = prune(net, x, target_ratio=0.4)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net.eval()(x)
    assert report.flops == (before, counter.get_total_flops())


@given(random_nets)
@settings(max_examples=200, deadline=None)
def test_random_nets_cut_equals_masked(net):
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    randomize(net)
    original = copy.deepcopy(net)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*nearest that can be reached")  # narrow nets move in large steps
        report = prune(net, x, target_ratio=0.4, round_to=1)
    assert not [name for name, _, reason in report.frozen if "without a rule" in reason]
    assert relative_error(outputs(net, x), outputs(masked(original, cuts_of(net)[-1]), x)) < 1e-5
    net.train()(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())
