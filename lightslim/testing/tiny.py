"""A tiny LightningModule and data that know nothing of lightslim, and a Trainer without noise."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def tiny_images(count: int = 96, classes: int = 4, seed: int = 0) -> TensorDataset:
    """Blobs whose class is the quadrant that is bright: learnable in a few steps.

    Args:
        count: how many; float32 images of 3 x 8 x 8 with int64 labels.
        classes: up to 4.
        seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 3, 8, 8, generator=generator)
    y = torch.arange(count) % classes
    for i, label in enumerate(y.tolist()):
        row, column = divmod(label, 2)
        x[i, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1.0
    return TensorDataset(x, y)


def tiny_loaders(batch_size: int = 16) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Training data, shuffled, and validation data: 96 and 32 of :func:`tiny_images`."""
    return (
        DataLoader(tiny_images(seed=1), batch_size=batch_size, shuffle=True),
        DataLoader(tiny_images(32, seed=2), batch_size=batch_size),
    )


class TinyNet(nn.Module):
    """Plain, residual, depthwise and concatenating layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(16, 20, 3, padding=1), nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 16, 3, padding=1)
        )
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.1), nn.Linear(128, 4))

    def forward(self, x: Tensor) -> Tensor:
        """Scores of four classes."""
        x = self.stem(x)
        y = torch.relu(x + self.body(x))
        scores: Tensor = self.head(torch.cat([y, self.depthwise(y)], 1))
        return scores


class TinyModule(pl.LightningModule):
    """Learns :func:`tiny_images` in a few steps; logs ``train_loss``, ``val_loss`` and ``val_acc``.

    Args:
        optimizer: a key of ``OPTIMIZERS``.
        net: default: a new :class:`TinyNet`, with the submodules stem, body, depthwise and head.

    Attributes:
        losses: one for each training step.

    Example:
        >>> tuple(TinyModule()(torch.zeros(2, 3, 8, 8)).shape)
        (2, 4)
    """

    def __init__(self, optimizer: str = "sgd", net: nn.Module | None = None) -> None:
        super().__init__()
        self.save_hyperparameters("optimizer")
        self.net = net or TinyNet()
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        scores: Tensor = self.net(x)
        return scores

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross entropy."""
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs loss and accuracy."""
        x, y = batch
        scores = self(x)
        self.log("val_loss", nn.functional.cross_entropy(scores, y))
        self.log("val_acc", (scores.argmax(1) == y).float().mean())

    def configure_optimizers(self) -> Any:
        """As its name says."""
        return OPTIMIZERS[self.hparams["optimizer"]](self)


def _one_cycle(module: pl.LightningModule) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    steps = int(module.trainer.estimated_stepping_batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _make(kind: Callable[..., torch.optim.Optimizer], module: pl.LightningModule, **arguments: Any) -> Any:
    return kind(module.parameters(), **arguments)


OPTIMIZERS: dict[str, Callable[[pl.LightningModule], Any]] = {
    "sgd": partial(_make, torch.optim.SGD, lr=0.05, momentum=0.9),
    "adam": partial(_make, torch.optim.Adam, lr=1e-2, amsgrad=True),
    "adamw": partial(_make, torch.optim.AdamW, lr=1e-2),
    "adamw_foreach": partial(_make, torch.optim.AdamW, lr=1e-2, foreach=True),
    "adamw_fused": partial(_make, torch.optim.AdamW, lr=1e-2, fused=True),
    "nadam": partial(_make, torch.optim.NAdam, lr=1e-2),
    "adafactor": partial(_make, torch.optim.Adafactor, lr=1e-1),
    "rmsprop": partial(_make, torch.optim.RMSprop, lr=1e-3, momentum=0.9, centered=True),
    "adagrad": partial(_make, torch.optim.Adagrad, lr=1e-2),
    "one_cycle": lambda module: _one_cycle(module),
}


def tiny_trainer(folder: Any, *callbacks: pl.Callback, **arguments: Any) -> pl.Trainer:
    """A CPU Trainer that logs and saves nothing unless told to."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 3,
            "default_root_dir": folder,
            "log_every_n_steps": 1,
            "callbacks": list(callbacks),
            **quiet,
            **arguments,
        }
    )
