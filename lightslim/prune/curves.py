"""Sensitivities for people: the chosen shares as a table, the curves as a picture where matplotlib is installed."""

from collections.abc import Mapping
from typing import Any

from lightslim.tables import table

Record = Mapping[str, Any]


def rows(record: Record) -> list[tuple[str, str, str, str]]:
    """By parameter, the most sensitive first: units, share gone, and the largest loss measured."""
    found, chosen = record["sensitivities"], record["chosen"]
    order = sorted(chosen, key=lambda name: -max(found[name]["loss"], default=0.0))
    return [
        (name, f"{found[name]['size']:,}", f"{chosen[name]:.1%}", f"{max(found[name]['loss'], default=0.0):.4f}")
        for name in order
    ]


HEADER = ("parameter", "units", "cut", "largest loss measured")


def chosen(record: Record) -> str:
    """The chosen shares as a table.

    Example:
        >>> curve = {"pruned_percent": [0.5], "loss": [0.25], "size": 16}
        >>> print(chosen({"sensitivities": {"conv.weight": curve}, "chosen": {"conv.weight": 0.5}}))
        parameter    units    cut  largest loss measured
        conv.weight     16  50.0%                 0.2500
    """
    return table(HEADER, rows(record))


def figure(record: Record) -> Any:
    """The curves of all layers in one matplotlib figure, with a mark where each is cut."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(10, 6), dpi=100, layout="constrained")
    axes = drawing.add_subplot()
    for name, curve in record["sensitivities"].items():
        (line,) = axes.plot([0.0, *curve["pruned_percent"]], [0.0, *curve["loss"]], marker=".", label=name)
        if record["chosen"].get(name):
            axes.axvline(record["chosen"][name], color=line.get_color(), linewidth=0.6, linestyle=":")
    axes.set_xlabel("share of units masked; dotted: cut")
    axes.set_ylabel(f"loss of {record['metric_name']}")
    axes.grid(alpha=0.3)
    drawing.legend(loc="outside right upper", fontsize="x-small")
    return drawing
