"""What keeps pruned weights at zero: in the module, its gradients, its optimizers and its averaged copies."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightslim.surgery import cuts_of
from lightslim_gradual.masks import Masks


class Held:
    """Masks over the weights of a module, which follow it when its layers are cut.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> held = Held({"weight": torch.tensor([[True, False]])})
        >>> held.zero_weights(net)
        >>> (net.weight == 0).tolist()
        [[True, False]]
    """

    def __init__(self, masks: Mapping[str, Tensor] | None = None, cuts: int = 0) -> None:
        self.masks: Masks = dict(masks or {})
        self.cuts = cuts  # of the module, that the masks have been through

    def to_state(self) -> dict[str, Any]:
        """Plain types and bool tensors."""
        return {"masks": dict(self.masks), "cuts": self.cuts}

    def follow(self, module: nn.Module) -> bool:
        """Cut the masks as ``module`` has been cut since; returns whether there was anything to cut."""
        cuts = cuts_of(module)
        new, self.cuts = cuts[self.cuts :], len(cuts)
        for item in (item for cut in new for item in cut.slices if item.tensor in self.masks):
            mask = self.masks[item.tensor]
            self.masks[item.tensor] = mask.index_select(item.dim, torch.tensor(item.kept, device=mask.device))
        return bool(new)

    def sparsity(self, name: str) -> float:
        """The share of a weight that is pruned now."""
        mask = self.masks.get(name)
        return 0.0 if mask is None else mask.float().mean().item()

    @torch.no_grad()
    def zero_weights(self, module: nn.Module) -> None:
        """Pruned weights are zero."""
        for parameter, mask in self._on(module):
            parameter.masked_fill_(mask, 0.0)

    @torch.no_grad()
    def zero_gradients(self, module: nn.Module) -> None:
        """Pruned weights have no gradient: none that is clipped with the others, none that an optimizer remembers."""
        for parameter, mask in self._on(module):
            if parameter.grad is not None:
                parameter.grad.masked_fill_(mask, 0.0)

    @torch.no_grad()
    def zero_memory(self, module: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        """Optimizers forget pruned weights, so that no momentum moves them."""
        for optimizer in optimizers:
            for parameter, mask in self._on(module):
                for value in optimizer.state.get(parameter, {}).values():
                    if isinstance(value, Tensor) and value.shape == mask.shape:
                        value.masked_fill_(mask, 0)

    def _on(self, module: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
        parameters = dict(module.named_parameters())
        for name, mask in self.masks.items():
            parameter = parameters[name]
            if mask.device != parameter.device:
                self.masks[name] = mask = mask.to(parameter.device)
            yield parameter, mask
