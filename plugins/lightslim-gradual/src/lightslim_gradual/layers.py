"""Which layers take part, how far they go, and the whole of it at once on a plain module."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightslim import CompressionError
from lightslim.errors import did_you_mean
from lightslim.patterns import check_pattern, select
from lightslim_gradual.masks import RANKINGS, Masks, cubic, masks_for, parse_pattern

Chosen = dict[str, tuple[Tensor, int]]  # by name, the weight and its input axis


@dataclass(frozen=True)
class Choice:
    """What to prune and how far; see :class:`GradualPruningStrategy` for the arguments and errors."""

    sparsity: float | None = None
    initial: float = 0.0
    ranking: str = "layer"
    pattern: str | None = None
    pruned_params: str = "*"
    ignore: Sequence[str] = ()
    min_size: int = 0

    def __post_init__(self) -> None:
        if self.ranking not in RANKINGS:
            raise CompressionError(f"ranking is {self.ranking!r}; {did_you_mean(self.ranking, RANKINGS)}")
        if self.pattern and self.sparsity is not None:
            raise CompressionError(f"sparsity is {self.sparsity}, but {self.pattern!r} says how much goes: give one")
        if not 0 <= self.initial < self.final < 1:
            raise CompressionError(
                f"initial_sparsity is {self.initial} and sparsity {self.final}; they must rise, from 0 to below 1"
            )
        for argument, pattern in (("pruned_params", self.pruned_params), *(("ignore", one) for one in self.ignore)):
            check_pattern(pattern, argument)

    @property
    def final(self) -> float:
        """The share of weights that are zero in the end."""
        if self.pattern:
            kept, of = parse_pattern(self.pattern)
            return 1 - kept / of
        return 0.5 if self.sparsity is None else self.sparsity

    def select(self, model: nn.Module) -> tuple[Chosen, dict[str, str]]:
        """The weights that take part, and why others of the layers that could do not."""
        found = _weights(model)
        named = set(select(self.pruned_params, found, "pruned_params"))
        ignored = {name for pattern in self.ignore for name in select(pattern, found, "ignore")}
        left = {}
        for name, (weight, _, inputs) in found.items():
            if name not in named or name in ignored:
                left[name] = "not asked for"
            elif weight.numel() < self.min_size:
                left[name] = f"{weight.numel()} weights are fewer than min_size {self.min_size}"
            elif self.pattern and inputs % parse_pattern(self.pattern)[1]:
                left[name] = f"{inputs} inputs do not divide into groups of {parse_pattern(self.pattern)[1]}"
        return {name: (weight, axis) for name, (weight, axis, _) in found.items() if name not in left}, left

    def check(self, model: nn.Module) -> None:
        """Raise if no layer takes part."""
        chosen, left = self.select(model)
        if not chosen:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in left.items())
            raise CompressionError(f"no layer is left to prune: {reasons}")

    def masks(self, chosen: Chosen, progress: float, before: Masks | None = None) -> Masks:
        """The masks at a point of the schedule, from 0 to 1; what ``before`` says is gone already stays so."""
        weights = {name: weight for name, (weight, _) in chosen.items()}
        axes = {name: axis for name, (_, axis) in chosen.items()}
        return masks_for(weights, cubic(progress, self.initial, self.final), self.ranking, self.pattern, axes, before)


def _weights(model: nn.Module) -> dict[str, tuple[Tensor, int, int]]:
    """The weights of convolutions and linear layers: each with its input axis and the inputs along it."""
    found: dict[str, tuple[Tensor, int, int]] = {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for child in model.modules():
        weight = child._parameters.get("weight") if isinstance(child, (_ConvNd, nn.Linear)) else None
        if weight is not None and names[weight] not in found:
            turned = bool(getattr(child, "transposed", False))
            axis = 0 if turned else 1
            inputs = weight.shape[axis] // (int(getattr(child, "groups", 1)) if turned else 1)
            found[names[weight]] = (weight, axis, inputs)
    return found


def sparsify(model: nn.Module, sparsity: float | None = None, ranking: str = "layer", pattern: str | None = None,
             pruned_params: str = "*", ignore: Sequence[str] = (), min_size: int = 0) -> Masks:  # fmt: skip
    """Set the least weights of a model's convolutions and linear layers to zero, at once and in place.

    Returns:
        What is zero now, as bool masks by parameter; the arguments are those of :class:`GradualPruningStrategy`.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 4))
        >>> _ = sparsify(net, pattern="2:4")
        >>> int((net[0].weight == 0).sum())
        16
    """
    choice = Choice(sparsity, 0.0, ranking, pattern, pruned_params, ignore, min_size)
    choice.check(model)
    chosen = choice.select(model)[0]
    masks = choice.masks(chosen, 1.0)
    with torch.no_grad():
        for name, mask in masks.items():
            chosen[name][0].masked_fill_(mask, 0.0)
    return masks
