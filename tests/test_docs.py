"""Every Python block of the README and the cards runs; every recipe in them parses."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Cards of plugins, where they are installed: test_plugins.py does that
PLUGINS = [page for page in sorted(ROOT.glob("plugins/*/README.md")) if find_spec(page.parent.name.replace("-", "_"))]
PAGES = [ROOT / "README.md", ROOT / "README.zh.md", *sorted(ROOT.glob("lightslim/**/README.md")), *PLUGINS]
BLOCKS = [(page, language, block) for page in PAGES
          for language, block in re.findall(r"```(python|yaml)\n(.*?)```", page.read_text(), re.S)]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*val_dataloader.*", "ignore:.*You defined.*", "ignore:asked to remove")
@pytest.mark.parametrize(
    ("page", "block"),
    [(p, b) for p, language, b in BLOCKS if language == "python"],
    ids=lambda x: x.parent.name if isinstance(x, Path) else "",
)
def test_python_blocks_run(page, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(page), "exec"), {"__name__": "__main__", **_given(tmp_path, page)})


def _given(tmp_path, page):
    """What the pages take as known: a module, its loaders, a recipe (the page's own first one, if it has any)."""
    from tiny import TinyModule, loaders

    from lightslim import Compressor

    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    train, val = loaders()
    recipe = (
        "strategies: {halve: {class: UniformPruneStrategy, target_ratio: 0.5}}\n"
        "compressor: {epoch: 1, strategies: [halve]}\n"
    )
    own = (block for of, language, block in BLOCKS if (of, language) == (page, "yaml"))
    (tmp_path / "compress.yaml").write_text(next(own, recipe))
    return {"Compressor": Compressor, "module": TinyModule(), "train_loader": train, "val_loader": val}


@pytest.mark.parametrize(
    ("page", "block"),
    [(p, b) for p, language, b in BLOCKS if language == "yaml"],
    ids=lambda x: x.parent.name if isinstance(x, Path) else "",
)
def test_recipes_parse(page, block, tmp_path, monkeypatch):
    from lightslim.recipe import Recipe

    monkeypatch.chdir(ROOT)
    (tmp_path / "recipe.yaml").write_text(block)
    Recipe.from_yaml(tmp_path / "recipe.yaml")


def test_the_chinese_page_shows_the_seeds_recipe_word_for_word():
    """Whose recipes, as they were published, are kept in tests/recipes."""
    (shown,) = [block for page, language, block in BLOCKS if (page.name, language) == ("README.zh.md", "yaml")]
    for name in ("pruners", "two_steps", "compress_pass"):
        assert (ROOT / "tests" / "recipes" / f"{name}.yaml").read_text() in shown


@pytest.mark.parametrize(
    "card",
    [*(ROOT / "lightslim" / family / "README.md" for family in ("prune", "quantize", "distill")),
     *ROOT.glob("plugins/*/README.md")],
    ids=lambda card: card.parent.name,
)  # fmt: skip
def test_a_card_says_what_one_wants_to_know(card):
    headings = re.findall(r"^## (.*)", card.read_text(), re.M)
    wanted = {"Three ways to call it", "What to expect", "Suggested settings", "When not to use it", "Sources"}
    assert wanted <= set(headings)


def test_links_lead_somewhere():
    for page in [*PAGES, *ROOT.glob("experiments/**/README.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_ci_runs_the_readmes_test_command():
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert ["lightslim run" in block for block in blocks] == [True, False]
    assert ["pytest" in block for block in blocks] == [False, True]
