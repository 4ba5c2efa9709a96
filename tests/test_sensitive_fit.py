"""Sensitive pruning inside a running fit: it hits its target, and a kill costs no more than a point."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from test_sensitivity import WithMetrics
from tiny import TinyModule, images, loaders, trainer
from torch.utils.data import DataLoader

from lightslim import CompressionError, CompressionMonitor, SensitivePruneStrategy, cli
from lightslim.cost import cost
from lightslim.pictures import pixels
from lightslim.prune import curves

X = torch.zeros(1, 3, 8, 8)


def cut(**arguments):
    given = {"target_ratio": 0.5, "start_epoch": 1, "metric_name": "val_loss", "mode": "min", "round_to": 1}
    return SensitivePruneStrategy(**{**given, **arguments})


def fit(folder, strategy, *callbacks, seed=0, **arguments):
    pl.seed_everything(seed, verbose=False)
    module = TinyModule("adam")
    module.net.head[2].p = 0.0
    train = DataLoader(images(seed=1), batch_size=16)
    checkpoint = arguments.pop("ckpt_path", None)
    trainer(folder, strategy, *callbacks, **{"max_epochs": 5, **arguments}).fit(
        module, train, loaders()[1], ckpt_path=checkpoint
    )
    return module


@pytest.mark.parametrize("steps", [1, 3])
def test_the_target_is_reached_in_any_number_of_steps(tmp_path, steps):
    strategy = cut(num_steps=steps, step_epochs=1)
    before = cost(TinyModule().net, X).flops
    module = fit(tmp_path, strategy)
    assert 1 - cost(module.net, X).flops / before == pytest.approx(0.5, abs=0.02)
    assert [record["epoch"] for record in strategy.history] == [1, 2, 3][:steps]
    assert [record["step_of"] for record in strategy.history] == [[i + 1, steps] for i in range(steps)]
    names = ["sensitivities.json", "sensitivities.json.epoch2", "sensitivities.json.epoch3"][:steps]
    for name, record in zip(names, strategy.history, strict=True):
        assert json.loads((tmp_path / name).read_text())["sensitivities"] == record["sensitivities"]
        assert record["chosen"] == {
            f"{layer}.weight": 1 - after / whole for layer, (whole, after) in record["units"].items()
        }


def test_a_layer_that_hurts_less_loses_more(tmp_path):
    """The second half of the stem's units is dead, all of the body's matter."""
    strategy = cut(target_ratio=0.3, start_epoch=0)

    class Dead(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            with torch.no_grad():
                pl_module.net.stem[0].weight[8:] *= 1e-12
                pl_module.net.body[0].weight.mul_(30)

    fit(tmp_path, strategy, Dead(), max_epochs=1)
    (record,) = strategy.history
    assert record["sensitivities"]["net.stem.0.weight"]["size"] == 16
    assert set(record["chosen"]) == {"net.stem.0.weight", "net.body.0.weight"}
    assert record["flops_removed"] == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("epoch", [0, 1, 2, 3])
def test_a_run_resumed_between_steps_ends_with_the_same_weights(tmp_path, epoch):
    def run(folder, **arguments):
        saver = pl.callbacks.ModelCheckpoint(folder / "c", "{epoch}", save_top_k=-1)
        strategy = cut(num_steps=3)
        return fit(folder, strategy, saver, enable_checkpointing=True, max_epochs=7, **arguments), strategy

    whole, first = run(tmp_path / "whole")
    resumed, second = run(tmp_path / "whole", ckpt_path=tmp_path / "whole" / "c" / f"epoch={epoch}.ckpt")
    assert len(first.history) == 3
    assert first.history == second.history
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name


class Looks(pl.Callback):
    """Does the analysis at the start of an epoch and cuts nothing."""

    def __init__(self, strategy):
        self.strategy, self.found = strategy, None

    def on_train_epoch_start(self, trainer, pl_module):
        if self.strategy is not None and trainer.current_epoch == 1:
            self.found = self.strategy.analyse(trainer, pl_module, None, False)


class Stirring(WithMetrics):
    """Dropout, a training metric, buffers that evaluation changes."""

    def __init__(self):
        super().__init__()
        self.seen = 0
        self.register_buffer("count", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.log("train_object", self.accuracy(self(batch[0]), batch[1]), on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.seen += 1
        self.count += 1
        return super().validation_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*shuffling enabled.*")
@pytest.mark.parametrize("arguments", [{}, {"precision": "bf16-mixed"}], ids=["float", "bf16"])
def test_the_run_does_not_notice_the_analysis(tmp_path, arguments):
    ends = []
    for look in (None, cut(eval_rate=0.7)):
        pl.seed_everything(5, verbose=False)
        train, _ = loaders()
        data = images(37, seed=2)
        val = DataLoader(data, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(1))
        module, looks = Stirring(), Looks(look)
        folder = tmp_path / str(len(ends))
        logger = TensorBoardLogger(folder, version=0)
        saver = pl.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
        run = trainer(folder, looks, saver, logger=logger, enable_checkpointing=True, **arguments)
        run.fit(module, train, val)
        state = {k: v for k, v in torch.load(folder / "epoch=2.ckpt", weights_only=False).items() if k != "callbacks"}
        ends.append((module.losses, module.seen, module.state_dict(), _scalars(logger.log_dir), state, looks.found))
    assert ends[0][-1] is None
    assert ends[1][-1] is not None
    for one, other in zip(*(end[:-1] for end in ends), strict=True):
        assert _same(one, other)


def _same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or str(a) == str(b)


def _scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_settled_metric_brings_the_next_step_and_patience_ends(tmp_path):
    class Says(TinyModule):
        values = (1.0, 1.0, 2.0, 3.0, 3.001, 3.01, 6.0, 7.0, 8.0, 9.0)

        def on_validation_epoch_end(self):
            self.log("told", self.values[self.current_epoch])

    strategy = SensitivePruneStrategy(
        metric_name="told", start_epoch=1, num_steps=3, step_epochs=3, target_ratio=0.3, round_to=1
    )
    train, val = loaders()
    trainer(tmp_path, strategy, max_epochs=9).fit(Says(), train, val)
    assert [record["epoch"] for record in strategy.history] == [1, 4, 6], "what came before a cut does not count"


def test_no_layer_loses_more_than_it_may_and_what_cannot_be_reached_is_said(tmp_path):
    strategy = cut(target_ratio=0.9, max_ratio={"*stem*": 0.3, "*": 0.6})
    with pytest.warns(UserWarning, match="asked to remove 90.0% .* nearest that can be reached"):
        fit(tmp_path, strategy, max_epochs=2)
    for layer, (before, after) in strategy.history[0]["units"].items():
        assert 1 - after / before <= (0.3 if "stem" in layer else 0.6)
    assert strategy.history[0]["flops_removed"] > 0.2


def test_steps_that_never_came_are_said(tmp_path):
    strategy = cut(num_steps=3, step_epochs=10)

    class Jumps(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            strategy._since = []

    with pytest.warns(UserWarning, match="training ended after 1 of 3 steps"):
        fit(tmp_path, strategy, Jumps())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric_name": None}, "metric_name says what .* choose from: val_acc, val_loss"),
        ({"metric_name": "val_los"}, "nothing logs 'val_los'; did you mean 'val_loss'"),
        ({"metric_name": "train_loss"}, "nothing logs 'train_loss'"),
        ({"num_steps": 5}, "num_steps is 5, but from epoch 1 on there are only 4 epochs"),
        ({"start_epoch": 5}, "training ends after 5 epochs: it never acts"),
        ({"pruned_params": "net.body.9.*"}, "matches none of .* nearest: net.body"),
    ],
)
def test_what_cannot_work_fails_before_the_first_step(tmp_path, arguments, message):
    module = TinyModule()
    with pytest.raises(CompressionError, match=message):
        trainer(tmp_path, cut(**arguments), max_epochs=5).fit(module, *loaders())
    assert module.losses == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"step_epochs": 0}, "step_epochs is 0"),
        ({"max_ratio": 0.0}, "max_ratio .* is 0.0"),
        ({"max_ratio": {"conv*": 1.1}}, "max_ratio 'conv\\*' is 1.1"),
        ({"delta_rate": 1.0}, "delta_rate is 1.0"),
        ({"eval_rate": 1.5}, "eval_rate is 1.5"),
        ({"target_ratio": 1.5}, "target_ratio is 1.5"),
        ({"mode": "up"}, "mode is 'up'"),
    ],
)
def test_bad_arguments_fail_in_the_constructor(arguments, message):
    with pytest.raises(CompressionError, match=message):
        cut(**arguments)


def test_a_file_of_another_run_is_never_used(tmp_path):
    fit(tmp_path, cut())
    for strategy in (cut(), cut(delta_rate=0.3), cut(start_epoch=0)):
        module = TinyModule()
        with pytest.raises(CompressionError, match=r"sensitivities\.json .*delete it"):
            trainer(tmp_path, strategy).fit(module, *loaders())
        assert module.losses == []


def test_one_page_shows_curves_and_choices(tmp_path):
    logger = TensorBoardLogger(tmp_path, version=0)
    strategy = cut()
    fit(tmp_path, strategy, CompressionMonitor(), logger=logger)
    (record,) = strategy.history
    shown = _scalars(logger.log_dir)
    for name, curve in record["sensitivities"].items():
        points = shown[f"lightslim/SensitivePruneStrategy/sensitivity/epoch1/{name}"]
        assert [step for step, _ in points] == [0, 20, 40, 60, 80]
        assert [value for _, value in points[1:]] == pytest.approx(curve["loss"], rel=1e-5)
        assert name in curves.chosen(record)


def test_curves_are_drawn_where_matplotlib_is(tmp_path):
    pytest.importorskip("matplotlib")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger, strategy = TensorBoardLogger(tmp_path, version=0), cut()
    fit(tmp_path, strategy, CompressionMonitor(), logger=logger)
    assert (tmp_path / "SensitivePruneStrategy-epoch1.png").read_bytes()[:4] == b"\x89PNG"
    events = EventAccumulator(logger.log_dir).Reload()
    (image,) = events.Images("lightslim/SensitivePruneStrategy/sensitivity/epoch1")
    assert image.width > image.height > 300
    (groups,) = events.Images("lightslim/SensitivePruneStrategy/groups/epoch1")
    assert groups.height > 100
    picture = pixels(curves.figure(strategy.history[0]))
    assert len({tuple(color) for color in picture.reshape(-1, 3)[::7].tolist()}) > 10


RECIPE = """\
model: {class: "tiny:TinyModule"}
data: {class: "test_sensitive_fit:Data"}
strategies:
  spare: {class: SensitivePruneStrategy, start_epoch: 1, metric_name: val_acc, num_steps: 2, max_ratio: {"*": 0.8}}
  quantize: {class: QuantizationStrategy, start_epoch: 5}
compressor: {epoch: 6, strategies: [spare, quantize]}
"""


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return loaders()[0]

    def val_dataloader(self):
        return loaders()[1]


def test_the_command_measures_and_trains_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    for _ in range(2):
        assert (
            cli.main(["sensitivity", "recipe.yaml", "--out", "out/s.json", "--set", "trainer={accelerator: cpu}"]) == 0
        )
        shown = capsys.readouterr().out
        found = json.loads((tmp_path / "out" / "s.json").read_text())["sensitivities"]
        assert list(found) == ["net.stem.0.weight", "net.body.0.weight"]
        assert "net.stem.0.weight     16" in shown
        assert "80%" in shown
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "lightning_logs") == ["out", "recipe.yaml"]
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("[spare, quantize]", "[quantize]"))
    with pytest.warns(UserWarning, match="not listed"):
        assert cli.main(["sensitivity", "recipe.yaml", "--out", "s.json"]) == 2
    assert "lists 0 strategies that measure sensitivities" in capsys.readouterr().err


SCRIPT = """
import os, signal, sys
from pathlib import Path
import pytorch_lightning as pl, torch
from test_sensitive_fit import cut, fit
from lightslim import files
from lightslim.prune.sensitivity_file import SensitivityFile

folder, deadly, when = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
count = 0

def die():
    global count
    count += 1
    if count == when:
        os.kill(os.getpid(), signal.SIGKILL)

class Dies(pl.Callback):
    def on_train_batch_end(self, *_):
        if deadly == "step":
            die()

save, sync = SensitivityFile.save, files._sync
def dying_save(self):
    save(self)
    if deadly == "point":
        die()
def dying_sync(path):  # half-way through writing a file
    if deadly == "write" and path.suffix != "":
        die()
    sync(path)
SensitivityFile.save, files._sync = dying_save, dying_sync

last = folder / "c" / "last.ckpt"
saver = pl.callbacks.ModelCheckpoint(folder / "c", "{epoch}", save_last=True, save_on_train_epoch_end=True)
strategy = cut(num_steps=2, step_epochs=1, eval_rate=0.5, start_epoch=1)
module = fit(folder, strategy, Dies(), saver, enable_checkpointing=True, max_epochs=4,
             ckpt_path=last if last.exists() else None)
torch.save([module.state_dict(), strategy.history], folder / "end.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("deaths", [["point 1", "write 3", "point 5", "step 2", "point 4"],
                                    ["step 8", "write 2", "step 3", "step 9", "step 3"]])  # fmt: skip
def test_kill_9_in_the_analysis_and_in_the_fit_changes_nothing(tmp_path, deaths):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    here = Path(__file__).parent

    def run(folder, death="none 0"):
        return subprocess.run(
            [sys.executable, str(script), str(tmp_path / folder), *death.split()],
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{here}:{here.parent}", "OMP_NUM_THREADS": "1",
                 "HOME": str(tmp_path)},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    whole = run("whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    for death in deaths:
        assert run("killed", death).returncode == -9, death
    ended = run("killed")
    assert ended.returncode == 0, ended.stderr[-3000:]
    one, other = (torch.load(tmp_path / folder / "end.pt", weights_only=True) for folder in ("whole", "killed"))
    assert one[1] == other[1]
    assert len(one[1]) == 2
    assert _same(one[0], other[0])
