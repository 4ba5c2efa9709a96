"""A plugin from its folder to a run: installed, listed, trained with, resumed, exported, removed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_compressor import DATA

ROOT = Path(__file__).parent.parent
TAYLOR = ROOT / "plugins" / "lightslim-taylor"
RECIPE = """
model: {class: "tiny:TinyModule", optimizer: adam}
data: {class: "tinydata:Quadrants"}
trainer:
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
  - class: "pytorch_lightning.callbacks:ModelCheckpoint"
    dirpath: kept
    filename: "{epoch}"
    save_top_k: -1
    mode: max
pruners: {by_taylor: {class: StructurePruner, criterions: {"*": taylor}}}
strategies: {halve: {class: UniformPruneStrategy, pruner: by_taylor, start_epoch: 1, target_ratio: 0.5}}
compressor: {epoch: 2, strategies: [halve]}
"""


@pytest.fixture
def place(tmp_path):
    """A folder with a recipe, and a run of Python there that finds what is installed in ``site``."""
    (tmp_path / "tinydata.py").write_text(DATA)
    (tmp_path / "small.yaml").write_text(RECIPE)

    def python(*arguments, status=0):
        path = os.pathsep.join(map(str, [tmp_path / "site", ROOT, ROOT / "tests", tmp_path]))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == status, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    return python


@pytest.mark.slow
def test_taylor_is_installed_runs_resumes_exports_and_is_missed_once_removed(place, tmp_path):
    source = shutil.copytree(TAYLOR, tmp_path / "source")  # building leaves files behind
    pip = ("pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    place(*pip, "--target", str(tmp_path / "site"), str(source))
    assert any(line.split()[:3] == ["taylor", "criterion", "lightslim-taylor"] for line in
               place("lightslim", "plugins").splitlines())  # fmt: skip

    place("lightslim", "run", "small.yaml", "--out", "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["versions"]["lightslim-taylor"] == "0.1.0"
    assert result["after"]["flops"] < 0.6 * result["before"]["flops"]
    assert "lightslim-taylor==0.1.0" in (tmp_path / "run" / "recipe.yaml").read_text()
    place("lightslim", "export", "run/checkpoints/epoch=1.ckpt", "--as", "float", "model.pt")

    place("lightslim", "run", "small.yaml", "--out", "again", "--resume", "kept/epoch=0.ckpt")
    resumed = json.loads((tmp_path / "again" / "result.json").read_text())
    assert resumed["after"] == result["after"]

    shutil.rmtree(tmp_path / "site")
    for command in (
        ("check", "run/recipe.yaml"),
        ("export", "run/checkpoints/epoch=1.ckpt", "--as", "float", "no.pt"),
    ):
        said = place("lightslim", *command, status=2)
        assert "plugins.0: the plugin 'lightslim-taylor' is not installed: pip install lightslim-taylor" in said
    assert "'taylor' is not a known criterion" in place("lightslim", "check", "small.yaml", status=2)
    assert not (tmp_path / "no.pt").exists()
