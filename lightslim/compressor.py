"""The front door: a module, its data and a recipe become a Trainer, a run, and a result."""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from inspect import signature
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.io import CheckpointIO
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import rank_zero_only, rank_zero_warn
from torch.optim import Optimizer

from lightslim import rundir
from lightslim.checkpoints import AtomicCheckpointIO, newest_checkpoint
from lightslim.errors import CompressionError
from lightslim.loading import read_checkpoint, restore
from lightslim.measure import Measurement
from lightslim.monitor import CompressionMonitor
from lightslim.recipe import Recipe
from lightslim.recipe.needs import plugins_named, with_plugins
from lightslim.registry import registry
from lightslim.rehearsal import Fetches, Rehearsal, Rehearsed, Writing
from lightslim.steps import replaced
from lightslim.strategy import CompressionStrategy
from lightslim.surgery import CHECKPOINT_KEY

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
Names = Sequence[str | tuple[str, str]]


# Since 2.6 Lightning takes the word of its caller on this; before, torch's own safe default holds.
_SAFE: dict[str, Any] = {"weights_only": True} if "weights_only" in signature(Trainer.fit).parameters else {}


_QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class CompressionResult(NamedTuple):
    """The compressed module, and what ``result.json`` holds."""

    module: LightningModule
    result: dict[str, Any]


class Compressor:
    """Runs a recipe on a LightningModule. Everything it does can be done by hand with a Trainer and callbacks.

    Args:
        module: any LightningModule; its steps stand for the training and the evaluation program.
        train_loader: training data, if there is no ``datamodule``.
        val_loader: validation data, if there is no ``datamodule``.
        datamodule: training and validation data in one.
        teachers: trained modules to distil from, a list or by name, instead of those of the recipe; only for recipes
            with a strategy that takes them.
        train_optimizer: from parameters to an optimizer, instead of the module's own ``configure_optimizers``.
        distiller_optimizer: the same for the distillation phase; only for recipes that have one.
        feed_list: names for the parts of a batch, in order; exported models carry them.
        fetch_list: names of logged metrics, or (name, logged name) pairs; must hold ``loss``.
        checkpoint_path: where checkpoints go, unless the recipe says; relative to the run directory.
        trainer: arguments for Lightning's Trainer; the recipe's ``trainer:`` section wins.
        out: the run directory. Default: ``runs/<name of the recipe>``, numbered from the second run on.

    Attributes:
        folder: the directory of the last run.

    Raises:
        CompressionError: both or neither kind of data, a fetch_list without ``loss``.

    Example:
        compressor = Compressor(module, train_loader, val_loader)
        compressor.config("compress.yaml")
        smaller, result = compressor.run()
    """

    def __init__(
        self,
        module: LightningModule,
        train_loader: Any = None,
        val_loader: Any = None,
        datamodule: LightningDataModule | None = None,
        teachers: Sequence[Any] | Mapping[str, Any] = (),
        train_optimizer: OptimizerFactory | None = None,
        distiller_optimizer: OptimizerFactory | None = None,
        feed_list: Names | None = None,
        fetch_list: Names | None = None,
        checkpoint_path: str = "checkpoints",
        trainer: Mapping[str, Any] | None = None,
        out: str | PathLike[str] | None = None,
    ) -> None:
        if (datamodule is None) == (train_loader is None):
            raise CompressionError("give the data either as train_loader (and val_loader) or as a datamodule")
        self.module = module
        self.data = {"datamodule": datamodule} if datamodule else _loaders(train_loader, val_loader)
        self.teachers = _by_name(teachers)
        self.train_optimizer = train_optimizer
        self.distiller_optimizer = distiller_optimizer
        self.feed_list = _pairs(feed_list)
        self.fetch_list = _pairs(fetch_list)
        if self.fetch_list and "loss" not in self.fetch_list:
            raise CompressionError(f"fetch_list must hold 'loss'; it holds {', '.join(self.fetch_list)}")
        self.checkpoint_path = checkpoint_path
        self.trainer_arguments = dict(trainer or {})
        self.out = Path(out) if out else None
        self.folder = self.out or Path("runs")
        self.recipe: Recipe | None = None

    @classmethod
    def from_recipe(cls, recipe: Recipe, out: str | PathLike[str] | None = None) -> "Compressor":
        """Build module and data as the recipe's ``model:`` and ``data:`` sections say, under its seed."""
        seed_everything(recipe.seed or 0, verbose=False)
        module, data = recipe.model(), recipe.data()
        for section, built, kind in (("model", module, LightningModule), ("data", data, LightningDataModule)):
            if built is None:
                raise CompressionError(f"{recipe.path} has no {section} section: nothing to run it on")
            if any(base.__module__.startswith("lightning.pytorch") for base in type(built).__mro__):
                raise CompressionError(
                    f"{recipe.path}: {section}: {type(built).__name__} is of lightning.pytorch; recipes run in the "
                    "Trainer of pytorch_lightning: import that, or give the callbacks to a Trainer of your own"
                )
            if not isinstance(built, kind):
                raise CompressionError(f"{recipe.path}: {section}: {type(built).__name__} is no {kind.__name__}")
        return cls(module, datamodule=data, out=out).config(recipe)

    def config(self, recipe: str | PathLike[str] | Recipe) -> "Compressor":
        """Take a recipe: a YAML file or a :class:`Recipe`."""
        self.recipe = recipe if isinstance(recipe, Recipe) else Recipe.from_yaml(recipe)
        if self.recipe.unlisted:
            names = ", ".join(self.recipe.unlisted)
            rank_zero_warn(f"{self.recipe.path}: {names} not listed under compressor.strategies, will not run")
        return self

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.folder / (self._recipe.checkpoint_path or self.checkpoint_path)

    @property
    def _recipe(self) -> Recipe:
        if self.recipe is None:
            raise CompressionError("no recipe yet: call config(path) first")
        if self.recipe.epoch is None:
            raise CompressionError(f"{self.recipe.path} has no compressor section: nothing says how long to train")
        return self.recipe

    def run(self, resume: str | PathLike[str] | None = None) -> CompressionResult:
        """Train and compress as the recipe says.

        Args:
            resume: a checkpoint to continue from; ``"auto"`` for the newest of this run directory, if any.

        Returns:
            The compressed module and the content of ``result.json``.

        Raises:
            CompressionError: anything that can be known to fail before the first training step.
        """
        # Processes that rank 0 has started join the run that it has opened.
        first = not getattr(rank_zero_only, "rank", 0)
        resuming = resume is not None or not first
        self.folder = self.out or rundir.default_folder(self._recipe.path, resuming)
        with contextlib.ExitStack() as stack:
            if first:
                stack.enter_context(rundir.taken(self.folder))
                stack.enter_context(rundir.nothing_half_written(self.folder, self.checkpoints))
            return self._run(resume, resuming)

    def _run(self, resume: str | PathLike[str] | None, resuming: bool) -> CompressionResult:
        recipe, started = self._recipe, time.time()
        measurement = Measurement(unfinished=resuming and not (self.folder / rundir.RESULT).exists())
        strategies = recipe.strategies()
        self._check_teachers(strategies)
        checkpoint = self._checkpoint(resume)
        rundir.prepare(self.folder, self.checkpoints, resuming)
        seed_everything(recipe.seed or 0, verbose=False)
        self._init_model(recipe.init_model)
        trainer = self._trainer([measurement, *strategies])
        if trainer.is_global_zero:
            rundir.write_recipe(self.folder, with_plugins(recipe.resolved()))
        self._fit(trainer, checkpoint)
        if not measurement.after and resume != "auto":
            raise CompressionError("there was nothing to train: see epoch, max_time and limit_train_batches")
        if not measurement.after:  # the run was finished already
            return CompressionResult(self.module, rundir.read_result(self.folder))
        result = self._result(strategies, measurement, time.time() - started)
        if trainer.is_global_zero:
            rundir.write_result(self.folder, result)
        return CompressionResult(self.module, result)

    def check(self) -> dict[str, str]:
        """Go through the beginning of a run up to the first training step, and train nothing.

        Returns:
            Strategy name to what it would do, as text.

        Raises:
            CompressionError: whatever :meth:`run` would raise.
        """
        strategies = self._recipe.strategies()
        note = "(as if it came first) " if len(strategies) > 1 else ""
        return self._before_training(strategies, lambda one, *fit: note + one.rehearse(*fit))

    def sensitivity(self, path: str | PathLike[str], progress: bool = True) -> dict[str, Any]:
        """Measure how sensitive the layers are that the recipe's sensitive pruning would cut; train nothing.

        Args:
            path: a JSON file, written after every point; what it holds of this model and data is not measured again.
            progress: show a bar with the remaining time.

        Returns:
            ``{parameter: {"pruned_percent": [...], "loss": [...], "size": units}}``.

        Raises:
            CompressionError: the recipe lists no or several strategies with an analysis, the file is of something else,
                or whatever :meth:`run` would raise.
        """
        strategies = self._recipe.strategies()
        found = [one for one in strategies if hasattr(one, "analyse")]
        if len(found) != 1:
            raise CompressionError(
                f"{self._recipe.path}: compressor.strategies lists {len(found)} strategies that measure sensitivities, "
                "such as SensitivePruneStrategy; list one"
            )
        target = Path(path).absolute()
        measured = self._before_training(found, lambda one, *fit: one.analyse(*fit, target, progress))
        return dict(next(iter(measured.values()))[0])

    def _before_training(self, strategies: Sequence[CompressionStrategy], act: Callable[..., Any]) -> dict[str, Any]:
        """Go up to the first training step, and let ``act`` have each strategy, the Trainer and the module there."""
        self._check_teachers(strategies)
        self._init_model(self._recipe.init_model)
        rehearsal = Rehearsal(strategies, act)
        trainer = _new_trainer({**self._arguments(), **_QUIET, "callbacks": [*strategies, rehearsal]})
        with contextlib.suppress(Rehearsed):
            self._fit(trainer, None)
        return rehearsal.results

    def export(
        self, checkpoint: str | PathLike[str], format_: str, path: str | PathLike[str], **options: Any
    ) -> dict[str, Any]:
        """Write the model of one of this recipe's checkpoints to a file; see :func:`lightslim.export.export`.

        Returns:
            The manifest, and the ``metrics`` of the file on the validation data.

        Raises:
            CompressionError: a checkpoint that cannot be read or does not fit, or whatever the format cannot hold.
        """
        read_checkpoint(checkpoint)
        exporter = registry().get("exporter", format_)
        exporter.check_available()
        exporter.check_options(options)
        writing = Writing(format_, Path(path).absolute(), options)
        # torch's exporters do not take the tensors of inference mode
        arguments = {**self._arguments(), **_QUIET, "inference_mode": False}
        trainer = _new_trainer({**arguments, "callbacks": [*self._recipe.strategies(), writing]})
        data = dict(self.data)
        if data.pop("train_dataloaders", None) is not None:
            data["dataloaders"] = data.pop("val_dataloaders")
        with contextlib.suppress(Rehearsed), warnings.catch_warnings():
            # Those that only watch or save a run have nothing to do here
            warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint.*")
            trainer.validate(self.module, ckpt_path=str(checkpoint), verbose=False, **_SAFE, **data)
        return writing.manifest

    def _check_teachers(self, strategies: Sequence[CompressionStrategy]) -> None:
        teachers = self.teachers or self._recipe.teachers()
        distilling = [strategy for strategy in strategies if hasattr(strategy, "equip")]
        for name, given in (("teachers", teachers), ("distiller_optimizer", self.distiller_optimizer)):
            if given and not distilling:
                raise CompressionError(f"{name} given, but no strategy of this recipe distils")
        for strategy in distilling:
            strategy.equip(teachers, self.distiller_optimizer)

    def _checkpoint(self, resume: str | PathLike[str] | None) -> Path | None:
        if resume == "auto":
            return newest_checkpoint(self.checkpoints)
        if resume is None:
            return None
        missing = {"state_dict", "epoch", "loops", "pytorch-lightning_version"} - set(read_checkpoint(resume))
        if missing:
            raise CompressionError(f"{resume} is no checkpoint to go on from: it holds no {', '.join(sorted(missing))}")
        return Path(resume)

    def _init_model(self, path: str | None) -> None:
        if path is not None:
            checkpoint = read_checkpoint(path)
            restore(self.module, checkpoint.get("state_dict", checkpoint), checkpoint.get(CHECKPOINT_KEY), path)

    def _arguments(self) -> dict[str, Any]:
        schedule = {"max_epochs": self._recipe.epoch, "check_val_every_n_epoch": self._recipe.eval_epoch}
        return {**schedule, **self.trainer_arguments, **self._recipe.trainer_arguments()}

    def _trainer(self, callbacks: Sequence[Callback]) -> Trainer:
        arguments = self._arguments()
        saver = ModelCheckpoint(self.checkpoints, "{epoch}", save_last=True, save_on_train_epoch_end=True)
        own = [
            *callbacks,
            CompressionMonitor(self._recipe.resolved()),
            *([saver] if arguments.get("enable_checkpointing", True) else []),
        ]
        arguments.setdefault(
            "logger", TensorBoardLogger(self.folder, name="", version="tensorboard", default_hp_metric=False)
        )
        callbacks = [*own, *_listed(arguments.get("callbacks")), Fetches(self.fetch_list)]
        plugins = _listed(arguments.get("plugins"))
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins = [*plugins, AtomicCheckpointIO()]
        return _new_trainer({"default_root_dir": self.folder, **arguments, "callbacks": callbacks, "plugins": plugins})

    def _fit(self, trainer: Trainer, checkpoint: Path | None) -> None:
        factory = self.train_optimizer
        own = {"configure_optimizers": lambda: factory(self.module.parameters())} if factory else {}
        with replaced(self.module, **own), _missing_files_said(trainer):
            trainer.fit(self.module, ckpt_path=str(checkpoint) if checkpoint else None, **_SAFE, **self.data)

    def _result(
        self, strategies: Sequence[CompressionStrategy], measured: Measurement, seconds: float
    ) -> dict[str, Any]:
        return {
            "recipe": str(self._recipe.path),
            "seed": self._recipe.seed or 0,
            "versions": {
                **{name: version(name) for name in ("lightslim", "torch", "pytorch-lightning")},
                **plugins_named(self._recipe.resolved()),
            },
            "seconds": round(seconds, 2),
            "before": measured.before,
            "after": measured.after,
            "strategies": [
                {"name": strategy.name, "class": type(strategy).__name__, "history": strategy.history}
                for strategy in strategies
            ],
            "exports": {
                format_: {key: file[key] for key in ("path", "bytes", "metrics", "max_abs_diff")}
                for strategy in strategies
                for record in strategy.history
                for format_, file in record.get("files", {}).items()
            },
        }


def _new_trainer(arguments: dict[str, Any]) -> Trainer:
    try:
        return Trainer(**arguments)
    except (MisconfigurationException, RuntimeError, TypeError, ValueError) as error:
        raise CompressionError(f"trainer: {error}") from error


@contextlib.contextmanager
def _missing_files_said(trainer: Trainer) -> Iterator[None]:
    """Data that is not where it should be, found out before the first step, is the user's to mend: no traceback."""
    try:
        yield
    except FileNotFoundError as error:
        if trainer.global_step:
            raise
        raise CompressionError(str(error)) from error


def _loaders(train: Any, val: Any) -> dict[str, Any]:
    return {"train_dataloaders": train, "val_dataloaders": val}


def _pairs(names: Names | None) -> dict[str, str]:
    return {name: name for name in names or () if isinstance(name, str)} | {
        pair[0]: pair[1] for pair in names or () if not isinstance(pair, str)
    }


def _by_name(teachers: Sequence[Any] | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(teachers, Mapping):
        return dict(teachers)
    return {"teacher" if len(teachers) == 1 else f"teacher_{i}": teacher for i, teacher in enumerate(teachers)}


def _listed(given: Any) -> list[Any]:
    return list(given) if isinstance(given, (list, tuple)) else [given] if given else []
