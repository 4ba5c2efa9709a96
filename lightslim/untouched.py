"""Put a module back as it was: modes, buffers, gradients, and the plain attributes that its Python keeps."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightslim.rng import isolated_rng, kept_generators

_CONTAINERS = (list, dict, set, deque)
Restore = Callable[[], None]


@contextlib.contextmanager
def untouched(module: nn.Module, except_for: Iterable[nn.Module] = (), parameters: bool = False) -> Iterator[None]:
    """Whatever happens inside, ``module`` and the random state are afterwards as they were before.

    Args:
        module: what to put back: modes, buffers, gradients and the plain attributes of every submodule.
        except_for: submodules whose buffers keep what they learn inside.
        parameters: whether something inside may write to parameters, so that they are put back, too.

    Example:
        >>> net = nn.BatchNorm1d(2)
        >>> with untouched(net):
        ...     _ = net.eval(), net(torch.ones(3, 2)), setattr(net, "seen", 1)
        >>> net.training, hasattr(net, "seen")
        (True, False)
    """
    modes = [(child, child.training) for child in module.modules()]
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    values = [(parameter, parameter.data, parameter.data.clone()) for parameter in module.parameters() if parameters]
    kept = set(except_for)
    owners = [child for child in module.modules() if child not in kept]
    bindings = [(child, dict(child._buffers)) for child in owners]
    buffers = [
        (buffer, buffer.detach().clone()) for _, bound in bindings for buffer in bound.values() if buffer is not None
    ]
    attributes = [(child, _own_attributes(child)) for child in module.modules()]
    try:
        with isolated_rng(), kept_generators(module.modules()):
            yield
    finally:
        for child, bound in bindings:
            child._buffers.update(bound)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for parameter, place, value in values:
            parameter.data = place.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for child, saved in attributes:
            _put_back(child, saved)
        for child, mode in modes:
            child.training = mode


_MODULE_INTERNALS = frozenset(vars(nn.Module())) | {"_trainer", "_fabric"}


def _is_state(name: str, value: Any) -> bool:
    # nn.Module keeps its parameters, hooks and children in underscored dicts of its own; Lightning its trainer.
    return name not in _MODULE_INTERNALS and isinstance(value, (*_CONTAINERS, Tensor, int, float, str, type(None)))


def _own_attributes(module: nn.Module) -> dict[str, tuple[Any, Restore]]:
    """Each plain attribute of ``module``, and how to bring back its content."""
    return {name: (value, _restorer(value)) for name, value in vars(module).items() if _is_state(name, value)}


def _put_back(module: nn.Module, saved: dict[str, tuple[Any, Restore]]) -> None:
    for name in [n for n, value in vars(module).items() if _is_state(n, value) and n not in saved]:
        delattr(module, name)
    for name, (original, restore) in saved.items():
        restore()
        vars(module)[name] = original


def _restorer(value: Any) -> Restore:
    """A function that gives a tensor or container, nested ones too, the content that it has now."""
    if isinstance(value, Tensor):
        content = value.detach().clone()
        return lambda: _refill_tensor(value, content)
    if not isinstance(value, _CONTAINERS):
        return lambda: None
    items = list(value.items()) if isinstance(value, dict) else list(value)
    inner = [_restorer(item) for item in (value.values() if isinstance(value, dict) else items)]

    def restore() -> None:
        value.clear()
        value.extend(items) if isinstance(value, (list, deque)) else value.update(items)
        for refill in inner:
            refill()

    return restore


def _refill_tensor(tensor: Tensor, content: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(content)
