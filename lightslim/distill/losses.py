"""What distillation minimises, as functions of tensors. Gradients reach the student's tensors only."""

import math

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, mse_loss, softmax

Pair = tuple[Tensor, Tensor]


def fsp_matrix(first: Tensor, second: Tensor) -> Tensor:
    """How the channels of two feature maps go together: their products, averaged over all positions.

    Args:
        first: ``[n, c0, *positions]``.
        second: ``[n, c1, *positions]``, the same positions.

    Returns:
        ``[n, c0, c1]``, in float32 where the maps are of half precision.

    Example:
        >>> fsp_matrix(torch.ones(1, 2, 4, 4), 3 * torch.ones(1, 1, 4, 4)).tolist()
        [[[3.0], [3.0]]]
    """
    # Sums over positions lose too much in half precision, to which autocast would take them
    with torch.autocast(first.device.type, enabled=False):
        products = _full(first).flatten(2) @ _full(second).flatten(2).transpose(1, 2)
    return products / math.prod(first.shape[2:])


def fsp_loss(student: Pair, teacher: Pair) -> Tensor:
    """Mean squared difference of two FSP matrices: "flow of the solution procedure", Yim et al., CVPR 2017.

    Student and teacher may differ in the positions, not in the channels.

    Args:
        student: two maps, ``[n, c0, *positions]`` and ``[n, c1, *positions]``.
        teacher: two maps of the same ``n``, ``c0`` and ``c1``.

    Returns:
        A scalar.

    Example:
        >>> ones = torch.ones(1, 1, 2, 2)
        >>> fsp_loss((ones, ones), (ones, 3 * ones)).item()
        4.0
    """
    return mse_loss(fsp_matrix(*student), fsp_matrix(*teacher).detach())


def l2_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two tensors of one shape, as a scalar.

    Example:
        >>> l2_loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])).item()
        2.0
    """
    return mse_loss(_full(student), _full(teacher).detach())


def soft_label_loss(
    student: Tensor,
    teacher: Tensor,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    scale_by_temperature: bool = False,
    dim: int = -1,
) -> Tensor:
    """Cross-entropy of the student's class probabilities under the teacher's: Hinton et al., 2015.

    Args:
        student: scores before the softmax.
        teacher: scores of the same shape.
        student_temperature: divides the student's scores.
        teacher_temperature: divides the teacher's.
        scale_by_temperature: multiply by the two temperatures (T squared where they are one), which keeps the size of
            the gradient when T changes.
        dim: the dimension of the classes.

    Returns:
        The mean over everything but the classes, a scalar.

    Example:
        >>> round(soft_label_loss(torch.zeros(1, 2), torch.tensor([[9.0, -9.0]])).item(), 4)  # ln 2
        0.6931
    """
    wanted = softmax(_full(teacher).detach() / teacher_temperature, dim)
    loss = -(wanted * log_softmax(_full(student) / student_temperature, dim)).sum(dim).mean()
    return loss * (student_temperature * teacher_temperature) if scale_by_temperature else loss


def _full(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
