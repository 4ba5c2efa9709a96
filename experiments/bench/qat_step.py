"""What fake quantization costs: one training step with it against the same step in float.

    python -m experiments.bench.qat_step [rounds]

Each round times every variant once, in shuffled order, in one process; what counts is the ratio within a round. A
second float copy runs along: its ratio to the first is the noise floor, and differences inside it are no findings.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from experiments.models import MobileNetV2
from lightslim.quantize import transform

Step = Callable[[], None]


def mlp() -> tuple[nn.Module, torch.Tensor]:
    """784-512-512-10, batch 256."""
    layers = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    return nn.Sequential(*layers), torch.randn(256, 784)


def mobilenet_v2() -> tuple[nn.Module, torch.Tensor]:
    """Batch 32 of 3 x 32 x 32."""
    return MobileNetV2(3, 10), torch.randn(32, 3, 32, 32)


def resnet18() -> tuple[nn.Module, torch.Tensor]:
    """CIFAR style, widths 64 to 512, batch 32 of 3 x 32 x 32."""
    blocks = [_Block(64, 64, 1), _Block(64, 64, 1)]
    for into, out in ((64, 128), (128, 256), (256, 512)):
        blocks += [_Block(into, out, 2), _Block(out, out, 1)]
    stem = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    return nn.Sequential(stem, *blocks, head), torch.randn(32, 3, 32, 32)


class _Block(nn.Module):
    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        same = into == out
        self.skip = nn.Identity() if same else nn.Sequential(nn.Conv2d(into, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def training_step(net: nn.Module, x: torch.Tensor) -> Step:
    """One step of SGD with momentum on random labels."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    labels = torch.randint(10, (len(x),))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), labels).backward()
        optimizer.step()

    return step


def ratios(variants: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Per-round seconds of each variant, over those of ``float``."""
    for step in variants.values():
        step(), step()
    found: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        seconds = {}
        for name in random.sample(list(variants), len(variants)):
            start = time.perf_counter()
            for _ in range(3):
                variants[name]()
            seconds[name] = time.perf_counter() - start
        for name, taken in seconds.items():
            found[name].append(taken / seconds["float"])
    return found


def interval(values: list[float]) -> tuple[float, float]:
    """The bootstrap interval (95 %) of the median."""
    medians = sorted(statistics.median(random.choices(values, k=len(values))) for _ in range(2000))
    return medians[50], medians[-51]


def main() -> None:
    """Print the table."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    settings = {"activation_quantize_type": "moving_average_abs_max", "weight_quantize_type": "channel_wise_abs_max"}
    for build in (mlp, mobilenet_v2, resnet18):
        net, x = build()
        variants = {
            "float": training_step(net, x),
            "float again": training_step(build()[0], x),
            "moving average, channel-wise": training_step(transform(build()[0], **settings), x),
            "abs_max both": training_step(transform(build()[0], 8, 8, "abs_max", "abs_max"), x),
        }
        for name, values in ratios(variants, rounds).items():
            low, high = interval(values)
            print(f"{build.__name__:14s} {name:30s} {statistics.median(values):5.2f}  [{low:.2f}, {high:.2f}]")


if __name__ == "__main__":
    main()
