"""A lesson tried on a few samples before the first real step: what is missing, ambiguous or unfit is known then."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightslim.distill.lesson import STUDENT_LOSS, TOTAL, Lesson, Part
from lightslim.distill.projection import Projection
from lightslim.errors import CompressionError
from lightslim.infit import probe_of
from lightslim.steps import replaced

Row = tuple[str, str, str, str, str]


class Trial:
    """Runs the student's training step once, its teachers with it; nobody notices.

    Args:
        lesson: attached, its teachers in place.
        trainer: of the running fit.
    """

    def __init__(self, lesson: Lesson, trainer: Trainer) -> None:
        self.lesson, self.trainer = lesson, trainer
        self.rows: list[Row] = []
        self._examined = self._again = False

    def run(self) -> list[Row]:
        """Try it; learn which maps are overwritten later, and make the projections that are needed.

        Returns:
            For each pair of maps: the loss, the student's map and its shape, the teacher's and its shape.

        Raises:
            CompressionError: a map that never comes, or comes more than once; shapes that do not go together; a name
                that the student logs, too; a teacher that cannot answer; a manual step without ``manual_backward``.
        """
        student = self.lesson.student
        probe = probe_of(self.trainer, student)
        if probe.train is None:
            raise CompressionError(f"{type(student).__name__} has no training_step that could be taught")
        with replaced(student, training_step=self._trial_of(student.training_step)):
            self._examined = self._again = False
            logged = probe.run(training=True)[1]
            if self._again:
                self._examined = self._again = False
                probe.run(training=True)
        self._check_names(set(logged))
        return self.rows

    def _trial_of(self, step: Callable[..., Any]) -> Callable[..., Any]:
        lesson = self.lesson

        @functools.wraps(step)
        def trial(*args: Any, **options: Any) -> Any:
            with lesson.watched(args, options), self._manual():
                output = step(*args, **options)
                if lesson.student.automatic_optimization:
                    self._examine()
            if not self._examined:
                raise CompressionError(
                    f"{type(lesson.student).__name__} optimizes by hand, but no self.manual_backward comes after the "
                    "maps that are compared: that is where the distillation loss is added"
                )
            return output

        return trial

    def _manual(self) -> contextlib.AbstractContextManager[None]:
        lesson = self.lesson
        if lesson.student.automatic_optimization:
            return contextlib.nullcontext()

        def manual_backward(*_: Any, **__: Any) -> None:
            if lesson.ready() and not self._examined:
                self._examine()

        return replaced(lesson.student, manual_backward=manual_backward)

    def _examine(self) -> None:
        """At the moment at which a real step would compute the losses."""
        self._examined = True
        taps = self.lesson.watch.taps
        for tap in taps if self.lesson.input.calls else [tap for tap in taps if tap is not self.lesson.input]:
            tap.value()
            tap.check_calls()
            if tap.spoiled:
                tap.copies = self._again = True
        if not self._again:
            self._compare()

    def _compare(self) -> None:
        arguments = self.lesson.arguments()
        answers = {name: teacher.rehearsed(arguments) for name, teacher in self.lesson.teachers.items()}
        self.rows = []
        for part in self.lesson.parts:
            student, teacher = [tap.value() for tap in part.student], answers[part.teacher][part.answers]
            self._project(part, student, teacher)
            loss = self.lesson.loss(part, teacher)
            if loss.numel() != 1:
                raise CompressionError(f"{part.name}: a loss is one number, not a tensor of {tuple(loss.shape)}")
            if torch.is_grad_enabled() and not any(x.requires_grad for x in student):
                rank_zero_warn(f"{part.name}: no gradient goes back from {part.distiller.student_maps}: frozen?")

    def _project(self, part: Part, student: list[Tensor], teacher: list[Tensor]) -> None:
        needed = part.distiller.mapped([x.shape for x in student], [x.shape for x in teacher])
        for index, (dim, into, out) in needed.items():
            known = self.lesson.projections.get(part.key(index))
            if known is not None and known.weight.shape != (out, into):
                raise CompressionError(
                    f"{part.name}: {part.distiller.student_maps[index]!r} is {into} wide now, its projection was made "
                    f"for {known.weight.shape[1]}: start the distillation after the cut"
                )
            if known is None:
                like = next(p for p in self.lesson.student.parameters() if p.is_floating_point())
                self.lesson.projections[part.key(index)] = Projection(dim, into, out).to(like)
        texts = zip(part.distiller.student_maps, student, part.distiller.teacher_maps, teacher, strict=True)
        self.rows += [(part.name, one, str(tuple(x.shape)), other, str(tuple(y.shape))) for one, x, other, y in texts]

    def _check_names(self, logged: set[str]) -> None:
        self.lesson.said_already = logged & {STUDENT_LOSS, TOTAL}
        taken = next((part.name for part in self.lesson.parts if part.name in logged), None)
        if taken is not None:
            raise CompressionError(f"the module logs {taken!r}, too: give the distiller another name")
