"""What a run costs against how good it is, as a picture: the runs that nothing beats in both are joined by a line."""

import io
from collections.abc import Sequence
from typing import Any

from lightslim.compare import Row, columns_of
from lightslim.errors import CompressionError, did_you_mean
from lightslim.pictures import check_can_draw

Point = tuple[float, float]


def front(points: Sequence[Point], maximize: bool = True) -> list[Point]:
    """The points for which no other costs as little and is as good, by cost.

    Example:
        >>> front([(1, 0.5), (2, 0.4), (3, 0.9)])
        [(1, 0.5), (3, 0.9)]
    """
    sign = 1 if maximize else -1
    best: list[Point] = []
    for cost, quality in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not best or sign * quality > sign * best[-1][1]:
            best.append((cost, quality))
    return best


def picture(rows: Sequence[Row], x: str, y: str | None = None, mode: str = "max") -> bytes:
    """A PNG of ``y`` over ``x``.

    Args:
        rows: from :func:`lightslim.compare.rows_of`.
        x: the column of the cost, as ``flops``.
        y: the column of the quality; None for the first metric.
        mode: ``max`` if more of ``y`` is better, else ``min``.

    Raises:
        CompressionError: matplotlib is not installed, or no row has such columns.
    """
    check_can_draw()
    columns = columns_of(rows)
    y = y or columns[0]
    for column in (x, y):
        if column not in columns:
            raise CompressionError(f"no run has a column {column!r}; {did_you_mean(column, columns)}")
    shown = [(row, cost, good) for row in rows
             if (cost := row.mean(x)) is not None and (good := row.mean(y)) is not None]  # fmt: skip
    buffer = io.BytesIO()
    _figure(shown, x, y, mode).savefig(buffer, format="png")
    return buffer.getvalue()


def _figure(shown: Sequence[tuple[Row, float, float]], x: str, y: str, mode: str) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    drawing = Figure(figsize=(9, 5.5), dpi=110, layout="constrained")
    axes = drawing.add_subplot()
    line = front([(cost, good) for _, cost, good in shown], mode == "max")
    axes.step(*zip(*line, strict=True), where="post", color="0.7", zorder=1, label="nothing as cheap is better")
    middle = (min(cost for _, cost, _ in shown) + max(cost for _, cost, _ in shown)) / 2
    for row, cost, good in shown:
        values, inwards = row.values[y], -1 if cost > middle else 1
        (mark,) = axes.plot([cost], [good], "o", zorder=3, color="C0" if (cost, good) in line else "0.5")
        axes.vlines(cost, min(values), max(values), color=mark.get_color(), zorder=2)
        axes.annotate(_short(row.name), (cost, good), xytext=(7 * inwards, 5), textcoords="offset points", fontsize=8,
                      ha="left" if inwards > 0 else "right")  # fmt: skip
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel(x)
    axes.set_ylabel(f"{y} (mean, from least to most)" if any(row.runs > 1 for row, _, _ in shown) else y)
    axes.margins(x=0.08, y=0.12)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    return drawing


def _short(name: str) -> str:
    return name.rpartition("/")[2] or name
