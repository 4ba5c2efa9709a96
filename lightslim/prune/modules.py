"""Calls of modules: who may see them, and whether one can have done anything but compute its result."""

import contextlib
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from threading import get_ident
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

PLAIN_VALUES = (
    bool, int, float, complex, str, bytes, type(None), type, FunctionType, BuiltinFunctionType,
    torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
_CONTAINERS = (list, tuple, set, frozenset, deque)
_OF_TORCH = frozenset(vars(nn.Module()))
State = tuple[nn.Module, dict[str, Any]]
"""A module and a copy of its attributes."""


class Hidden(Exception):
    """Something could be kept where it would not be seen."""


@contextlib.contextmanager
def calls_seen_by(see: Callable[[Callable[..., Any], nn.Module, Any, Any], Any]) -> Iterator[None]:
    """While in force, ``see`` answers each call of a module in this thread.

    Args:
        see: gets the call as it would have been, the module, its arguments and those by name.

    Example:
        >>> with calls_seen_by(lambda call, module, args, kwargs: 2 * call(module, *args, **kwargs)):
        ...     nn.Identity()(1)
        2
    """
    own, thread = nn.Module.__call__, get_ident()

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return see(own, module, args, kwargs) if get_ident() == thread else own(module, *args, **kwargs)

    nn.Module.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = own  # type: ignore[method-assign]


class Looks:
    """What modules look like; what has not changed since the last look is held once.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
        >>> before = Looks().at(net)
        >>> unchanged(before), setattr(net[1], "inplace", True), unchanged(before)
        (True, None, False)
    """

    def __init__(self) -> None:
        self._known: dict[int, State] = {}

    def at(self, module: nn.Module) -> Sequence[State] | None:
        """What a module and those in it look like; None if a call could change, or ask, something else.

        Hooks could, and attributes that are not plain values or containers of them.
        """
        try:
            return None if _has_any_global_hook() else [self._state(child) for child in module.modules()]
        except Hidden:
            return None

    def _state(self, module: nn.Module) -> State:
        known = self._known.get(id(module))
        if known is None or not unchanged([known]):
            known = self._known[id(module)] = module, _attributes(module)
        return known


def unchanged(states: Sequence[State]) -> bool:
    """Whether modules look as they did."""
    try:
        return all(vars(module) == attributes for module, attributes in states)
    except Exception:  # tensors in the place of others, which cannot be compared to a single truth
        return False


def drawn() -> Any:
    """What changes when Python or numpy draw a random number."""
    _, words, *rest = np.random.get_state(legacy=True)
    return random.getstate(), words.tobytes(), rest  # type: ignore[union-attr]


def _attributes(module: nn.Module) -> dict[str, Any]:
    if module._forward_hooks or module._forward_pre_hooks:
        raise Hidden
    return {name: _copied_or_own(name, value) for name, value in vars(module).items()}


def _copied_or_own(name: str, value: Any) -> Any:
    """A copy of an attribute; what nn.Module keeps for itself holds tensors and modules, which stay the same ones."""
    if name not in _OF_TORCH:
        return _copied(value)
    return dict(value) if isinstance(value, dict) else value


def _copied(value: Any) -> Any:
    """A copy of plain values in containers."""
    if isinstance(value, dict):
        return {_copied(key): _copied(item) for key, item in value.items()}
    if type(value) in _CONTAINERS:
        return type(value)(map(_copied, value))
    if type(value) in PLAIN_VALUES:
        return value
    raise Hidden
