"""A picture of the groups: which layers give and take which units, as text for Graphviz."""

from collections.abc import Iterator

from lightslim.graph.groups import Graph, Group


def dot(graph: Graph) -> str:
    """The coupled groups in the DOT language: layers that lose the same units hang on one ellipse, frozen ones on grey.

    An arrow into the ellipse is a layer that makes the units, one out of it a layer that reads them. Draw it with
    ``dot -Tsvg`` or any viewer of Graphviz; lightslim itself needs none.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightslim.graph import record
        >>> from lightslim.steps import forward_probe
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> print(dot(record(forward_probe(net, torch.zeros(1, 4)))))
        digraph groups {
          rankdir=LR; node [shape=box];
          "group 0" [shape=ellipse, label="8 units"];
          "0" -> "group 0";
          "group 0" -> "2";
          "frozen 0" [shape=ellipse, style=filled, label="4: an input of the model"];
          "0" -> "frozen 0" [dir=none];
          "frozen 1" [shape=ellipse, style=filled, label="2: an output of the model"];
          "2" -> "frozen 1" [dir=none];
        }
    """
    return "\n".join(["digraph groups {", "  rankdir=LR; node [shape=box];", *_groups(graph), *_frozen(graph), "}"])


def _groups(graph: Graph) -> Iterator[str]:
    for number, group in enumerate(graph):
        name = f"group {number}"
        yield f'  "{name}" [shape=ellipse, label="{group.size} units"];'
        yield from dict.fromkeys(_arrows(name, group))


def _arrows(name: str, group: Group) -> Iterator[str]:
    for slot in group.weights:
        layer = _quoted(slot.tensor.rpartition(".")[0] or slot.tensor)
        yield f'  "{layer}" -> "{name}";' if slot.dim == 0 else f'  "{name}" -> "{layer}";'


def _frozen(graph: Graph) -> Iterator[str]:
    for number, group in enumerate(graph.frozen):
        yield f'  "frozen {number}" [shape=ellipse, style=filled, label="{group.size}: {_quoted(group.reason)}"];'
        for layer in dict.fromkeys(name.rpartition(".")[0] or name for name in group.tensors):
            yield f'  "{_quoted(layer)}" -> "frozen {number}" [dir=none];'


def _quoted(text: str) -> str:
    return text.replace("\\", "/").replace('"', "'")
