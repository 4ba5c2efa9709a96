"""The student as it was before anything compressed it, as its own teacher."""

import copy
from collections.abc import Mapping
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from torch import nn

from lightslim.errors import CompressionError
from lightslim.strategy import strategies_of
from lightslim.surgery import conform, structure

SELF = "self"


class Earlier:
    """A copy of the student that keeps up with it until the first strategy of the fit acts.

    Args:
        module: the student, built but not trained or cut yet.

    Attributes:
        network: the copy; the same object from the beginning, its content comes with :meth:`take`.
        state: its content as plain values, once it is final; None before.

    Raises:
        CompressionError: the student has no parameters yet.
    """

    def __init__(self, module: LightningModule) -> None:
        if not any(True for _ in module.parameters()):
            raise CompressionError(f"teacher {SELF!r}: {type(module).__name__} has no parameters when training begins")
        self.network: nn.Module = copy.deepcopy(module)
        self.state: dict[str, Any] | None = None

    def on_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Take the student when its last epoch before the first strategy ends."""
        if trainer.current_epoch + 1 == _first_epoch(trainer):
            self.take(trainer, module)

    def on_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Take the student where no such epoch ends, or has ended before a resume."""
        untouched = not any(strategy._begun for strategy in strategies_of(trainer))
        if untouched and trainer.current_epoch + 1 >= _first_epoch(trainer):
            self.take(trainer, module)

    def take(self, trainer: Trainer, module: LightningModule) -> None:
        """Copy the student as it is now; in all processes as it is in the first."""
        weights = {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
        self.load(trainer.strategy.broadcast({"weights": weights, **structure(module)}))

    def load(self, state: Mapping[str, Any]) -> None:
        """Give the copy this content."""
        self.state = dict(state)
        conform(self.network, state["weights"], state)
        self.network.load_state_dict(state["weights"])


def _first_epoch(trainer: Trainer) -> int:
    return min(strategy.start_epoch for strategy in strategies_of(trainer))
