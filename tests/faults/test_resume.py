"""A run of three strategies, killed twenty times at random moments, ends as one that was left alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Processes are forked from one that has imported everything; a timer kills them, wherever they are
SCRIPT = """
import itertools, json, os, random, signal, sys, time
from pathlib import Path
import pytorch_lightning as pl, torch
from tiny import TinyModule, loaders
from lightslim import (AtomicCheckpointIO, DistillationStrategy, QuantizationStrategy, SoftLabelDistiller,
                       UniformPruneStrategy)
from lightslim.checkpoints import newest_checkpoint
from lightslim.loading import read_checkpoint

def strategies():
    distiller = SoftLabelDistiller(student_feature_map="net.head", teacher_feature_map="net.head")
    return [
        UniformPruneStrategy(target_ratio=0.5, start_epoch=1),
        DistillationStrategy([distiller], teacher="self", start_epoch=2, end_epoch=5,
                             distiller_optimizer={"optimizer": "Adam", "lr": 0.01}),
        QuantizationStrategy(start_epoch=5, activation_quantize_type="moving_average_abs_max"),
    ]

def fit(folder):
    resume = newest_checkpoint(folder)
    pl.seed_everything(0 if resume is None else os.getpid(), verbose=False)
    saver = pl.callbacks.ModelCheckpoint(folder, "{epoch}", save_last=True, save_on_train_epoch_end=True)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=8, callbacks=[*strategies(), saver], logger=False, enable_progress_bar=False,
        enable_model_summary=False, plugins=[AtomicCheckpointIO()],
    )
    trainer.fit(TinyModule("adam"), *loaders(4), ckpt_path=resume)

def forked(folder, kill_after=None):
    child = os.fork()
    if not child:
        if kill_after is not None:
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            signal.setitimer(signal.ITIMER_REAL, kill_after)
        try:
            fit(folder)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def content(folder):
    found = read_checkpoint(folder / "last.ckpt")
    return {key: found[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "lightslim", "callbacks",
                                        "global_step")}

def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and bool(((a == b) | (a != a) & (b != b)).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a if "ModelCheckpoint" not in str(key))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or a != a and b != b

if __name__ == "__main__":
    root, kills = Path(sys.argv[1]), int(sys.argv[2])
    start = time.time()
    assert forked(root / "whole") == 0
    seconds, expected = time.time() - start, content(root / "whole")
    dice, delivered, ends = random.Random(0), 0, []
    for number in itertools.count():
        folder, before, again = root / f"run{number}", delivered, True
        while (code := forked(folder, dice.uniform(0.05, 0.85) * seconds if again else None)) != 0:
            assert code == -signal.SIGKILL, code
            delivered, again = delivered + 1, dice.random() < 0.2
        if delivered > before:  # else it was faster than its killer
            ends.append(equal(content(folder), expected))
        if len(ends) == kills:
            break
    print(json.dumps({"kills": delivered, "ends": ends}))
"""


@pytest.mark.slow
def test_twenty_kills_and_every_end_is_the_same(tmp_path, record_property):
    (tmp_path / "chain.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(tmp_path / "chain.py"), str(tmp_path), "20"],
        env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["kills"] >= 20
    assert len(found["ends"]) == 20
    assert all(found["ends"])
    record_property("runs killed that ended bitwise equal", f"{len(found['ends'])} ({found['kills']} kills)")
