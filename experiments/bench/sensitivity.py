"""What an analysis of sensitivity costs when the common beginning of its steps is computed once.

    python -m experiments.bench.sensitivity            # --images 500 --ratios 2 --rounds 1 --models resnet20

Each round runs the analysis of all layers both ways, in an order drawn anew, on the same images, which are in memory
for both: with every step computed whole, and with what comes before the masked layer computed once for each batch. What
counts is the ratio of times within a round. All points must be equal to the last bit.
"""

import argparse
import logging
import random
import statistics
import time

import torch
from pytorch_lightning import Trainer
from torch.utils.data import DataLoader, TensorDataset

from experiments.models import ImageClassifier
from lightslim.graph import record
from lightslim.prune import StructurePruner
from lightslim.prune.analysis import Analysis, Measure, parameter_names
from lightslim.prune.ratios import measured_ratios
from lightslim.steps import step_probe

MODELS = {"resnet20": 1.0, "mobilenet_v1": 0.375}


def build(network: str, images: int, ratios: int) -> Analysis:
    """An analysis of all layers of a network, on images of 28 by 28."""
    torch.manual_seed(0)
    module = ImageClassifier(network, width=MODELS[network])
    data = DataLoader(TensorDataset(torch.randn(images, 1, 28, 28), torch.randint(10, (images,))), batch_size=128)
    graph, pruner = record(step_probe(module, next(iter(data)), None)), StructurePruner()
    groups = parameter_names(pruner.selected(graph, "*"), pruner, graph.parameters)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", enable_model_summary=False, **quiet)
    measure = Measure("val_loss", "min", measured_ratios(1 / (ratios + 1)))
    return Analysis(trainer, module, graph, groups, pruner, measure, ([data], [float("inf")]))


def timed(network: str, images: int, ratios: int, once: bool) -> tuple[float, object]:
    """Seconds, and the points."""
    start = time.perf_counter()
    analysis = build(network, images, ratios)
    analysis.evaluation.replaying = once
    found = analysis.run(progress=False)
    return time.perf_counter() - start, found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--ratios", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    for network in options.models:
        quotients, seconds = [], {}
        for _ in range(options.rounds):
            found = {}
            for once in random.sample([False, True], 2):
                seconds[once], found[once] = timed(network, options.images, options.ratios, once)
            if found[False] != found[True]:
                raise SystemExit(f"{network}: the points differ")
            quotients.append(seconds[True] / seconds[False])
        spread = f"[{min(quotients):.2f}, {max(quotients):.2f}]"
        whole = f"{seconds[True]:.1f} s instead of {seconds[False]:.1f} s"
        print(f"{network:14s} {statistics.median(quotients):.2f}  {spread}  {whole}, the points are equal", flush=True)


if __name__ == "__main__":
    main()
