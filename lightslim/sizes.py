"""The sizes that modules remember as plain numbers: torch's own layers beside their weights, and anybody's Python."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
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


def sizes_from_axes(module: nn.Module, made: Iterable[Made], kept: Mapping[Axis, int]) -> dict[str, Any]:
    """The ints, and lists and tuples of ints, on ``module`` that equal the size of an axis which shrinks.

    Args:
        module: any module; ``num_heads``, ``split_sizes`` and the like lie in its ``__dict__``.
        made: the ops that its own code ran, whose axes it may speak of.
        kept: how many units remain of each leaf that loses some.

    Returns:
        Attribute name to the value after the cut. Where two axes of one size shrink differently the more frequent wins;
        whether that was right is for a trial to find out.
    """
    after: dict[int, Counter[int]] = {}
    for axis in {id(axis): axis for one in made for axis in one.touched}.values():
        if (left := count(axis, kept)) != axis.size:
            after.setdefault(axis.size, Counter())[left] += 1
    new = {size: lefts.most_common(1)[0][0] for size, lefts in after.items()}
    changed = {name: _replaced(value, new) for name, value in vars(module).items()}
    return {name: value for name, value in changed.items() if value is not None}


def _replaced(value: Any, new: Mapping[int, int]) -> Any:
    """``value`` with each size that changes in it changed; None if there is none."""
    if type(value) is int:
        return new.get(value)
    if type(value) in (tuple, list, torch.Size) and any(type(item) is int and item in new for item in value):
        return type(value)(new.get(item, item) if type(item) is int else item for item in value)
    return None


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


_RULES: dict[type[nn.Module], Callable[[nn.Module, Sequence[int]], dict[str, Any]]] = {
    _ConvNd: _convolution,
    nn.Linear: _linear,
    _NormBase: lambda _, weight: {"num_features": weight[0]},
    nn.GroupNorm: lambda _, weight: {"num_channels": weight[0]},
    nn.LayerNorm: lambda _, weight: {"normalized_shape": tuple(weight)},
    nn.RMSNorm: lambda _, weight: {"normalized_shape": tuple(weight)},
    nn.Embedding: lambda _, weight: {"num_embeddings": weight[0], "embedding_dim": weight[1]},
    nn.EmbeddingBag: lambda _, weight: {"num_embeddings": weight[0], "embedding_dim": weight[1]},
    nn.PReLU: lambda _, weight: {"num_parameters": weight[0]},
}

HOLD_SIZES = (_NormBase, nn.RNNBase)
"""Layers whose sizes follow every cut, whether or not they have weights to read them off."""
