"""A file of sensitivities on a full or failing disk; a run whose disk is full, and goes on when it is not."""

import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightslim import CompressionError
from lightslim.loading import read_checkpoint
from lightslim.prune.sensitivity_file import SensitivityFile

ROOT = Path(__file__).parents[2]
RECIPE = """
model: {class: "experiments.models:ImageClassifier", network: resnet20, width: 0.25}
data: {class: "experiments.data:Digits", batch_size: 64}
trainer: {accelerator: cpu, limit_train_batches: 3, limit_val_batches: 1, enable_progress_bar: false}
strategies:
  cut:
    {class: SensitivePruneStrategy, start_epoch: 1, target_ratio: 0.5, metric_name: val_acc, delta_rate: 0.5,
     eval_rate: 0.05}
compressor: {epoch: 2, strategies: [cut], checkpoint_path: checkpoints}
"""


@pytest.fixture
def points(tmp_path):
    """A file as an analysis leaves it."""
    found = SensitivityFile(tmp_path / "s.json", {"metric": "val_acc"})
    found.baseline = 0.9375
    for layer in range(8):
        for percent in (20, 40, 60, 80):
            found.add(f"net.{layer}.weight", 16, percent / 100, round(0.001 * percent * layer, 6))
    return found


def test_a_full_disk_at_fifty_points_leaves_the_old_file(points, record_property):
    old = points.path.read_bytes()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for k in range(50):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (k * (len(old) - 1) // 49, hard))
            with pytest.raises(CompressionError, match=r"s\.json cannot be written"):
                points.save()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert points.path.read_bytes() == old
        assert [path.name for path in points.path.parent.iterdir()] == ["s.json"]
    record_property("sensitivities, full disks survived", "50 of 50")


def test_of_five_hundred_bit_flips_and_a_hundred_truncations_none_is_used(points, record_property):
    content, generator = points.path.read_bytes(), random.Random(0)
    damaged = [bytearray(content) for _ in range(500)]
    for copy in damaged:
        at = generator.randrange(8 * len(content))
        copy[at // 8] ^= 1 << at % 8
    refused = 0
    for bad in [*damaged, *(content[: generator.randrange(len(content))] for _ in range(100))]:
        points.path.write_bytes(bad)
        try:
            found = SensitivityFile(points.path, points.fingerprint)
        except CompressionError as error:
            refused += "s.json" in str(error)
        else:  # a space that has become another
            assert (found.baseline, found.sensitivities) == (points.baseline, points.sensitivities)
    assert refused >= 590
    record_property("sensitivities, damages refused", f"{refused} of 600; the others change no value")


def run(folder, *arguments, limit=None):
    """``lightslim run`` in ``folder``, no file of which may outgrow ``limit`` bytes."""
    command = [sys.executable, "-W", "ignore", "-m", "lightslim", "run", "recipe.yaml", *arguments]
    bound = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, preexec_fn=bound
    )


@pytest.mark.slow
def test_a_run_on_a_full_disk_says_so_and_goes_on_when_there_is_room(tmp_path, record_property):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assert run(tmp_path, "--out", "whole").returncode == 0
    expected = read_checkpoint(tmp_path / "whole" / "checkpoints" / "last.ckpt")["state_dict"]
    limits = (1_000, 20_000, 100_000)
    for limit in limits:
        full = run(tmp_path, "--out", f"full{limit}", limit=limit)
        assert full.returncode == 2
        assert "cannot be written: File too large" in full.stderr.splitlines()[-1]
        again = run(tmp_path, "--out", f"full{limit}", "--resume", "auto")
        assert again.returncode == 0, again.stderr
        found = read_checkpoint(tmp_path / f"full{limit}" / "checkpoints" / "last.ckpt")["state_dict"]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    record_property("runs on full disks that went on", f"{len(limits)} of {len(limits)}")
