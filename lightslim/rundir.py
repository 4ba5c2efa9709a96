"""A run directory: the resolved recipe, checkpoints, TensorBoard events, exports, and ``result.json``."""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightslim.errors import CompressionError
from lightslim.files import locked, replacing
from lightslim.yamlfile import dump

RESULT, RECIPE = "result.json", "recipe.yaml"


def default_folder(recipe: Path, resuming: bool) -> Path:
    """``runs/<name of the recipe>``, numbered from the second run on; the newest that exists when resuming.

    A file called recipe.yaml is named after its folder.
    """
    name, number = _name_of(recipe), 1
    while _numbered(name, number).exists():
        number += 1
    return _numbered(name, max(number - 1, 1) if resuming else number)


def default_sweep_folder(recipe: Path) -> Path:
    """``runs/<name of the recipe>-sweep``, the same each time: a sweep given again goes on."""
    return Path("runs") / f"{_name_of(recipe)}-sweep"


def _name_of(recipe: Path) -> str:
    return recipe.stem if recipe.stem != "recipe" else recipe.resolve().parent.name


def _numbered(name: str, number: int) -> Path:
    return Path("runs") / (name if number == 1 else f"{name}-{number}")


def saved_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest at the end; ``last.ckpt`` is the newest where it is."""
    return sorted(folder.glob("[!.]*.ckpt"), key=lambda path: (path.stem == "last", path.stat().st_mtime))


def prepare(folder: Path, checkpoints: Path, resuming: bool) -> None:
    """Make the folder of a run and make sure it can be written to.

    Raises:
        CompressionError: it cannot be written to, or holds another run that this one does not continue.
    """
    if not resuming and ((folder / RESULT).exists() or saved_in(checkpoints)):
        raise CompressionError(f"{folder} already holds a run: continue it with --resume auto, or name another --out")
    for path in (folder, checkpoints):
        probe = path / ".writable"
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink(missing_ok=True)  # by another process of the run
        except OSError as error:
            raise CompressionError(f"the run directory {path} cannot be written to: {error.strerror}") from error


@contextlib.contextmanager
def taken(folder: Path) -> Iterator[None]:
    """``folder`` is there, and no other run writes into it meanwhile; if it ends empty, it is taken away again.

    Raises:
        CompressionError: another run is there, or it cannot be made.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CompressionError(f"the run directory {folder} cannot be written to: {error.strerror}") from error
    try:
        with locked(folder):
            yield
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # there is something in it
                path.rmdir()


@contextlib.contextmanager
def nothing_half_written(folder: Path, checkpoints: Path) -> Iterator[None]:
    """If a CompressionError ends what happens inside before there is a checkpoint, ``folder`` is as it was before."""
    before = set(folder.iterdir())
    try:
        yield
    except CompressionError:
        if not saved_in(checkpoints):
            for path in set(folder.iterdir()) - before:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_recipe(folder: Path, resolved: Mapping[str, Any]) -> None:
    """Keep the recipe as it was run, includes and overrides resolved."""
    write_text(folder / RECIPE, dump(dict(resolved)))


def recipe_of(checkpoint: str | Path) -> Path:
    """The recipe of the run that a checkpoint lies in.

    Raises:
        CompressionError: there is no such file, or no folder above it is a run directory.
    """
    if not Path(checkpoint).is_file():
        raise CompressionError(f"{checkpoint}: there is no such checkpoint")
    for folder in Path(checkpoint).absolute().parents:
        if (folder / RECIPE).is_file():
            return folder / RECIPE
    raise CompressionError(f"{checkpoint} lies in no run directory: name the recipe with --recipe")


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Write ``result.json``."""
    write_text(folder / RESULT, json.dumps(result, indent=2, allow_nan=True) + "\n")


def read_result(folder: Path) -> dict[str, Any]:
    """Read ``result.json`` of a finished run.

    Raises:
        CompressionError: there is none, or it is damaged.
    """
    path = folder / RESULT
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CompressionError(f"{folder} holds no {RESULT}: it is not a finished run") from None
    except (OSError, ValueError) as error:
        raise CompressionError(f"{path} cannot be read: {error}") from error
    measured = [result.get(when) if isinstance(result, dict) else None for when in ("before", "after")]
    if not all(isinstance(one, dict) and isinstance(one.get("metrics"), dict) for one in measured):
        raise CompressionError(f"{path} is not the result of a run")
    return dict(result)
