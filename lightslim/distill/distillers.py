"""The distillers: which maps of student and teacher are compared, and by which loss."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from typing_extensions import override

from lightslim.distill.losses import fsp_matrix, l2_loss, soft_label_loss
from lightslim.distill.projection import Projection
from lightslim.errors import CompressionError

Shapes = Sequence[torch.Size]


class Distiller(nn.Module):
    """One loss between maps of the student and maps of a teacher; the base of all.

    A subclass computes it in ``forward(student, teacher)``, from two lists of tensors, and may override
    :meth:`mapped`. A map is named by the path of a submodule, whose output it is; ``PATH:input`` is its input,
    ``PATH@1`` its second call in a step, ``PATH:output[0]`` one of several tensors, and nothing at all the network.

    Args:
        student_maps: names of maps of the student.
        teacher_maps: as many of the teacher.
        distillation_loss_weight: what the loss is multiplied with.
        project: put a trained linear map between them where the student's is of another width.
        teacher: which of several teachers.
        name: what the loss is logged as.

    Raises:
        CompressionError: no maps, not as many of each, or a weight that is not positive.
    """

    compared_dims: ClassVar[int | None] = None  # leading dimensions that must agree; None for all

    def __init__(
        self,
        student_maps: Sequence[str],
        teacher_maps: Sequence[str],
        distillation_loss_weight: float = 1.0,
        project: bool = False,
        teacher: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        if not 0 < distillation_loss_weight < float("inf"):
            raise CompressionError(
                f"distillation_loss_weight is {distillation_loss_weight}; it must be positive and finite"
            )
        self.student_maps, self.teacher_maps = list(student_maps), list(teacher_maps)
        self.distillation_loss_weight = distillation_loss_weight
        self.project = project
        self.teacher = teacher
        self.name = name or type(self).__name__

    def mapped(self, student: Shapes, teacher: Shapes) -> dict[int, tuple[int, int, int]]:
        """Check the shapes of the maps, and say which of the student's need a projection.

        Args:
            student: shapes of the student's maps.
            teacher: shapes of the teacher's.

        Returns:
            Index of the map to its projection: dimension, size, size afterwards.

        Raises:
            CompressionError: shapes that do not go together; both are named.
        """
        needed = {}
        for index, (one, other) in enumerate(zip(student, teacher, strict=True)):
            differing = [dim for dim, sizes in enumerate(zip(one, other, strict=False)) if sizes[0] != sizes[1]]
            differing = [dim for dim in differing if self.compared_dims is None or dim < self.compared_dims]
            same_rank = self.compared_dims is not None or len(one) == len(other)
            if not same_rank or len(differing) > self.project or differing == [0]:
                raise self._mismatch(index, one, other)
            if differing:
                needed[index] = (differing[0], one[differing[0]], other[differing[0]])
        return needed

    def compare(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], projections: Mapping[int, Projection]
    ) -> Tensor:
        """The loss of maps of which some are projected first; to be overridden where that costs less in another order.

        Args:
            student: maps of the student, as they are.
            teacher: maps of the teacher.
            projections: by the index of the student's map.
        """
        maps = [projections[i](x) if i in projections else x for i, x in enumerate(student)]
        loss: Tensor = self(maps, teacher)
        return loss

    def _mismatch(self, index: int, student: torch.Size, teacher: torch.Size) -> CompressionError:
        cure = "" if self.project else "; project=True trains a linear map where one dimension differs, as channels do"
        return CompressionError(
            f"{self.name}: the student's {self.student_maps[index]!r} is {tuple(student)}, the teacher's "
            f"{self.teacher_maps[index]!r} is {tuple(teacher)}{cure}"
        )


class FSPDistiller(Distiller):
    """Compares how the two ends of a section go together: :func:`lightslim.distill.fsp_loss` of each pair, summed.

    Args:
        student_pairs: pairs of maps of the student, of equal height and width in a pair.
        teacher_pairs: as many of the teacher, with the channels of the student's.
        distillation_loss_weight: what the loss is multiplied with.
        project: where the channels differ, put a trained linear map between.
        teacher: which of several teachers.
        name: what the loss is logged as.

    Raises:
        CompressionError: no pairs, or not as many of each.

    Example:
        >>> FSPDistiller([("blocks.0", "blocks.2")], [("layer1", "layer2")]).student_maps
        ['blocks.0', 'blocks.2']
    """

    compared_dims: ClassVar[int | None] = 2  # sums over positions: those of the two networks need not agree

    def __init__(
        self,
        student_pairs: Sequence[tuple[str, str]] = (),
        teacher_pairs: Sequence[tuple[str, str]] = (),
        distillation_loss_weight: float = 1.0,
        project: bool = False,
        teacher: str | None = None,
        name: str | None = None,
    ) -> None:
        self.check_pairs(student_pairs, teacher_pairs)
        super().__init__(
            list(chain.from_iterable(student_pairs)), list(chain.from_iterable(teacher_pairs)),
            distillation_loss_weight, project, teacher, name or "fsp_distillation_loss",
        )  # fmt: skip
        self.student_pairs, self.teacher_pairs = list(student_pairs), list(teacher_pairs)

    @staticmethod
    def check_pairs(student_pairs: Sequence[tuple[str, str]], teacher_pairs: Sequence[tuple[str, str]]) -> None:
        """Raise unless there are pairs, and as many of each."""
        for argument, pairs in (("student_pairs", student_pairs), ("teacher_pairs", teacher_pairs)):
            if not pairs or any(isinstance(pair, str) or len(pair) != 2 for pair in pairs):
                raise CompressionError(f"{argument} is {pairs!r}; it must be a list of pairs of maps")
        if len(student_pairs) != len(teacher_pairs):
            raise CompressionError(
                f"student_pairs has {len(student_pairs)} pairs, teacher_pairs {len(teacher_pairs)}; give as many"
            )

    @override
    def mapped(self, student: Shapes, teacher: Shapes) -> dict[int, tuple[int, int, int]]:
        for maps, shapes in ((self.student_maps, student), (self.teacher_maps, teacher)):
            for index in range(0, len(maps), 2):
                one, other = shapes[index : index + 2]
                if len(one) < 3 or len(other) < 3 or one[2:] != other[2:]:
                    raise CompressionError(
                        f"{self.name}: {maps[index]!r} is {tuple(one)} and {maps[index + 1]!r} is {tuple(other)}; the "
                        "maps of a pair must be [batch, channels, height, width], equal but for the channels"
                    )
        return super().mapped(student, teacher)

    @override
    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """The loss of all pairs."""
        return self.compare(student, teacher, {})

    @override
    def compare(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], projections: Mapping[int, Projection]
    ) -> Tensor:
        # P0 (F0 F1^T) P1^T is (P0 F0) (P1 F1)^T: a matrix of channels is projected for less than maps of positions
        losses = [
            mse_loss(
                _projected(fsp_matrix(student[i], student[i + 1]), projections.get(i), projections.get(i + 1)),
                fsp_matrix(teacher[i], teacher[i + 1]).detach(),
            )
            for i in range(0, len(student), 2)
        ]
        return torch.stack(losses).sum()


def _projected(matrix: Tensor, rows: Projection | None, columns: Projection | None) -> Tensor:
    with torch.autocast(matrix.device.type, enabled=False):
        matrix = matrix if rows is None else rows.weight.to(matrix.dtype) @ matrix
        return matrix if columns is None else matrix @ columns.weight.to(matrix.dtype).T


class L2Distiller(Distiller):
    """Mean squared difference of two maps of one shape: :func:`lightslim.distill.l2_loss`.

    Args:
        student_feature_map: of the student; by default what its ``forward`` returns.
        teacher_feature_map: of the teacher.
        distillation_loss_weight: what the loss is multiplied with.
        project: where one dimension differs, put a trained linear map between.
        teacher: which of several teachers.
        name: what the loss is logged as.

    Example:
        >>> L2Distiller("blocks.4", "layer2", project=True).name
        'l2loss_blocks.4_layer2'
    """

    def __init__(
        self,
        student_feature_map: str = "",
        teacher_feature_map: str = "",
        distillation_loss_weight: float = 1.0,
        project: bool = False,
        teacher: str | None = None,
        name: str | None = None,
    ) -> None:
        name = name or f"l2loss_{student_feature_map}_{teacher_feature_map}".rstrip("_")
        super().__init__([student_feature_map], [teacher_feature_map], distillation_loss_weight, project, teacher, name)

    @override
    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """The loss."""
        return l2_loss(student[0], teacher[0])


class SoftLabelDistiller(Distiller):
    """The teacher's class probabilities as labels: :func:`lightslim.distill.soft_label_loss`.

    Args:
        student_feature_map: scores of the student before the softmax; by default what its ``forward`` returns.
        teacher_feature_map: the same of the teacher.
        student_temperature: divides the student's scores.
        teacher_temperature: divides the teacher's.
        distillation_loss_weight: what the loss is multiplied with.
        scale_by_temperature: multiply by both temperatures, as Hinton et al. do.
        dim: the dimension of the classes.
        project: where one dimension differs, put a trained linear map between.
        teacher: which of several teachers.
        name: what the loss is logged as.

    Raises:
        CompressionError: a temperature that is not positive.

    Example:
        >>> SoftLabelDistiller("net.fc", "fc", 4.0, 4.0, scale_by_temperature=True).name
        'soft_label_loss_net.fc_fc'
    """

    def __init__(
        self,
        student_feature_map: str = "",
        teacher_feature_map: str = "",
        student_temperature: float = 1.0,
        teacher_temperature: float = 1.0,
        distillation_loss_weight: float = 1.0,
        scale_by_temperature: bool = False,
        dim: int = -1,
        project: bool = False,
        teacher: str | None = None,
        name: str | None = None,
    ) -> None:
        temperatures = {"student_temperature": student_temperature, "teacher_temperature": teacher_temperature}
        for argument, value in temperatures.items():
            if not 0 < value < float("inf"):
                raise CompressionError(f"{argument} is {value}; it must be positive and finite")
        name = name or f"soft_label_loss_{student_feature_map}_{teacher_feature_map}".rstrip("_")
        super().__init__([student_feature_map], [teacher_feature_map], distillation_loss_weight, project, teacher, name)
        self.options = (student_temperature, teacher_temperature, scale_by_temperature, dim)

    @override
    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """The loss."""
        return soft_label_loss(student[0], teacher[0], *self.options)
