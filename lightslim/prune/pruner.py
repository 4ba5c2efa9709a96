"""Which units go: patterns say along which dimension and by which criterion each parameter is ranked."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightslim.errors import CompressionError
from lightslim.graph import Graph, Group, Slot
from lightslim.patterns import lookup, select
from lightslim.prune.spared import one_factor_each, without_embeddings
from lightslim.registry import registry


class StructurePruner:
    """Ranks the units of a group by a criterion of the weights that make them.

    Args:
        pruning_axis: pattern of parameter names to the dimension whose slices are ranked and removed; parameters that
            no pattern fits are never chosen (they still follow the groups they belong to). Default: ``{"*": 0}``.
        criterions: pattern of parameter names to the name of a registered criterion. Default: ``{"*": "l1_norm"}``.
        embeddings: whether the residual stream of a transformer, which layer norms run over, may lose units.

    Raises:
        CompressionError: an axis is negative or a criterion is not registered.

    Example:
        >>> pruner = StructurePruner(criterions={"*": "l1_norm"})
        >>> pruner.keep(torch.tensor([3.0, 1.0, 2.0, 1.0]), 3).tolist()
        [True, True, True, False]
    """

    def __init__(
        self,
        pruning_axis: Mapping[str, int] | None = None,
        criterions: Mapping[str, str] | None = None,
        embeddings: bool = False,
    ) -> None:
        self.embeddings = embeddings
        self.pruning_axis = dict(pruning_axis or {"*": 0})
        self.criterions = dict(criterions or {"*": "l1_norm"})
        for pattern, axis in self.pruning_axis.items():
            if axis < 0:
                raise CompressionError(f"pruning_axis {pattern!r} is {axis}; it must be 0 or more")
        self._functions = {name: registry().get("criterion", name) for name in self.criterions.values()}

    def selected(self, graph: Graph, pruned_params: str, ignore: Sequence[str] = ()) -> list[Group]:
        """The groups that hold the pruning axis of some parameter named by ``pruned_params`` and of none in ``ignore``.

        Raises:
            CompressionError: no parameter has such a name, or none of those named can lose units (it says why).
        """
        graph = self.narrowed(graph)
        names = list(graph.parameters)
        named = set(select(pruned_params, names, "pruned_params"))
        spared = {name for pattern in ignore for name in select(pattern, names, "ignore")}
        owners = [(group, {slot.tensor for slot in group.slots if self.ranks(slot)}) for group in graph]
        groups = [group for group, owned in owners if owned & named and not owned & spared]
        if pruned_params == "*":  # weights that do not train (a loss network, say) stay unless they are named
            groups = [group for group in groups if not {slot.tensor for slot in group.weights} <= graph.untrained]
        if not groups:
            raise CompressionError(
                f"pruned_params: {pruned_params!r} names nothing that can lose units{_why(graph, named)}"
            )
        return one_factor_each(graph, groups)

    def narrowed(self, graph: Graph) -> Graph:
        """The same graph with the groups frozen that this pruner leaves alone."""
        return graph if self.embeddings else without_embeddings(graph)

    def ranks(self, slot: Slot) -> bool:
        """Whether a slot lies along the pruning axis of its parameter."""
        return lookup(self.pruning_axis, slot.tensor) == slot.dim

    def tensors(
        self, module: nn.Module, gradients: Callable[[], Mapping[str, Tensor]] | None = None
    ) -> dict[str, Tensor]:
        """The parameters of ``module`` by name, as :meth:`importance` takes them.

        Args:
            module: what is to be ranked.
            gradients: takes gradients by parameter name; only called for a criterion that reads them. Without it the
                parameters' own ``.grad`` counts.
        """
        tensors: dict[str, Tensor] = dict(module.named_parameters())
        if gradients is None or not any(map(_reads_gradient, self._functions.values())):
            return tensors
        taken = gradients()
        return {name: _with_gradient(tensor, taken.get(name)) for name, tensor in tensors.items()}

    def importance(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """The score of each unit: the criterion summed over every weight slice along a pruning axis that the unit owns.

        So residual branches agree on what to keep. A group without such a slice is ranked by all its weights.

        Args:
            group: the units to rank.
            tensors: parameters by name.

        Returns:
            1-D tensor, one score per unit; larger stays longer.

        Raises:
            CompressionError: a weight or its gradient holds NaN or infinity, no criterion is given for it, or its
                criterion reads a gradient that it does not have.
        """
        slots = [slot for slot in group.weights if self.ranks(slot)] or list(group.weights)
        named = [(slot, self._criterion(slot)) for slot in slots]
        if all(getattr(self._functions[name], "reads", None) == "norm" for _, name in named):
            named = [(slot, named[0][1]) for slot in _norm_scales(group)] or named
        return torch.stack([group.gather(slot, self._score(slot, name, tensors)).cpu() for slot, name in named]).sum(0)

    def _criterion(self, slot: Slot) -> str:
        name = lookup(self.criterions, slot.tensor)
        if name is None:
            raise CompressionError(f"criterions: no pattern fits {slot.tensor!r}; add '*'")
        return name

    def _score(self, slot: Slot, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        weight = tensors[slot.tensor]
        if _reads_gradient(self._functions[name]) and weight.grad is None:
            raise CompressionError(
                f"{slot.tensor} cannot be ranked by {name}: it has no gradient; on a plain model call loss.backward() "
                "before, and let frozen weights be ranked by another criterion or name them in ignore"
            )
        scores: Tensor = self._functions[name](weight, axis=slot.dim)
        if not bool(torch.isfinite(scores).all()):
            raise CompressionError(f"{slot.tensor} holds NaN or infinite values: it cannot be ranked by {name}")
        return scores

    @staticmethod
    def keep(scores: Tensor, count: int) -> Tensor:
        """Bool mask of the ``count`` best units; among equals the lower index stays."""
        best = torch.argsort(scores, descending=True, stable=True)[:count]
        return torch.zeros(len(scores), dtype=torch.bool).index_fill_(0, best, True)


def _reads_gradient(criterion: Callable[..., Tensor]) -> bool:
    return getattr(criterion, "reads", None) == "gradient"


def _with_gradient(tensor: Tensor, gradient: Tensor | None) -> Tensor:
    """The values of ``tensor`` with a gradient of their own: the parameter's stays as it is."""
    seen = tensor.detach()
    seen.grad = None if gradient is None else gradient.to(seen)
    return seen


def _norm_scales(group: Group) -> list[Slot]:
    """The scales of the batch norms that the units go through: they lie beside a running mean."""
    names = {slot.tensor for slot in group.slots}
    norms = {name.removesuffix("running_mean") for name in names if name.endswith("running_mean")}
    return [slot for slot in group.slots if slot.tensor.removesuffix("weight") in norms]


def _why(graph: Graph, named: set[str]) -> str:
    reasons = {f"{group.tensors[0]}: {group.reason}" for group in graph.frozen if named & set(group.tensors)}
    unreached = {f"{name}: not used by any step" for name in named & set(graph.unreached)}
    listed = sorted(reasons | unreached)[:5]
    return f" ({'; '.join(listed)})" if listed else ""
