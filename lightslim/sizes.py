"""The sizes that torch's own layers remember beside their weights, read off the shapes of those weights."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

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
