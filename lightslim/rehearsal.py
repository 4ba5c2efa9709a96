"""What the front door hooks into a run: do something at its first step and stop, or check what is logged."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from lightslim import deploy
from lightslim.infit import logged_names, probe_of
from lightslim.strategy import CompressionStrategy, check_metric


class Rehearsed(Exception):
    """Ends a run before its first step."""


class Rehearsal(Callback):
    """Does something with every strategy, by name, then stops the run."""

    def __init__(self, strategies: Sequence[CompressionStrategy], act: Callable[..., Any]) -> None:
        self.strategies, self.act = strategies, act
        self.results: dict[str, Any] = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.results = {one.name: self.act(one, trainer, pl_module) for one in self.strategies}
        raise Rehearsed


class Writing(Callback):
    """Writes the module that is about to be validated to a file, then stops."""

    def __init__(self, format_: str, path: Path, options: Mapping[str, Any]) -> None:
        self.arguments = format_, str(path), options
        self.manifest: dict[str, Any] = {}

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.manifest = deploy.write(trainer, pl_module, *self.arguments)
        raise Rehearsed


class Fetches(Callback):
    """Checks, before the first step, that everything in ``fetch_list`` is logged."""

    def __init__(self, fetch_list: Mapping[str, str]) -> None:
        self.fetch_list = fetch_list

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.fetch_list:
            logged = logged_names(trainer, pl_module, probe_of(trainer, pl_module))
            for name in self.fetch_list.values():
                check_metric(name, logged, "fetch_list")
