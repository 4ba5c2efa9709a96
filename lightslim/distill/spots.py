"""Where in a network a distiller looks: an input or output of a submodule, in one of its calls."""

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from lightslim.errors import CompressionError
from lightslim.patterns import select
from lightslim.steps import tensors_in

_TEXT = re.compile(r"(?P<pattern>.*?)(?:@(?P<call>-?\d+))?(?::(?P<side>input|output)(?:\[(?P<index>\d+)\])?)?\Z")
_WRAPPER = "_orig_mod"  # torch.compile's, which nobody writes in a recipe


@dataclass(frozen=True)
class Spot:
    """One place in a network.

    Args:
        path: of the submodule; empty for the network itself.
        side: ``input`` or ``output``.
        call: which call of it in a step, counted from 0, or from the end if negative; None for its only one.
        index: which of the tensors there; None for the only one.
        said: the argument and the text that named it, for messages.
    """

    path: str
    side: str
    call: int | None
    index: int | None
    said: str


def modules_of(network: nn.Module) -> dict[str, nn.Module]:
    """Every submodule by its path, as if nothing were compiled; the network itself is ``''``."""
    found: dict[str, nn.Module] = {}
    for path, module in network.named_modules(remove_duplicate=False):
        plain = ".".join(part for part in path.split(".") if part != _WRAPPER)
        found.setdefault(plain, module)
    return found


def locate(text: str, network: nn.Module, argument: str) -> Spot:
    """Find the place that ``text`` names in ``network``.

    Args:
        text: ``PATH``, ``PATH@CALL``, ``PATH:input``, ``PATH@CALL:output[INDEX]`` ...; a pattern may stand for the path
            if it fits one submodule.
        network: where to look.
        argument: what holds the text, for messages.

    Raises:
        CompressionError: no submodule fits, or more than one.

    Example:
        >>> locate("*.1:input", nn.Sequential(nn.Sequential(nn.ReLU(), nn.ReLU())), "here").path
        '0.1'
    """
    parts = _TEXT.match(text)
    assert parts is not None, "every text fits"
    path = _path(parts["pattern"], modules_of(network), argument)
    call, index = (None if parts[name] is None else int(parts[name]) for name in ("call", "index"))
    return Spot(path, parts["side"] or "output", call, index, f"{argument} {text!r}")


def _path(pattern: str, modules: dict[str, nn.Module], argument: str) -> str:
    if pattern in modules:
        return pattern
    found = select(pattern, [path for path in modules if path], argument)
    if len({id(modules[path]) for path in found}) > 1:
        shown = ", ".join(found[:5]) + (" ..." if len(found) > 5 else "")
        raise CompressionError(f"{argument}: {pattern!r} matches {len(found)} modules, {shown}; name one")
    return found[0]


class Tap:
    """Keeps what passes a spot during one step.

    Something that a later operation overwrites in place is of no use any more; ``copies`` makes the tap keep copies.
    """

    def __init__(self, spot: Spot, whole: bool = False) -> None:
        self.spot = spot
        self.whole = whole  # keep all that passes, not one tensor
        self.copies = False
        self.calls = 0
        self._kept: deque[tuple[Any, list[int]]] = deque(maxlen=max(1, -(spot.call or 0)))

    def clear(self) -> None:
        """Forget the last step."""
        self.calls = 0
        self._kept.clear()

    def see(self, passing: Any) -> None:
        """Something passes."""
        wanted = self.spot.call or 0
        if wanted < 0 or wanted == self.calls:
            value = passing if self.whole else self._one(passing)
            value = _copied(value) if self.copies else value
            self._kept.append((value, [tensor._version for tensor in tensors_in(value)]))
        self.calls += 1

    def _one(self, passing: Any) -> Tensor:
        tensors = list(tensors_in(passing))
        index = self.spot.index if self.spot.index is not None or len(tensors) != 1 else 0
        if index is None or index >= len(tensors):
            name = f"{self.spot.path}:{self.spot.side}[0]"
            raise CompressionError(f"{self.spot.said}: {len(tensors)} tensors pass there; say which, as {name!r}")
        return tensors[index]

    @property
    def filled(self) -> bool:
        """Whether the call that counts has come."""
        return len(self._kept) == self._kept.maxlen

    @property
    def spoiled(self) -> bool:
        """Whether what is kept has been overwritten since."""
        return any(tensor._version != version for value, versions in self._kept
                   for tensor, version in zip(tensors_in(value), versions, strict=True))  # fmt: skip

    def value(self) -> Any:
        """What was kept.

        Raises:
            CompressionError: the call that counts never came.
        """
        if not self.filled:
            raise CompressionError(f"{self.spot.said}: called {self.calls} times in this step")
        return self._kept[0][0]

    def check_calls(self) -> None:
        """Raise if there is more than one call to choose from, and nothing says which."""
        if self.calls > 1 and self.spot.call is None:
            raise CompressionError(
                f"{self.spot.said}: called {self.calls} times in a step; say which, as '{self.spot.path}@0'"
            )


def _copied(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, value)


class Watch:
    """Taps on a network. Only while :attr:`on`, they keep what passes."""

    def __init__(self, network: nn.Module, taps: list[Tap]) -> None:
        self.network, self.taps = network, taps
        self.on = False
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Put hooks on the submodules; the network's own calls are reported by who calls it."""
        modules = modules_of(self.network)
        for tap in self.taps:
            if tap.spot.path:
                self._handles.append(self._hooked(modules[tap.spot.path], tap))

    def _hooked(self, module: nn.Module, tap: Tap) -> RemovableHandle:
        # Compiled code would not see what a hook keeps in Python
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def see(passing: Any) -> None:
            if self.on:
                tap.see(passing)

        if tap.whole:
            return module.register_forward_pre_hook(lambda _, args, options: see((args, options)), with_kwargs=True)
        if tap.spot.side == "input":
            return module.register_forward_pre_hook(
                lambda _, args, options: see([*args, *options.values()]), with_kwargs=True
            )
        return module.register_forward_hook(lambda _, args, output: see(output))

    def detach(self) -> None:
        """Take the hooks away, and what was kept."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def clear(self) -> None:
        """Forget the last step."""
        for tap in self.taps:
            tap.clear()

    def whole_call(self, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """The network itself is called."""
        for tap in self._own("input"):
            tap.see((args, options) if tap.whole else [*args, *options.values()])

    def whole_result(self, output: Any) -> None:
        """The network itself has answered."""
        for tap in self._own("output"):
            tap.see(output)

    def _own(self, side: str) -> Iterator[Tap]:
        return (tap for tap in self.taps if not tap.spot.path and tap.spot.side == side and self.on)


def compiled(network: nn.Module) -> bool:
    """Whether any part of ``network`` is compiled: such code has to be made anew to notice hooks."""
    return any(
        getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, _WRAPPER)
        for module in network.modules()
    )
