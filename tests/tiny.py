"""The tiny module and its data under the short names that the tests use."""

from lightslim.testing.tiny import OPTIMIZERS, TinyModule, TinyNet
from lightslim.testing.tiny import tiny_images as images
from lightslim.testing.tiny import tiny_loaders as loaders
from lightslim.testing.tiny import tiny_trainer as trainer

__all__ = ["OPTIMIZERS", "TinyModule", "TinyNet", "images", "loaders", "trainer"]
