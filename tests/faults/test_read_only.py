"""Folders that a user may read and not write: said before anything trains, and nothing in them changes."""

import contextlib
import os
import tempfile
from pathlib import Path

import pytest
import torch

from lightslim.cli import main

NOBODY = 65534
RECIPE = """
model: {class: "experiments.models:ImageClassifier", network: resnet20, width: 0.25}
data: {class: "experiments.data:Digits", batch_size: 64}
trainer: {accelerator: cpu, limit_train_batches: 2, limit_val_batches: 1, enable_progress_bar: false, logger: false}
strategies: {ONE: {start_epoch: 0, STRATEGY}}
compressor: {epoch: 2, seed: 3, strategies: [ONE]}
"""


@contextlib.contextmanager
def nobody():
    """Who may write everywhere becomes, for the time being, somebody who may not."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def places():
    """A folder that everybody may read, and one where everybody may write."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        locked, free = root / "locked", root / "free"
        for path in (locked, free):
            path.mkdir()
        free.chmod(0o777)
        yield locked, free


STRATEGIES = {
    "quantize": "class: QuantizationStrategy, float_model_save_path: FILE",
    "halve": "class: SensitivePruneStrategy, target_ratio: 0.5, metric_name: val_acc, sensitivities_file: FILE",
}


def recipe(folder: Path, one: str, file: Path | str = "file") -> str:
    path = folder / f"{one}.yaml"
    path.write_text(RECIPE.replace("STRATEGY", STRATEGIES[one]).replace("FILE", str(file)).replace("ONE", one))
    return str(path)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_locked_folder_is_named_and_stays_as_it_was(places, capsys):
    locked, free = places
    given, run = recipe(free, "quantize"), locked / "run"
    # Everything that is imported on the way is imported now: nobody may not read every environment
    assert main(["run", given, "--out", str(run)]) == 0
    assert main(["compare", str(run), "--out", str(free / "table.md")]) == 0
    for path in (locked, *locked.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = contents(locked)
    attempts = {
        "a new run": ["run", given, "--out", str(locked / "new")],
        "a run that goes on": ["run", given, "--out", str(run), "--resume", "auto"],
        "its table": ["compare", str(run), "--out", str(locked / "table.md")],
        "a plugin": ["plugins", "new", "thing", "--out", str(locked)],
        "sensitivities": ["sensitivity", recipe(free, "halve"), "--out", str(locked / "file.json")],
        "an export at the end": ["run", recipe(free, "quantize", locked / "model.pt"), "--out", str(free / "a")],
        "an analysis in the middle": ["run", recipe(free, "halve", locked / "s.json"), "--out", str(free / "b")],
    }
    capsys.readouterr()
    for what, arguments in attempts.items():
        with nobody():
            assert main(arguments) == 2, what
        said = capsys.readouterr().err
        assert str(locked) in said, (what, said)
        assert "cannot be written" in said, (what, said)
    assert contents(locked) == before
    assert not (free / "a").exists()
    assert not (free / "b").exists()
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 1
