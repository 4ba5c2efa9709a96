"""The zoo's table: read from finished runs, whole, and every row of it has a command that makes its runs."""

import doctest
import itertools
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from experiments import zoo
from lightslim.errors import CompressionError
from lightslim.export import export
from lightslim.recipe import Recipe

ROOT = Path(__file__).parent.parent
BASE = yaml.safe_load((ROOT / "experiments/mobilenet_v1_uniform/recipe.yaml").read_text())


def run(folder, accuracy, seed=0, **compressor):
    folder.mkdir(parents=True)
    after = {"metrics": {"val_acc": accuracy}, "flops": 1000, "params": 20, "bytes": 3000 + seed}
    (folder / "result.json").write_text(json.dumps({"seed": seed, "before": after, "after": after}))
    recipe = {**BASE, "compressor": {**BASE["compressor"], **compressor}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def page(folder):
    path = folder / "README.md"
    path.write_text(f"before\n{zoo.BEGIN}\nold\n{zoo.END}\nafter\n")
    return path


def test_seeds_are_averaged_files_timed_and_what_is_missing_is_said(tmp_path):
    for seed, accuracy in enumerate((0.9, 0.91, 0.95)):
        last = run(tmp_path / "runs" / f"grid/0.5/seed-{seed}", accuracy, seed)
    run(tmp_path / "runs" / "alone", 0.8, strategies=[])
    (last / "exports").mkdir()
    export(nn.Linear(4, 3), torch.zeros(1, 4), last / "exports" / "float.onnx", format="onnx")
    runs = zoo.find(tmp_path / "runs")
    text = zoo.table(runs, zoo.latencies(runs, rounds=3))
    alone, pruned = [line.strip("| ").split(" | ") for line in text.splitlines()[2:4]]
    assert alone[:7] == ["MobileNet V1", "baseline", "1", "80.00", "1,000", "20", "3,000"]
    assert pruned[:7] == ["MobileNet V1", "uniform -50 %", "3", "92.00 (90.00 .. 95.00)", "1,000", "20", "3,001"]
    assert float(pruned[8]) > 0
    assert pruned[7] == pruned[9] == ""
    assert "No runs yet of MobileNet V1: uniform -60 %" in text
    assert "ResNet-20: all." in text


def test_the_table_replaces_the_one_before_and_nothing_else(tmp_path):
    path = page(tmp_path)
    zoo.write(path, "one")
    zoo.write(path, "two")
    assert path.read_text() == f"before\n{zoo.BEGIN}\n\ntwo\n\n{zoo.END}\nafter\n"
    (tmp_path / "bare.md").write_text("nothing")
    with pytest.raises(CompressionError, match="has no lines"):
        zoo.write(tmp_path / "bare.md", "one")


def test_runs_that_do_not_belong_are_named_and_doubles_refused(tmp_path, capsys):
    run(tmp_path / "a", 0.9)
    other = run(tmp_path / "digits", 0.9)
    (other / "recipe.yaml").write_text(yaml.safe_dump({**BASE, "data": {"class": "experiments.data:Digits"}}))
    assert [each.folder.name for each in zoo.find(tmp_path)] == ["a"]
    assert "digits" in capsys.readouterr().err
    run(tmp_path / "b", 0.9)
    with pytest.raises(CompressionError, match=r"b and .*a are both mobilenet_v1, uniform -50 %, seed 0"):
        zoo.find(tmp_path)


def test_the_script_makes_every_row(tmp_path):
    """With commands that only note what they are given; each must be a recipe that parses."""
    log, tools = tmp_path / "log", tmp_path / "bin"
    tools.mkdir()
    for name, body in (("lightslim", f'printf "%s\\n" "$@" END >> {log}'), ("python", "true")):
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    subprocess.run([ROOT / "experiments" / "zoo.sh", tmp_path], check=True, env=environment)
    calls = [call.strip().split("\n") for call in log.read_text().split("END\n") if call]
    runs = {}
    for call in calls:
        settings = [call[i + 1] for i, word in enumerate(call) if word == "--set"]
        recipe = Recipe.from_yaml(ROOT / call[1], settings).resolved()
        assert recipe["trainer"]["limit_train_batches"] == 0.5
        given = recipe["compressor"].get("init_model"), recipe.get("teacher", {}).get("checkpoint")
        assert {str(Path(path).parents[1]) for path in given if path} <= runs.keys(), "made before"
        row = recipe["model"]["network"], zoo.method_of(recipe), recipe["compressor"]["seed"]
        runs[call[call.index("--out") + 1]] = row
    assert runs.pop(f"{tmp_path}-teacher") == ("resnet20", "baseline", 0)
    assert sorted(runs.values()) == sorted(itertools.product(zoo.NETWORKS, zoo.METHODS, range(3)))
    assert len(runs) == len(calls) - 1


def test_examples_run():
    found = doctest.testmod(zoo)
    assert found.attempted > 0
    assert found.failed == 0
