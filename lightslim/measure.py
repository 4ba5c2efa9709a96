"""What the model was before compression and what it is after training: metrics and cost, taken in the run itself."""

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from lightslim.cost import probe_cost
from lightslim.infit import evaluate, probe_of
from lightslim.strategy import strategies_of


class Measurement(Callback):
    """Measures the model when the first strategy is about to begin, and when training ends.

    It must come before the strategies in the Trainer's list. What it measured travels in checkpoints.

    Args:
        unfinished: the run may have been stopped between its last step and its end, which is made up for then.

    Attributes:
        before: {"metrics": {name: value}, "flops": per sample, "params": count, "bytes": of parameters and buffers}.
        after: the same at the end of training.
    """

    def __init__(self, unfinished: bool = False) -> None:
        self.unfinished = unfinished
        self.before: dict[str, Any] = {}
        self.after: dict[str, Any] = {}

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        first = min((strategy.start_epoch for strategy in strategies_of(trainer)), default=0)
        if not self.before and trainer.current_epoch >= first:
            self.before = _measured(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.after = _measured(trainer, pl_module)
        self.before = self.before or self.after  # training ended before any strategy began

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning skips what surrounds the training loop, too, where no epoch is left
        if self.unfinished and self.before and not self.after:
            trainer.fit_loop.on_run_start()
            trainer.fit_loop.on_run_end()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = state_dict["before"]


def _measured(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    cost = probe_cost(probe_of(trainer, module))
    return {
        "metrics": evaluate(trainer, module),
        "flops": cost.flops,
        "params": cost.params,
        "bytes": cost.bytes,
    }
