"""What happens in a training step while a student is taught: watch it, ask the teachers, add to its loss."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from lightslim.distill.distillers import Distiller
from lightslim.distill.projection import Projection
from lightslim.distill.spots import Spot, Tap, Watch, compiled, locate
from lightslim.distill.teacher import Arguments, Teacher
from lightslim.errors import CompressionError
from lightslim.steps import replaced

STUDENT_LOSS, TOTAL = "student_loss", "distillation_loss"


class Part:
    """One distiller at work: its taps on the student, and which answers of its teacher it gets."""

    def __init__(self, name: str, distiller: Distiller, student: list[Tap], teacher: str, answers: slice) -> None:
        self.name, self.distiller = name, distiller
        self.student, self.teacher, self.answers = student, teacher, answers

    def key(self, index: int) -> str:
        """The name of the projection of a map."""
        return f"{self.name}, {self.distiller.student_maps[index]!r}"


class Lesson:
    """Distillers between one student and its teachers.

    Args:
        student: learns; its class and its methods stay as they are.
        distillers: by the name that their loss is logged as.
        teachers: networks by name.
        task_loss_weight: what the student's own loss is multiplied with.
        teacher_input: the call of the student whose arguments the teachers get; None for its ``forward``, or where the
            step does without, the first part of the batch.

    Raises:
        CompressionError: a map is not found, or a distiller's teacher.
    """

    def __init__(
        self,
        student: LightningModule,
        distillers: Mapping[str, Distiller],
        teachers: Mapping[str, nn.Module],
        task_loss_weight: float = 1.0,
        teacher_input: str | None = None,
    ) -> None:
        self.student, self.task_loss_weight = student, task_loss_weight
        self.live = False
        self.projections: dict[str, Projection] = {}  # by Part.key
        self.parts: list[Part] = []
        spots: dict[str, list[Spot]] = {name: [] for name in teachers}
        for name, distiller in distillers.items():
            teacher = _teacher_of(name, distiller, teachers)
            taps = [Tap(locate(text, student, f"{name}: student map")) for text in distiller.student_maps]
            first = len(spots[teacher])
            spots[teacher] += [
                locate(text, teachers[teacher], f"{name}: teacher map") for text in distiller.teacher_maps
            ]
            self.parts.append(Part(name, distiller, taps, teacher, slice(first, len(spots[teacher]))))
        self.teachers = {name: Teacher(name, teachers[name], found) for name, found in spots.items() if found}
        self.fallback = teacher_input is None
        self.input = Tap(locate(f"{teacher_input or ''}:input", student, "teacher_input"), whole=True)
        self.watch = Watch(student, [self.input, *(tap for part in self.parts for tap in part.student)])
        self.last: dict[str, Tensor] = {}
        self.said_already: set[str] = set()  # names that the student logs by itself
        self._batch: Any = None
        self._traces = contextlib.ExitStack()

    def attach(self) -> None:
        """Wrap the student's training step, and watch its modules."""
        step = self.student.training_step

        @functools.wraps(step)
        def training_step(*args: Any, **options: Any) -> Any:
            return self._taught(step, args, options) if self.live else step(*args, **options)

        # Lightning looks at the arguments that the step takes, through one decorator at most
        training_step.__wrapped__ = getattr(step, "__wrapped__", step)
        self._traces.enter_context(replaced(self.student, training_step=training_step))
        if compiled(self.student):  # code made before and after has to be made anew
            self._traces.callback(torch.compiler.reset)
            torch.compiler.reset()
        self._traces.callback(self.watch.detach)
        self.watch.attach()

    def detach(self) -> None:
        """Leave nothing on the student."""
        self.live = False
        self._traces.close()

    def _taught(self, step: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        self.last = {}
        with self.watched(args, options), self._manual():
            output = step(*args, **options)
            if output is not None and self.student.automatic_optimization:
                output = self._added(output)
        self._say()
        return output

    @contextlib.contextmanager
    def watched(self, args: tuple[Any, ...], options: Mapping[str, Any]) -> Iterator[None]:
        """The taps are open for a step that is called with these arguments.

        ``forward`` is watched by hand: steps may call it without ``__call__``, and DDP calls that without it.
        """
        student, watch, forward = self.student, self.watch, self.student.forward
        self._batch = args[0] if args else next(iter(options.values()), None)
        watch.clear()

        @functools.wraps(forward)
        def spy(*args: Any, **options: Any) -> Any:
            watch.whole_call(args, options)
            output = forward(*args, **options)
            watch.whole_result(output)
            return output

        watch.on = True
        try:
            with replaced(student, forward=spy):
                yield
        finally:
            watch.on = False
            watch.clear()
            self._batch = None

    def ready(self) -> bool:
        """Whether all maps of the student have passed."""
        return all(tap.filled for part in self.parts for tap in part.student)

    def _manual(self) -> contextlib.AbstractContextManager[None]:
        """With manual optimization: the first backward that comes when all maps have passed takes the loss along."""
        if self.student.automatic_optimization:
            return contextlib.nullcontext()
        backward = self.student.manual_backward

        def manual_backward(loss: Tensor, *args: Any, **options: Any) -> None:
            backward(self._added(loss) if self.ready() and not self.last else loss, *args, **options)

        return replaced(self.student, manual_backward=manual_backward)

    def _added(self, output: Any) -> Any:
        """The step's output, or its loss, with the distillers' losses."""
        loss = output["loss"] if isinstance(output, Mapping) else output
        parts = self.losses()
        total = sum(parts.values(), self.task_loss_weight * loss)
        self.last = {name: part.detach() for name, part in {STUDENT_LOSS: loss, **parts, TOTAL: total}.items()}
        return {**output, "loss": total} if isinstance(output, Mapping) else total

    def losses(self) -> dict[str, Tensor]:
        """The weighted loss of each part in the step that is being watched."""
        arguments = self.arguments()
        answers = {name: teacher.answer(arguments) for name, teacher in self.teachers.items()}
        return {part.name: self.loss(part, answers[part.teacher][part.answers]) for part in self.parts}

    def loss(self, part: Part, teacher: Sequence[Tensor]) -> Tensor:
        """The weighted loss of one part."""
        maps = [tap.value() for tap in part.student]
        projections = {i: self.projections[part.key(i)] for i in range(len(maps)) if part.key(i) in self.projections}
        return part.distiller.distillation_loss_weight * part.distiller.compare(maps, teacher, projections)

    def parameters(self) -> Iterator[Tensor]:
        """What is trained beside the student."""
        return (projection.weight for projection in self.projections.values())

    def arguments(self) -> Arguments:
        """What the teachers get."""
        if self.fallback and not self.input.calls:
            batch = self._batch[0] if isinstance(self._batch, (tuple, list)) and self._batch else self._batch
            return ((), batch) if isinstance(batch, Mapping) else ((batch,), {})
        arguments: Arguments = self.input.value()
        return arguments

    def _say(self) -> None:
        for name, value in self.last.items():
            if name not in self.said_already:
                self.student.log(name, value, prog_bar=True)


def _teacher_of(name: str, distiller: Distiller, teachers: Mapping[str, nn.Module]) -> str:
    chosen = distiller.teacher or (next(iter(teachers)) if len(teachers) == 1 else None)
    if chosen is None or chosen not in teachers:
        names = ", ".join(teachers)
        said = f"there is no teacher {chosen!r}" if chosen else "there are several teachers; say which by 'teacher'"
        raise CompressionError(f"{name}: {said}: {names}")
    return chosen
