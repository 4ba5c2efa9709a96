"""What distillation costs: one of its training steps against a float step and the teacher's forward, done by hand.

One epoch of Lightning's Trainer; each round has one step of every variant, in shuffled order, on one batch.
"""

import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from experiments.bench.paired import Row, row
from experiments.bench.qat_step import resnet18
from experiments.models import MobileNetV2
from lightslim import DistillationStrategy, FSPDistiller, L2Distiller, SoftLabelDistiller
from lightslim.distill import Distiller

VARIANTS = ("float", "float + teacher", "float + teacher again", "by hand", "distilled")
WARM_UP = 3
Pair = tuple[nn.Module, nn.Module, Tensor, list[Distiller]]


def mlp() -> Pair:
    """784-512-512-10 from one twice as wide, batch 256."""
    student, teacher = (
        nn.Sequential(nn.Linear(784, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 10)) for n in (512, 1024)
    )
    return student, teacher, torch.randn(256, 784), []


def mobilenet_v2() -> Pair:
    """From ResNet-18, batch 32 of 3 x 32 x 32, with two sections and a map beside the scores."""
    teacher, x = resnet18()
    maps = [
        FSPDistiller([("net.blocks.0", "net.blocks.0.bn3")], [("1", "2")], project=True),
        L2Distiller("net.blocks.2", "4", project=True),
    ]
    return MobileNetV2(3, 10), teacher, x, maps


PAIRS: dict[str, Callable[[], Pair]] = {build.__name__: build for build in (mlp, mobilenet_v2)}


class Student(pl.LightningModule):
    """Trains a network; asks ``beside``, too, when told, and learns soft labels from it."""

    def __init__(self, net: nn.Module, beside: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.beside = [beside]  # in a list, so that it is no part of the module
        self.asks = self.learns = False

    def forward(self, x: Tensor) -> Tensor:
        """Scores."""
        return self.net(x)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """The loss, and the teacher's forward: without any use for it, or for what one would write by hand."""
        scores = self(batch[0])
        loss = nn.functional.cross_entropy(scores, batch[1])
        if self.asks:
            with torch.no_grad():
                answer = self.beside[0](batch[0])
            loss = self._taught(loss, scores, answer) if self.learns else loss
        return loss

    def _taught(self, loss: Tensor, scores: Tensor, answer: Tensor) -> Tensor:
        soft = nn.functional.cross_entropy(scores, answer.softmax(-1))
        for name, value in (("own", loss), ("soft", soft), ("both", loss + soft)):
            self.log(name, value, prog_bar=True)
        return loss + soft

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


class Rounds(pl.Callback):
    """Makes each step one of the variants, and times it."""

    def __init__(self, strategy: DistillationStrategy) -> None:
        self.strategy, self.order = strategy, []
        self.seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}

    def on_train_batch_start(self, trainer: pl.Trainer, module: Student, *_: object) -> None:
        """The strategy has made ready before."""
        self.order = self.order or random.sample(VARIANTS, len(VARIANTS))
        self.name = self.order.pop()
        self.strategy._lesson.live = self.name == "distilled"
        module.learns = self.name == "by hand"
        module.asks = module.learns or self.name.startswith("float + teacher")
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_: object) -> None:
        """Take the time."""
        self.seconds[self.name].append(time.perf_counter() - self.start)


def measured(pair: Pair, rounds: int) -> dict[str, list[float]]:
    """Per-round seconds of each variant."""
    student, teacher, x, maps = pair
    labels = torch.arange(len(x)) % 10
    strategy = DistillationStrategy(
        [SoftLabelDistiller(), *maps], teacher, distiller_optimizer={"optimizer": "SGD", "lr": 1e-3, "momentum": 0.9}
    )
    timing = Rounds(strategy)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[strategy, timing],
        default_root_dir=tempfile.mkdtemp(), logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    batches = [(x, labels)] * ((WARM_UP + rounds) * len(VARIANTS))
    trainer.fit(Student(student, teacher), DataLoader(batches, batch_size=None))
    return {name: seconds[WARM_UP:] for name, seconds in timing.seconds.items()}


def rows(rounds: int, quick: bool) -> Iterator[Row]:
    """A distilled step beside one with the teacher's forward by hand; a second one of those is the control."""
    for name, build in PAIRS.items():
        if quick and name != "mlp":
            continue
        student, teacher, x, maps = build()
        for label, distillers in {"scores": [], **({"scores, map, section": maps} if maps else {})}.items():
            seconds = measured((student, teacher, x, distillers), rounds)
            base = "float + teacher"
            yield row(f"{name}, {label}, {base} again", seconds, f"{base} again", base, control=True)
            yield row(f"{name}, {label} / {base}", seconds, "distilled", base, 1.05)
            yield row(f"{name}, scores learnt and logged by hand / {base}", seconds, "by hand", base)
            if not distillers:
                yield row(f"{name}, {label} / by hand", seconds, "distilled", "by hand", 1.05)
