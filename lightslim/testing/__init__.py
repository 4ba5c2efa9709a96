"""For authors of components: tiny data to try them on, and what every component of a kind must do."""

from lightslim.testing.components import assert_criterion, assert_distiller, assert_range
from lightslim.testing.strategies import assert_exports, assert_resumes, assert_trains
from lightslim.testing.tiny import TinyModule, TinyNet, tiny_images, tiny_loaders, tiny_trainer

__all__ = [
    "TinyModule",
    "TinyNet",
    "assert_criterion",
    "assert_distiller",
    "assert_exports",
    "assert_range",
    "assert_resumes",
    "assert_trains",
    "tiny_images",
    "tiny_loaders",
    "tiny_trainer",
]
