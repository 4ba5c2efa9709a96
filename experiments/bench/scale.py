"""How looking at a model and cutting it grow with the model: ``python -m experiments.bench.scale --out scale.md``.

Networks of 10 to 1,000 layers and up to a billion parameters on the meta device, which has shapes and no numbers, each
in a process of its own; and narrow ones with real weights, since trying a cut takes numbers. The exponent says what
bounds it: seconds grow with layers to that power.
"""

import argparse
import itertools
import math
import multiprocessing
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.bench.table import foot, markdown
from lightslim.graph import record
from lightslim.prune import StructurePruner, prune, sensitivity
from lightslim.prune.widths import Rounding, uniform_widths
from lightslim.steps import forward_probe
from lightslim.surgery import apply, plan

LAYERS = (10, 30, 100, 300, 1000)
PHASES = ("record s", "widths s", "plan s", "cut s", "peak MiB", "narrow: prune() s", "narrow: sensitivity() s")
LAST = 300  # layers of the largest network whose sensitivities are measured
COLUMNS = ("network", "layers", "parameters", "ops", *PHASES)
Found = Mapping[str, float]


class Residual(nn.Module):
    """Two convolutions of 3 by 3, and what came in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps to feature maps."""
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class Block(nn.Module):
    """Attention and two linear layers, each behind a layer norm: four linear layers."""

    def __init__(self, width: int, heads: int = 8) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.wide, self.narrow = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Tokens to tokens."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, self.head_width)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.wide(self.norm2(x))))


class Module(pl.LightningModule):
    """Logs something of a network's outputs."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def validation_step(self, x: Tensor, batch_idx: int) -> None:
        """The mean square of the outputs."""
        self.log("loss", self.net(x).square().mean())


def conv(layers: int, width: int, device: str) -> tuple[nn.Module, Tensor]:
    """A residual network of ``layers`` convolutions."""
    with torch.device(device):
        blocks = (Residual(width) for _ in range(layers // 2))
        net = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                            nn.Linear(width, 10))  # fmt: skip
        return net, torch.randn(2, 3, 8, 8)


def transformer(layers: int, width: int, device: str) -> tuple[nn.Module, Tensor]:
    """A transformer of ``layers`` linear layers."""
    with torch.device(device):
        net = nn.Sequential(nn.Linear(16, width), *(Block(width) for _ in range(layers // 4)), nn.Linear(width, 10))
        return net, torch.randn(2, 4, 16)


NETS: dict[str, tuple[Callable[[int, int, str], tuple[nn.Module, Tensor]], int, int]] = {
    "conv": (conv, 336, 32),
    "transformer": (transformer, 576, 32),
}


def grown(network: str, layers: int) -> Found:
    """What one size takes: each phase on the meta device, then the whole on a narrow network with real weights."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    build, wide, narrow = NETS[network]
    net, x = build(layers, wide, "meta")
    before = _peak()
    found = {"layers": layers, "parameters": sum(p.numel() for p in net.parameters()), **phases(net, x)}
    found["peak MiB"] = _peak() - before
    net, x = build(layers, narrow, "cpu")
    found["narrow: sensitivity() s"] = analysed(net, x) if layers <= LAST else math.nan
    start = time.perf_counter()
    prune(net, x, 0.5)
    return {**found, "narrow: prune() s": time.perf_counter() - start}


def analysed(net: nn.Module, x: Tensor) -> float:
    """Seconds that one point of every group's sensitivity takes, on one batch."""
    start = time.perf_counter()
    sensitivity(Module(net), [x], "loss", ratios=[0.5], mode="min")
    return time.perf_counter() - start


def phases(net: nn.Module, x: Tensor) -> Found:
    """Seconds of each phase of a cut; the first units of every group stay, since there are no numbers to rank by."""
    times = [time.perf_counter()]
    graph = record(forward_probe(net, x))
    times.append(time.perf_counter())
    pruner = StructurePruner()
    widths = uniform_widths(graph, pruner.selected(graph, "*"), 0.5, Rounding()).widths
    times.append(time.perf_counter())
    cut = plan(net, graph, {axis: torch.arange(axis.size) < width for axis, width in widths.items()})
    times.append(time.perf_counter())
    apply(net, cut)
    times.append(time.perf_counter())
    seconds = [later - earlier for earlier, later in itertools.pairwise(times)]
    return {"ops": sum(map(len, graph.traces.values())), **dict(zip(PHASES, seconds, strict=False))}


def _peak() -> float:
    """The most memory that this process has had so far, in MiB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The power of size that values grow with: the slope of a straight line through the logarithms.

    Example:
        >>> round(exponent([1, 10, 100], [2, 200, 20000]), 6)
        2.0
    """
    x, y = ([math.log(max(value, 1e-9)) for value in each] for each in (sizes, values))
    middle = [sum(each) / len(each) for each in (x, y)]
    over = sum((a - middle[0]) * (b - middle[1]) for a, b in zip(x, y, strict=True))
    return over / sum((a - middle[0]) ** 2 for a in x)


def growth(sizes: Sequence[Found], name: str) -> float:
    """The exponent of one column, by its larger half."""
    known = [each for each in sizes if not math.isnan(each[name])]
    larger = known[len(known) // 2 :] if len(known) > 3 else known
    sizes = [each["layers"] for each in larger]
    return exponent(sizes, [each[name] for each in larger]) if len(set(sizes)) > 1 else math.nan


def refused(network: str) -> str:
    """What the meta device has no answer to."""
    build, wide, _ = NETS[network]
    try:
        prune(*build(10, wide, "meta"), 0.5)
    except Exception as error:  # whatever torch says about numbers that there are not
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "nothing"


def report(found: Mapping[str, Sequence[Found]]) -> str:
    """A table with a line for each size and, below those of a network, the exponents of its larger half."""
    lines = []
    for network, sizes in found.items():
        for each in sizes:
            counts = (f"{each[name]:,.0f}" for name in COLUMNS[1:4])
            lines.append((network, *counts, *(f"{each[name]:.3g}".replace("nan", "") for name in PHASES)))
        lines.append(
            (f"{network}: exponent", "", "", "", *(f"{growth(sizes, name):.2f}".replace("nan", "") for name in PHASES))
        )
    refusals = "; ".join(f"{network}: {refused(network)}" for network in found)
    note = f"On the meta device prune() itself gets no further than: {refusals}."
    return f"{markdown(COLUMNS, lines)}\n\n{note}\n\n{foot()}.\n"


def draw(found: Mapping[str, Sequence[Found]], path: Path) -> bool:
    """A picture of the curves, if matplotlib is installed; says whether."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    for panel, (network, sizes) in zip(panels, found.items(), strict=True):
        for name in PHASES:
            panel.loglog(
                [each["layers"] for each in sizes], [max(each[name], 1e-3) for each in sizes], marker="o", label=name
            )
        panel.set(title=network, xlabel="layers")
    panels[-1].legend()
    figure.savefig(path)
    return True


def main() -> None:
    """Grow the networks, print the table, write it and the picture."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--layers", nargs="+", type=int, default=LAYERS)
    parser.add_argument("--out", type=Path, help="Markdown; the picture gets the same name and .png")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        found = {name: list(pool.map(grown, [name] * len(options.layers), options.layers)) for name in NETS}
    warnings.simplefilter("ignore")
    text = report(found)
    print(text, end="")
    if options.out:
        options.out.write_text(text, encoding="utf-8")
        if not draw(found, options.out.with_suffix(".png")):
            print("no picture: matplotlib is not installed")


if __name__ == "__main__":
    main()
