"""Curves of sensitivity: equal to masking by hand, however they are computed."""

import copy
import json

import pytest
import torch
from analyses import Chain, Wrapped, analysis_of, conv, loader
from nets import masked, randomize
from tiny import TinyModule, images, trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics.classification import MulticlassAccuracy

from experiments.models import ImageClassifier
from lightslim import CompressionError, StructurePruner
from lightslim.graph import record
from lightslim.prune import sensitivity
from lightslim.prune.analysis import masked_units, parameter_names
from lightslim.prune.samples import Room, Samples
from lightslim.steps import step_probe
from lightslim.surgery import plan

pytestmark = pytest.mark.filterwarnings("ignore:.*val_dataloader.*")


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
    changed = [loss != 0 for curve in found["val_loss"].values() for loss in curve["loss"]]
    assert sum(changed) > len(changed) / 2  # not all: units that a ReLU silences anyway change nothing


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

    module, data = Writing(randomize(Chain(lambda net, x: x))), loader()
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
