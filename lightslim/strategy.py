"""The base of all strategies: a Lightning callback that acts at an epoch, remembers it, and leaves no trace."""

import contextlib
import math
import weakref
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightslim.errors import CompressionError, did_you_mean
from lightslim.infit import averaged_copies, refuse_masks, refuse_sharded
from lightslim.rng import random_states, restore_own
from lightslim.steps import replaced
from lightslim.surgery import CHECKPOINT_KEY, conform, structure


class CompressionStrategy(Callback):
    """One method of compression on its schedule: it begins at ``start_epoch`` and ends at ``end_epoch``.

    Subclasses say what happens in :meth:`begin` and, if there is an end, :meth:`finish`; :meth:`rehearse` looks ahead
    before the first training step, so that what cannot work fails there and not hours later.

    Args:
        start_epoch: the strategy begins before the first step of this epoch (counted from 0).
        end_epoch: it ends before the first step of this epoch; None if it has no end.
        name: tells strategies of one class apart, in checkpoints and logs; a recipe gives its own name for it.

    Attributes:
        history: one plain record (dicts, lists, numbers, strings) per act; kept in checkpoints.

    Raises:
        CompressionError: an epoch is negative, or the end does not come after the start.
    """

    must_be_last: ClassVar[bool] = False

    def __init__(self, start_epoch: int = 0, end_epoch: int | None = None, name: str | None = None) -> None:
        if start_epoch < 0:
            raise CompressionError(f"start_epoch is {start_epoch}; epochs are counted from 0")
        if end_epoch and end_epoch <= start_epoch:
            raise CompressionError(f"end_epoch is {end_epoch}; it must come after start_epoch, which is {start_epoch}")
        self.start_epoch = start_epoch
        self.end_epoch = end_epoch or None
        self.name = name or type(self).__name__
        self.history: list[dict[str, Any]] = []
        self._named = name is not None
        self._begun = self._ended = False
        self._acted_on: weakref.ref[LightningModule] | None = None
        self._traces = contextlib.ExitStack()
        self._random: dict[str, Any] | None = None

    @property
    @override
    def state_key(self) -> str:
        identity = {"name": self.name} if self._named else {"start_epoch": self.start_epoch}
        return self._generate_state_key(**identity)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"begun": self._begun, "ended": self._ended, "history": self.history}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._begun, self._ended = state_dict["begun"], state_dict["ended"]
        self.history = list(state_dict["history"])

    def rehearse(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Find out, before training starts, whether :meth:`begin` can work; raise CompressionError if not.

        Returns:
            What it would do, as text for people.
        """
        return ""

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Act. Returns the plain record of what was done."""
        raise NotImplementedError

    def evaluate_as(self, trainer: Trainer, pl_module: LightningModule, state: Mapping[str, Any] | None) -> None:
        """Called when the weights of a checkpoint are about to be loaded for validation, test or prediction.

        Args:
            trainer: evaluates.
            pl_module: has the structure of the checkpoint already.
            state: this strategy's state in it; None if it has none.
        """

    def figures(self) -> Mapping[str, float]:
        """Numbers to follow from epoch to epoch, by tag, for :class:`~lightslim.CompressionMonitor`."""
        return {}

    def distributions(self) -> Mapping[str, Tensor]:
        """The same for values whose histogram tells something."""
        return {}

    def finish(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any] | None:
        """End the phase. Returns a record if there is something to tell."""
        return None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            refuse_sharded(trainer)
            refuse_masks(trainer)
            self._check_schedule(trainer)
            self._forget_other(pl_module)
        if self is _first_strategy(trainer):
            self._traces.enter_context(_structured_checkpoints(trainer, pl_module))

    def _forget_other(self, module: LightningModule) -> None:
        """Start afresh on a module that this strategy has not acted on; a resumed run brings its state after this."""
        if self._acted_on is None or self._acted_on() is not module:
            self._begun = self._ended = False
            self.history = []
            self._acted_on = weakref.ref(module)

    def _check_schedule(self, trainer: Trainer) -> None:
        # A single debugging batch is no run: what would act later stays idle.
        last = trainer.max_epochs
        if last is None or last < 0 or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.start_epoch >= last:
            raise CompressionError(
                f"{self.name}: start_epoch is {self.start_epoch}, but training ends after {last} epochs: it never acts"
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Before the loaders' iterators are made: they draw the order of the samples
        if self._random is not None:
            restore_own(trainer, self._random["states"])
            # A schedule that asks for the number of steps has had them made too early, without their own state
            trainer.fit_loop._combined_loader = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._random is not None and self._random["within_epoch"]:
            restore_own(trainer, self._random["states"])
        self._random = None
        if self._begun:
            return
        batches = trainer.num_training_batches  # infinite for a stream
        steps = 0 if math.isinf(batches) else math.ceil(batches / trainer.accumulate_grad_batches)
        if 0 <= trainer.max_steps <= self.start_epoch * steps and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise CompressionError(
                f"{self.name}: training ends after {trainer.max_steps} steps, before start_epoch {self.start_epoch}: "
                "it never acts"
            )
        self.rehearse(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.act_if_due(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Resumed from a checkpoint of an epoch's last step, Lightning begins the next epoch without telling anybody
        if batch_idx == 0:
            self.act_if_due(trainer, pl_module)

    def act_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin or finish if this epoch is the one; call it as often as you like."""
        epoch = trainer.current_epoch
        if not self._begun and epoch >= self.start_epoch:
            self._note(trainer, self.begin(trainer, pl_module))
            self._begun = True
        if self._begun and not self._ended and self.end_epoch is not None and epoch >= self.end_epoch:
            self._note(trainer, self.finish(trainer, pl_module))
            self._ended = True

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._begun and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"{self.name} never acted: training ended in epoch {trainer.current_epoch}, before {self.start_epoch}"
            )

    def _note(self, trainer: Trainer, record: dict[str, Any] | None) -> None:
        if record is not None:
            # What is measured on a process's own share of the data differs: rank 0's counts, as in checkpoints
            record = trainer.strategy.broadcast(record)
            self.history.append({"epoch": trainer.current_epoch, "step": trainer.global_step, **record})

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        record = checkpoint.setdefault(CHECKPOINT_KEY, {})
        record.update(structure(pl_module))
        if self is _first_strategy(trainer):
            record["random"] = {"states": random_states(trainer), "within_epoch": _within_epoch(trainer)}

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self is _first_strategy(trainer):
            self._random = checkpoint.get(CHECKPOINT_KEY, {}).get("random")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._traces.close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._traces.close()


def strategies_of(trainer: Trainer) -> list[CompressionStrategy]:
    """The compression strategies among a Trainer's callbacks, in order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, CompressionStrategy)]  # type: ignore[attr-defined]


def _first_strategy(trainer: Trainer) -> CompressionStrategy | None:
    return next(iter(strategies_of(trainer)), None)


def _within_epoch(trainer: Trainer) -> bool:
    return not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def _structured_checkpoints(trainer: Trainer, module: LightningModule) -> contextlib.AbstractContextManager[None]:
    """While in force, the module's checkpoints hold its structure, and loading one restores that structure first.

    Lightning hands callbacks their state only after the weights are loaded, too late for shapes; the module's own hooks
    run before. They also run for weights-only checkpoints, which skip callbacks. For evaluation callbacks get no state
    at all.
    """
    load, save = module.on_load_checkpoint, module.on_save_checkpoint

    def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
        for each in (module, *averaged_copies(trainer)):
            conform(each, checkpoint["state_dict"], checkpoint.get(CHECKPOINT_KEY))
        if not trainer.training:
            for strategy in strategies_of(trainer):
                strategy.evaluate_as(trainer, module, checkpoint.get("callbacks", {}).get(strategy.state_key))
        load(checkpoint)

    def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
        checkpoint.setdefault(CHECKPOINT_KEY, {}).update(structure(module))
        save(checkpoint)

    return replaced(module, on_load_checkpoint=on_load_checkpoint, on_save_checkpoint=on_save_checkpoint)


def changed_metrics(before: Mapping[str, float], after: Mapping[str, float], metric_name: str | None) -> str:
    """The end of a strategy's one line: ``metric_name``, or every metric, before and after the act.

    Example:
        >>> changed_metrics({"acc": 0.9, "loss": 1.0}, {"acc": 0.5, "loss": 2.0}, "acc")
        ', acc 0.9000 -> 0.5000'
    """
    shown = [name for name in ([metric_name] if metric_name else before) if name in before and name in after]
    return "".join(f", {name} {before[name]:.4f} -> {after[name]:.4f}" for name in shown)


def check_metric(metric_name: str | None, logged: Collection[str], argument: str = "metric_name") -> None:
    """Raise if ``metric_name``, given as ``argument``, is not among the names that the module logs.

    Example:
        >>> check_metric("val_ac", ["val_acc", "val_loss"])
        Traceback (most recent call last):
            ...
        lightslim.errors.CompressionError: metric_name: nothing logs 'val_ac'; did you mean 'val_acc'?
    """
    if metric_name is not None and metric_name not in logged:
        raise CompressionError(f"{argument}: nothing logs {metric_name!r}; {did_you_mean(metric_name, logged)}")
