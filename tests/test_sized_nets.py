"""Models with sizes in their Python: cut where they can be, frozen with the reason where not, and they always run."""

import copy

import pytest
import torch
from nets import masked, outputs, randomize
from sized_nets import NETS
from torch import nn

from lightslim import CompressionError
from lightslim.prune import find_groups, prune
from lightslim.surgery import cuts_of

X = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings("ignore:asked to remove")


@pytest.fixture(params=NETS, ids=list(NETS))
def net(request):
    return randomize(NETS[request.param]())


def test_no_op_is_unknown(net):
    assert find_groups(net, X).unknown == ()


def test_it_loses_flops_runs_and_equals_the_masked_model(net):
    original = copy.deepcopy(net)
    report = prune(net, X, 0.4, round_to=1)
    assert report.flops_removed >= 0.3
    expected = outputs(masked(original, cuts_of(net)[-1]), X)
    torch.testing.assert_close(outputs(net, X), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    net.train()(X).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())


def test_heads_are_rewritten_where_the_code_joins_them_by_a_size_of_its_own():
    net = randomize(NETS["heads of a fused projection"]())
    prune(net, X, 0.5, round_to=1)
    for block in net.blocks:
        attention = block.mixer
        assert attention.num_heads < 8
        assert attention.head_dim == 4
        assert attention.attn_dim == attention.proj.in_features == 4 * attention.num_heads
    assert net.embed.out_features == 32, "the residual stream stays unless asked for"


def test_heads_stay_with_the_reason_where_the_code_joins_them_by_the_input():
    net = randomize(NETS["heads whose join is fixed"]())
    report = prune(net, X, 0.4, round_to=1)
    assert all(block.mixer.num_heads == 8 for block in net.blocks)
    reasons = {name: reason for name, size, reason in report.frozen if size == 8}
    assert all("does not stand this cut" in reasons[f"blocks.{i}.mixer.qkv.weight"] for i in range(3))


def test_query_heads_go_with_their_group():
    net = randomize(NETS["grouped queries"]())
    prune(net, X, 0.5, round_to=1)
    for block in net.blocks:
        assert block.mixer.heads == 2 * block.mixer.groups < 8


def test_the_residual_stream_is_cut_on_request():
    net = randomize(NETS["gates"]())
    report = prune(net, X, 0.5, round_to=1, embeddings=True)
    assert net.embed.out_features == net.head.in_features == net.position.shape[2] < 32
    assert report.flops_removed == pytest.approx(0.5, abs=0.02)
    net(X)


def test_a_model_that_nothing_can_leave_is_an_error_with_the_reasons_and_unchanged():
    class Sealed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 3)

        def forward(self, x):
            return self.b(self.a(x).reshape(-1, 12).relu())

    net = randomize(Sealed())
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(CompressionError, match=r"nothing that can lose units \(.*a\.weight: the model does not stand"):
        prune(net, torch.randn(4, 8), 0.5, round_to=1)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


ZOO = ("vit_tiny_patch16_224", "skresnet18", "res2net50_26w_4s", "mobilevit_xxs", "ghostnet_100")


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_timms_models_where_it_is_installed(name):
    timm = pytest.importorskip("timm", exc_type=ImportError)
    net = timm.create_model(name, pretrained=False)
    size = 224 if "vit_tiny" in name else 96
    images = torch.randn(2, 3, size, size)
    assert prune(net, images, 0.5).flops_removed >= 0.3
    net.train()(images).sum().backward()
    net.eval()(images)


class StandardisedConv(nn.Conv2d):
    """Each filter has mean 0 and variance 1 whenever it is used, as in nets without norms of their activations."""

    def forward(self, x):
        filters = self.weight.reshape(1, self.out_channels, -1)
        weight = nn.functional.batch_norm(filters, None, None, training=True, momentum=0.0, eps=1e-6)
        return nn.functional.conv2d(x, weight.reshape_as(self.weight), self.bias, padding=1)


def test_standardised_filters_lose_inputs_as_a_norm_does():
    net = nn.Sequential(StandardisedConv(3, 16, 3), nn.ReLU(), StandardisedConv(16, 32, 3), nn.ReLU(),
                        StandardisedConv(32, 8, 3), nn.Flatten(), nn.Linear(512, 4))  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    report = prune(net, x, 0.5)
    assert report.flops_removed > 0.45
    assert (net[2].in_channels, net[4].in_channels) == (net[0].out_channels, net[2].out_channels)
    assert net[0].out_channels < 16
    assert net[2].out_channels < 32
    filters = net[2].weight.detach().flatten(1).double()
    expected = (filters - filters.mean(1, keepdim=True)) / (filters.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    inside = net[1](net[0](x)).double()
    by_hand = nn.functional.conv2d(inside, expected.reshape(net[2].weight.shape), net[2].bias.double(), padding=1)
    torch.testing.assert_close(net[2](net[1](net[0](x))).double(), by_hand, rtol=1e-4, atol=1e-4)


class HandNorm(nn.LayerNorm):
    """A layer norm spelled out."""

    def forward(self, x):
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        return self.weight * ((x - mean) / torch.sqrt(variance + self.eps)) + self.bias


class ResponseNorm(nn.Module):
    """Each unit's norm over positions beside the mean of all units' norms (ConvNeXt V2)."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        norms = x.norm(p=2, dim=1, keepdim=True)
        return x + self.weight * x * norms / (norms.mean(-1, keepdim=True) + 1e-6)


class MeanGate(nn.Module):
    """A gate from the mean over units, through weights of its own: no norm."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(1, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.mix(x.mean(-1, keepdim=True)))


def between(*layers):
    return nn.Sequential(nn.Linear(8, 32), *layers, nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))


def test_a_norm_spelled_out_is_cut_as_the_built_in_one():
    native, by_hand = randomize(between(nn.LayerNorm(32))), between(HandNorm(32))
    by_hand.load_state_dict(native.state_dict())
    reports = [prune(net, X, 0.5) for net in (native, by_hand)]
    assert reports[0].units == reports[1].units
    assert native[0].out_features == by_hand[1].weight.numel() < 32
    assert by_hand[1].normalized_shape == (by_hand[0].out_features,)
    torch.testing.assert_close(by_hand(X), native(X))


def test_a_statistic_that_meets_its_units_stands_their_loss_and_another_use_freezes_them():
    net = between(ResponseNorm(32))
    assert prune(net, X, 0.5).units["0"][1] < 32
    assert net(X).isfinite().all()
    (reason,) = [reason for name, _, reason in prune(between(MeanGate()), X, 0.3).frozen if name == "0.weight"][:1]
    assert "reduced by mean" in reason
    both = prune(between(HandNorm(32), MeanGate()), X, 0.3)
    assert "0" not in both.units, "one use of two is a norm"


def test_only_the_models_own_operations_are_recorded():
    """Not the copies that put it back afterwards."""
    ops = {made.op for trace in find_groups(nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(16)), X).traces.values()
           for made in trace}  # fmt: skip
    assert not ops & {"clone", "copy_"}


def test_a_residual_stream_under_norms_spelled_out_stays_unless_asked_for():
    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.norm, self.wide = nn.Linear(8, 32), HandNorm(32), nn.Linear(32, 64)
            self.narrow, self.leave = nn.Linear(64, 32), nn.Linear(32, 4)

        def forward(self, x):
            x = self.enter(x)
            return self.leave(x + self.narrow(torch.relu(self.wide(self.norm(x)))))

    stays, goes = Stream(), Stream()
    prune(stays, X, 0.4)
    prune(goes, X, 0.4, embeddings=True)
    assert stays.enter.out_features == 32 > goes.enter.out_features
    assert goes(X).shape == stays(X).shape == (2, 16, 4)
