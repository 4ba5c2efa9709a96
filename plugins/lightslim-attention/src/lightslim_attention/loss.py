"""Where a feature map is active, and how far two networks differ in that."""

import torch
from torch import Tensor
from torch.nn import functional

_POOL = {1: functional.adaptive_avg_pool1d, 2: functional.adaptive_avg_pool2d, 3: functional.adaptive_avg_pool3d}


def attention_map(x: Tensor, power: float = 2.0) -> Tensor:
    """The mean over channels of ``|x| ** power`` at each position.

    Args:
        x: ``[n, channels, *positions]``, one to three dimensions of positions; half types are worked out in float32.
        power: above 1 it weighs the strongest channels more.

    Returns:
        ``[n, *positions]``, nowhere negative.

    Example:
        >>> attention_map(torch.tensor([[[1.0, 0.0], [-3.0, 0.0]]]))
        tensor([[5., 0.]])
    """
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return x.abs().pow(power).mean(1)


def attention_loss(student: Tensor, teacher: Tensor, power: float = 2.0) -> Tensor:
    """Squared distance of two attention maps, each of unit length: Zagoruyko and Komodakis, ICLR 2017.

    ``mean_n || q_s / ||q_s|| - q_t / ||q_t|| ||^2`` with the flattened maps ``q``: from 0, where both look at the same
    places, to 2, where they share none. Gradients reach the student only.

    Args:
        student: ``[n, channels, *positions]``.
        teacher: likewise; channels may differ, and so may the sizes of positions: the finer map is averaged down.
        power: of :func:`attention_map`.

    Returns:
        A scalar.

    Example:
        >>> left, right = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 4.0], [0.0, 1.0]]])
        >>> attention_loss(left, right).item(), attention_loss(left, 3 * left).item()
        (2.0, 0.0)
    """
    one, other = attention_map(student, power), attention_map(teacher.detach(), power)
    size = [min(pair) for pair in zip(one.shape[1:], other.shape[1:], strict=True)]
    return (_direction(one, size) - _direction(other, size)).square().sum(1).mean()


def _direction(attention: Tensor, size: list[int]) -> Tensor:
    if list(attention.shape[1:]) != size:
        attention = _POOL[len(size)](attention.unsqueeze(1), size)
    return functional.normalize(attention.flatten(1))
