"""Which layers lose their units together: as a record, and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightslim.graph import Graph, Group
from lightslim.pictures import check_can_draw, save

Dims = Mapping[str, Sequence[int]]
MOST = 120  # layers and groups shown: more cannot be read


def named_groups(graph: Graph) -> dict[str, Group]:
    """Groups by name; numbered where a name comes twice."""
    found: dict[str, Group] = {}
    for group in graph:
        name, number = group.name, 2
        while name in found:
            name, number = f"{group.name}#{number}", number + 1
        found[name] = group
    return found


def dims_by_layer(group: Group) -> dict[str, list[int]]:
    """The dimensions of weights that hold a group's units: 0 where a layer makes them, others where it reads them."""
    found: dict[str, list[int]] = {}
    for slot in group.weights:
        found.setdefault(slot.tensor.rpartition(".")[0] or slot.tensor, []).append(slot.dim)
    return found


def draw_groups(graph: Graph, path: str | Path) -> None:
    """Draw the layers of a model and which of them are coupled.

    Args:
        graph: from :func:`lightslim.prune.find_groups`.
        path: of the picture; its suffix (png, svg, pdf) says what is written.

    Raises:
        CompressionError: matplotlib is not installed, or does not write such files.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from torch import nn
        >>> from lightslim.prune import find_groups
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> path = Path(tempfile.mkdtemp()) / "groups.svg"
        >>> draw_groups(find_groups(net, torch.zeros(1, 4)), path)
        >>> path.exists()
        True
    """
    check_can_draw()
    groups = named_groups(graph)
    units = {name: (group.size, group.size) for name, group in groups.items()}
    coupled = {name: dims_by_layer(group) for name, group in groups.items()}
    save(figure(coupled, units, list(graph.flops_by_layer())), Path(path))


def figure(coupled: Mapping[str, Dims], units: Mapping[str, Sequence[int]], order: Sequence[str]) -> Any:
    """A column for each group, a row for each layer, and a mark where the layer's weight holds the group's units.

    Args:
        coupled: by group, the dimensions of each of its layers' weights; from :func:`dims_by_layer`.
        units: by group, units before and after a cut.
        order: the layers, from the input of the model on; others come last.
    """
    from matplotlib.figure import Figure

    shown = dict(list(coupled.items())[:MOST])
    layers = {layer for dims in shown.values() for layer in dims}
    rows = {
        layer: row for row, layer in enumerate(dict.fromkeys([*(o for o in order if o in layers), *sorted(layers)]))
    }
    drawing = Figure(figsize=(4 + 0.28 * len(shown), 1.8 + 0.2 * len(rows)), dpi=100, layout="constrained")
    axes = drawing.add_subplot()
    for column, (name, dims) in enumerate(shown.items()):
        places = [(rows[layer], dim) for layer, found in dims.items() for dim in found]
        _column(axes, column, places)
        before, after = units.get(name, ("", ""))
        label = f"{before}" if before == after else f"{before} → {after}"
        axes.annotate(label, (column, -0.7), rotation=90, ha="center", va="bottom", fontsize=7)
    for row in range(len(rows)):
        axes.axhline(row, color="0.93", zorder=0)
    axes.set_yticks(list(rows.values()), list(rows), fontsize=7)
    axes.set(xticks=[], xlim=(-0.8, len(shown) - 0.2), ylim=(len(rows) - 0.3, -3.5))
    more = f" (the first {MOST} of {len(coupled)})" if len(coupled) > MOST else ""
    axes.set_xlabel(f"groups of coupled units{more}; ● the layer makes them, ○ it reads them", fontsize=8)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    return drawing


def _column(axes: Any, column: int, places: Sequence[tuple[int, int]]) -> None:
    colour = f"C{column % 10}"
    rows = [row for row, _ in places]
    axes.plot([column, column], [min(rows), max(rows)], color=colour, linewidth=1.2, zorder=1)
    for row, dim in places:
        axes.plot(column, row, "o", markersize=5.5, color=colour, zorder=2, markerfacecolor="white" if dim else colour)
