"""What a step finds and does not make itself: weights, buffers, the batch, constants. Are they still the same?"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

# As wide as the numbers, since there are less of them to compare than bytes
_INTEGERS = {kind.itemsize: kind for kind in (torch.uint8, torch.int16, torch.int32, torch.int64)}


class Source(Protocol):
    """A tensor that a step was given."""

    @property
    def bytes(self) -> int:
        """The memory kept for it alone."""

    def same(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is it, to the last bit."""


@dataclass
class Lasting:
    """A parameter or buffer, which outlives the step: it is the same object, whose content has not changed."""

    tensor: Tensor
    content: Tensor | None
    version: int
    bytes: int = 0

    @classmethod
    def of(cls, tensor: Tensor) -> "Lasting":
        """``tensor`` as it is now; of buffers, which are refilled when an evaluation ends, the content is kept."""
        content = None if isinstance(tensor, nn.Parameter) else tensor.detach().clone()
        return cls(tensor, content, _version(tensor))

    @property
    def storage(self) -> int:
        """The address of its memory."""
        return int(self.tensor.untyped_storage()._cdata)

    def same(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is this one, unchanged."""
        return tensor is self.tensor and self.unchanged()

    def unchanged(self) -> bool:
        """Whether it holds what it held."""
        version = _version(self.tensor)
        if version != self.version or version < 0:
            if self.content is None or not equal(self.tensor, self.content):
                return False
            self.version = version
        return True


@dataclass(frozen=True)
class Passing:
    """Anything else, known by its content."""

    content: Tensor

    @property
    def bytes(self) -> int:
        """The memory of its content."""
        return self.content.numel() * self.content.element_size()

    def same(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` holds the same."""
        return equal(tensor, self.content)


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same to the last bit, NaN included.

    Example:
        >>> equal(torch.tensor([float("nan")]), torch.tensor([float("nan")])), equal(torch.zeros(1), -torch.zeros(1))
        (True, False)
    """
    if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return False
    bits = _INTEGERS[min(one.element_size(), 8)]
    return torch.equal(*(tensor.detach().reshape(-1).view(bits) for tensor in (one, other)))


def _version(tensor: Tensor) -> int:
    """The count of writes to a tensor; negative where torch does not count them."""
    return -1 if tensor.is_inference() else tensor._version
