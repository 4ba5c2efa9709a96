"""A recipe driven by Optuna: each trial of a study is a run, with the settings that the study proposes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightslim.errors import CompressionError, did_you_mean
from lightslim.rundir import read_result
from lightslim.sweep import check, train

Choices = Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Objective:
    """What a study optimizes: a run of a recipe, judged by what its ``result.json`` says at the end.

    Each trial is a process and a folder of its own, ``trial0`` and so on: several machines that share the study's
    storage share out the trials.

    Args:
        recipe: the file.
        space: by ``key.path`` of the recipe, a list to choose from, or ``{"low": .., "high": ..}`` with ``log`` or
            ``step`` if wanted; whole numbers where ``low`` is one.
        targets: metrics that the module logs in validation, or ``flops``, ``params``, ``bytes``; a study has a
            direction for each.
        out: the folder that holds the trials' folders.
        settings: ``key.path=value`` each, for all trials.

    Raises:
        CompressionError: no targets, bounds that lack an end, or the recipe does not stand one of the settings.

    Example:
        study = optuna.create_study(directions=["maximize", "minimize"], storage="sqlite:///study.db")
        space = {"strategies.halve.target_ratio": {"low": 0.3, "high": 0.7}, "model.width": [0.5, 1.0]}
        study.optimize(Objective("recipe.yaml", space, ["val_acc", "flops"]), n_trials=20)
    """

    recipe: str | Path
    space: Mapping[str, Choices]
    targets: Sequence[str] = ("val_acc",)
    out: str | Path = "runs/study"
    settings: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.targets or isinstance(self.targets, str):
            raise CompressionError(f"targets is {self.targets!r}; it must list at least one metric")
        ends = [f"{key}={value}" for key, choices in self.space.items() for value in _ends(key, choices)]
        for settings in [[], *([end] for end in ends)]:
            check(Path(self.recipe), [*self.settings, *settings], Path(self.out))

    def __call__(self, trial: Any) -> tuple[float, ...]:
        """Run one trial; resumes the run in its folder if there is one.

        Raises:
            CompressionError: the run failed, its folder holds one of other settings, or its result no such target.
        """
        folder = Path(self.out) / f"trial{trial.number}"
        proposed = [f"{key}={_suggested(trial, key, choices)}" for key, choices in self.space.items()]
        check(Path(self.recipe), [*self.settings, *proposed], folder)
        if train(Path(self.recipe), [*self.settings, *proposed], folder):
            raise CompressionError(f"trial {trial.number} failed: {', '.join(proposed)}")
        after = read_result(folder)["after"]
        values = after["metrics"] | {key: after[key] for key in ("flops", "params", "bytes")}
        for target in self.targets:
            if target not in values:
                raise CompressionError(f"{folder} measured no {target!r}; {did_you_mean(target, values)}")
        return tuple(float(values[target]) for target in self.targets)


def _ends(key: str, choices: Choices) -> Sequence[Any]:
    """Values that stand for all: of bounds the two ends."""
    if not isinstance(choices, Mapping):
        if isinstance(choices, str) or not choices:
            raise CompressionError(f"space: {key} is {choices!r}; list the values, or give low and high")
        return choices
    if not {"low", "high"} <= choices.keys() <= {"low", "high", "log", "step"}:
        raise CompressionError(f"space: {key} has {', '.join(choices)}; it takes low and high, and log or step")
    return choices["low"], choices["high"]


def _suggested(trial: Any, key: str, choices: Choices) -> Any:
    if not isinstance(choices, Mapping):
        return trial.suggest_categorical(key, list(choices))
    whole = isinstance(choices["low"], int) and isinstance(choices["high"], int)
    return (trial.suggest_int if whole else trial.suggest_float)(key, **choices)
