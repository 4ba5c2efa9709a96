"""The distiller: which maps look at the same places."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightslim import CompressionError
from lightslim.distill import Distiller
from lightslim_attention.loss import attention_loss


class AttentionDistiller(Distiller):
    """Compares where maps of student and teacher are active: :func:`attention_loss` of each pair, summed.

    Widths need not agree, so nothing is projected; maps of other heights and widths are averaged to the smaller.

    Args:
        student_maps: names of maps of the student, ``[n, channels, *positions]`` each.
        teacher_maps: as many of the teacher, each to be compared with the student's at its place.
        power: of the magnitudes, before their mean over the channels.
        distillation_loss_weight: what the loss is multiplied with.
        teacher: which of several teachers.
        name: what the loss is logged as.

    Raises:
        CompressionError: no maps, or not as many of each; a power below 1; before the first step maps without
            positions, or of other ranks.

    Example:
        >>> AttentionDistiller(["blocks.2"], ["layer2"]).name
        'attention_loss'
    """

    def __init__(
        self,
        student_maps: Sequence[str] = (),
        teacher_maps: Sequence[str] = (),
        power: float = 2.0,
        distillation_loss_weight: float = 1.0,
        teacher: str | None = None,
        name: str | None = None,
    ) -> None:
        if not student_maps or len(student_maps) != len(teacher_maps):
            raise CompressionError(
                f"student_maps names {len(student_maps)} maps, teacher_maps {len(teacher_maps)}; name as many of each, "
                "and at least one"
            )
        if not 1 <= power < float("inf"):
            raise CompressionError(f"power is {power}; it must be 1 or more, and finite")
        super().__init__(student_maps, teacher_maps, distillation_loss_weight, False, teacher, name or "attention_loss")
        self.power = power

    @override
    def mapped(self, student: Sequence[torch.Size], teacher: Sequence[torch.Size]) -> dict[int, Any]:
        for index, (one, other) in enumerate(zip(student, teacher, strict=True)):
            if not 3 <= len(one) <= 5 or len(one) != len(other) or one[0] != other[0]:
                raise CompressionError(
                    f"{self.name}: the student's {self.student_maps[index]!r} is {tuple(one)}, the teacher's "
                    f"{self.teacher_maps[index]!r} is {tuple(other)}; both must be [batch, channels, *positions] with "
                    "one to three dimensions of positions"
                )
        return {}

    @override
    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """The loss of all pairs."""
        pairs = zip(student, teacher, strict=True)
        return torch.stack([attention_loss(one, other, self.power) for one, other in pairs]).sum()
