"""Cutting live models: identity of parameters, optimizer state, undo, checkpoints of any earlier or later structure."""

import copy
import warnings

import pytest
import torch
from nets import DenseNet, outputs, randomize
from tiny import TinyNet
from torch import nn

from lightslim import CompressionError, load_compressed
from lightslim.graph import record
from lightslim.prune import prune
from lightslim.steps import forward_probe
from lightslim.surgery import Cut, Slice, apply, conform, cuts_of, plan, structure

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def every_second_unit(net: nn.Module) -> Cut:
    graph = record(forward_probe(net, X))
    return plan(net, graph, {group.axis: torch.arange(group.size) % 2 == 0 for group in graph})


def test_parameters_stay_the_same_objects():
    net = TinyNet()
    before = {name: id(p) for name, p in net.named_parameters()}
    apply(net, every_second_unit(net))
    assert {name: id(p) for name, p in net.named_parameters()} == before
    assert net.stem[0].weight.shape == (8, 3, 3, 3)
    assert (net.depthwise.in_channels, net.depthwise.groups) == (8, 8)


def test_optimizer_state_is_cut_like_its_parameter():
    net = randomize(TinyNet())
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    net(X).sum().backward()
    optimizer.step()
    cut = every_second_unit(net)
    old = {name: optimizer.state[p]["exp_avg"].clone() for name, p in net.named_parameters()}
    apply(net, cut, [optimizer])
    for name, parameter in net.named_parameters():
        expected = old[name]
        for item in cut.slices:
            if item.tensor == name:
                expected = expected.index_select(item.dim, torch.tensor(item.kept))
        assert torch.equal(optimizer.state[parameter]["exp_avg"], expected)
        assert optimizer.state[parameter]["step"] == 1
        assert parameter.grad is None or parameter.grad.shape == parameter.shape
    net(X).sum().backward()
    optimizer.step()


def test_factored_state_is_cut_along_the_dimensions_that_it_has():
    net = randomize(TinyNet())
    optimizer = torch.optim.Adafactor(net.parameters(), lr=0.01)
    net(X).sum().backward()
    optimizer.step()
    old = optimizer.state[net.stem[0].weight]["row_var"].clone()
    cut = every_second_unit(net)
    apply(net, cut, [optimizer])
    weight = net.stem[0].weight
    assert torch.equal(optimizer.state[weight]["row_var"], old[::2])
    net(X).sum().backward()
    optimizer.step()


class Flat(torch.optim.SGD):
    """Keeps its memory as one long row."""

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["memory"] = parameter.grad.flatten().clone()
        return super().step(closure)


@pytest.mark.parametrize("kind", [Flat, torch.optim.LBFGS])
def test_state_of_another_shape_is_dropped_with_a_warning(kind):
    net = randomize(TinyNet())
    optimizer = kind(net.parameters(), lr=0.01)

    def loss():
        optimizer.zero_grad()
        value = net(X).square().mean()
        value.backward()
        return value

    optimizer.step(loss) if kind is not Flat else (loss(), optimizer.step())
    with pytest.warns(UserWarning, match="starts afresh"):
        apply(net, every_second_unit(net), [optimizer])
    optimizer.step(loss) if kind is not Flat else (loss(), optimizer.step())


def test_undo_restores_every_value_and_attribute():
    net = randomize(TinyNet())
    before, said = copy.deepcopy(net.state_dict()), repr(net)
    undo = apply(net, every_second_unit(net))
    undo()
    assert repr(net) == said
    assert cuts_of(net) == []
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_cut_that_does_not_fit_changes_nothing():
    net = randomize(TinyNet())
    before = copy.deepcopy(net.state_dict())
    good = every_second_unit(net)
    bad = Cut((*good.slices, Slice("head.3.weight", 0, 99, (0, 1))), good.rewrites)
    with pytest.raises(CompressionError, match=r"head.3.weight with 99 positions"):
        apply(net, bad)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_cut_survives_as_plain_values():
    cut = every_second_unit(TinyNet())
    assert Cut.from_state(cut.to_state()) == cut


@pytest.mark.parametrize("build", [TinyNet, DenseNet])
def test_conform_goes_to_smaller_and_back_to_larger_structures(build):
    net = randomize(build())
    large, large_record = copy.deepcopy(net.state_dict()), structure(net)
    large_output = outputs(net, X)
    sizes = []
    for ratio in (0.3, 0.3):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*nearest that can be reached")
            prune(net, X, ratio)
        sizes.append((copy.deepcopy(net.state_dict()), structure(net), outputs(net, X)))
    for weights, record_, expected in [sizes[0], (large, large_record, large_output), sizes[1]]:
        conform(net, weights, record_)
        net.load_state_dict(weights)
        torch.testing.assert_close(outputs(net, X), expected, rtol=0, atol=0)


def test_shapes_alone_are_enough_for_torchs_own_layers(tmp_path):
    net = randomize(TinyNet())
    prune(net, X, 0.5)
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    loaded = load_compressed(TinyNet, tmp_path / "weights.pt")
    torch.testing.assert_close(outputs(loaded, X), outputs(net, X), rtol=0, atol=0)


def test_channels_last_stays_channels_last():
    net = TinyNet().to(memory_format=torch.channels_last)
    apply(net, every_second_unit(net))
    assert net.body[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("content", "message"), [(b"", "cannot be read"), (b"not a checkpoint", "cannot be read")])
def test_damaged_files_are_refused(tmp_path, content, message):
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(CompressionError, match=message):
        load_compressed(TinyNet, tmp_path / "x.ckpt")
    with pytest.raises(CompressionError, match="no such checkpoint"):
        load_compressed(TinyNet, tmp_path / "missing.ckpt")


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "x.pt")
    with pytest.raises(CompressionError, match="does not fit TinyNet"):
        load_compressed(TinyNet, tmp_path / "x.pt")


class Remembers(nn.Module):
    """Keeps what it computed last, graph and all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 3)
        self.last = None

    def forward(self, x):
        self.last = self.first(x).relu()
        return self.second(self.last)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize(
    "build",
    [
        Remembers,
        lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 16)), nn.ReLU(), nn.Linear(16, 3)),
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 16)), nn.ReLU(), nn.Linear(16, 3)),
    ],
    ids=["remembers", "weight_norm", "parametrized"],
)
def test_a_model_that_holds_a_graph_from_before_the_cut_trains_after_it(build):
    torch.manual_seed(0)
    net, x = build(), torch.randn(8, 6)
    net(x).sum().backward()
    held = net(x)
    prune(net, x, target_ratio=0.5, round_to=1)
    net(x).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad.shape == parameter.shape, name
        assert parameter.grad.abs().sum() > 0, name
    assert held.shape == (8, 3)
