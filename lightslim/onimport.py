"""Do something as soon as another package has been imported, without importing it."""

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Act = Callable[[], object]


def when_imported(module: str, act: Act) -> None:
    """Call ``act`` once: now if ``module`` is there already, else when it has been imported.

    Example:
        >>> when_imported("sys", lambda: print("is there"))
        is there
    """
    if sys.modules.get(module) is not None:
        act()
    else:
        sys.meta_path.insert(0, _Watch(module, act))


class _Watch:
    """Leaves finding to those behind it, and has the loader that they found followed by ``act``.

    It stays where it is when that is done: whoever looks for a module at that moment walks along the same list.
    """

    def __init__(self, module: str, act: Act) -> None:
        self.module, self.act = module, act
        self.searching = False

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        if fullname != self.module or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            loader: Any = _Followed(spec.loader, self)
            spec.loader = loader
        return spec

    def has_come(self) -> None:
        """The module has been imported."""
        act, self.act = self.act, lambda: None
        act()


class _Followed:
    """A loader in whose place it stands until the module is there."""

    def __init__(self, loader: Any, watch: _Watch) -> None:
        self._loader, self._watch = loader, watch

    def exec_module(self, module: ModuleType) -> None:
        """As the loader does."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._watch.has_come()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
