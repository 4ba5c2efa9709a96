"""Finished runs side by side; those that differ in their seed only are one row, with their mean and spread."""

import csv
import io
import itertools
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightslim import rundir
from lightslim.errors import CompressionError
from lightslim.show import flat, number
from lightslim.tables import table
from lightslim.yamlfile import dump, read

Values = dict[str, list[float]]


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed only: a name, how many, and the values of each column."""

    name: str
    runs: int
    values: Values

    def mean(self, column: str) -> float | None:
        """The mean of a column; None where no run has it."""
        return statistics.fmean(self.values[column]) if self.values.get(column) else None

    def text(self, column: str) -> str:
        """A cell: one number, or the mean and the standard deviation of several."""
        values = self.values.get(column, [])
        if len(set(values)) < 2:
            return number(values[0]) if values else ""
        mean, deviation = statistics.fmean(values), statistics.stdev(values)
        whole = mean >= 1000
        return f"{number(round(mean) if whole else mean)} ± {number(round(deviation) if whole else deviation)}"


def find_runs(paths: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """The run directories at and under ``paths``: the finished ones, and those that have begun and not ended.

    Raises:
        CompressionError: there is no finished run at or under one of them.
    """
    finished: list[Path] = []
    begun: list[Path] = []
    for path in paths:
        here = sorted(found.parent for found in path.rglob(rundir.RESULT))
        if not here:
            raise CompressionError(f"{path} holds no {rundir.RESULT}: it is not a finished run")
        finished += here
        begun += sorted(found.parent for found in path.rglob(rundir.RECIPE) if found.parent not in here)
    return list(dict.fromkeys(finished)), list(dict.fromkeys(begun))


def rows_of(folders: Sequence[Path], latency: Callable[[Path], float] | None = None) -> list[Row]:
    """One row for each recipe; the runs of its seeds are put together.

    Args:
        folders: run directories.
        latency: what times an exported file, in milliseconds; None to time none.

    Raises:
        CompressionError: a result is missing or damaged.
    """
    groups: dict[str, list[Path]] = {}
    for folder in folders:
        groups.setdefault(_but_for_the_seed(folder), []).append(folder)
    rows = []
    for members in groups.values():
        values: Values = {}
        for folder in members:
            for column, value in _measured(folder, latency):
                values.setdefault(column, []).append(value)
        rows.append(Row(_common_name(members), len(members), values))
    return rows


def _but_for_the_seed(folder: Path) -> str:
    """A run's recipe as text, its seed left out; the folder itself where no recipe is kept."""
    kept = folder / rundir.RECIPE
    if not kept.is_file():
        return str(folder)
    tree = dict(read(kept).tree)
    settings = tree.get("compressor") or {}
    return dump({**tree, "compressor": {key: value for key, value in settings.items() if key != "seed"}})


def _measured(folder: Path, latency: Callable[[Path], float] | None) -> Iterator[tuple[str, float]]:
    result = rundir.read_result(folder)
    yield from flat(result["after"]).items()
    if "seconds" in result:
        yield "seconds", result["seconds"]
    exports: Mapping[str, Any] = result.get("exports") or {}
    for format_, file in exports.items():
        yield f"{format_} bytes", file["bytes"]
        for name, value in file["metrics"].items():
            yield f"{format_} {name}", value
        if latency:
            yield f"{format_} ms", latency(_at(folder, file["path"]))


def _at(folder: Path, path: str) -> Path:
    """An exported file, which a run names from where it was started, or which moved with its folder."""
    places = Path(path), folder / path, folder / Path(path).name
    return next((place for place in places if place.exists()), places[0])


def _common_name(members: Sequence[Path]) -> str:
    """What the names of the members begin with, without what is left of a seed.

    Example:
        >>> _common_name([Path("runs/ratio=0.5,seed=0"), Path("runs/ratio=0.5,seed=1")])
        'runs/ratio=0.5'
    """
    names = [str(member) for member in members]
    if len(names) == 1:
        return names[0]
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return re.sub(r"[^\w)\]]*(seed)?[^\w)\]]*$", "", "".join(letters[0] for letters in alike)) or names[0]


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Every column that a row has, in the order of their first appearance; seconds last."""
    columns = dict.fromkeys(column for row in rows for column in row.values)
    return sorted(columns, key=lambda column: column == "seconds")


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The header and the rows as text."""
    columns = columns_of(rows)
    seeds = any(row.runs > 1 for row in rows)
    header = ["run", *(["seeds"] if seeds else []), *columns]
    return [header, *([row.name, *([str(row.runs)] if seeds else []), *map(row.text, columns)] for row in rows)]


def as_text(rows: Sequence[Row]) -> str:
    """The table for a terminal."""
    header, *lines = cells(rows)
    return table(header, lines)


def as_markdown(rows: Sequence[Row]) -> str:
    """The table for a page."""
    header, *lines = cells(rows)
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines)) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """The table for a program: for each column the mean and, where there are several seeds, the standard deviation."""
    columns, several = columns_of(rows), any(row.runs > 1 for row in rows)
    header = ["run", "seeds"]
    for column in columns:
        header += [column, f"{column} std"] if several else [column]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        line: list[Any] = [row.name, row.runs]
        for column in columns:
            values = row.values.get(column, [])
            line.append(row.mean(column))
            if several:
                line.append(statistics.stdev(values) if len(values) > 1 else None)
        writer.writerow(line)
    return out.getvalue()
