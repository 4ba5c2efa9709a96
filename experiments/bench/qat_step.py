"""What fake quantization costs: one training step with it against the same step in float.

Peers that are installed run along. Noted is the loss after 15 steps on one batch: a broken network may well be a fast
one.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from experiments.bench.paired import Row, measure, row
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
    blocks = [ResidualBlock(64, 64, 1), ResidualBlock(64, 64, 1)]
    for into, out in ((64, 128), (128, 256), (256, 512)):
        blocks += [ResidualBlock(into, out, 2), ResidualBlock(out, out, 1)]
    stem = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    return nn.Sequential(stem, *blocks, head), torch.randn(32, 3, 32, 32)


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        same = into == out
        self.skip = nn.Identity() if same else nn.Sequential(nn.Conv2d(into, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """``[n, into, h, w]`` to ``[n, out, h / stride, w / stride]``."""
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
        return f"loss {loss} NOT FINITE"
    return f"loss {loss:.3f}" + (" STUCK AT LN 10" if abs(loss - math.log(CLASSES)) < 0.01 else "")


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor]], float]] = {
    "mlp": (mlp, 1.25),
    "mobilenet_v2": (mobilenet_v2, 1.2),
    "resnet18": (resnet18, 1.08),
}


def rows(rounds: int, quick: bool) -> Iterator[Row]:
    """Each variant beside the step in float; a second one of those is the control."""
    peers = OURS | installed()
    for model in ["mlp"] if quick else MODELS:
        build, goal = MODELS[model]
        variants = training_steps(*build(), peers)
        losses = {name: [step().item() for _ in range(WARM_UP)][-1] for name, step in variants.items()}
        seconds = measure(variants, rounds, repeats=1 if quick else 3)
        for name in variants:
            if name != "float":
                bound = goal if name == "moving average, channel-wise" else None
                note = verdict(losses[name])
                yield row(f"{model}, {name} / float", seconds, name, "float", bound, note, name == "float again")
