"""What it costs to record, unify, plan, try and cut: ResNets beside Torch-Pruning where it is installed."""

import copy
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec

import torch
from torch import nn

from experiments.bench.paired import Row, Step, measure, row
from lightslim.graph import record
from lightslim.prune import StructurePruner, prune
from lightslim.prune.widths import Rounding, uniform_widths
from lightslim.steps import forward_probe
from lightslim.surgery import apply, plan

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


def rows(rounds: int, quick: bool) -> Iterator[Row]:
    """The whole beside the recording alone, which is linear in the number of operations, and beside a peer."""
    x = torch.randn(2, 3, 64, 64)
    for name in ["26"] if quick else DEPTHS:
        net = resnet(DEPTHS[name])
        steps: dict[str, Step] = {
            "record": partial(record, forward_probe(net, x)),
            "record again": partial(record, forward_probe(net, x)),
            "untried": lambda net=net: _untried(copy.deepcopy(net), x),
            "prune": lambda net=net: prune(copy.deepcopy(net), x, 0.5),
        }
        if find_spec("torch_pruning"):
            steps["Torch-Pruning"] = lambda net=net: _peer(copy.deepcopy(net), x)
        seconds = measure(steps, max(rounds // 5, 2))
        yield row(f"ResNet-{name}, record again", seconds, "record again", "record", control=True)
        yield row(f"ResNet-{name}, with trials / without", seconds, "prune", "untried", 3)
        yield row(f"ResNet-{name}, with trials / record", seconds, "prune", "record", 5)
        if "Torch-Pruning" in steps:
            yield row(f"ResNet-{name}, with trials / Torch-Pruning", seconds, "prune", "Torch-Pruning", 1)
            yield row(f"ResNet-{name}, without trials / Torch-Pruning", seconds, "untried", "Torch-Pruning", 1)


def _untried(net: nn.Module, x: torch.Tensor) -> None:
    """Record, rank, plan and cut, and trust that the cut model runs."""
    graph, pruner = record(forward_probe(net, x)), StructurePruner()
    groups = pruner.selected(graph, "*")
    widths = uniform_widths(graph, groups, 0.5, Rounding()).widths
    tensors = pruner.tensors(net, None)
    kept = {group.axis: pruner.keep(pruner.importance(group, tensors), widths[group.axis]) for group in groups}
    apply(net, plan(net, graph, kept))


def _peer(net: nn.Module, x: torch.Tensor) -> None:
    import torch_pruning

    importance = torch_pruning.importance.MagnitudeImportance(p=1)
    head = [net[-1]]  # type: ignore[index]
    torch_pruning.pruner.MetaPruner(net, x, importance=importance, pruning_ratio=0.3, ignored_layers=head).step()
