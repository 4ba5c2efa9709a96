"""The benchmarks: how they measure, and that all of them run and stand in one table."""

import copy
import doctest
import importlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments.bench import agreement, paired, scale, table
from experiments.bench.__main__ import BENCHES
from lightslim.export import export
from lightslim.quantize import transform

ROOT = Path(__file__).parent.parent


def test_every_round_runs_every_step_and_the_first_does_not_count():
    calls = []
    seconds = paired.measure({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=4, repeats=2)
    assert {name: len(each) for name, each in seconds.items()} == {"a": 4, "b": 4, "c": 4}
    rounds = [sorted(calls[i : i + 6]) for i in range(0, len(calls), 6)]
    assert rounds == [["a", "a", "b", "b", "c", "c"]] * 5


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=20), st.floats(0.1, 10))
def test_a_ratio_is_taken_within_rounds(seconds, factor):
    found = paired.row("", {"ours": [factor * each for each in seconds], "other": seconds}, "ours", "other")
    assert found.ratio == pytest.approx(factor)
    assert found.spread == pytest.approx((factor, factor))


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30))
def test_an_interval_holds_the_median_and_lies_within_the_values(values):
    low, high = paired.interval(values, draws=200)
    assert min(values) <= low <= sorted(values)[len(values) // 2]
    assert sorted(values)[(len(values) - 1) // 2] <= high <= max(values)


@pytest.mark.parametrize(("spread", "verdict"), [((0.9, 1.2), ""), ((1.01, 1.2), "missed"), ((0.2, 0.3), "")])
def test_a_goal_is_missed_where_the_whole_interval_is_above_it(spread, verdict):
    assert table.cells("a", paired.Row("a", 1.0, 1.0, 1.0, spread, goal=1.0))[-1] == verdict


@pytest.mark.parametrize("module", ["paired", "table", "scale"])
def test_examples_run(module):
    found = doctest.testmod(importlib.import_module(f"experiments.bench.{module}"))
    assert found.attempted > 0
    assert found.failed == 0


def test_a_growing_network_is_cut_without_numbers_and_its_table_says_what_bounds_it(tmp_path):
    def grown(layers):
        net, x = scale.conv(layers, 16, "meta")
        found = scale.phases(net, x)
        assert net[0].weight.is_meta
        assert net[1].conv1.out_channels < 16
        return {
            "layers": layers,
            "parameters": 0,
            "peak MiB": 1.0,
            "narrow: prune() s": 1.0,
            **found,
            "narrow: sensitivity() s": 1.0 if layers < 4 else math.nan,
        }

    found = {"conv": [grown(2), grown(6)]}
    ops = [each["ops"] for each in found["conv"]]
    assert ops[1] - ops[0] == 2 * (ops[0] - scale.phases(*scale.conv(0, 16, "meta"))["ops"])
    text = scale.report(found)
    assert text.count("\n| conv |") == 2
    assert "nan" not in text
    assert "meta tensors" in text
    assert scale.draw(found, tmp_path / "scale.png") == (tmp_path / "scale.png").exists()


@pytest.mark.slow
def test_one_command_runs_all_and_writes_one_table(tmp_path):
    pytest.importorskip("onnxruntime")
    command = [sys.executable, "-m", "experiments.bench", "--quick", "--out", str(tmp_path / "bench.md")]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    text = (tmp_path / "bench.md").read_text()
    assert text == done.stdout
    lines = [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if line.startswith("|")][2:]
    assert {line[0].partition(":")[0] for line in lines} == set(BENCHES)
    for name, ours, other, ratio, *_ in lines:
        assert 0 < float(ratio) < math.inf, name
        assert min(float(value.split()[0].replace(",", "")) for value in (ours, other)) >= 0
    assert all(any("A/A" in line[-1] for line in lines if line[0].startswith(f"{name}:")) for name in BENCHES)
    assert "torch 2" in text.splitlines()[-1]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    net, data = transform(agreement.Mixed()), [(torch.randn(8, 1, 28, 28), torch.zeros(8)) for _ in range(2)]
    for x, _ in data:
        net(x)
    path = tmp_path_factory.mktemp("agreement") / "net.onnx"
    export(net.eval(), data[0][0], path, format="int8")
    return net, path, data


def test_codes_of_a_file_are_compared_with_the_models(exported):
    net, path, data = exported
    assert all(agreement.equal_codes(net, path))
    differing, total = agreement.codes_apart(net, path, data)
    assert differing < total / 100


def test_a_file_of_other_codes_is_seen(exported):
    net, path, data = exported
    other = copy.deepcopy(net)
    with torch.no_grad():
        dict(other.named_parameters())["left.0.weight"][0, 0, 0, 0].add_(0.1)
    assert not all(agreement.equal_codes(other, path))
    assert agreement.codes_apart(other, path, data)[0] > agreement.codes_apart(net, path, data)[0]
