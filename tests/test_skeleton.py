"""`lightslim plugins new`: each kind, installed for real, is listed and passes its own tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightslim import CompressionError
from lightslim.cli import main
from lightslim.registry import KINDS
from lightslim.skeleton import new_plugin

ROOT = Path(__file__).parent.parent


def run(*command, folder, site):
    environment = {**os.environ, "PYTHONPATH": f"{site}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_installs_is_listed_and_passes_its_own_tests(tmp_path, capsys, kind):
    assert main(["plugins", "new", "lightslim-my-own", "--kind", kind, "--out", str(tmp_path)]) == 0
    folder, site = tmp_path / "lightslim-my-own", tmp_path / "site"
    assert str(folder) in capsys.readouterr().out
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    run(*pip, "--target", str(site), str(folder), folder=tmp_path, site=site)
    listed = run("-m", "lightslim", "plugins", folder=tmp_path, site=site)
    assert [line.split()[1] for line in listed.splitlines() if "lightslim-my-own" in line] == [kind]
    passed = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", folder=folder, site=site)
    assert "failed" not in passed
    recipe = (folder / "README.md").read_text().split("```yaml\n")[1].split("```")[0]
    (tmp_path / "recipe.yaml").write_text(recipe)
    read = "from lightslim.recipe import Recipe; print(len(Recipe.from_yaml('recipe.yaml').strategies()))"
    assert run("-c", read, folder=tmp_path, site=site).strip() == "1"


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("Lightslim_Mine", "lightslim-mine"),
        ("my criterion!", "lightslim-my-criterion"),
        ("../evil", "lightslim-evil"),
        ("lightslim", "lightslim-my-plugin"),
        ("lightslim-class", "lightslim-my-class"),
        ("json", "lightslim-my-json"),
        ("lightslim-l1-norm", "lightslim-my-l1-norm"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused_with_the_nearest(tmp_path, name, right):
    with pytest.raises(CompressionError, match=f"did you mean '{right}'"):
        new_plugin(name, "criterion", tmp_path)
    assert not list(tmp_path.iterdir())
    assert new_plugin(right, "criterion", tmp_path).is_dir()


def test_an_unknown_kind_and_a_folder_that_exists_are_refused(tmp_path):
    with pytest.raises(CompressionError, match="did you mean 'criterion'"):
        new_plugin("lightslim-mine", "criterium", tmp_path)
    (tmp_path / "lightslim-mine").mkdir()
    with pytest.raises(CompressionError, match="is there already"):
        new_plugin("lightslim-mine", "criterion", tmp_path)
    assert not list((tmp_path / "lightslim-mine").iterdir())


def test_nothing_is_half_written(tmp_path, monkeypatch):
    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(CompressionError, match="No space left"):
            new_plugin("lightslim-mine", "criterion", tmp_path)
    assert not list(tmp_path.iterdir())
