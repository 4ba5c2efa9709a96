"""Uniform pruning: targets, widths, patterns, refusals, on plain modules."""

import copy
import dataclasses
import itertools
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import masked, outputs, randomize
from torch import nn

from experiments.models import MobileNetV1, ResNet20
from lightslim import CompressionError, StructurePruner
from lightslim.cost import cost
from lightslim.graph import record
from lightslim.prune import find_groups, prune
from lightslim.prune.widths import Removal, Rounding
from lightslim.steps import forward_probe
from lightslim.surgery import cuts_of

X = torch.zeros(2, 1, 28, 28)


@pytest.mark.parametrize("target", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_the_target_is_reached_within_one_percent(target):
    net = MobileNetV1()
    before = cost(net, X).flops
    prune(net, X, target)
    assert 1 - cost(net, X).flops / before == pytest.approx(target, abs=0.01)


def test_wide_layers_keep_multiples_of_eight_and_all_keep_about_the_same_share():
    report = prune(ResNet20(), X, 0.5)
    for before, after in report.units.values():
        assert after % 8 == 0 if before >= 32 else after >= 1
        assert abs(after - before * (1 - report.ratio)) <= max(8, 2)


def test_rounding_can_be_changed_and_minimum_units_hold():
    report = prune(ResNet20(), X, 0.5, round_to=4)
    assert all(after % 4 == 0 for before, after in report.units.values() if before >= 16)
    assert Rounding(round_to=1, min_units=6).nearest(64, 0.99) == 6


GRAPH = record(forward_probe(MobileNetV1(), X))


@given(st.lists(st.dictionaries(st.integers(0, len(GRAPH) - 1), st.floats(0, 1), max_size=4), min_size=1, max_size=6))
def test_what_widths_remove_does_not_depend_on_the_widths_asked_for_before(questions):
    removed, groups = Removal(GRAPH), list(GRAPH)
    for shares in questions:
        widths = {groups[i].axis: round(groups[i].size * share) for i, share in shares.items()}
        assert removed(widths) == 1 - GRAPH.flops(widths) / GRAPH.flops()
        for group in groups[:3]:
            move = {group.axis: group.size // 3}
            assert removed.moved(move) == 1 - GRAPH.flops(widths | move) / GRAPH.flops()


def test_an_unreachable_target_is_said_and_the_nearest_is_taken():
    net = nn.Sequential(nn.Conv2d(1, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 4, 3))
    with pytest.warns(UserWarning, match=r"asked to remove 99.9% .* nearest that can be reached is 9\d"):
        report = prune(net, X, 0.999)
    assert report.flops_removed < 0.999


def test_two_cuts_compound():
    net = MobileNetV1()
    whole = cost(net, X).flops
    prune(net, X, 0.1)
    prune(net, X, 0.1)
    assert cost(net, X).flops / whole == pytest.approx(0.81, abs=0.02)


def test_only_named_parameters_lose_units():
    net = MobileNetV1()
    report = prune(net, X, 0.3, pruned_params=r".*blocks\.([5-9]|1\d)\.pointwise\.weight")
    assert net.blocks[0].pointwise.out_channels == MobileNetV1().blocks[0].pointwise.out_channels
    assert all(name.startswith("blocks") for name in report.units)


def test_ignored_parameters_keep_their_units():
    net = ResNet20()
    prune(net, X, 0.3, ignore=["layer1*"])
    assert net.layer1[0].conv1.out_channels == 16
    assert net.layer3[0].conv1.out_channels < 64


def test_the_weakest_filters_go_and_ties_keep_the_lower_index():
    net = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, -3.0, 1.0, 2.0]).view(4, 1, 1, 1))
    prune(net, torch.zeros(2, 1, 4, 4), 0.5)
    assert net[0].weight.flatten().tolist() == [-3.0, 2.0]
    assert StructurePruner.keep(torch.ones(4), 2).tolist() == [True, True, False, False]


def test_residual_branches_agree_by_the_sum_of_their_norms():
    net = ResNet20()
    graph = record(forward_probe(net, X))
    group = next(g for g in graph if len(g.weights) > 4)
    tensors = dict(net.named_parameters())
    by_hand = sum(
        tensors[s.tensor].detach().double().abs().sum((1, 2, 3))
        for s in group.weights
        if s.dim == 0 and s.axis.size == group.size
    )
    torch.testing.assert_close(StructurePruner().importance(group, tensors).double(), by_hand, rtol=1e-5, atol=1e-5)


def test_global_ranking_takes_from_where_the_units_are_weak():
    net = nn.Sequential(*(nn.Conv2d(a, b, 3, bias=False) for a, b in itertools.pairwise([3, 32, 32, 4])))
    with torch.no_grad():
        net[1].weight[:24] *= 1e-3
    report = prune(net, torch.zeros(2, 3, 12, 12), 0.5, round_to=1, ranking="global")
    assert report.units["0"] == (32, 32)
    assert int((net[1].weight.abs().amax((1, 2, 3)) > 1e-2).sum()) == 8, "the strong ones all stay"
    assert report.flops_removed == pytest.approx(0.5, abs=0.05)


def test_outputs_are_never_cut():
    net = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert [group.name for group in find_groups(net, X)] == ["0"]


class Constant(nn.Module):
    """Its Python holds the width as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(12, 16), nn.Linear(16, 2)

    def forward(self, x):
        return self.c(self.b(self.a(x).reshape(-1, 12)).relu())


def test_a_group_whose_cut_does_not_run_is_frozen_with_the_reason():
    net = randomize(Constant())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*nearest that can be reached")
        report = prune(net, torch.randn(5, 8), 0.3, round_to=1)
    assert net.a.out_features == 12
    assert net.b.out_features < 16
    assert any(name == "a.weight" and "does not stand this cut" in reason for name, _, reason in report.frozen)
    net(torch.randn(3, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_ratio": 0.0}, "target_ratio is 0.0"),
        ({"target_ratio": 1.0}, "target_ratio is 1.0"),
        ({"target_ratio": float("nan")}, "target_ratio is nan"),
        ({"pruned_params": "layr1*"}, "'layr1\\*' matches none of .* names; nearest: .*layer1"),
        ({"pruned_params": "fc.*"}, "names nothing that can lose units .*an output"),
        ({"pruned_params": "re:(["}, "not a valid regular expression"),
        ({"criterion": "l1norm"}, "did you mean 'l1_norm'"),
        ({"ignore": ["nothing"]}, "ignore: 'nothing' matches none"),
        ({"ranking": "all"}, "ranking is 'all'; choose from layer, global"),
        ({"round_to": 0}, "round_to is 0"),
        ({"min_units": 0}, "min_units is 0"),
    ],
)
def test_bad_arguments_leave_the_model_alone(arguments, message):
    net = ResNet20()
    with pytest.raises(CompressionError, match=message):
        prune(net, X, **arguments)
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in ResNet20().parameters())


def test_nan_weights_are_refused_by_name():
    net = ResNet20()
    with torch.no_grad():
        net.layer2[0].conv1.weight[0, 0] = float("nan")
    with pytest.raises(CompressionError, match=r"layer2\.0\.conv1\.weight holds NaN"):
        prune(net, X, 0.5)


def _net(forward, width: int = 16) -> nn.Module:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, width, 3), nn.Conv2d(width, 24, 3), nn.Conv2d(24, 4, 3)

        def forward(self, x):
            return self.c(self.b(forward(self.a(x).relu())).relu())

    return randomize(Odd())


ODD = {
    "branch on the width": lambda h: h * 0 if h.shape[1] != 16 else h,
    "positions counted": lambda h: h * torch.arange(h.shape[1]).view(1, -1, 1, 1),
    "linspace": lambda h: h * torch.linspace(0.5, 1.5, h.shape[1]).view(1, -1, 1, 1),
    "rolled": lambda h: torch.roll(h.flatten(1), 1).view_as(h),
    "sum of gates": lambda h: h * h.sigmoid().sum(1, keepdim=True),
    "mean by hand": lambda h: h * (h.sum(1, keepdim=True) / h.shape[1]),
    "scaled by the width": lambda h: h * h.shape[1] ** -0.5,
    "global deviation": lambda h: h / h.std(),
}


@pytest.mark.filterwarnings("ignore:asked to remove")
@pytest.mark.parametrize("kind", ODD)
def test_units_that_the_code_counts_or_scales_over_stay(kind):
    net, x = _net(ODD[kind]), torch.rand(2, 3, 9, 9)
    original = copy.deepcopy(net)
    report = prune(net, x, 0.3, round_to=1)
    assert net.a.out_channels == 16
    assert net.b.out_channels < 24
    assert any(name == "a.weight" for name, _, _ in report.frozen)
    torch.testing.assert_close(outputs(net, x), outputs(masked(original, cuts_of(net)[-1]), x), rtol=1e-9, atol=1e-9)


def test_noise_of_a_fixed_width_is_tried_in_training():
    class ChannelNoise(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.channels = channels

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.empty(1, self.channels, 1, 1).bernoulli_(0.9) if self.training else x

    net = nn.Sequential(nn.Conv2d(3, 16, 3), ChannelNoise(16), nn.Conv2d(16, 4, 3))
    prune(net, torch.rand(2, 3, 9, 9), 0.5)
    assert net[1].channels == net[0].out_channels == 8
    assert net.train()(torch.rand(2, 3, 9, 9)).shape == (2, 4, 5, 5)


@pytest.mark.filterwarnings("ignore:asked to remove")
def test_a_loss_network_is_left_alone():
    class WithCritic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 3, 3))
            self.critic = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3)).requires_grad_(False)

        def forward(self, x):
            return self.critic(self.net(x)).square().mean()

    net = WithCritic()
    prune(net, torch.rand(2, 3, 12, 12), 0.2, round_to=1)
    assert net.net[0].out_channels < 16
    assert net.critic[0].out_channels == 16


@pytest.mark.filterwarnings("ignore:asked to remove")
def test_layers_that_share_a_weight_shrink_together():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 32), nn.Linear(32, 32), nn.Linear(32, 32)
            self.c.weight = self.b.weight
            self.head = nn.Linear(32, 2)

        def forward(self, x):
            return self.head(self.c(self.b(self.a(x)).relu()).relu())

    net = Tied()
    prune(net, torch.rand(4, 4), 0.5)
    assert net.c.weight is net.b.weight
    assert net.c.in_features == net.c.out_features == net.b.in_features == net.c.weight.shape[0] < 32


@dataclasses.dataclass(slots=True)
class Result:
    logits: torch.Tensor
    features: torch.Tensor


@pytest.mark.filterwarnings("ignore:asked to remove")
def test_outputs_in_slots_are_outputs():
    class Slotted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.hidden, self.head = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 2)

        def forward(self, x):
            features = self.hidden(self.a(x).relu())
            return Result(self.head(features), features)

    net = Slotted()
    prune(net, torch.rand(4, 4), 0.2, round_to=1)
    assert net(torch.rand(4, 4)).features.shape == (4, 16)
    assert net.a.out_features < 16


@pytest.mark.parametrize("target", [0.2, 0.5])
def test_a_target_that_some_widths_reach_is_reached(target):
    widths = [3, 64, 64, 64, 4]
    net = nn.Sequential(*(nn.Conv2d(a, b, 3) for a, b in itertools.pairwise(widths)))
    assert prune(net, torch.zeros(2, 3, 12, 12), target).flops_removed == pytest.approx(target, abs=0.01)


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.b = nn.Conv2d(3, 16, 3), nn.Dropout2d(0.5), nn.Conv2d(16, 4, 3)
        self.up = nn.ConvTranspose2d(16, 32, 2, groups=16)
        self.c = nn.Conv2d(32, 4, 1)

    def forward(self, x):
        h = self.drop(torch.add(self.a(x), 0.0, out=None))
        mask = torch.tril(torch.ones(h.shape[-1], h.shape[-1]))
        return self.b(h @ mask), self.c(self.up(h))


def test_dropout_masks_and_depthwise_transposed_layers_are_no_obstacle():
    net = Dropped()
    report = prune(net, torch.rand(2, 3, 8, 8), 0.5, round_to=1)
    assert net.a.out_channels == net.up.in_channels == net.up.groups < 16
    assert net.up.out_channels == net.c.in_channels == 2 * net.up.groups
    assert report.flops_removed == pytest.approx(0.5, abs=0.05)
