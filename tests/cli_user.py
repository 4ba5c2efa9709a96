"""A user's script around LightningCLI, of either Lightning; it runs once for each list of arguments in a file."""

import importlib
import json
from pathlib import Path

import torch
from tiny import TinyNet, loaders
from torch import nn


class Teacher(TinyNet):
    """The same weights whenever it is built."""

    def __init__(self, seed: int = 0) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            super().__init__()


def classes(lightning):
    """The user's module and data."""

    class Module(lightning.LightningModule):
        def __init__(self, learning_rate: float = 0.1) -> None:
            super().__init__()
            self.net = TinyNet()
            self.learning_rate = learning_rate

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), self.learning_rate, momentum=0.9)

    class Data(lightning.LightningDataModule):
        def train_dataloader(self):
            return loaders()[0]

        def val_dataloader(self):
            return loaders()[1]

    return Module, Data


def main(namespace: str, folder: str) -> None:
    """Run each list of ``runs.json`` and keep the weights that it ends with, and its strategies' histories."""
    # These two lines are all that a user adds
    importlib.import_module("lightslim" if namespace == "pytorch_lightning" else "lightslim.lightning")
    lightning, cli = (importlib.import_module(name) for name in (namespace, f"{namespace}.cli"))
    for name, arguments in json.loads(Path(folder, "runs.json").read_text()).items():
        run = cli.LightningCLI(*classes(lightning), args=arguments, seed_everything_default=0)
        histories = [callback.history for callback in run.trainer.callbacks if hasattr(callback, "history")]
        torch.save({"weights": run.model.state_dict(), "histories": histories}, Path(folder, f"{name}.pt"))
