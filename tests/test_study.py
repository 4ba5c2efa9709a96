"""A study of Optuna whose trials are runs of a recipe."""

from pathlib import Path

import pytest
import yaml
from test_sweep import RECIPE

from lightslim import CompressionError
from lightslim.rundir import read_result
from lightslim.study import Objective

optuna = pytest.importorskip("optuna")
SPACE = {"strategies.halve.target_ratio": {"low": 0.3, "high": 0.6}, "model.width": [0.25, 0.5]}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


def test_a_study_runs_what_it_proposes_and_goes_on(recipe, tmp_path):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    objective = Objective(recipe, SPACE, ["val_acc", "flops"], "study", ["compressor.seed=5"])
    for _ in range(2):  # the second time as another process, or another machine, would
        study = optuna.create_study(
            directions=["maximize", "minimize"], storage="sqlite:///study.db", study_name="a", load_if_exists=True
        )
        study.optimize(objective, n_trials=1)
    assert [trial.number for trial in study.trials] == [0, 1]
    for trial in study.trials:
        folder = tmp_path / "study" / f"trial{trial.number}"
        result, ran = read_result(folder), yaml.safe_load((folder / "recipe.yaml").read_text())
        assert trial.values == [result["after"]["metrics"]["val_acc"], result["after"]["flops"]]
        assert ran["strategies"]["halve"]["target_ratio"] == trial.params["strategies.halve.target_ratio"]
        assert ran["model"]["width"] == trial.params["model.width"]
        assert result["seed"] == 5
    another = optuna.create_study(directions=["maximize", "minimize"])
    another.enqueue_trial({"strategies.halve.target_ratio": 0.55, "model.width": 0.25})
    with pytest.raises(CompressionError, match="trial0 holds a run of other settings"):
        another.optimize(objective, n_trials=1)


@pytest.mark.parametrize(
    ("space", "targets", "message"),
    [
        ({"strategies.halve.target_ratio": {"low": 0.3, "high": 1.5}}, ["val_acc"], "must lie between 0 and 1"),
        ({"strategies.halve.target_rato": [0.5]}, ["val_acc"], "target_ratio"),
        ({"model.width": {"low": 0.5}}, ["val_acc"], "low and high"),
        ({"model.width": []}, ["val_acc"], "list the values"),
        ({"model.width": "0.5"}, ["val_acc"], "list the values"),
        ({}, [], "at least one"),
        ({}, "val_acc", "list"),
    ],
)
def test_what_no_run_stands_is_refused_before_the_study(recipe, space, targets, message):
    with pytest.raises(CompressionError, match=message):
        Objective(recipe, space, targets)
    assert not (recipe.parent / "runs").exists()


def test_a_target_that_no_run_measures_is_named(recipe):
    study = optuna.create_study(direction="maximize")
    with pytest.raises(CompressionError, match="val_acc"):
        study.optimize(Objective(recipe, {}, ["val_ac"], "study"), n_trials=1)
