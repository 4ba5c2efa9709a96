"""Compressor and the command line: the run directory, results, refusals, and interruption by signal."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tiny import TinyModule, images, loaders
from torch.utils.data import DataLoader

from lightslim import CompressionError, Compressor, load_compressed
from lightslim.cli import main
from lightslim.cost import cost

ROOT = Path(__file__).parent.parent
RECIPE = """
model: {class: "tiny:TinyModule", optimizer: adam}
data: {class: "tinydata:Quadrants"}
trainer: {accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
strategies:
    halve: {class: UniformPruneStrategy, start_epoch: 1, target_ratio: 0.5, metric_name: val_acc}
compressor: {epoch: 3, strategies: [halve]}
"""
DATA = """
import pytorch_lightning as pl
from tiny import loaders

class Quadrants(pl.LightningDataModule):
    def __init__(self, batch_size: int = 16, folder: str | None = None):
        super().__init__()
        self.folder = folder
        self.batch_size = batch_size

    def setup(self, stage):
        if self.folder:
            open(self.folder)

    def train_dataloader(self):
        return loaders(self.batch_size)[0]

    def val_dataloader(self):
        return loaders(self.batch_size)[1]
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tinydata.py").write_text(DATA)
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    torch.save(TinyModule().state_dict(), path.with_name("weights.pt"))
    torch.save({"state_dict": {}, "lightslim": {"cuts": [{}]}}, path.with_name("foreign.ckpt"))
    path.with_name("empty").mkdir()
    (path.with_name("empty") / "result.json").write_text('{"before": {}, "after": {}}')
    path.with_name("no_model.yaml").write_text("compressor: {epoch: 1, strategies: []}")
    monkeypatch.delitem(sys.modules, "tinydata", raising=False)
    return path


def test_config_and_run_return_the_smaller_module_and_the_result(recipe):
    module = TinyModule("adam")
    before = cost(module, torch.zeros(1, 3, 8, 8))
    compressor = Compressor(module, *loaders(), feed_list=["image", "label"], fetch_list=[("loss", "val_loss")])
    smaller, result = compressor.config(recipe).run()
    after = cost(module, torch.zeros(1, 3, 8, 8))
    assert smaller is module
    assert compressor.folder == Path("runs/small")
    assert result == json.loads((compressor.folder / "result.json").read_text())
    assert (result["before"]["flops"], result["after"]["flops"]) == (before.flops, after.flops)
    assert (result["before"]["params"], result["after"]["params"]) == (before.params, after.params)
    assert (result["before"]["bytes"], result["after"]["bytes"]) == (before.bytes, after.bytes)
    assert result["after"]["flops"] / result["before"]["flops"] == pytest.approx(0.5, abs=0.01)
    (strategy,) = result["strategies"]
    assert (strategy["name"], strategy["class"]) == ("halve", "UniformPruneStrategy")
    assert strategy["history"][0]["epoch"] == 1
    assert set(result) == {"recipe", "seed", "versions", "seconds", "before", "after", "strategies", "exports"}
    assert {path.name for path in compressor.folder.iterdir()} == {
        "recipe.yaml",
        "result.json",
        "checkpoints",
        "tensorboard",
    }


def test_the_metrics_in_the_result_are_lightnings(recipe):
    import pytorch_lightning as pl

    module = TinyModule("adam")
    _, result = Compressor(module, *loaders()).config(recipe).run()
    said = pl.Trainer(logger=False, accelerator="cpu").validate(module, loaders()[1], verbose=False)[0]
    assert result["after"]["metrics"] == pytest.approx(said, rel=1e-5)


def test_tensorboard_tells_the_story(recipe):
    compressor = Compressor(TinyModule("adam"), *loaders())
    _, result = compressor.config(recipe).run()
    events = EventAccumulator(str(compressor.folder / "tensorboard")).Reload()
    tags = events.Tags()["scalars"]
    flops = [(event.step, event.value) for event in events.Scalars("lightslim/flops")]
    steps, (large, small) = len(loaders()[0]), (result[when]["flops"] for when in ("before", "after"))
    assert flops == [(0, large), (steps - 1, large), *((epoch * steps, small) for epoch in (1, 2, 3))]
    assert {"lightslim/params", "lightslim/units/net.stem.0", "lightslim/at_act/val_acc", "val_acc"} <= set(tags)
    assert "lightslim/halve/text_summary" in events.Tags()["tensors"]


CHAIN = """
model: {class: "tiny:TinyModule", optimizer: adam}
data: {class: "tinydata:Quadrants"}
trainer: {accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
strategies:
    halve: {class: UniformPruneStrategy, start_epoch: 1, target_ratio: 0.5}
    quantize: {class: QuantizationStrategy, start_epoch: 2, activation_quantize_type: moving_average_abs_max}
compressor: {epoch: 4, strategies: [halve, quantize]}
"""


def scalars_of(folder):
    """Every point of every curve of a run."""
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_one_page_tells_the_story_of_a_chain(recipe):
    recipe.write_text(CHAIN)
    assert main(["run", str(recipe), "--out", "out"]) == 0
    scalars, steps = scalars_of(Path("out")), len(loaders()[0])
    events = EventAccumulator("out/tensorboard", size_guidance={"histograms": 0}).Reload()
    (layout,) = events.Tensors("custom_scalars__config__")
    page = Layout.FromString(layout.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for category in page.category for chart in category.chart}
    assert list(charts)[:3] == ["acc", "loss", "FLOPs"]
    assert {"^train_loss$", "^val_loss$"} <= set(charts["loss"])
    for title, tags in charts.items():
        assert any(re.search(pattern, tag) for pattern in tags for tag in scalars), title
    ranges = scalars["lightslim/ranges/net.stem.0.input_quantizer"]
    assert [step for step, _ in ranges] == [3 * steps, 4 * steps]
    assert all(value > 0.5 for _, value in ranges)
    assert scalars["lightslim/signal_to_noise/net.stem.0"][0][0] == 2 * steps
    histograms = [events.Histograms(tag) for tag in events.Tags()["histograms"]]
    assert [len(values) for values in histograms] == [2, 2, 2, 2]
    assert all(values[0].histogram_value.max == pytest.approx(127, abs=0.1) or
               values[0].histogram_value.min == pytest.approx(-127, abs=0.1) for values in histograms)  # fmt: skip
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_a_resumed_run_draws_no_act_twice(recipe):
    recipe.write_text(CHAIN)
    assert main(["run", str(recipe), "--out", "whole"]) == 0
    for epochs in (3, 4):
        command = ["run", str(recipe), "--out", "parts", "--resume", "auto", "--set", f"compressor.epoch={epochs}"]
        assert main(command) == 0
    whole, parts = scalars_of(Path("whole")), scalars_of(Path("parts"))
    for tag in ("lightslim/flops", "lightslim/units/net.stem.0"):
        assert [value for _, value in parts[tag]][:3] == [value for _, value in whole[tag]][:3]
        assert len(parts[tag]) <= len(whole[tag]) + 1, "the end of the first part is one point more"
    assert parts["lightslim/signal_to_noise/net.stem.0"] == whole["lightslim/signal_to_noise/net.stem.0"]
    ranges = "lightslim/ranges/net.stem.0.input_quantizer"
    assert [step for step, _ in parts[ranges]] == [step for step, _ in whole[ranges]]


def test_train_optimizer_stands_in_for_the_modules_own(recipe):
    made = []

    def optimizer(parameters):
        made.append(torch.optim.SGD(parameters, lr=0.01))
        return made[-1]

    module = TinyModule("adam")
    Compressor(module, *loaders(), train_optimizer=optimizer).config(recipe).run()
    assert len(made) == 1
    assert "configure_optimizers" not in vars(module)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_loader": None}, "give the data"),
        ({"fetch_list": ["val_acc"]}, "fetch_list must hold 'loss'"),
        ({"fetch_list": [("loss", "valloss")]}, "fetch_list: nothing logs 'valloss'; did you mean 'val_loss'"),
        ({"teachers": [TinyModule()]}, "teachers given, but no strategy of this recipe distils"),
        ({"distiller_optimizer": torch.optim.SGD}, "distiller_optimizer given"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(recipe, arguments, message):
    train, val = loaders()
    with pytest.raises(CompressionError, match=message):
        Compressor(**{"module": TinyModule(), "train_loader": train, "val_loader": val, **arguments}).config(
            recipe
        ).run()
    assert not Path("runs/small").exists()


def test_without_a_recipe_or_a_schedule_there_is_nothing_to_run(recipe):
    with pytest.raises(CompressionError, match="call config"):
        Compressor(TinyModule(), *loaders()).run()
    recipe.write_text("pruners: {by_l1: {class: StructurePruner}}")
    with pytest.raises(CompressionError, match="no compressor section"):
        Compressor(TinyModule(), *loaders()).config(recipe).run()


def test_a_strategy_that_is_not_listed_is_said_not_to_run(recipe):
    recipe.write_text(RECIPE.replace("strategies: [halve]", "strategies: []"))
    with pytest.warns(UserWarning, match="halve not listed under compressor.strategies"):
        Compressor(TinyModule(), *loaders()).config(recipe)


def test_a_pruned_checkpoint_can_be_the_start_of_the_next_run(recipe):
    Compressor(TinyModule("adam"), *loaders()).config(recipe).run()
    (first,) = Path("runs/small/checkpoints").glob("epoch*.ckpt")
    text = RECIPE.replace("epoch: 3,", f"epoch: 2, init_model: {first},").replace(
        "target_ratio: 0.5", "target_ratio: 0.2"
    )
    recipe.with_name("second.yaml").write_text(text)
    _, result = Compressor(TinyModule("adam"), *loaders()).config("second.yaml").run()
    one = json.loads(Path("runs/small/result.json").read_text())
    assert result["before"]["flops"] == one["after"]["flops"]
    loaded = load_compressed(TinyModule, next(Path("runs/second/checkpoints").glob("last.ckpt")))
    assert sum(p.numel() for p in loaded.parameters()) == result["after"]["params"]


def test_check_says_what_would_happen_and_trains_nothing(recipe, capsys):
    assert main(["check", str(recipe)]) == 0
    said = capsys.readouterr().out
    assert "halve: FLOPs" in said
    assert "net.stem.0" in said
    assert "not cut: net.head.3.weight" in said
    assert not Path("runs").exists()


def test_run_inspect_and_compare(recipe, capsys):
    assert main(["run", str(recipe), "--out", "a"]) == 0
    assert main(["run", str(recipe), "--out", "b", "--set", "strategies.halve.target_ratio=0.3"]) == 0
    capsys.readouterr()
    assert main(["compare", "a", "b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "a", "b"]
    assert "flops" in lines[0]
    assert main(["inspect", "a/checkpoints/last.ckpt"]) == 0
    said = capsys.readouterr().out
    assert "prune at epoch 1" in said
    assert "net.stem.0" in said
    assert main(["plugins"]) == 0
    assert ["UniformPruneStrategy", "strategy", "lightslim", "0.1.0"] in [
        line.split() for line in capsys.readouterr().out.splitlines()
    ]


BAD = [
    (["run", "missing.yaml"], "missing.yaml"),
    (["run", "small.yaml", "--set", "strategies.halve.target_ratoi=0.3"], "did you mean 'target_ratio'"),
    (["run", "small.yaml", "--set", "strategies.halve.target_ratio=1.5"], "target_ratio"),
    (["run", "small.yaml", "--set", "strategies.halve.start_epoch=3"], "start_epoch"),
    (["run", "small.yaml", "--set", "strategies.halve.metric_name=val_ac"], "did you mean 'val_acc'"),
    (["run", "small.yaml", "--set", "strategies.halve.pruned_params=nett.*"], "matches none"),
    (["run", "small.yaml", "--set", "model.class=tiny:TinyModul"], "did you mean 'TinyModule'"),
    (["run", "small.yaml", "--set", "data.batchsize=3"], "did you mean 'batch_size'"),
    (["run", "small.yaml", "--set", "data.folder=nowhere"], "nowhere"),
    (["run", "no_model.yaml"], "no model section"),
    (["run", "small.yaml", "--out", "small.yaml"], "cannot be written"),
    (["run", "small.yaml", "--out", "/proc/lightslim"], "cannot be written"),
    (["run", "small.yaml", "--resume", "nothing.ckpt"], "no such checkpoint"),
    (["run", "small.yaml", "--set", "trainer.accelerator=gpux"], "trainer: "),
    (["run", "small.yaml", "--set", "data.class=tiny:TinyModule"], "TinyModule is no LightningDataModule"),
    (["run", "small.yaml", "--resume", "weights.pt"], "no checkpoint to go on from"),
    (["run", "small.yaml", "--set", "compressor.checkpoint_path=/proc/zz"], "cannot be written"),
    (["run", "small.yaml", "--set", "strategies.halve.pruned_params='('"], "not a valid regular expression"),
    (["run", "small.yaml", "--set", "trainer.limit_train_batches=0"], "nothing to train"),
    (["inspect", "foreign.ckpt"], "no checkpoint that lightslim can read"),
    (["compare", "empty"], "not the result of a run"),
    (["inspect", "small.yaml"], "cannot be read as a checkpoint"),
    (["compare", "absent"], "not a finished run"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
@pytest.mark.filterwarnings("ignore:.*limit_train_batches.*", "ignore:`Trainer.fit` stopped")
def test_mistakes_end_in_one_line_and_leave_nothing(recipe, capsys, arguments, message):
    before = sorted(Path().rglob("*"))
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1]
    assert error[-1].startswith("lightslim: ")
    assert [path for path in sorted(Path().rglob("*")) if path not in before and "__pycache__" not in str(path)] == []


def test_runs_without_a_name_are_numbered(recipe):
    folders = []
    for resume in (None, None, "auto"):
        compressor = Compressor(TinyModule("adam"), *loaders()).config(recipe)
        compressor.run(resume=resume)
        folders.append(str(compressor.folder))
    assert folders == ["runs/small", "runs/small-2", "runs/small-2"]
    Path("deep").mkdir()
    renamed = Path("deep/recipe.yaml")
    renamed.write_text(RECIPE)
    compressor = Compressor(TinyModule("adam"), *loaders()).config(renamed)
    compressor.run()
    assert compressor.folder == Path("runs/deep")


def test_an_existing_run_is_not_overwritten(recipe, capsys):
    assert main(["run", str(recipe), "--out", "a"]) == 0
    result = Path("a/result.json").read_bytes()
    assert main(["run", str(recipe), "--out", "a"]) == 2
    assert "--resume auto" in capsys.readouterr().err
    assert main(["run", str(recipe), "--out", "a", "--resume", "auto"]) == 0
    assert Path("a/result.json").read_bytes() == result


@pytest.mark.filterwarnings("ignore:`Trainer.fit` stopped")
def test_a_run_that_was_stopped_after_its_last_step_is_finished(recipe):
    assert main(["run", str(recipe), "--out", "a"]) == 0
    whole = json.loads(Path("a/result.json").read_text())
    Path("a/result.json").unlink()
    assert main(["run", str(recipe), "--out", "a", "--resume", "auto"]) == 0
    assert {**json.loads(Path("a/result.json").read_text()), "seconds": whole["seconds"]} == whole


SLOW = """
import time
from tiny import TinyModule

class SlowModule(TinyModule):
    def on_train_epoch_start(self):
        time.sleep(0.5)
"""


def test_two_runs_do_not_write_into_one_folder(recipe, capsys):
    from lightslim.files import locked

    Path("out").mkdir()
    with locked(Path("out")):
        assert main(["run", str(recipe), "--out", "out"]) == 2
    assert "out: another process is writing there" in capsys.readouterr().err
    assert list(Path("out").iterdir()) == []
    assert main(["run", str(recipe), "--out", "out"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_goes_on_where_it_was(recipe, number):
    Path("slowmodel.py").write_text(SLOW)
    text = RECIPE.replace("tiny:TinyModule", "slowmodel:SlowModule").replace("epoch: 3,", "epoch: 6,")
    recipe.write_text(text.replace("start_epoch: 1", "start_epoch: 2"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}
    command = [sys.executable, "-m", "lightslim", "run", str(recipe), "--out", "a"]
    # Tests that a shell started in the background inherit a SIGINT that is ignored
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=heeding) as process:
        _wait_for(lambda: list(Path("a/checkpoints").glob("epoch=3*.ckpt")))
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Traceback" not in error
    assert not Path("a/result.json").exists()
    resumed = subprocess.run([*command, "--resume", "auto"], env=environment, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    result = json.loads(Path("a/result.json").read_text())
    assert result["strategies"][0]["history"][0]["epoch"] == 2
    assert result["after"]["flops"] / result["before"]["flops"] == pytest.approx(0.5, abs=0.01)


def _wait_for(condition, seconds: float = 60) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.05)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_a_loader_without_validation_still_runs(recipe):
    recipe.write_text(RECIPE.replace(", metric_name: val_acc", ""))
    _, result = Compressor(TinyModule(), DataLoader(images(), batch_size=16)).config(recipe).run()
    assert result["after"]["metrics"] == {}
    assert result["after"]["flops"] < result["before"]["flops"]
