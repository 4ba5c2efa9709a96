"""The sizes that modules remember as plain numbers: torch's own layers beside their weights, and anybody's Python."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice, product
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightslim.graph import Axis, Made, count

Shapes = Mapping[str, Sequence[int]]


def sizes_from_shapes(module: nn.Module, shapes: Shapes) -> dict[str, Any]:
    """The attributes that ``module`` must have when its own parameters and buffers have these shapes.

    Args:
        module: one layer, whose attributes still tell what it was (depthwise or not).
        shapes: by the layer's own names ("weight", "running_mean").

    Example:
        >>> sizes_from_shapes(nn.Linear(8, 4), {"weight": (3, 8)})
        {'out_features': 3, 'in_features': 8}
    """
    rule = next((rule for kind, rule in _RULES.items() if isinstance(module, kind)), None)
    vector = shapes.get("weight", shapes.get("running_mean"))
    return rule(module, vector) if rule is not None and vector is not None else {}


def sizes_from_axes(module: nn.Module, made: Iterable[Made], kept: Mapping[Axis, int]) -> list[dict[str, Any]]:
    """The ints, and lists and tuples of ints, on ``module`` that equal the size of an axis which shrinks.

    Args:
        module: any module; ``num_heads``, ``split_sizes`` and the like lie in its ``__dict__``.
        made: the ops that its own code ran, whose axes it may speak of.
        kept: how many units remain of each leaf that loses some.

    Returns:
        What they may be after the cut, attribute name to value, the likeliest first: where axes of one size shrink
        differently, or one does not, a trial has to find out which is meant. Empty where there are none.
    """
    if isinstance(module, tuple(_RULES)) and not isinstance(module, HOLD_SIZES):
        return []  # the shapes of its weights say it all
    after: dict[int, Counter[int]] = {}
    for axis in {id(axis): axis for one in made for axis in one.touched}.values():
        after.setdefault(axis.size, Counter())[count(axis, kept)] += 1
    new = {
        size: sorted(left, key=lambda n: (n == size, -left[n])) for size, left in after.items() if set(left) != {size}
    }
    choices = {name: _replaced(value, new) for name, value in vars(module).items()}
    choices = {name: values for name, values in choices.items() if values}
    combined = islice(product(*choices.values()), MOST_READINGS) if choices else ()
    return [dict(zip(choices, values, strict=True)) for values in combined]


MOST_READINGS = 8


def _replaced(value: Any, new: Mapping[int, list[int]]) -> list[Any]:
    """What ``value`` may become when the sizes in it change."""
    if type(value) is int:
        return new.get(value, [])
    if type(value) in (tuple, list, torch.Size) and any(type(item) is int and item in new for item in value):
        return [type(value)(new.get(item, [item])[0] if type(item) is int else item for item in value)]
    return []


def _convolution(module: nn.Module, weight: Sequence[int]) -> dict[str, Any]:
    assert isinstance(module, _ConvNd)
    depthwise = module.groups == module.in_channels and module.groups > 1
    multiplier = module.out_channels // module.groups
    if module.transposed:
        groups = weight[0] if depthwise else module.groups
        return {"in_channels": weight[0], "out_channels": weight[1] * groups, "groups": groups}
    groups = weight[0] // multiplier if depthwise else module.groups
    return {"in_channels": weight[1] * groups, "out_channels": weight[0], "groups": groups}


def _linear(_: nn.Module, weight: Sequence[int]) -> dict[str, Any]:
    return {"out_features": weight[0], "in_features": weight[1]}


def _group_norm(module: nn.Module, weight: Sequence[int]) -> dict[str, Any]:
    assert isinstance(module, nn.GroupNorm)
    groups = weight[0] if module.num_groups == module.num_channels else module.num_groups
    return {"num_channels": weight[0], "num_groups": groups}


_RULES: dict[type[nn.Module], Callable[[nn.Module, Sequence[int]], dict[str, Any]]] = {
    _ConvNd: _convolution,
    nn.Linear: _linear,
    _NormBase: lambda _, weight: {"num_features": weight[0]},
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: lambda _, weight: {"normalized_shape": tuple(weight)},
    nn.RMSNorm: lambda _, weight: {"normalized_shape": tuple(weight)},
    nn.Embedding: lambda _, weight: {"num_embeddings": weight[0], "embedding_dim": weight[1]},
    nn.EmbeddingBag: lambda _, weight: {"num_embeddings": weight[0], "embedding_dim": weight[1]},
    nn.PReLU: lambda _, weight: {"num_parameters": weight[0]},
}

HOLD_SIZES = (_NormBase, nn.RNNBase)
"""Layers whose sizes follow every cut, whether or not they have weights to read them off."""
