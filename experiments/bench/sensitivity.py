"""What an analysis of sensitivity costs when the common beginning of its steps is computed once.

Each round runs the analysis of all layers on the same images: with every step computed whole, with what comes before
the masked layer computed once for each batch, both with the batches in memory, and as one would by hand, by a mask and
``Trainer.validate`` for each point. All points must be equal to the last bit. The loop by hand has its own process,
since an analysis lets the C library keep what steps free, from which that loop would gain.
"""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
from pytorch_lightning import Trainer
from torch.utils.data import DataLoader, TensorDataset

from experiments.bench.paired import Row, Step, measure, prepare, row
from experiments.models import ImageClassifier
from lightslim.graph import record
from lightslim.prune import StructurePruner
from lightslim.prune.analysis import Analysis, Measure, parameter_names
from lightslim.prune.neutral import zeroed
from lightslim.prune.ratios import measured_ratios
from lightslim.steps import step_probe

WIDTHS = {"resnet20": 1.0, "mobilenet_v1": 0.375}
GOALS = {"resnet20": 0.5, "mobilenet_v1": 0.6}


def build(network: str, images: int, ratios: int, memory: float = 1.0) -> Analysis:
    """An analysis of all layers of a network, on images of 28 by 28, that may take ``memory`` GiB."""
    torch.manual_seed(0)
    module = ImageClassifier(network, width=WIDTHS[network])
    data = DataLoader(TensorDataset(torch.randn(images, 1, 28, 28), torch.randint(10, (images,))), batch_size=128)
    graph, pruner = record(step_probe(module, next(iter(data)), None)), StructurePruner()
    groups = parameter_names(pruner.selected(graph, "*"), pruner, graph.parameters)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", enable_model_summary=False, **quiet)
    measure = Measure("val_loss", "min", measured_ratios(1 / (ratios + 1)), memory=memory)
    return Analysis(trainer, module, graph, groups, pruner, measure, ([data], [float("inf")]))


def points(network: str, images: int, ratios: int, once: bool) -> object:
    """The curves of all layers."""
    analysis = build(network, images, ratios)
    analysis.evaluation.replaying = once
    return analysis.run(progress=False)


def by_hand(network: str, images: int, ratios: int) -> object:
    """The same curves: mask, validate, take the mask off."""
    analysis = build(network, images, ratios, memory=0)
    module, trainer, (loader,) = analysis.module, analysis.trainer, analysis.data[0]  # type: ignore[index]

    def value() -> float:
        return trainer.validate(module, loader, verbose=False)[0]["val_loss"]

    found, baseline = {}, value()
    for name, group in analysis.groups.items():
        losses = []
        for cut in analysis._cuts(name, analysis.measure.ratios):
            with zeroed(module, cut):
                losses.append(value() - baseline)
        found[name] = {"pruned_percent": list(analysis.measure.ratios), "loss": losses, "size": group.size}
    return found, baseline


def rows(rounds: int, quick: bool) -> Iterator[Row]:
    """The beginning computed once, beside everything computed whole."""
    images, ratios = (128, 1) if quick else (2000, 4)
    own = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, own, prepare, (torch.get_num_threads(),)) as process:
        for network in ["resnet20"] if quick else WIDTHS:
            yield from _rows(process, network, images, ratios, max(rounds // 5, 1))


def _rows(process: ProcessPoolExecutor, network: str, images: int, ratios: int, rounds: int) -> Iterator[Row]:
    found = {}

    def step(name: str, once: bool) -> None:
        found[name] = points(network, images, ratios, once)

    def hand() -> None:
        found["by hand"] = process.submit(by_hand, network, images, ratios).result()

    names = {"whole": False, "whole again": False, "once": True}
    steps: dict[str, Step] = {name: partial(step, name, once) for name, once in names.items()}
    seconds = measure({**steps, "by hand": hand}, rounds)
    if not found["whole"] == found["once"] == found["by hand"]:
        raise SystemExit(f"{network}: the points differ")
    yield row(f"{network}, whole again", seconds, "whole again", "whole", control=True)
    yield row(f"{network}, beginning once / whole", seconds, "once", "whole", 1, "points bit-equal")
    yield row(f"{network}, beginning once / by hand", seconds, "once", "by hand", GOALS[network], "points bit-equal")
