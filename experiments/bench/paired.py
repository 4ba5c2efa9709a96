"""How everything here is measured: in rounds, each variant once in each, in an order drawn anew.

A slow moment of the machine then hits all alike, and what counts is the ratio within a round. A thing measured against
itself says how far from 1 a ratio may lie by chance.
"""

import logging
import random
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Step = Callable[[], object]
Rounds = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Row:
    """What ours takes beside something else.

    Attributes:
        name: what is measured.
        ours: its median.
        other: the median of what it is compared with.
        ratio: the median of ours over other within a round; less is better.
        spread: the 95 % interval of that.
        goal: what the ratio should not exceed; None for no goal.
        unit: of ``ours`` and ``other``.
        note: what else there is to know.
        control: a thing against itself: the noise of this machine, at this moment.
    """

    name: str
    ours: float
    other: float
    ratio: float
    spread: tuple[float, float]
    goal: float | None = None
    unit: str = "ms"
    note: str = ""
    control: bool = False


def prepare(threads: int) -> None:
    """Make a process ready to measure: as many threads, and nothing said in between."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


def measure(steps: Mapping[str, Step], rounds: int, repeats: int = 1) -> dict[str, list[float]]:
    """Seconds of each step in each round, after one round that doesn't count."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name in random.sample(list(steps), len(steps)):
            start = time.perf_counter()
            for _ in range(repeats):
                steps[name]()
            found[name].append((time.perf_counter() - start) / repeats)
    return {name: seconds[1:] for name, seconds in found.items()}


def row(
    name: str,
    seconds: Rounds,
    ours: str,
    other: str,
    goal: float | None = None,
    note: str = "",
    control: bool = False,
) -> Row:
    """Compare two of the variants that were measured together.

    Example:
        >>> row("halved", {"a": [1.0, 2.0, 1.5], "b": [2.0, 4.0, 3.0]}, "a", "b", goal=1)
        Row(name='halved', ours=1500.0, other=3000.0, ratio=0.5, spread=(0.5, 0.5), goal=1, unit='ms', note='', \
control=False)
    """
    ratios = [one / two for one, two in zip(seconds[ours], seconds[other], strict=True)]
    medians = (1e3 * statistics.median(seconds[variant]) for variant in (ours, other))
    return Row(name, *medians, statistics.median(ratios), interval(ratios), goal, note=note, control=control)


def interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """A bootstrap 95 % interval of the median; it draws from a generator of its own."""
    drawn = random.Random(0)
    medians = sorted(statistics.median(drawn.choices(values, k=len(values))) for _ in range(draws))
    return medians[draws // 40], medians[-draws // 40]
