"""Plugins as they really come: distributions on sys.path, good ones and broken ones."""

import importlib.metadata
import sys

import pytest

from lightslim import CompressionError, UniformPruneStrategy
from lightslim.registry import DISABLED, KINDS, Registry, load, registry

GOOD = """
from lightslim import hookimpl

def {name}(weight, axis=0):
    return weight

@hookimpl
def lightslim_register(registry):
    registry.add("criterion", {name})
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Write a distribution that brings one plugin module, and put it on sys.path."""
    modules = []

    def write(distribution: str, code: str, folder: str = "site") -> None:
        module = distribution.replace("-", "_")
        site = tmp_path / folder
        site.mkdir(exist_ok=True)
        (site / f"{module}.py").write_text(code)
        info = site / f"{module}-1.5.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(f"[lightslim]\n{module} = {module}\n")
        monkeypatch.syspath_prepend(site)
        modules.append(module)

    yield write
    for module in modules:
        sys.modules.pop(module, None)


def loaded() -> Registry:
    """What ``registry()`` would find now; its cache stays as it is."""
    return load(importlib.metadata.entry_points(group="lightslim"))


def test_our_own_components_come_by_the_same_door():
    assert registry() is registry()
    assert registry().get("strategy", "UniformPruneStrategy") is UniformPruneStrategy
    assert "lightslim" in {entry.distribution for entry in registry().entries()}
    assert registry().problems == []


def test_a_plugin_is_there_once_it_is_installed(install):
    install("slim-good", GOOD.format(name="mine"))
    found = loaded()
    assert found.get("criterion", "mine").__name__ == "mine"
    assert ("mine", "slim-good", "1.5") in [(e.name, e.distribution, e.version) for e in found.entries()]


BROKEN = {
    "import": ("raise RuntimeError('no luck')", "RuntimeError: no luck"),
    "exit": ("raise SystemExit(3)", "SystemExit: 3"),
    "signature": (
        "from lightslim import hookimpl\n@hookimpl\ndef lightslim_register(reg): pass",
        "PluginValidationError",
    ),
    "misspelt": ("from lightslim import hookimpl\n@hookimpl\ndef lightslim_registr(registry): pass", "unknown hook"),
    "unmarked": ("def lightslim_register(registry): pass", "marked with @hookimpl"),
    "half": (GOOD.format(name="half") + "    raise OSError('half way')", "OSError: half way"),
    "twice": (GOOD.format(name="half") * 2 + "    registry.add('criterion', half)", "but slim-broken already has"),
    "kind": (
        "from lightslim import hookimpl\n@hookimpl\ndef lightslim_register(registry): registry.add('criterium', max)",
        "did you mean 'criterion'",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plugin_is_named_and_hurts_nobody(install, kind):
    code, reason = BROKEN[kind]
    before = loaded().names("criterion")
    install("slim-broken", code)
    install("slim-good", GOOD.format(name="mine"))
    found = loaded()
    (problem,) = found.problems
    assert problem.distribution == "slim-broken"
    assert reason in problem.reason
    assert "\n" not in problem.reason
    assert found.names("criterion") == sorted([*before, "mine"])
    with pytest.raises(
        CompressionError, match=r"'half' is not a known criterion; .*\(not taken in: .* of slim-broken:"
    ):
        found.get("criterion", "half")


@pytest.mark.parametrize("order", [("slim-a", "slim-b"), ("slim-b", "slim-a")])
def test_a_name_that_two_packages_claim_is_refused_naming_both_and_the_cure(install, order):
    for distribution in order:
        install(distribution, GOOD.format(name="mine") + f'    registry.add("criterion", min, "{distribution}")')
    found = loaded()
    refusal = f"'mine' is claimed more than once, by slim-a and slim-b: uninstall one .*{DISABLED}=slim-b"
    with pytest.raises(CompressionError, match=refusal):
        found.get("criterion", "mine")
    assert found.get("criterion", "slim-a") is found.get("criterion", "slim-b") is min
    assert [problem.distribution for problem in found.problems] == ["slim-b"]
    assert [entry.distribution for entry in found.entries() if entry.name == "mine"] == ["slim-a", "slim-b"]


@pytest.mark.parametrize("rogue", ["slim-rogue", "a-rogue"])
def test_a_built_in_name_is_no_exception(install, rogue):
    install(rogue, GOOD.format(name="l1_norm"))
    found = loaded()
    with pytest.raises(CompressionError, match=f"'l1_norm' is claimed .* lightslim.*{DISABLED}={rogue}"):
        found.get("criterion", "l1_norm")
    assert found.get("strategy", "UniformPruneStrategy") is UniformPruneStrategy


@pytest.mark.parametrize("name", ["slim_rogue", "slim-rogue"])
def test_a_plugin_can_be_disabled_by_its_name_or_its_distributions(install, monkeypatch, name):
    install("slim-rogue", GOOD.format(name="l1_norm"))
    monkeypatch.setenv(DISABLED, f"other, {name}")
    assert loaded().get("criterion", "l1_norm").__module__ == "lightslim.prune.criteria"


def test_one_distribution_seen_twice_is_no_clash(install):
    install("slim-good", GOOD.format(name="mine"))
    install("slim-good", GOOD.format(name="mine"), folder="again")
    assert loaded().problems == []


def test_without_our_own_entry_point_the_cure_is_named():
    with pytest.raises(CompressionError, match=r"not installed.*pip install -e"):
        load([])


def test_a_name_that_is_taken_is_refused_naming_both():
    found = loaded()
    with pytest.raises(CompressionError, match="this program adds the criterion 'l1_norm', but lightslim already has"):
        found.add("criterion", max, "l1_norm")


def test_unknown_names_and_kinds_say_what_there_is():
    found = Registry()
    found.add("criterion", min)
    with pytest.raises(CompressionError, match="'mn' is not a known criterion; did you mean 'min'"):
        found.get("criterion", "mn")
    with pytest.raises(CompressionError, match="'criterium' is not a kind of component; did you mean 'criterion'"):
        found.add("criterium", max)
    assert set(KINDS) == {"strategy", "pruner", "criterion", "distiller", "range", "exporter"}
