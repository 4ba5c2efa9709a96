"""An optimizer of the distillation phase's own, and the module's own ones put aside meanwhile."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightslim.errors import CompressionError, did_you_mean
from lightslim.steps import replaced

Factory = Callable[[Iterable[Any]], Any]


def factory_of(given: Factory | Mapping[str, Any]) -> Factory:
    """From parameters to what ``configure_optimizers`` may return.

    Args:
        given: such a function, or the name of a class of ``torch.optim`` with its arguments.

    Raises:
        CompressionError: no such class, or arguments that it does not take.

    Example:
        >>> make = factory_of({"optimizer": "SGD", "lr": 0.1})
        >>> make(nn.Linear(2, 2).parameters()).defaults["lr"]
        0.1
    """
    if callable(given):
        return given
    options = dict(given)
    name = options.pop("optimizer", None)
    kinds = {key: kind for key, kind in vars(torch.optim).items()
             if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer}  # fmt: skip
    if name not in kinds:
        raise CompressionError(
            f"distiller_optimizer: 'optimizer' is {name!r}, no class of torch.optim; {did_you_mean(str(name), kinds)}"
        )

    def make(parameters: Iterable[Any]) -> Any:
        return kinds[name](parameters, **options)

    try:
        make([nn.Parameter(torch.zeros(1))])
    except (TypeError, ValueError) as error:
        raise CompressionError(f"distiller_optimizer: {name} refuses its arguments: {error}") from error
    return make


class Aside:
    """The optimizers and schedulers of a module, out of the way while another one does their work.

    Args:
        trainer: whose optimizers are exchanged.
        module: whose parameters, and ``extra`` ones, the other one gets.
        make: makes the other one.
        extra: more parameters.

    Raises:
        CompressionError: a module that optimizes by hand would find another number of optimizers.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, make: Factory, extra: Iterable[Tensor]) -> None:
        strategy = trainer.strategy
        self.optimizers, self.schedulers = list(strategy.optimizers), list(strategy.lr_scheduler_configs)
        parameters = [*module.parameters(), *extra]
        with replaced(module, configure_optimizers=lambda: make(parameters)):
            strategy.setup_optimizers(trainer)
        if not module.automatic_optimization and len(strategy.optimizers) != len(self.optimizers):
            found = len(strategy.optimizers)
            self.put_back(trainer, module)
            raise CompressionError(
                f"distiller_optimizer makes {found}, but training_step optimizes by hand with {len(self.optimizers)}: "
                "make as many"
            )
        module.zero_grad(set_to_none=True)
        _tell_monitors(trainer)

    def put_back(self, trainer: Trainer, module: LightningModule) -> None:
        """The same objects work again, with the state that they had."""
        trainer.strategy.optimizers = self.optimizers
        trainer.strategy.lr_scheduler_configs = self.schedulers
        module.zero_grad(set_to_none=True)
        _tell_monitors(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [config.scheduler.state_dict() for config in self.schedulers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse."""
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for config, saved in zip(self.schedulers, state["schedulers"], strict=True):
            config.scheduler.load_state_dict(saved)


def _tell_monitors(trainer: Trainer) -> None:
    """Monitors of learning rates name what they watch once, when training starts."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if hasattr(callback, "lrs") and any(kind.__name__ == "LearningRateMonitor" for kind in type(callback).__mro__):
            callback.on_train_start(trainer)
