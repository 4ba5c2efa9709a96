"""What every component must do, whoever wrote it; runs over the registry."""

import inspect
from pathlib import Path

import pytest
from components import ROWS

import lightslim
from lightslim.registry import registry
from lightslim.testing import (
    assert_criterion,
    assert_distiller,
    assert_exports,
    assert_range,
    assert_resumes,
    assert_trains,
)

ENTRIES = [(entry.kind, entry.name) for entry in registry().entries() if entry.distribution == "lightslim"]
OF = {kind: [name for k, name in ENTRIES if k == kind] for kind, _ in ENTRIES}
CARDS = "\n".join(path.read_text() for path in Path(lightslim.__file__).parent.glob("*/README.md"))


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_every_component_has_its_row_its_docstring_and_its_place_on_a_card(kind, name):
    component = registry().get(kind, name)
    assert (kind, name) in ROWS
    assert inspect.getdoc(component)
    assert "Example" in inspect.getdoc(component)
    assert f"`{name}`" in CARDS or name in CARDS


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, n in ENTRIES if inspect.isclass(registry().get(k, n))])
def test_constructor_arguments_are_hinted_and_have_defaults(kind, name):
    for parameter in inspect.signature(registry().get(kind, name)).parameters.values():
        assert parameter.annotation is not parameter.empty
        assert parameter.default is not parameter.empty


@pytest.mark.parametrize("name", OF["strategy"])
def test_a_strategy_trains_acts_and_is_read_back_from_its_checkpoint(name):
    assert_trains(ROWS["strategy", name])


@pytest.mark.parametrize("name", OF["strategy"])
def test_a_strategy_resumes_with_a_fresh_module_to_the_same_weights(tmp_path, name):
    assert_resumes(ROWS["strategy", name], tmp_path)


@pytest.mark.parametrize("name", OF["strategy"])
def test_a_strategy_exports(tmp_path, name):
    assert_exports(ROWS["strategy", name], tmp_path)


@pytest.mark.parametrize("name", OF["criterion"])
def test_a_criterion_scores_the_slices_of_any_axis(name):
    assert_criterion(registry().get("criterion", name))


@pytest.mark.parametrize("name", OF["range"])
def test_a_range_has_bounds_learns_and_is_restored(name):
    assert_range(ROWS["range", name])


@pytest.mark.parametrize("name", OF["distiller"])
def test_a_distiller_teaches_the_student_alone(name):
    assert_distiller(ROWS["distiller", name])
