"""Every Python block of the README and the cards runs; every recipe in them parses."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("lightslim/**/README.md"))]
BLOCKS = [(page, language, block) for page in PAGES
          for language, block in re.findall(r"```(python|yaml)\n(.*?)```", page.read_text(), re.S)]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*val_dataloader.*", "ignore:.*You defined.*", "ignore:asked to remove")
@pytest.mark.parametrize(
    ("page", "block"),
    [(p, b) for p, language, b in BLOCKS if language == "python"],
    ids=lambda x: getattr(x, "name", ""),
)
def test_python_blocks_run(page, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(page), "exec"), {"__name__": "__main__", **_given(tmp_path)})


def _given(tmp_path):
    """What the pages take as known: a module, its loaders, a recipe."""
    from tiny import TinyModule, loaders

    from lightslim import Compressor

    train, val = loaders()
    (tmp_path / "compress.yaml").write_text(
        "strategies: {halve: {class: UniformPruneStrategy, target_ratio: 0.5}}\n"
        "compressor: {epoch: 1, strategies: [halve]}\n"
    )
    return {"Compressor": Compressor, "module": TinyModule(), "train_loader": train, "val_loader": val}


@pytest.mark.parametrize(
    ("page", "block"), [(p, b) for p, language, b in BLOCKS if language == "yaml"], ids=lambda x: getattr(x, "name", "")
)
def test_recipes_parse(page, block, tmp_path, monkeypatch):
    from lightslim.recipe import Recipe

    monkeypatch.chdir(ROOT)
    (tmp_path / "recipe.yaml").write_text(block)
    Recipe.from_yaml(tmp_path / "recipe.yaml")


def test_ci_runs_the_readmes_test_command():
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert ["lightslim run" in block for block in blocks] == [True, False]
    assert ["pytest" in block for block in blocks] == [False, True]
