"""The plugins that a recipe needs: what counts as there, and what is said of those that are not there."""

import pytest

from lightslim import CompressionError
from lightslim.recipe import Recipe, needs
from lightslim.registry import DISABLED, Registry, registry

RECIPE = """
plugins: [{plugin}]
strategies: {{halve: {{class: UniformPruneStrategy, target_ratio: 0.5}}}}
compressor: {{epoch: 2, strategies: [halve]}}
"""


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Reads a recipe that needs a plugin, where slim-half 1.5 and what lightslim has are installed."""
    found = Registry("slim-half", "1.5")
    found.add("criterion", max, name="half")
    monkeypatch.setattr(found, "entries", lambda own=found.entries: [*own(), *registry().entries()])
    monkeypatch.setattr(needs, "registry", lambda: found)

    def read(plugin):
        (tmp_path / "recipe.yaml").write_text(RECIPE.format(plugin=plugin))
        return Recipe.from_yaml(tmp_path / "recipe.yaml")

    return read


@pytest.mark.parametrize("plugin", ["slim-half", "Slim_HALF == 1.4", "lightslim"])
def test_one_that_is_there_is_enough_in_any_spelling_and_version(read, plugin):
    assert read(plugin).strategies()


@pytest.mark.parametrize("plugin", ["slim-half>=1.0", "slim half", "'slim-half[x]'", "==1.0", "''"])
def test_what_is_no_name_and_version_is_refused_as_that(read, plugin):
    with pytest.raises(CompressionError, match=r"recipe\.yaml:2: plugins\.0: .* is no plugin: NAME or NAME==VERSION"):
        read(plugin)


@pytest.mark.parametrize("word", ["slim-gone", "gone"])
def test_one_that_is_missing_and_one_that_is_disabled_have_other_cures(read, tmp_path, monkeypatch, word):
    monkeypatch.setenv(DISABLED, f"other, {word}")
    with pytest.raises(CompressionError, match=r"'slim-gone' is not installed: pip install slim-gone"):
        read("slim-gone==2.0")
    info = tmp_path / "slim_gone-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: slim-gone\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text("[lightslim]\ngone = slim_gone\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CompressionError, match=f"'slim-gone' is disabled: take it out of {DISABLED}"):
        read("slim-gone==2.0")
