"""Each package under plugins/, as its user has it: installed, found by name, run, resumed, exported, and missed."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLUGINS = sorted(path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml"))
pytestmark = [pytest.mark.slow, pytest.mark.parametrize("plugin", PLUGINS, ids=lambda path: path.name)]

RECIPE = """
model: {class: "experiments.models:ImageClassifier", network: resnet20, width: 0.25}
data: {class: "experiments.data:Digits", batch_size: 128}
trainer: {accelerator: cpu, enable_progress_bar: false, enable_model_summary: false, limit_val_batches: 1}
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder into which a plugin has been installed, by its own build backend."""
    folders = {}

    def install(plugin):
        if plugin not in folders:
            folders[plugin] = tmp_path_factory.mktemp(plugin.name)
            command = [*PIP, "install", "-q", "--no-deps", "--target", str(folders[plugin]), str(plugin)]
            run = subprocess.run(command, capture_output=True, text=True, timeout=600)
            assert run.returncode == 0, run.stderr
        return folders[plugin]

    return install


PIP = [sys.executable, "-m", "pip"]


def command(*arguments, folder=None, where=None, **environment):
    """Run a module of this interpreter from ``where``, with or without what is installed in ``folder``."""
    paths = [str(ROOT), str(ROOT / "tests"), *([str(folder)] if folder else [])]
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], cwd=where or ROOT, capture_output=True, text=True, timeout=900,
        env={**os.environ, "PYTHONPATH": ":".join(paths), "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def test_its_own_tests_and_its_card_pass(plugin, installed, tmp_path):
    where = [plugin / "tests", installed(plugin) / module_of(plugin), ROOT / "tests" / "test_docs.py"]
    run = command("pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *where, "-k", f"not test_docs or {plugin.name}",
                  folder=installed(plugin))  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    assert " skipped" not in run.stdout


def module_of(plugin):
    points = tomllib.loads((plugin / "pyproject.toml").read_text())["project"]["entry-points"]["lightslim"]
    (module,) = points.values()
    return module


def test_it_runs_in_a_recipe_resumes_and_exports_and_is_missed_when_it_is_gone(plugin, installed, tmp_path):
    folder, recipe = installed(plugin), tmp_path / "recipe.yaml"
    example = plugin / "tests" / "example.yaml"
    recipe.write_text(RECIPE + example.read_text())
    listed = command("lightslim", "plugins", folder=folder)
    assert plugin.name in listed.stdout
    run = command(
        "lightslim", "run", recipe, "--out", "out", "--set", "compressor.epoch=2", folder=folder, where=tmp_path
    )
    assert run.returncode == 0, run.stderr
    again = command("lightslim", "run", recipe, "--out", "out", "--resume", "auto", folder=folder, where=tmp_path)
    assert again.returncode == 0, again.stderr
    acts = [
        record
        for one in json.loads((tmp_path / "out/result.json").read_text())["strategies"]
        for record in one["history"]
    ]
    assert acts[0]["epoch"] == 1, "what the stopped run did is not done again"
    assert json.loads((tmp_path / "out/result.json").read_text())["versions"][plugin.name] == "0.1.0"
    checkpoint = tmp_path / "out/checkpoints/last.ckpt"
    written = command("lightslim", "export", checkpoint, "--as", "float", "float.pt", folder=folder, where=tmp_path)
    assert written.returncode == 0, written.stderr
    assert (tmp_path / "float.pt").stat().st_size > 10_000

    gone = command("lightslim", "run", recipe, "--out", "other", where=tmp_path)
    assert gone.returncode == 2
    assert "is not a known" in gone.stderr
    assert not (tmp_path / "other").exists()
    kept = command("lightslim", "check", "out/recipe.yaml", where=tmp_path)
    assert kept.returncode == 2
    assert f"the plugin '{plugin.name}' is not installed: pip install {plugin.name}" in kept.stderr
