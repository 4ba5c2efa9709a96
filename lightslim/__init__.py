"""lightslim: prune, quantize and distil any LightningModule inside the training run you already have.

The public names are those of ``lightslim.api``. They are imported, and torch and Lightning with them, when the first is
asked for, so that what needs neither, as ``lightslim compare``, answers at once.
"""

import importlib.util
from typing import TYPE_CHECKING, Any

from lightslim.onimport import when_imported

if TYPE_CHECKING:
    from lightslim.api import *  # noqa: F403
else:  # hidden from type checkers, to which it would make every misspelt name a good one

    def __getattr__(name: str) -> Any:
        public = name == "__all__" or not name.startswith("_")
        if public and importlib.util.find_spec(f"{__name__}.{name}"):
            return importlib.import_module(f"{__name__}.{name}")
        if public and name in _public_names():
            return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)


def __dir__() -> list[str]:
    return sorted({*_public_names(), *globals()})


def _public_names() -> set[str]:
    """Import them; from then on they are here as if they had always been."""
    api = importlib.import_module(f"{__name__}.api")
    globals().update({name: getattr(api, name) for name in ("__all__", *api.__all__)})
    return {"__all__", *api.__all__}


when_imported("pytorch_lightning.cli", _public_names)  # its short names are those of classes that exist by then
