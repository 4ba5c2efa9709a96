"""Curves of sensitivity: equal to masking by hand, however they are computed."""

import copy
import json

import pytest
import pytorch_lightning as pl
import torch
from nets import masked, randomize
from tiny import TinyModule, images, trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics.classification import MulticlassAccuracy

from experiments.models import ImageClassifier
from lightslim import CompressionError, StructurePruner
from lightslim.graph import record
from lightslim.prune import sensitivity
from lightslim.prune.analysis import Analysis, Measure, masked_units, parameter_names
from lightslim.prune.samples import Room, Samples
from lightslim.prune.unitwise import chains
from lightslim.steps import step_probe
from lightslim.surgery import plan

pytestmark = pytest.mark.filterwarnings("ignore:.*val_dataloader.*")
INFINITE = [float("inf")]


def loader(count=48, batch_size=16, channels=3):
    data = images(count, seed=2)
    return DataLoader([(x[:channels], y) for x, y in data], batch_size=batch_size)


def analysis_of(module, data, metric="val_loss", ratios=(0.25, 0.5, 0.75), memory=1.0, rate=None, mode="min"):
    graph = record(step_probe(module, next(iter(data)), None))
    pruner = StructurePruner()
    groups = parameter_names(pruner.selected(graph, "*"), pruner, graph.parameters)
    measure = Measure(metric, mode, ratios, rate, memory)
    return Analysis(trainer("."), module, graph, groups, pruner, measure, ([data], INFINITE))


@pytest.mark.parametrize("network", ["resnet20", "mobilenet_v1"])
def test_points_equal_masking_by_hand_and_a_trainer_on_a_copy(network, tmp_path):
    torch.manual_seed(0)
    module = ImageClassifier(network, num_classes=4, width=0.25, learning_rate=0.02)
    data, ratios = loader(61, channels=1), (0.25, 0.75)
    trainer(tmp_path, max_epochs=4).fit(module, data)
    found = {metric: sensitivity(module, data, metric, ratios) for metric in ("val_acc", "val_loss")}
    graph = record(step_probe(module, next(iter(data)), None))
    groups = parameter_names(graph, StructurePruner(), graph.parameters)
    assert list(found["val_acc"]) == list(found["val_loss"]) == list(groups)
    by_trainer = trainer(tmp_path)
    (whole,) = by_trainer.validate(copy.deepcopy(module), data, verbose=False)
    for name, group in groups.items():
        scores = StructurePruner().importance(group, dict(module.named_parameters()))
        for point, ratio in enumerate(ratios):
            kept = StructurePruner.keep(scores, group.size - masked_units(group.size, ratio))
            copied = masked(module, plan(module, graph, {group.axis: kept}))
            (metrics,) = by_trainer.validate(copied, data, verbose=False)
            for metric, curves in found.items():
                assert curves[name]["loss"][point] == whole[metric] - metrics[metric]
            assert found["val_loss"][name]["loss"][point]


class Wrapped(pl.LightningModule):
    """Logs the mean of what a network gives."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch[0]).square().mean())


def conv(a, b):
    return nn.Conv2d(a, b, 3, padding=1)


class Chain(nn.Module):
    """Four convolutions; what lies between the second and the third differs."""

    def __init__(self, between):
        super().__init__()
        self.a, self.b, self.c, self.d = conv(3, 8), conv(8, 8), conv(8, 8), conv(8, 4)
        self.between = between

    def forward(self, x):
        x = torch.relu_(self.b(self.a(x).relu()))
        x = self.between(self, x)
        return self.d(torch.relu(self.c(x)))


class InPlace(nn.Module):
    """Adds into its input, rectifies in place, and uses the old names of what was overwritten."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.head = conv(3, 8), conv(8, 8), conv(8, 8), nn.Linear(8, 2)
        self.norm, self.act = nn.BatchNorm2d(8), nn.ReLU(inplace=True)

    def forward(self, x):
        identity = self.act(self.norm(self.stem(x)))
        for layer in (self.a, self.b):
            out = layer(identity)
            out += identity
            identity = self.act(out)
            identity.flatten(2).mul_(0.5)
        return self.head(identity.flatten(2).mean(2))


class Twice(nn.Module):
    """The same layer is called twice, before and after another one."""

    def __init__(self):
        super().__init__()
        self.stem, self.shared, self.other, self.head = conv(3, 8), conv(8, 8), conv(8, 8), conv(8, 2)

    def forward(self, x):
        x = self.shared(self.stem(x)).relu()
        return self.head(self.shared(self.other(x).relu()).relu())


class Branching(nn.Module):
    """Which way it goes depends on the values."""

    def __init__(self):
        super().__init__()
        self.stem, self.up, self.down, self.mid, self.head = conv(3, 8), conv(8, 8), conv(8, 8), conv(8, 8), conv(8, 2)

    def forward(self, x):
        x = self.stem(x).relu()
        x = self.up(x) if x.mean() > 0.3 else self.down(x)
        x = self.mid(x.relu())
        return self.head(x) if x.max() > 0.5 else self.head(x.relu()) * 2


class Remembering(nn.Module):
    """What it does to a batch depends on the last one."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 8), conv(8, 2)
        self.last = None

    def forward(self, x):
        x = self.a(x) if self.last is None else self.a(x) + self.last.mean()
        x = self.b(x.relu())
        self.last = self.c(x.relu())
        return self.last


class Counting(nn.Module):
    """Every third call is another one."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 8), conv(8, 2)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = self.a(x * 2 if self.calls % 3 == 0 else x).relu()
        return self.c(self.b(x).relu())


class Secret(torch.autograd.Function):
    """Reads memory behind torch's back."""

    @staticmethod
    def forward(ctx, x):
        with torch._C.DisableTorchFunction():
            return x * float(x.numpy().sum() > 0)


ODD = {
    "nothing": lambda net, x: x,
    "numpy": lambda net, x: x * float(x.numpy().mean()),
    "from numpy": lambda net, x: x + torch.from_numpy(x.numpy() * 2),
    "tolist": lambda net, x: x * sum(x.flatten().tolist()),
    "item": lambda net, x: x * x.mean().item(),
    "random": lambda net, x: x + torch.rand_like(x),
    "views kept": lambda net, x: x[:, :4].repeat(1, 2, 1, 1) + x.transpose(2, 3),
    "constant": lambda net, x: x * torch.tensor([1.0, 2.0] * 4).view(1, 8, 1, 1),
    "weights again": lambda net, x: x + net.a.weight.data.mean(),
    "no grad needed": lambda net, x: x.detach().clone().add_(1),
    "out": lambda net, x: torch.add(x, 1, out=torch.empty_like(x)),
    "choice": lambda net, x: x[:, torch.nonzero(x.sum((0, 2, 3)) > -1).flatten()] * 2,
    "sum of parts": lambda net, x: sum(x.chunk(2, 1)).repeat(1, 2, 1, 1),
}
NETS = {
    "in place": InPlace,
    "called twice": Twice,
    "counting": Counting,
    "branching": Branching,
    **{name: lambda between=between: Chain(between) for name, between in ODD.items()},
}
UNPROVABLE = {"remembering": Remembering, "secret": lambda: Chain(lambda net, x: Secret.apply(x))}


@pytest.mark.parametrize("kind", [*NETS, *UNPROVABLE])
def test_what_is_computed_once_changes_no_bit(kind):
    module, data = Wrapped(randomize({**NETS, **UNPROVABLE}[kind]())), loader(40)
    once, plain = analysis_of(module, data), analysis_of(module, data)
    plain.evaluation.replaying = False
    state = copy.deepcopy(module.state_dict())
    assert plain.run()[0] == once.run()[0]
    assert once.evaluation.replaying == (kind in NETS), "only what cannot be proved is computed whole"
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert not module.training or module.net.training


def test_most_operations_are_not_repeated():
    calls = []

    class Counted(nn.Conv2d):
        def forward(self, x):
            out = super().forward(x)
            calls.append(bool(torch.isfinite(out).all()))
            return out

    from torch.utils._python_dispatch import TorchDispatchMode

    class Convolutions(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += "convolution" in str(func)
            return func(*args, **(kwargs or {}))

    net = nn.Sequential(*(layer for _ in range(9) for layer in (nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())))
    counts = []
    for memory in (1.0, 0.0):
        analysis = analysis_of(Wrapped(net), loader(64, 16), ratios=(0.4,) * 1, memory=memory)
        with Convolutions() as mode:
            analysis.run()
        counts.append(mode.count)
    assert counts[0] < 0.85 * counts[1]
    assert not calls


def test_memory_is_bounded_and_beyond_it_steps_run_whole():
    module, data = Wrapped(randomize(Chain(ODD["nothing"]))), loader(64)
    size = 16 * (3 * 64 + 1) * 4 + 16 * 4  # a batch, its labels being longer
    most = 0
    for batches in (0, 1.5, 30):
        analysis = analysis_of(module, data, memory=batches * size / 2**30)
        evaluation = analysis.evaluation
        before = evaluation._room.left + sum(map(_size, evaluation.samples[0].kept))
        cuts = {name: analysis._cuts(name, [0.5])[0] for name in analysis.groups}
        weights = {name: analysis._weights(cut) for name, cut in cuts.items()}
        for name in evaluation.order(weights) if evaluation.samples[0].kept else ():
            evaluation.prepare(weights[name], cuts[name], chains(analysis.graph, analysis.groups).get(name))
            held = sum(prefix.bytes for prefix in evaluation._prefixes.values())
            assert held + evaluation._room.left + sum(map(_size, evaluation.samples[0].kept)) == before
            assert evaluation._room.left >= 0
            most = max(most, held)
        assert analysis.run()[0] == analysis_of(module, data, memory=0).run()[0]
    assert most > 0


def _size(batch):
    return sum(tensor.numel() * tensor.element_size() for tensor in batch)


class WithMetrics(TinyModule):
    """Logs a metric object, a value known only at the end of an epoch, and one by sum."""

    def __init__(self):
        super().__init__()
        self.accuracy = MulticlassAccuracy(4, average="micro")
        self.scores = []

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        scores = self(batch[0])
        self.accuracy(scores, batch[1])
        self.log("object", self.accuracy)
        self.log("total", (scores.argmax(1) == batch[1]).float().sum(), reduce_fx="sum")
        self.scores.append(scores)

    def on_validation_epoch_start(self):
        self.scores = []

    def on_validation_epoch_end(self):
        self.log("spread", torch.cat(self.scores).std())


def test_any_metric_that_validation_logs_can_be_measured():
    torch.manual_seed(0)
    module, data = randomize(WithMetrics()), loader(40)  # the last batch is smaller
    object_, accuracy, total, spread = (
        sensitivity(module, data, name, [0.25, 0.75]) for name in ("object", "val_acc", "total", "spread")
    )
    for name, curve in object_.items():
        assert curve["loss"] == pytest.approx(accuracy[name]["loss"], abs=1e-7)
        assert curve["loss"] == pytest.approx([loss / 40 for loss in total[name]["loss"]], abs=1e-7)
    assert any(loss for curve in object_.values() for loss in curve["loss"])
    assert any(loss for curve in spread.values() for loss in curve["loss"])
    assert module.scores == []


def test_the_sign_follows_the_mode_and_names_are_those_of_parameters():
    module, data = randomize(TinyModule()), loader()
    less, more = (sensitivity(module, data, "val_loss", [0.5], mode=mode) for mode in ("min", "max"))
    assert list(less) == ["net.stem.0.weight", "net.body.0.weight"]
    assert {n: c["loss"][0] for n, c in less.items()} == {n: -c["loss"][0] for n, c in more.items()}
    (only,) = sensitivity(module, data, "val_loss", [0.5], pruned_params="*body.0*")
    assert only == "net.body.0.weight"


def test_a_layer_of_few_units_keeps_one_and_is_not_measured_twice():
    module = Wrapped(nn.Sequential(conv(3, 2), nn.ReLU(), conv(2, 2)))
    found = sensitivity(module, loader(), "val_loss", [0.1, 0.4, 0.6, 0.9])["net.0.weight"]
    assert found["size"] == 2
    assert found["loss"][0] == 0.0
    assert found["loss"][1] == found["loss"][2] == found["loss"][3] != 0.0


def test_one_seeded_part_of_the_data_serves_all_points():
    data = DataLoader(images(100), batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(3))
    state, outside = data.generator.get_state(), torch.get_rng_state()
    first = Samples(data, float("inf"), 0.3, Room(10**6))
    assert sum(len(y) for _, y in first) == 30
    assert torch.equal(state, data.generator.get_state())
    assert torch.equal(outside, torch.get_rng_state())
    for room in (10**6, 13_000, 0):
        again = Samples(data, float("inf"), 0.3, Room(room))
        for _ in range(2):
            assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert torch.equal(state, data.generator.get_state())
    assert first.fingerprint() == Samples(data, float("inf"), 0.3, Room(10**6)).fingerprint()
    assert first.fingerprint() != Samples(data, float("inf"), 0.3, Room(10**6), seed=1).fingerprint()


def test_of_a_stream_whole_batches_are_drawn_and_the_limit_holds():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(torch.arange(200.0))

    data = DataLoader(Stream(), batch_size=2)
    seen = [batch.tolist() for batch in Samples(data, 50, 0.3, Room(0))]
    assert seen == [batch.tolist() for batch in Samples(data, 50, 0.3, Room(10**6))]
    assert 5 < len(seen) < 30
    assert all(batch[1] < 100 for batch in seen)
    assert len(list(Samples(DataLoader(range(100), batch_size=4), 5, 0.5, Room(0)))) == 3


def test_batches_that_a_step_writes_into_are_the_same_for_every_point():
    class Writing(Wrapped):
        def validation_step(self, batch, batch_idx):
            batch[0].mul_(2)
            super().validation_step(batch, batch_idx)

    module, data = Writing(randomize(Chain(ODD["nothing"]))), loader()
    assert analysis_of(module, data).run()[0] == analysis_of(module, data, memory=0).run()[0]


class Killed(BaseException):
    pass


def test_a_killed_analysis_goes_on_at_the_next_point(tmp_path, monkeypatch):
    from lightslim.prune.evaluation import Evaluation

    module, data, path = randomize(TinyModule()), loader(), tmp_path / "s.json"
    whole, plain, calls = sensitivity(module, data, "val_loss", mode="min"), Evaluation.masked, []

    def dying(self, cut):
        if len(calls) in (3, 4):
            calls.append(None)
            raise Killed
        calls.append(cut)
        return plain(self, cut)

    monkeypatch.setattr(Evaluation, "masked", dying)
    for points in (3, 3):
        with pytest.raises(Killed):
            sensitivity(module, data, "val_loss", mode="min", sensitivities_file=path)
        content = json.loads(path.read_text())["sensitivities"]
        assert sum(len(curve["loss"]) for curve in content.values()) == points
    assert sensitivity(module, data, "val_loss", mode="min", sensitivities_file=path) == whole
    assert len(calls) == 3 + 2 + 5
    assert sensitivity(module, data, "val_loss", mode="min", sensitivities_file=path) == whole
    assert len(calls) == 10, "a finished file is read, and nothing is measured"
    assert [file.name for file in tmp_path.iterdir()] == ["s.json"]


DAMAGED = {
    "empty": "",
    "half": '{"format": 1, "fingerprint": {}, "baseline": 0.5, "sensitivities": {"a": {"pruned_perc',
    "a list": "[]",
    "of another format": '{"format": 99, "fingerprint": {}, "baseline": 0.5, "sensitivities": {}}',
    "of the format before": '{"format": 1, "fingerprint": {}, "baseline": 0.5, "sensitivities": {}}',
    "without a checksum": '{"format": 2, "fingerprint": {}, "baseline": 0.5, "sensitivities": {}}',
    "edited": '{"format": 2, "fingerprint": {}, "baseline": 0.5, "sensitivities": {}, "sha256": "0"}',
    "binary": "\x80\x04\x95",
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_named_and_left_alone(kind, tmp_path):
    path = tmp_path / "s.json"
    path.write_bytes(DAMAGED[kind].encode("latin-1"))
    with pytest.raises(CompressionError, match=r"s\.json .*delete it"):
        sensitivity(TinyModule(), loader(), "val_loss", sensitivities_file=path)
    assert path.read_bytes() == DAMAGED[kind].encode("latin-1")


def test_a_file_of_something_else_says_what_differs(tmp_path):
    path, module, data = tmp_path / "s.json", TinyModule(), loader()
    sensitivity(module, data, "val_loss", [0.5], mode="min", sensitivities_file=path)
    cases = {
        "ratios: \\[0.5\\] there, \\[0.25\\] here": {"ratios": [0.25]},
        'metric_name: "val_loss" there, "val_acc" here': {"metric_name": "val_acc"},
        'mode: "min" there, "max" here': {"mode": "max"},
        "data: ": {"loader": loader(32)},
        "eval_rate: null there, 0.5 here": {"eval_rate": 0.5},
        "model: ": {"module": randomize(TinyModule())},
    }
    for message, changes in cases.items():
        arguments = {"module": module, "loader": data, "metric_name": "val_loss", "ratios": [0.5], "mode": "min"}
        with pytest.raises(CompressionError, match=message):
            sensitivity(**{**arguments, **changes}, sensitivities_file=path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric_name": "val_los"}, "nothing logs 'val_los'; did you mean 'val_loss'"),
        ({"mode": "least"}, "mode is 'least'"),
        ({"ratios": [0.5, 0.2]}, "ratios are"),
        ({"ratios": [0.5, 1.0]}, "ratios are"),
        ({"ratios": []}, "ratios are"),
        ({"eval_rate": 0.0}, "eval_rate is 0.0"),
        ({"memory": -1.0}, "memory is -1.0"),
        ({"pruned_params": "net.steem*"}, "matches none .* nearest: net.stem"),
        ({"loader": []}, "yields no batch"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments, message):
    with pytest.raises(CompressionError, match=message):
        sensitivity(**{"module": TinyModule(), "loader": loader(), "metric_name": "val_loss", **arguments})
