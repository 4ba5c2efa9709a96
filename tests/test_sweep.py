"""Grids of runs: checked before anything trains, resumed where they were killed, compared over seeds."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightslim import CompressionError
from lightslim.cli import main
from lightslim.compare import Row, as_csv, as_markdown, find_runs, rows_of
from lightslim.pareto import front
from lightslim.sweep import grid

ROOT = Path(__file__).parents[1]
RECIPE = """
model: {class: "experiments.models:ImageClassifier", network: resnet20, width: 0.25}
data: {class: "experiments.data:Digits", batch_size: 64}
trainer: {accelerator: cpu, limit_train_batches: 2, limit_val_batches: 1, enable_progress_bar: false}
strategies: {halve: {class: UniformPruneStrategy, start_epoch: 1, target_ratio: 0.5, metric_name: val_acc}}
compressor: {epoch: 2, seed: 3, strategies: [halve]}
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
SWEEP = ["run", "recipe.yaml", "--sweep", "strategies.halve.target_ratio=0.3,0.5", "--seeds", "2", "--out", "all"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def test_a_grid_is_the_product_and_values_are_yaml():
    cells = grid(["a.b=1,[2,3]", "c.b='x,y', z"], seeds=[0, 1])
    assert [cell.settings for cell in cells][:3] == [
        ("a.b=1", "c.b='x,y'", "compressor.seed=0"),
        ("a.b=1", "c.b='x,y'", "compressor.seed=1"),
        ("a.b=1", "c.b=z", "compressor.seed=0"),
    ]
    assert len(cells) == len({cell.name for cell in cells}) == 8
    assert cells[-1].name == "a.b=2_3,c.b=z,seed=1"


@pytest.mark.parametrize("sweep", ["a.b", "=1", "a.b=", "a.b=[1", "a.b=1,1"])
def test_a_sweep_written_otherwise_is_refused(sweep):
    with pytest.raises(CompressionError, match="sweep"):
        grid([sweep])


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("strategies.halve.target_ratoi=0.3,0.5", "did you mean 'target_ratio'"),
        ("strategies.halv.target_ratio=0.3,0.5", "did you mean 'halve'"),
        ("strategies.halve.target_ratio=0.3,1.5", "1.5"),
        ("model.network=resnet20,resnet21", "resnet21"),
    ],
)
def test_a_mistake_in_one_run_stops_all_before_the_first(folder, capsys, sweep, message):
    assert main(["run", "recipe.yaml", "--sweep", sweep, "--out", "all"]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["recipe.yaml"]


def lightslim(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "lightslim", *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_a_sweep_killed_half_way_goes_on_where_it_was(folder):
    with subprocess.Popen(
        [sys.executable, "-m", "lightslim", *SWEEP], env=ENVIRONMENT, start_new_session=True
    ) as sweep:
        wanted = Path("all/target_ratio=0.3,seed=4/checkpoints")
        end = time.time() + 120
        while not list(wanted.glob("*.ckpt")):
            assert time.time() < end
            time.sleep(0.02)
        os.killpg(sweep.pid, signal.SIGKILL)
    first = Path("all/target_ratio=0.3,seed=3/result.json")
    before = first.read_bytes(), first.stat().st_mtime
    again = lightslim(*SWEEP)
    assert again.returncode == 0, again.stderr
    assert "[1/4] target_ratio=0.3,seed=3: finished before" in again.stdout
    assert (first.read_bytes(), first.stat().st_mtime) == before
    names = {path.name for path in Path("all").iterdir()}
    assert names == {f"target_ratio={ratio},seed={seed}" for ratio in (0.3, 0.5) for seed in (3, 4)}
    alone = lightslim("run", "recipe.yaml", "--set", "strategies.halve.target_ratio=0.3", "--set", "compressor.seed=4",
                      "--out", "alone")  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    killed, whole = (
        torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for path in (wanted.parent, Path("alone"))
    )
    assert killed.keys() == whole.keys()
    assert all(torch.equal(killed[name], whole[name]) for name in whole)
    rows = rows_of(find_runs([Path("all")])[0])
    assert [(row.name, row.runs) for row in rows] == [("all/target_ratio=0.3", 2), ("all/target_ratio=0.5", 2)]
    other = lightslim(*SWEEP, "--set", "compressor.epoch=3")
    assert other.returncode == 2
    assert "holds a run of other settings" in other.stderr


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_go_on(folder):
    (folder / "odd.py").write_text(
        "from experiments.models import ImageClassifier\n"
        "class Odd(ImageClassifier):\n"
        "    def training_step(self, batch, batch_idx):\n"
        "        if self.hparams.learning_rate > 0.5: raise RuntimeError('on purpose')\n"
        "        return super().training_step(batch, batch_idx)\n"
    )
    (folder / "recipe.yaml").write_text(RECIPE.replace("experiments.models:ImageClassifier", "odd:Odd"))
    run = lightslim("run", "recipe.yaml", "--sweep", "model.learning_rate=0.9,0.1", "--out", "all")
    assert run.returncode == 2
    assert "1 of 2 runs failed: learning_rate=0.9." in run.stderr.splitlines()[-1]
    assert find_runs([Path("all")]) == ([Path("all/learning_rate=0.1")], [Path("all/learning_rate=0.9")])


def finished(folder, seed, accuracy, ratio=0.5):
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(
        f"strategies: {{a: {{target_ratio: {ratio}}}}}\ncompressor: {{seed: {seed}, epoch: 2}}\n"
    )
    measured = {"metrics": {"acc": accuracy}, "flops": int(10_000 * (1 - ratio)), "params": 10, "bytes": 40}
    result = {"before": measured, "after": measured, "seconds": 1.5, "exports": {}, "strategies": []}
    (folder / "result.json").write_text(json.dumps(result))


def test_seeds_are_one_row_with_mean_and_spread(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for ratio, base in ((0.25, 0.9), (0.5, 0.8), (0.75, 0.85)):
        for seed in range(4):
            finished(Path(f"runs/r{ratio}-seed{seed}"), seed, base + 0.01 * seed, ratio)
    Path("runs/begun").mkdir()
    Path("runs/begun/recipe.yaml").write_text("{}")
    assert main(["compare", "runs", "--out", "t.md", "--out", "t.csv", "--out", "t.png"]) == 0
    said = capsys.readouterr()
    assert "runs/r0.5       4  0.8150 ± 0.0129  5,000" in said.out
    assert "not finished: runs/begun" in said.err
    assert "| runs/r0.5 | 4 | 0.8150 ± 0.0129 | 5,000 |" in Path("t.md").read_text()
    lines = Path("t.csv").read_text().splitlines()
    assert lines[0].startswith("run,seeds,acc,acc std,flops")
    assert lines[2].startswith("runs/r0.5,4,0.81")
    assert len(lines) == 4
    assert Path("t.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "runs", "--out", "t.txt"], ".md, .csv, .png"),
        (["compare", "runs", "--out", "t.png", "--x", "flop"], "did you mean 'flops'"),
        (["compare", "nowhere"], "nowhere holds no result.json"),
        (["run", "recipe.yaml", "--seeds", "0"], "--seeds 0"),
        (["run", "recipe.yaml", "--seeds", "2", "--resume", "auto"], "--resume is for one run"),
    ],
)
def test_mistakes_are_said_and_write_nothing(folder, capsys, arguments, message):
    finished(Path("runs/a"), 0, 0.5)
    before = sorted(folder.rglob("*"))
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before


points = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=12)


@given(points, st.booleans())
def test_the_front_is_what_nothing_beats(found, maximize):
    def beats(a, b):
        better = a[1] >= b[1] if maximize else a[1] <= b[1]
        return a != b and a[0] <= b[0] and better

    line = front(found, maximize)
    assert set(line) == {point for point in found if not any(beats(other, point) for other in found)}
    assert line == sorted(line)


def test_a_column_that_some_runs_lack_is_empty_there():
    rows = [Row("a", 1, {"acc": [0.5], "int8 bytes": [10]}), Row("b", 1, {"acc": [0.25]})]
    assert as_markdown(rows).splitlines()[3] == "| b | 0.2500 |  |"
    assert as_csv(rows).splitlines()[2] == "b,1,0.25,"
