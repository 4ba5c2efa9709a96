"""What needs neither torch nor Lightning runs without them; the public names are there when they are asked for."""

import importlib
import subprocess
import sys
from importlib.machinery import FileFinder, SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_sweep import finished

import lightslim
import lightslim.api
from lightslim.onimport import when_imported

ROOT = Path(__file__).parent.parent
WITHOUT = """
import sys
sys.modules.update({"torch": None, "pytorch_lightning": None, "tensorboard": None})
from lightslim.cli import main
"""


def python(code, *arguments, cwd=ROOT):
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


def test_runs_are_compared_without_torch(tmp_path):
    folders = [tmp_path / f"seed={seed}" for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        finished(folder, seed, 0.5 + seed / 4)
    out = [f"--out={tmp_path / name}" for name in ("table.md", "table.csv", "picture.png")]
    done = python(f"{WITHOUT}raise SystemExit(main(sys.argv[1:]))", "compare", *folders, *out)
    assert done.returncode == 0, done.stderr
    assert "0.6250 ± 0.1768" in done.stdout
    assert "0.6250 ± 0.1768" in (tmp_path / "table.md").read_text()
    assert "0.625" in (tmp_path / "table.csv").read_text()
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["run", "--help"], 0), (["rum"], 2), ([], 2)])
def test_help_and_typos_are_answered_without_torch(arguments, status):
    done = python(f"{WITHOUT}raise SystemExit(main(sys.argv[1:]))", *arguments)
    assert done.returncode == status
    assert "usage: lightslim" in done.stdout + done.stderr


def test_every_public_name_is_the_one_of_its_home():
    assert set(lightslim.__all__) == set(lightslim.api.__all__)
    assert set(lightslim.__all__) <= set(dir(lightslim))
    for name in lightslim.__all__:
        assert getattr(lightslim, name) is getattr(lightslim.api, name)


@pytest.mark.parametrize("name", ["Compresor", "__wrapped__", "_private", "__main__", "lightning", "compare.nothing"])
def test_a_name_that_is_not_there_is_an_attribute_error(monkeypatch, name):
    monkeypatch.delattr(lightslim, name, raising=False)  # a module that another test imported is there
    with pytest.raises(AttributeError, match=f"module 'lightslim' has no attribute '{name}'"):
        getattr(lightslim, name)


@pytest.mark.slow
def test_names_and_modules_come_when_asked_for():
    done = python("""
import sys, lightslim
assert "torch" not in sys.modules
assert lightslim.yamlfile.dump([1]) == "- 1\\n" and "torch" not in sys.modules
assert lightslim.prune.prune
from lightslim import *
assert Compressor is lightslim.Compressor and hookimpl
""")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("first", ["lightslim", "pytorch_lightning.cli"])
def test_the_command_line_of_lightning_finds_the_strategies_whichever_is_imported_first(first):
    pytest.importorskip("jsonargparse")
    second = {"lightslim": "pytorch_lightning.cli", "pytorch_lightning.cli": "lightslim"}[first]
    code = f"import {first}, {second}, pytorch_lightning as pl; print([c.__name__ for c in subclasses(pl.Callback)])"
    subclasses = "def subclasses(kind): return [kind, *(c for k in kind.__subclasses__() for c in subclasses(k))]\n"
    done = python(subclasses + code)
    assert "UniformPruneStrategy" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("first", ["lightslim", "torch"])
def test_the_operators_are_there_whichever_is_imported_first(first):
    second = {"lightslim": "torch", "torch": "lightslim"}[first]
    done = python(f"""
import sys, {first}, {second}
print(torch.ops.lightslim.fake_quant(torch.tensor([0.4, 3.0]), torch.tensor(1.0), None, 2).tolist())
assert "pytorch_lightning" not in sys.modules
assert torch.__loader__ is torch.__spec__.loader and type(torch.__loader__).__module__.startswith("_frozen")
""")
    assert done.stdout == "[0.0, 1.0]\n", done.stderr


def test_what_is_put_in_the_place_of_a_name_stays(monkeypatch):
    monkeypatch.setattr(lightslim, "load_compressed", "another")
    assert not hasattr(lightslim, "nothing")
    assert lightslim.load_compressed == "another"


@pytest.mark.parametrize("last", [True, False])
def test_an_act_follows_its_module_and_is_done_once(monkeypatch, tmp_path, last):
    """Wherever the module is found: by the last of all finders, or by the one right behind."""
    name = f"awaited_{last}"
    (tmp_path / f"{name}.py").write_text("VALUE = 1\n")
    finders = list(sys.meta_path)
    if last:
        monkeypatch.syspath_prepend(tmp_path)
    else:
        finder = FileFinder(str(tmp_path), (SourceFileLoader, [".py"]))
        finders.insert(0, SimpleNamespace(find_spec=lambda name, path, target=None: finder.find_spec(name)))
    monkeypatch.setattr(sys, "meta_path", finders)
    acts = []
    when_imported(name, lambda: acts.append(sys.modules[name].VALUE))
    assert find_spec(name).loader.is_package(name) is False
    assert acts == []
    for _ in range(2):
        sys.modules.pop(name, None)
        module = importlib.import_module(name)
        assert isinstance(module.__loader__, SourceFileLoader)
        assert module.__spec__.loader is module.__loader__
    assert acts == [1]
