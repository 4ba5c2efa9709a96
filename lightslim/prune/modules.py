"""Calls of modules: who may see them, and which do nothing but compute their result."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from threading import get_ident
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

PLAIN_VALUES = (
    bool, int, float, complex, str, bytes, type(None),
    torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
_OF_TORCH = frozenset(vars(nn.Module()))
State = tuple[nn.Module, dict[str, Any], Any]
"""A module, a copy of its attributes, and the forward method of its class."""


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
    """What the modules of a network look like; what has not changed since the last look is held once.

    Args:
        network: others than its modules are not looked at.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
        >>> before = Looks(net).at(net)
        >>> unchanged(before), setattr(net[1], "inplace", True), unchanged(before)
        (True, None, False)
    """

    def __init__(self, network: nn.Module) -> None:
        self._own = set(map(id, network.modules()))
        self._seen: dict[int, State] = {}

    def at(self, module: nn.Module) -> Sequence[State] | None:
        """What a module and those in it look like; None if a call could do more than compute its result.

        Only torch's own classes are known not to: what a user's code does besides may not show in its attributes.
        Hooks are code of the user's, too, and so may be attributes that are no plain values or lists of them.
        """
        try:
            return [self._state(child) for child in module.modules()]
        except Hidden:
            return None

    def _state(self, module: nn.Module) -> State:
        if id(module) not in self._own or not type(module).__module__.startswith("torch.nn.modules."):
            raise Hidden
        seen = self._seen.get(id(module))
        if seen is None or not unchanged([seen]):
            seen = self._seen[id(module)] = module, _attributes(module), type(module).forward
        return seen


def unchanged(states: Sequence[State]) -> bool:
    """Whether modules look as they did."""
    try:
        for module, known, forward in states:
            if vars(module) != known or type(module).forward is not forward:
                return False
        return True
    except Exception:  # tensors in the place of others, which cannot be compared to a single truth
        return False


def plainly_called() -> bool:
    """Whether a call is one without gradients, transformations of ``torch.func`` and hooks for all modules."""
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    return not (torch.is_grad_enabled() or transformed or _has_any_global_hook())


def _attributes(module: nn.Module) -> dict[str, Any]:
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise Hidden
    return {name: _copied_or_own(name, value) for name, value in vars(module).items()}


def _copied_or_own(name: str, value: Any) -> Any:
    """A copy of an attribute; what nn.Module keeps for itself holds tensors and modules, which stay the same ones."""
    if name not in _OF_TORCH:
        return _copied(value)
    return dict(value) if isinstance(value, dict) else value


def _copied(value: Any) -> Any:
    """A copy of a plain value, or of a list of some."""
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    if type(value) in PLAIN_VALUES:
        return value
    raise Hidden
