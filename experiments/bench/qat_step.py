"""What fake quantization costs: one training step with it against the same step in float.

    python -m experiments.bench.qat_step               # --rounds 3 --models mlp resnet18

Each round times every variant once, in shuffled order, in one process; what counts is the ratio within a round. A
second float copy runs along: its ratio to the first is the noise floor, and differences inside it are no findings.
Peers that are installed run along, too. The last column is the loss after 15 steps on one batch: a broken network may
well be a fast one.
"""

import argparse
import copy
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from experiments.bench.fake_quant import interval
from experiments.bench.peers import Peer, installed
from experiments.models import MobileNetV2
from lightslim.quantize import transform

Step = Callable[[], Tensor]
CLASSES = 10
WARM_UP = 15


def mlp() -> tuple[nn.Module, Tensor]:
    """784-512-512-10, batch 256."""
    layers = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    return nn.Sequential(*layers), torch.randn(256, 784)


def mobilenet_v2() -> tuple[nn.Module, Tensor]:
    """Batch 32 of 3 x 32 x 32."""
    return MobileNetV2(3, 10), torch.randn(32, 3, 32, 32)


def resnet18() -> tuple[nn.Module, Tensor]:
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

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


OURS: dict[str, Peer] = {
    "float": lambda net, x: net,
    "float again": lambda net, x: net,
    "moving average, channel-wise": lambda net, x: transform(
        net, 8, 8, "channel_wise_abs_max", "moving_average_abs_max"
    ),
    "abs_max both": lambda net, x: transform(net, 8, 8, "abs_max", "abs_max"),
}


def warmed(net: nn.Module, x: Tensor) -> nn.Module:
    """``net``, whose batch norms know the batch: calibrated on fresh ones, a peer finds ranges of nothing."""
    norms = [child for child in net.modules() if isinstance(child, nn.BatchNorm2d)]
    # Exactly: in a deep network a little of the fresh statistics, times every layer, leaves nothing of the signal
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        net(x)
    for norm in norms:
        norm.momentum = 0.1
    return net


def training_step(net: nn.Module, x: Tensor, labels: Tensor) -> Step:
    """One step of SGD with momentum, which returns the loss before it."""
    # A peer may leave evaluation mode behind
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=3e-3, momentum=0.9)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def training_steps(net: nn.Module, x: Tensor, peers: Mapping[str, Peer]) -> dict[str, Step]:
    """The step of each variant, all from the same weights."""
    net = warmed(net, x)
    # As many of each: else a network that sees nothing would still learn how often each comes, and leave ln 10
    labels = torch.arange(len(x)) % CLASSES
    return {name: training_step(peer(copy.deepcopy(net), x), x, labels) for name, peer in peers.items()}


def verdict(loss: float) -> str:
    """The loss, and what is wrong with it."""
    if not math.isfinite(loss):
        return f"{loss} NOT FINITE"
    return f"{loss:.3f}" + (" STUCK AT LN 10" if abs(loss - math.log(CLASSES)) < 0.01 else "")


def ratios(variants: Mapping[str, Step], rounds: int) -> dict[str, list[float]]:
    """Per-round seconds of each variant, over those of ``float``."""
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


MODELS = {build.__name__: build for build in (mlp, mobilenet_v2, resnet18)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args()
    torch.manual_seed(0)
    peers = OURS | installed()
    for model in options.models:
        variants = training_steps(*MODELS[model](), peers)
        losses = {name: [step().item() for _ in range(WARM_UP)][-1] for name, step in variants.items()}
        for name, values in ratios(variants, options.rounds).items():
            low, high = interval(values)
            found = f"{statistics.median(values):5.2f}  [{low:.2f}, {high:.2f}]"
            print(f"{model:14s} {name:30s} {found}  {verdict(losses[name])}", flush=True)


if __name__ == "__main__":
    main()
