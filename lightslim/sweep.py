"""A grid of runs of one recipe, one after the other, each in a folder and a process of its own.

Processes, since nothing that a run leaves behind (random state, memory, a crash) may reach the next one; what it costs
is an import. The folders are the only memory of a sweep: the same command given again goes on where it was.
"""

import itertools
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightslim import rundir
from lightslim.compressor import Compressor
from lightslim.errors import CompressionError
from lightslim.recipe import Recipe
from lightslim.yamlfile import dump, read


@dataclass(frozen=True)
class Cell:
    """One run of a grid: the name of its folder, and its settings as ``key.path=value`` each."""

    name: str
    settings: tuple[str, ...]


def grid(sweeps: Sequence[str], seeds: Sequence[int] = ()) -> list[Cell]:
    """Every combination of values, the seeds innermost.

    Args:
        sweeps: ``key.path=value,value,...`` each; values are YAML, so what holds a comma goes into quotes or brackets.
        seeds: values of ``compressor.seed``.

    Raises:
        CompressionError: a sweep is written otherwise, or gives a value twice.

    Example:
        >>> [cell.name for cell in grid(["strategies.halve.target_ratio=0.3,0.5"], seeds=[0])]
        ['target_ratio=0.3,seed=0', 'target_ratio=0.5,seed=0']
    """
    axes = [_axis(sweep) for sweep in sweeps]
    if seeds:
        axes.append(("compressor.seed", [str(seed) for seed in seeds]))
    shorts = [key.rpartition(".")[2] for key, _ in axes]
    keys = [short if shorts.count(short) == 1 else key for short, (key, _) in zip(shorts, axes, strict=True)]
    cells = []
    for values in itertools.product(*(values for _, values in axes)):
        settings = tuple(f"{key}={value}" for (key, _), value in zip(axes, values, strict=True))
        pairs = (f"{key}={_plain(value)}" for key, value in zip(keys, values, strict=True))
        cells.append(Cell(",".join(pairs), settings))
    _check_names(cells)
    return cells


def _axis(sweep: str) -> tuple[str, list[str]]:
    key, equals, text = (part.strip() for part in sweep.partition("="))
    source = f"[{text}]"
    try:
        nodes = list(getattr(yaml.compose(source, Loader=yaml.SafeLoader), "value", ()))
    except yaml.YAMLError as error:
        raise CompressionError(f"--sweep {sweep}: the values are not YAML: {error}") from error
    if not key or not equals or not nodes:
        raise CompressionError(f"--sweep {sweep}: must be written as key.path=value,value")
    return key, [source[node.start_mark.index : node.end_mark.index].strip() for node in nodes]


def _plain(value: str) -> str:
    """A value as part of a folder's name."""
    return re.sub(r"[^\w.+-]+", "_", value).strip("_") or "_"


def _check_names(cells: Sequence[Cell]) -> None:
    names = [cell.name for cell in cells]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise CompressionError(f"two runs of the sweep would be {twice}: give each value once")


def run_grid(recipe: Path, cells: Sequence[Cell], settings: Sequence[str], out: Path) -> list[Path]:
    """Check every run of the grid, then train those that are not finished.

    Args:
        recipe: the file.
        cells: the runs.
        settings: ``key.path=value`` each, for all of them.
        out: the folder that holds their folders.

    Returns:
        Their folders.

    Raises:
        CompressionError: a setting is wrong, or a folder holds a run of other settings: nothing has been trained then.
            Or runs have failed: the others are finished then, and the same call tries these again.
    """
    folders = [out / cell.name for cell in cells]
    for cell, folder in zip(cells, folders, strict=True):
        check(recipe, [*settings, *cell.settings], folder)
    failed = []
    for number, (cell, folder) in enumerate(zip(cells, folders, strict=True), 1):
        done = (folder / rundir.RESULT).exists()
        print(f"[{number}/{len(cells)}] {cell.name}{': finished before' if done else ''}", flush=True)
        if not done and train(recipe, [*settings, *cell.settings], folder):
            failed.append(cell.name)
    if failed:
        raise CompressionError(
            f"{len(failed)} of {len(cells)} runs failed: {'; '.join(failed)}. The same command tries them again"
        )
    return folders


def check(recipe: Path, settings: Sequence[str], folder: Path) -> None:
    """Make sure that a recipe can be run with ``settings``, ``key.path=value`` each, in ``folder``.

    Raises:
        CompressionError: it or they are wrong, or the folder holds a run of other settings.
    """
    wanted = Recipe.from_yaml(recipe, settings)
    Compressor.from_recipe(wanted)
    kept = folder / rundir.RECIPE
    if kept.exists() and _asked(read(kept).tree) != _asked(wanted.resolved()):
        raise CompressionError(f"{folder} holds a run of other settings: name another --out, or take it away")


def _asked(tree: Mapping[str, Any]) -> str:
    """What a recipe asks for; what a run notes down beside it is left out."""
    return dump({section: content for section, content in tree.items() if section != "plugins"})


def train(recipe: Path, settings: Sequence[str], folder: Path) -> int:
    """Run or resume in a process of its own; returns its exit status."""
    options = itertools.chain.from_iterable(("--set", setting) for setting in settings)
    command = [sys.executable, "-m", "lightslim", "run", str(recipe), *options]
    with subprocess.Popen([*command, "--resume", "auto", "--out", str(folder)]) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:  # which the process has got, too: it ends by itself
            process.wait()
            raise


def seeds_from(first: int | None, count: int) -> Iterator[int]:
    """``count`` seeds, beginning with the recipe's own.

    Example:
        >>> list(seeds_from(None, 3))
        [0, 1, 2]
    """
    yield from range(first or 0, (first or 0) + count)
