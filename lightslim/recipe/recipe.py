"""A recipe: one YAML file that says which strategies compress which model, and when.

Sections ``pruners``, ``distillers`` and ``strategies`` hold named instances, ``name: {class: Name, argument: value}``;
``model``, ``teacher`` and ``data`` hold one object each, of a ``class: pkg.mod:Name``, ``teachers`` several by name (a
teacher's ``checkpoint`` holds its weights); ``trainer`` holds arguments for Lightning's Trainer; ``compressor`` (of old
``compress_pass``) says what runs and for how long; ``plugins`` lists distributions that must be installed; ``include``
names more files. Everything is checked when the file is
read; models, data and what the Trainer takes are built when asked for.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from pytorch_lightning import Trainer
from torch import nn

from lightslim.errors import CompressionError
from lightslim.loading import fill, read_checkpoint, restore
from lightslim.recipe.arguments import bind
from lightslim.recipe.blueprint import Blueprint, importable, realize
from lightslim.recipe.drafts import drafted, instance, instances, section
from lightslim.recipe.hints import fit
from lightslim.recipe.needs import SECTION as PLUGINS
from lightslim.recipe.needs import check_plugins
from lightslim.recipe.schedule import SECTIONS, schedule
from lightslim.recipe.sources import gather
from lightslim.strategy import CompressionStrategy
from lightslim.surgery import CHECKPOINT_KEY
from lightslim.yamlfile import Document, Where

_OBJECTS = ("model", "data")
_SECTIONS = ("pruners", "distillers", "strategies", *_OBJECTS, "teacher", "teachers", "trainer", PLUGINS, *SECTIONS)

# What the trainer section must leave to the compressor section.
_SAME_SETTING = {"max_epochs": "epoch", "check_val_every_n_epoch": "eval_epoch"}


@dataclass(frozen=True)
class Recipe:
    """What a recipe file says, checked.

    Args:
        path: the file.
        epoch: how many epochs to train; None if the file has no ``compressor`` section, and so cannot be run.
        checkpoint_path: folder for checkpoints.
        init_model: checkpoint to start from.
        eval_epoch: evaluate every so many epochs.
        seed: of all random numbers.
        teacher_checkpoint: weights for the one teacher of the ``teacher`` section.
        unlisted: names of strategies that are defined but not listed to run.

    Example:
        recipe = Recipe.from_yaml("compress.yaml", overrides=["strategies.halve.target_ratio=0.3"])
        trainer = Trainer(max_epochs=recipe.epoch, callbacks=recipe.strategies(), **recipe.trainer_arguments())
    """

    path: Path
    epoch: int | None = None
    checkpoint_path: str | None = None
    init_model: str | None = None
    eval_epoch: int = 1
    seed: int | None = None
    teacher_checkpoint: str | None = None
    unlisted: tuple[str, ...] = ()
    _listed: Sequence[Blueprint] = field(default=(), repr=False)
    _objects: Mapping[str, Blueprint] = field(default_factory=dict, repr=False)
    _teachers: Mapping[str, tuple[Blueprint, str | None]] = field(default_factory=dict, repr=False)
    _trainer: Mapping[str, Any] = field(default_factory=dict, repr=False)
    _tree: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_yaml(cls, path: str | PathLike[str], overrides: Sequence[str] = ()) -> "Recipe":
        """Read and check a recipe.

        Args:
            path: the file; classes in it are found from the current folder, the file's folder, and what is installed.
            overrides: ``key.path=value`` each, stronger than the file.

        Raises:
            CompressionError: something is wrong with it; the message begins with ``FILE:LINE: key.path``.
        """
        document = gather(path, _SECTIONS, overrides)
        with importable(Path.cwd(), Path(path).parent):
            check_plugins(document)
            strategies = _strategies(document)
            settings = schedule(document, strategies)
            listed = settings.pop("strategies")
            teachers = _teachers(document)
            return cls(
                path=Path(path),
                **settings,
                teacher_checkpoint=teachers["teacher"][1] if "teacher" in teachers else None,
                unlisted=tuple(name for name in strategies if name not in listed),
                _listed=[strategies[name] for name in listed],
                _objects={
                    name: instance(section(document, name), document.where(name))
                    for name in _OBJECTS
                    if document.tree.get(name) is not None
                },
                _teachers=teachers,
                _trainer=_trainer(document, settings),
                _tree=document.tree,
            )

    def strategies(self) -> list[CompressionStrategy]:
        """New strategies, in the order listed; those that name the same pruner or distiller share it."""
        strategies: list[CompressionStrategy] = self._built(list(self._listed))
        return strategies

    def model(self) -> Any:
        """A new model; None if the recipe has none."""
        return self._built(self._objects.get("model"))

    def teacher(self) -> Any:
        """A new teacher with the weights of ``teacher_checkpoint``; None if the recipe has none.

        Raises:
            CompressionError: see :meth:`teachers`.
        """
        return self.teachers().get("teacher")

    def teachers(self) -> dict[str, Any]:
        """New teachers by name, each with the weights of its checkpoint; a ``teacher`` section has ``teacher``.

        Raises:
            CompressionError: a teacher is no module, or its checkpoint is missing, damaged or of another network.
        """
        return {name: self._taught(blueprint, path) for name, (blueprint, path) in self._teachers.items()}

    def data(self) -> Any:
        """A new data module; None if the recipe has none."""
        return self._built(self._objects.get("data"))

    def trainer_arguments(self) -> dict[str, Any]:
        """What the recipe wants of the Trainer, with new callbacks and loggers."""
        arguments: dict[str, Any] = self._built(self._trainer)
        return arguments

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain values, after includes and overrides."""
        return copy.deepcopy(dict(self._tree))

    def _taught(self, blueprint: Blueprint, path: str | None) -> nn.Module:
        network = self._built(blueprint)
        if not isinstance(network, nn.Module):
            raise (blueprint.where / "class").error(f"{type(network).__name__} is no module")
        try:
            if path is not None:
                checkpoint = read_checkpoint(path)
                weights, record = checkpoint.get("state_dict", checkpoint), checkpoint.get(CHECKPOINT_KEY)
                # Only what was cut may have other shapes: weights of another width are a mistake
                restore(network, weights, record, path) if (record or {}).get("cuts") else fill(network, weights, path)
        except CompressionError as error:
            raise (blueprint.where / "checkpoint").error(str(error)) from error
        return network

    def _built(self, value: Any) -> Any:
        with importable(Path.cwd(), self.path.parent):
            return realize(value, {})


def _strategies(document: Document) -> dict[str, Blueprint]:
    pruners, distillers = instances(document, "pruners", "pruner"), instances(document, "distillers", "distiller")
    for name in sorted(distillers.keys() & pruners.keys()):
        raise distillers[name].where.error(f"is the name of a pruner too, at {pruners[name].where.place}")
    strategies = instances(document, "strategies", "strategy", {**pruners, **distillers})
    built: dict[Blueprint, Any] = {}
    for blueprint in [*pruners.values(), *distillers.values(), *strategies.values()]:
        blueprint.build(built)  # only for the checks in their constructors
    for blueprint in strategies.values():
        if not isinstance(built[blueprint], CompressionStrategy):
            raise (blueprint.where / "class").error(f"{type(built[blueprint]).__name__} is no CompressionStrategy")
    return strategies


def _teachers(document: Document) -> dict[str, tuple[Blueprint, str | None]]:
    """Blueprints by name, each with the path of its checkpoint."""
    one, several = section(document, "teacher"), section(document, "teachers")
    if one and several:
        raise document.where("teachers").error("there is a teacher section, too: name all of them here")
    where = document.where("teachers")
    if one:
        return {"teacher": _teacher(one, document.where("teacher"))}
    return {fit(name, str, where / name): _teacher(content, where / name) for name, content in several.items()}


def _teacher(content: Any, where: Where) -> tuple[Blueprint, str | None]:
    arguments = dict(fit(content, dict, where))
    checkpoint = fit(arguments.pop("checkpoint", None), str | None, where / "checkpoint")
    return instance(arguments, where), checkpoint


def _trainer(document: Document, settings: Mapping[str, Any]) -> dict[str, Any]:
    where = document.where("trainer")
    arguments = bind(Trainer, drafted(section(document, "trainer"), where), where)
    for name, same in _SAME_SETTING.items():
        if name in arguments and same in settings:
            raise (where / name).error(f"would fight with {same!r} of the compressor section")
    return arguments
