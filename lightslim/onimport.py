"""Do something as soon as another package is imported, without importing it."""

import sys
from collections.abc import Callable


def when_imported(module: str, act: Callable[[], object]) -> None:
    """Call ``act`` once: now if ``module`` is imported already, else right before it is.

    Example:
        >>> when_imported("sys", lambda: print("is there"))
        is there
    """
    if module in sys.modules:
        act()
    else:
        sys.meta_path.insert(0, _Watch(module, act))


class _Watch:
    """Finds nothing; being asked is what it waits for."""

    def __init__(self, module: str, act: Callable[[], object]) -> None:
        self.module, self.act = module, act

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == self.module and self in sys.meta_path:
            sys.meta_path.remove(self)
            self.act()
