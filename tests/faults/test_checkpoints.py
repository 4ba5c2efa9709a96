"""Checkpoints that are killed while written, run out of disk, or are damaged: none is loaded without a word."""

import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from tiny import TinyModule, loaders

from lightslim import CompressionError, UniformPruneStrategy
from lightslim.checkpoints import AtomicCheckpointIO, newest_checkpoint
from lightslim.loading import read_checkpoint

ROOT = Path(__file__).parents[2]

SAVES = """
import sys, torch
from pathlib import Path
from lightslim.checkpoints import AtomicCheckpointIO
print("ready", flush=True)
number = 0
while True:
    content = {"number": number, "state_dict": {"weight": torch.full((400_000,), float(number))}}
    AtomicCheckpointIO().save_checkpoint(content, Path(sys.argv[1]) / "last.ckpt")
    number += 1
"""


@pytest.fixture
def checkpoint(tmp_path):
    """One of a run that has pruned."""
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[UniformPruneStrategy(target_ratio=0.5, start_epoch=1)],
        plugins=[AtomicCheckpointIO()],
    )  # fmt: skip
    trainer.fit(TinyModule("adam"), *loaders())
    trainer.save_checkpoint(tmp_path / "run" / "last.ckpt")
    return tmp_path / "run" / "last.ckpt"


def equal(a, b):
    """Whether two checkpoints hold the same values."""
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.slow
def test_twenty_kills_while_saving_leave_readable_checkpoints(tmp_path, record_property):
    elsewhere = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(elsewhere)}
    generator = random.Random(0)
    for _ in range(20):
        command = [sys.executable, "-c", SAVES, str(tmp_path)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(generator.uniform(0.05, 0.3))
            process.kill()
        found = read_checkpoint(tmp_path / "last.ckpt")
        assert bool((found["state_dict"]["weight"] == found["number"]).all())
        assert len(list(tmp_path.iterdir())) <= 2
    AtomicCheckpointIO().save_checkpoint({}, tmp_path / "last.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    record_property("checkpoints, kills survived while saving", "20 of 20")


def test_a_full_disk_at_fifty_points_leaves_the_old_checkpoint(checkpoint, record_property):
    old, size = checkpoint.read_bytes(), checkpoint.stat().st_size
    content = read_checkpoint(checkpoint)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for k in range(50):
        try:
            # SIGXFSZ is ignored by Python: a write beyond the limit fails like one on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (k * (size - 1) // 49, hard))
            with pytest.raises(CompressionError, match=r"last\.ckpt cannot be written"):
                AtomicCheckpointIO().save_checkpoint(content, checkpoint)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert checkpoint.read_bytes() == old
        assert [path.name for path in checkpoint.parent.iterdir()] == ["last.ckpt"]
    record_property("checkpoints, full disks survived", "50 of 50")


@pytest.mark.slow
def test_of_five_hundred_bit_flips_and_a_hundred_truncations_none_is_loaded_silently(checkpoint, record_property):
    content, expected, generator = checkpoint.read_bytes(), read_checkpoint(checkpoint), random.Random(0)
    flips = [generator.randrange(8 * len(content)) for _ in range(500)]
    damaged = [bytearray(content) for _ in flips]
    for copy, bit in zip(damaged, flips, strict=True):
        copy[bit // 8] ^= 1 << bit % 8
    cut = [content[: generator.randrange(len(content))] for _ in range(100)]
    refused = 0
    for bad in [*damaged, *cut]:
        checkpoint.write_bytes(bad)
        try:
            loaded = AtomicCheckpointIO().load_checkpoint(checkpoint, weights_only=True)
        except CompressionError as error:
            refused += "last.ckpt" in str(error)
        else:  # what holds no value, as a time or a padding
            assert equal(loaded, expected)
    assert refused >= 400
    record_property("checkpoints, damages refused", f"{refused} of 600; the others change no value")


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_taken(checkpoint):
    before = checkpoint.with_name("epoch=1.ckpt")
    shutil.copy(checkpoint, before)
    half = checkpoint.read_bytes()
    checkpoint.write_bytes(half[: len(half) // 2])
    (checkpoint.parent / ".epoch=2.partial.ckpt").write_bytes(half[:100])
    with pytest.warns(UserWarning, match=r"last\.ckpt cannot be read .*looking for the one before"):
        assert newest_checkpoint(checkpoint.parent) == before
    before.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="cannot be read"),
        pytest.raises(CompressionError, match="none of the 2 checkpoints there can be read"),
    ):
        newest_checkpoint(checkpoint.parent)
    assert newest_checkpoint(checkpoint.parent / "nowhere") is None
