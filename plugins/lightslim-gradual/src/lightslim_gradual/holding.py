"""A strategy whose weights, once pruned, stay at zero while the optimizer goes on."""

from typing import Any

from pytorch_lightning import LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override

from lightslim import CompressionStrategy
from lightslim.infit import averaged_copies, optimizers_of
from lightslim.surgery import cuts_of
from lightslim_gradual.held import Held
from lightslim_gradual.masks import Masks


class HoldingStrategy(CompressionStrategy):
    """Keeps what :meth:`hold` is given at zero, from then to the end of the fit; subclasses say what and when.

    Example:
        >>> HoldingStrategy(start_epoch=2).state_dict()["masks"]
        {}
    """

    def __init__(self, start_epoch: int = 0, end_epoch: int | None = None, name: str | None = None) -> None:
        super().__init__(start_epoch, end_epoch, name)
        self.held = Held()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **self.held.to_state()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.held = Held(state_dict["masks"], state_dict["cuts"])

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not self._begun:
            self.held = Held(cuts=len(cuts_of(pl_module)))

    def hold(self, trainer: Trainer, module: LightningModule, masks: Masks) -> None:
        """From now on weights are zero where ``masks``, those of rank 0, are True; optimizers forget them."""
        self.held.masks.update(trainer.strategy.broadcast({name: mask.cpu() for name, mask in masks.items()}))
        self._zero(trainer, module)
        self.held.zero_memory(module, optimizers_of(trainer))

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.held.zero_gradients(pl_module)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        # Not every optimizer works on one number at a time
        self._zero(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # After on_train_end, in which averaging callbacks put the average in place
        self._zero(trainer, pl_module)

    def _zero(self, trainer: Trainer, module: LightningModule) -> None:
        self.held.follow(module)
        for each in (module, *averaged_copies(trainer)):
            self.held.zero_weights(each)
