"""What it costs to record, unify, plan and cut: ResNets of growing depth, beside Torch-Pruning where it is installed.

Run it with ``python -m experiments.bench.graph``. Times are medians of three, on as many threads as torch is given.
"""

import copy
import statistics
import time
import warnings

import torch
from torch import nn

from lightslim.graph import record
from lightslim.prune import prune
from lightslim.steps import forward_probe

DEPTHS = {"26": (2, 2, 2, 2), "50": (3, 4, 6, 3), "101": (3, 4, 23, 3), "152": (3, 8, 36, 3)}


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1 and a shortcut; ``wide`` is what comes out."""

    def __init__(self, into: int, width: int, stride: int) -> None:
        super().__init__()
        wide = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(into, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide),
        )  # fmt: skip
        same = stride == 1 and into == wide
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(nn.Conv2d(into, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Body plus shortcut."""
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet(blocks: tuple[int, ...]) -> nn.Module:
    """A bottleneck ResNet for images of any size."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)]
    into = 64
    for stage, count in enumerate(blocks):
        for index in range(count):
            layers.append(Bottleneck(into, 64 << stage, 2 if stage and not index else 1))
            into = 256 << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(into, 1000))


def main() -> None:
    """One line per depth."""
    x = torch.randn(2, 3, 64, 64)
    print("| ResNet | ops | record s | record + plan + try + cut s | ms per op | forward s |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, blocks in DEPTHS.items():
        net = resnet(blocks)
        graph = record(forward_probe(net, x))
        recorded = median(lambda net=net: record(forward_probe(net, x)))
        whole = median(lambda net=net: _prune(copy.deepcopy(net), x))
        forward = median(lambda net=net: net(x))
        ops = sum(map(len, graph.traces.values()))
        print(f"| {name} | {ops} | {recorded:.2f} | {whole:.2f} | {1000 * whole / ops:.2f} | {forward:.2f} |")
    _peer(x)


def _prune(net: nn.Module, x: torch.Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prune(net, x, 0.5)


def median(run: object, times: int = 3) -> float:
    """Seconds that ``run`` takes."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()  # type: ignore[operator]
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _peer(x: torch.Tensor) -> None:
    try:
        import torch_pruning
    except ImportError:
        print("Torch-Pruning is not installed: no peer to compare with")
        return
    for name, blocks in DEPTHS.items():
        net = resnet(blocks)

        def cut(net: nn.Module = net) -> None:
            copied = copy.deepcopy(net)
            importance = torch_pruning.importance.MagnitudeImportance(p=1)
            head = [copied[-1]]  # type: ignore[index]
            pruner = torch_pruning.pruner.MetaPruner(
                copied, x, importance=importance, pruning_ratio=0.3, ignored_layers=head
            )
            pruner.step()

        print(f"Torch-Pruning, ResNet-{name}: {median(cut):.2f} s")


if __name__ == "__main__":
    main()
