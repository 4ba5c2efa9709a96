"""One table of all measurements, in Markdown."""

import os
import platform
from collections.abc import Iterable, Sequence

import torch

from experiments.bench.paired import Row
from lightslim.export.bench import machine

READING = "Ratios are medians within rounds, less is better; a goal is missed where the whole interval lies above it."
COLUMNS = ("measurement", "ours", "other", "ours / other", "95 %", "goal", "")


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose first ``left`` columns start at the left and the others end at the right.

    Example:
        >>> print(markdown(("layer", "units"), [("conv1", "16")]))
        | layer | units |
        |---|---:|
        | conv1 | 16 |
    """
    rule = ("---" if i < left else "---:" for i in range(len(columns)))
    return "\n".join(
        [
            "| " + " | ".join(columns) + " |",
            "|" + "|".join(rule) + "|",
            *("| " + " | ".join(row) + " |" for row in rows),
        ]
    )


def report(found: Iterable[tuple[str, Sequence[Row]]]) -> str:
    """The table: a line for each row, grouped by benchmark, and the machine at its foot."""
    lines = [cells(f"{bench}: {row.name}", row) for bench, rows in found for row in rows]
    return f"{markdown(COLUMNS, lines)}\n\n{foot()}. {READING}\n"


def cells(name: str, row: Row) -> tuple[str, ...]:
    """A row as text.

    Example:
        >>> cells("a", Row("a", 1.0, 2.0, 0.5, (0.4, 0.6), goal=1.0))
        ('a', '1.00 ms', '2.00 ms', '0.50', '0.40 .. 0.60', '<= 1', '')
    """
    low, high = row.spread
    verdicts = [row.note, "A/A: the noise" if row.control else "", "missed" if row.goal and low > row.goal else ""]
    return (
        name,
        *(
            f"{value:,.2f} {row.unit}" if row.unit == "ms" else f"{value:,.0f} {row.unit}"
            for value in (row.ours, row.other)
        ),
        f"{row.ratio:.2f}",
        f"{low:.2f} .. {high:.2f}",
        "" if row.goal is None else f"<= {row.goal:.3g}",
        ", ".join(filter(None, verdicts)),
    )


def foot() -> str:
    """What the figures depend on."""
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{machine()}; {os.cpu_count()} cores, {torch.get_num_threads()} threads{load}; torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )
