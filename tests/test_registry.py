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
        monkeypatch.delitem(sys.modules, module, raising=False)

    return write


def loaded() -> Registry:
    return load(importlib.metadata.entry_points(group="lightslim"))


def test_our_own_components_come_by_the_same_door():
    assert registry().get("strategy", "UniformPruneStrategy") is UniformPruneStrategy
    assert {entry.distribution for entry in registry().entries()} == {"lightslim"}
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
    "half": (
        GOOD.format(name="half") + "    raise OSError('half way')",
        "OSError: half way",
    ),
    "kind": (
        "from lightslim import hookimpl\n@hookimpl\ndef lightslim_register(registry): registry.add('criterium', max)",
        "did you mean 'criterion'",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plugin_is_named_and_hurts_nobody(install, kind):
    code, reason = BROKEN[kind]
    install("slim-broken", code)
    install("slim-good", GOOD.format(name="mine"))
    found = loaded()
    (problem,) = found.problems
    assert problem.distribution == "slim-broken"
    assert reason in problem.reason
    assert found.names("criterion") == ["l1_norm", "mine"]
    with pytest.raises(
        CompressionError, match=r"'half' is not a known criterion; .*slim_broken of slim-broken did not load"
    ):
        found.get("criterion", "half")


@pytest.mark.parametrize("order", [("slim-a", "slim-b"), ("slim-b", "slim-a")])
def test_a_name_that_two_packages_bring_is_refused_naming_both(install, order):
    for distribution in order:
        install(distribution, GOOD.format(name="mine") + f'    registry.add("criterion", min, "{distribution}")')
    found = loaded()
    with pytest.raises(CompressionError, match="slim-a and slim-b both bring the criterion 'mine'"):
        found.get("criterion", "mine")
    assert found.get("criterion", "slim-a") is found.get("criterion", "slim-b") is min
    assert len(found.problems) == 1


def test_a_built_in_name_is_no_exception(install):
    install("slim-rogue", GOOD.format(name="l1_norm"))
    found = loaded()
    with pytest.raises(CompressionError, match="lightslim and slim-rogue both bring the criterion 'l1_norm'"):
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


def test_unknown_names_and_kinds_say_what_there_is():
    found = Registry()
    found.add("criterion", min)
    with pytest.raises(CompressionError, match="'mn' is not a known criterion; did you mean 'min'"):
        found.get("criterion", "mn")
    with pytest.raises(CompressionError, match="both bring the criterion 'min'"):
        found.add("criterion", max, "min")
    assert set(KINDS) == {"strategy", "pruner", "criterion", "distiller", "range", "exporter"}
