"""lightslim: prune, quantize and distil any LightningModule inside the training run you already have.

The public names are those of ``lightslim.api``. They are imported, and torch and Lightning with them, when the first is
asked for, so that what needs neither, as ``lightslim compare``, answers at once.
"""

import importlib.util
from typing import TYPE_CHECKING, Any

from lightslim.onimport import when_imported

if TYPE_CHECKING:
    from lightslim.api import *  # noqa: F403
    from lightslim.api import __all__ as __all__
else:  # hidden from type checkers, to which it would make every misspelt name a good one

    def __getattr__(name: str) -> Any:
        if _is_module(name):
            return importlib.import_module(f"{__name__}.{name}")
        if (name == "__all__" or not name.startswith("_")) and name in _public_names():
            return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)


def __dir__() -> list[str]:
    return sorted({*_public_names(), *globals()})


def _is_module(name: str) -> bool:
    # The one of that name doubles every strategy: it is imported by those who say so
    if name == "lightning" or name.startswith("_") or not name.isidentifier():
        return False
    return importlib.util.find_spec(f"{__name__}.{name}") is not None


def _public_names() -> set[str]:
    """Import them; from then on they are here as if they had always been."""
    api = importlib.import_module(f"{__name__}.api")
    for name in ("__all__", *api.__all__):
        globals().setdefault(name, getattr(api, name))
    return {"__all__", *api.__all__}


when_imported("torch", lambda: importlib.import_module(f"{__name__}.kernels"))  # brings torch.ops.lightslim
when_imported("pytorch_lightning.cli", _public_names)  # its short names are those of classes that exist by then
