"""When weights become zero: the schedule, over the epochs of a fit."""

from collections.abc import Sequence
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightslim import CompressionError
from lightslim.tables import table
from lightslim_gradual.holding import HoldingStrategy
from lightslim_gradual.layers import Choice


class GradualPruningStrategy(HoldingStrategy):
    """Set more and more of the least weights to zero, along a cubic schedule from ``start_epoch`` to ``end_epoch``.

    Zhu and Gupta, *To prune, or not to prune*, 2017. A weight that is gone gets no gradient, loses what the optimizer
    remembers of it, and is exactly zero after each step; the rest goes on as before. Nothing is put on the module: in
    the end its weights are plain tensors with zeros, which stay to the end of the fit.

    Args:
        start_epoch: ``initial_sparsity`` is set before the first step of this epoch.
        end_epoch: all of ``sparsity`` is reached before the first step of this epoch; None for half of what is left.
        sparsity: share of the weights that are zero in the end, below 1; None for 0.5, or what ``pattern`` says.
        initial_sparsity: where it begins.
        every: batches from one choice of weights to the next.
        ranking: "layer" takes that share of each layer, "global" all weights below one bar.
        pattern: as "2:4": along the inputs of a layer, 2 of 4 neighbours stay, which sparse tensor cores ask for.
        pruned_params: pattern of the weights, of convolutions and linear layers, that may go.
        ignore: patterns of weights that stay although ``pruned_params`` names them.
        min_size: layers of fewer weights stay dense.
        name: tells strategies of one class apart.

    Raises:
        CompressionError: sparsities that do not rise, ``every`` below 1, a malformed pattern; in ``setup`` a pattern
            that fits nothing, or no epoch left after ``end_epoch``.

    Example:
        >>> GradualPruningStrategy(start_epoch=2, end_epoch=8, sparsity=0.9, ignore=["*head*"]).choice.final
        0.9
    """

    def __init__(
        self,
        start_epoch: int = 0,
        end_epoch: int | None = None,
        sparsity: float | None = None,
        initial_sparsity: float = 0.0,
        every: int = 100,
        ranking: str = "layer",
        pattern: str | None = None,
        pruned_params: str = "*",
        ignore: Sequence[str] = (),
        min_size: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(start_epoch, end_epoch, name)
        if every < 1:
            raise CompressionError(f"every is {every}; it must be 1 batch or more")
        self.choice = Choice(sparsity, initial_sparsity, ranking, pattern, pruned_params, tuple(ignore), min_size)
        self.every = every
        self._given_end = self.end_epoch

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.end_epoch = self._end(trainer)
            if any(True for _ in pl_module.parameters()):
                self.choice.check(pl_module)

    def _end(self, trainer: Trainer) -> int:
        last = trainer.max_epochs
        if self._given_end is None and (last is None or last < 0):
            raise CompressionError(f"{self.name}: training has no last epoch: say end_epoch")
        end = self._given_end if self._given_end is not None else (self.start_epoch + (last or 0)) // 2
        if last is not None and 0 < last <= end and not trainer.fast_dev_run:
            raise CompressionError(
                f"{self.name}: end_epoch is {end}, and training ends after {last} epochs: the last weights to go would "
                "leave no epoch to recover in"
            )
        return end

    @override
    def rehearse(self, trainer: Trainer, pl_module: LightningModule) -> str:
        self.choice.check(pl_module)
        chosen, left = self.choice.select(pl_module)
        rows = [(name, f"{weight.numel():,}", "") for name, (weight, _) in chosen.items()]
        rows += [(name, "", reason) for name, reason in left.items()]
        head = f"{self.choice.final:.1%} of {len(chosen)} layers, from epoch {self.start_epoch} to {self.end_epoch}\n"
        return head + table(("weight", "numbers", "stays dense"), rows)

    @override
    def begin(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return self._prune(trainer, pl_module, 0.0)

    @override
    def finish(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return self._prune(trainer, pl_module, 1.0)

    def _prune(self, trainer: Trainer, module: LightningModule, progress: float) -> dict[str, Any]:
        """Go as far as the schedule is; returns the record."""
        self.held.follow(module)
        chosen, left = self.choice.select(module)
        before = {name: self.held.sparsity(name) for name in (*chosen, *self.held.masks)}
        self.hold(trainer, module, self.choice.masks(chosen, progress, self.held.masks))
        sparsity = {name: [share, self.held.sparsity(name)] for name, share in before.items()}
        return {"act": "sparsify", "sparsity": sparsity, "dense": left}

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        cut = self.held.follow(pl_module)
        due = batch_idx % self.every == 0 and not self._ended
        if self._begun and (due or (cut and self.choice.pattern)):
            record = self._prune(trainer, pl_module, self._progress(trainer, batch_idx))
            if self.history[-1]["epoch"] < trainer.current_epoch:
                self._note(trainer, record)

    def _progress(self, trainer: Trainer, batch_idx: int) -> float:
        """Where in the schedule a batch is; in a stream, whose length nobody knows, where its epoch is."""
        now = trainer.current_epoch + batch_idx / trainer.num_training_batches
        return (now - self.start_epoch) / max((self.end_epoch or 0) - self.start_epoch, 1e-9)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self._begun and not self._ended and not trainer.fast_dev_run:
            rank_zero_warn(f"{self.name}: training ended before epoch {self.end_epoch}, short of its sparsity")
