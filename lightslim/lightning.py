"""Every strategy once more, as a callback of ``lightning.pytorch``, for its LightningCLI.

A Trainer of either Lightning takes our callbacks as they are, but its command line asks for subclasses of its own
``Callback``. Importing this module makes them, those of plugins included, with the same names, arguments and
checkpoints. For ``pytorch_lightning`` it is ``import lightslim`` alone: with both, a short name would
have two meanings.

Example:
    >>> from lightning.pytorch.callbacks import Callback
    >>> from lightslim.lightning import UniformPruneStrategy
    >>> isinstance(UniformPruneStrategy(), Callback)
    True
"""

from lightning.pytorch.callbacks import Callback

from lightslim.monitor import CompressionMonitor
from lightslim.registry import registry


def _twin(ours: type) -> type:
    return type(ours.__name__, (ours, Callback), {"__module__": __name__})


__all__ = ["CompressionMonitor", *registry().names("strategy")]
globals().update({name: _twin(registry().get("strategy", name)) for name in registry().names("strategy")})
globals()["CompressionMonitor"] = _twin(CompressionMonitor)
