"""Distillation on a schedule: teachers stand beside the student for some epochs, then they are gone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from typing_extensions import override

from lightslim.distill.distillers import Distiller
from lightslim.distill.itself import SELF, Earlier
from lightslim.distill.lesson import STUDENT_LOSS, TOTAL, Lesson
from lightslim.distill.optimizers import Aside, Factory, factory_of
from lightslim.distill.projection import Projection
from lightslim.distill.teacher import check_apart
from lightslim.distill.trial import Trial
from lightslim.errors import CompressionError, did_you_mean
from lightslim.strategy import CompressionStrategy, strategies_of
from lightslim.surgery import cuts_of
from lightslim.tables import table

Given = nn.Module | str


class DistillationStrategy(CompressionStrategy):
    """Train the module on its own loss and on the distance of its maps from those of one or several teachers.

    A teacher is frozen, in evaluation mode, without gradients, on the student's device and in its precision; it is no
    part of the student, its checkpoints, optimizers or DDP. It answers once per batch.

    Args:
        distillers: what is compared, and how.
        teacher: a trained module, several by name or in a list, or ``"self"``: the student as it was before the first
            strategy of this fit acted. A recipe's ``teacher`` section, or the Compressor, may give it instead.
        start_epoch: the teachers come before the first step of this epoch.
        end_epoch: they go before the first step of this epoch; None for the end of training.
        task_loss_weight: what the module's own loss is multiplied with meanwhile.
        distiller_optimizer: for this phase: from parameters to what ``configure_optimizers`` may return, or as
            ``{"optimizer": "SGD", "lr": 0.1}``. Afterwards the module's own ones go on as they were at ``start_epoch``.
        teacher_input: the teachers are called as this submodule is (``PATH`` or ``PATH@CALL``); by default as the
            student's ``forward``, or, where a step does without it, with the first part of the batch.
        cache: folder, relative to the run directory, that keeps the teachers' answers; pays where the same batches come
            again each epoch, not shuffled and not augmented.
        cache_bytes: what the folder may hold.
        name: tells strategies of one class apart.

    Raises:
        CompressionError: no distillers, two that would be logged under one name, a weight below 0; in ``setup`` no
            teacher, a map that matches nothing or two modules, two phases at once; before the first step shapes that do
            not go together.

    Example:
        >>> from lightslim.distill import SoftLabelDistiller
        >>> DistillationStrategy([SoftLabelDistiller()], teacher=nn.Linear(2, 2), end_epoch=3).task_loss_weight
        1.0
    """

    def __init__(
        self,
        distillers: Sequence[Distiller] = (),
        teacher: Given | Mapping[str, Given] | Sequence[Given] | None = None,
        start_epoch: int = 0,
        end_epoch: int | None = None,
        task_loss_weight: float = 1.0,
        distiller_optimizer: Mapping[str, Any] | Factory | None = None,
        teacher_input: str | None = None,
        cache: str | None = None,
        cache_bytes: int = 2**30,
        name: str | None = None,
    ) -> None:
        super().__init__(start_epoch, end_epoch, name)
        if not distillers:
            raise CompressionError("distillers is empty: nothing would be distilled")
        if not 0 <= task_loss_weight < float("inf"):
            raise CompressionError(f"task_loss_weight is {task_loss_weight}; it must be 0 or more and finite")
        if cache_bytes < 1:
            raise CompressionError(f"cache_bytes is {cache_bytes}; it must be positive")
        self.distillers = list(distillers)
        self._losses = _named(distillers)
        self.teachers = _networks(teacher)
        self.task_loss_weight = task_loss_weight
        self.distiller_optimizer = None if distiller_optimizer is None else factory_of(distiller_optimizer)
        self.teacher_input = teacher_input
        self.cache, self.cache_bytes = cache, cache_bytes
        self._earlier: Earlier | None = None
        self._lesson: Lesson | None = None
        self._aside: Aside | None = None
        self._saved: dict[str, Any] = {}
        self._cuts = 0

    def equip(self, teachers: Mapping[str, nn.Module], distiller_optimizer: Factory | None) -> None:
        """Take from a Compressor what was not given here."""
        self.teachers = self.teachers or dict(teachers)
        self.distiller_optimizer = self.distiller_optimizer or distiller_optimizer

    @override
    def state_dict(self) -> dict[str, Any]:
        phase = self._phase_state() if self._begun and not self._ended else {}
        earlier = {"earlier": self._earlier.state} if self._earlier and self._earlier.state and not self._ended else {}
        return {**super().state_dict(), **phase, **earlier}

    def _phase_state(self) -> dict[str, Any]:
        """The projections, and the state of the optimizers put aside; as loaded, until they are built."""
        if self._lesson is None:
            return self._saved
        projections = {key: projection.saved() for key, projection in self._lesson.projections.items()}
        last = {name: float(value) for name, value in self._lesson.last.items()}
        return {"last": last, "projections": projections, "aside": self._aside.state_dict() if self._aside else None}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._saved = {key: state_dict[key] for key in ("last", "projections", "aside") if key in state_dict}
        if self._earlier is not None and "earlier" in state_dict:
            self._earlier.load(state_dict["earlier"])

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._lesson, self._aside, self._saved = None, None, {}
        self._check_phases(trainer)
        if not self.teachers:
            raise CompressionError(
                f"{self.name}: there is no teacher; give a module, or 'self', or a recipe's teacher section"
            )
        self._earlier = Earlier(pl_module) if SELF in self.teachers.values() else None
        for name, network in self._networks().items():
            check_apart(f"{self.name}: teacher {name!r}", network, pl_module)
        if any(True for _ in pl_module.parameters()):
            self._new_lesson(pl_module)

    def _check_phases(self, trainer: Trainer) -> None:
        end, last = self.end_epoch or float("inf"), trainer.max_epochs
        if last is not None and 0 <= last < end < float("inf") and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(f"{self.name}: end_epoch is {end}, but training ends after {last} epochs, still distilling")
        for other in strategies_of(trainer):
            if not isinstance(other, DistillationStrategy) or other is self:
                continue
            if self.start_epoch < (other.end_epoch or float("inf")) and other.start_epoch < end:
                raise CompressionError(
                    f"{self.name} and {other.name} distil at once: give one strategy both teachers and distillers"
                )

    def _networks(self) -> dict[str, nn.Module]:
        return {name: self._earlier.network if self._earlier and given == SELF else given  # type: ignore[misc]
                for name, given in self.teachers.items()}  # fmt: skip

    def _new_lesson(self, module: LightningModule) -> Lesson:
        return Lesson(module, self._losses, self._networks(), self.task_loss_weight, self.teacher_input)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if not self._begun or self._ended:
            return
        # Resumed within the phase: the optimizer has to be there before Lightning restores its state
        lesson = self._new_lesson(pl_module)
        for key, saved in self._saved["projections"].items():
            lesson.projections[key] = Projection.restored(saved).to(pl_module.device)
        lesson.last = {name: torch.tensor(value) for name, value in self._saved["last"].items()}
        self._lesson = lesson
        self._exchange(trainer, pl_module)
        if self._aside is not None:
            self._aside.load_state_dict(self._saved["aside"])

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._earlier is not None:
            self._earlier.on_start(trainer, pl_module)
        super().on_train_start(trainer, pl_module)
        if self._lesson is not None and self._begun and not self._ended:
            self._open(self._lesson, trainer)

    @override
    def rehearse(self, trainer: Trainer, pl_module: LightningModule) -> str:
        lesson = self._new_lesson(pl_module)
        try:
            rows = self._open(lesson, trainer)
        finally:
            _close(lesson)
        self._check_projections(lesson)
        return f"{len(self.distillers)} losses\n" + table(("loss", "student", "shape", "teacher", "shape"), rows)

    def _check_projections(self, lesson: Lesson) -> None:
        if lesson.projections and self.distiller_optimizer is None:
            raise CompressionError(
                f"{self.name}: {next(iter(lesson.projections))} needs a projection, and nothing would train it: give a "
                "distiller_optimizer"
            )

    def _open(self, lesson: Lesson, trainer: Trainer) -> list[tuple[str, str, str, str, str]]:
        """Teachers in, hooks on, and a trial."""
        self._cuts = len(cuts_of(lesson.student))
        for teacher in lesson.teachers.values():
            teacher.enter(trainer, lesson.student)
        lesson.attach()
        rows = Trial(lesson, trainer).run()
        for teacher in lesson.teachers.values() if self.cache else ():
            share = self.cache_bytes // trainer.world_size
            folder = Path(trainer.default_root_dir) / str(self.cache)
            teacher.remember(folder, share, trainer.precision_plugin.precision)
        return rows

    @override
    def act_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for other in strategies_of(trainer):  # whichever is listed first, one phase ends before another begins
            if isinstance(other, DistillationStrategy) and other is not self and other._lesson is not None:
                CompressionStrategy.act_if_due(other, trainer, pl_module)
        super().act_if_due(trainer, pl_module)

    @override
    def begin(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        self._lesson = lesson = self._new_lesson(pl_module)
        self._open(lesson, trainer)
        self._check_projections(lesson)
        self._exchange(trainer, pl_module)
        rank_zero_info(f"{self.name}, epoch {trainer.current_epoch}: distils by {', '.join(self._losses)}")
        return {"act": "distil", "losses": list(self._losses), "teachers": list(lesson.teachers)}

    def _exchange(self, trainer: Trainer, module: LightningModule) -> None:
        if self.distiller_optimizer is not None and self._lesson is not None:
            self._aside = Aside(trainer, module, self.distiller_optimizer, self._lesson.parameters())

    @property
    def optimizers_aside(self) -> Sequence[torch.optim.Optimizer]:
        """The module's own optimizers while another one works: a cut has to reach their state, too."""
        return self._aside.optimizers if self._aside else ()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._lesson is None or not self._begun or self._ended:
            return
        if len(cuts_of(pl_module)) != self._cuts:
            self._cuts = len(cuts_of(pl_module))
            Trial(self._lesson, trainer).run()
        # Only here: others may run the training step to look at the module
        self._lesson.live = True

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._lesson is not None:
            self._lesson.live = False

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """DDP knows nothing of the projections: their gradients are averaged here."""
        if self._lesson is None or not self._lesson.live or trainer.world_size == 1:
            return
        for parameter in self._lesson.parameters():
            if parameter.grad is not None:
                parameter.grad = trainer.strategy.reduce(parameter.grad, reduce_op="mean")

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._earlier is not None:
            self._earlier.on_epoch_end(trainer, pl_module)

    @override
    def finish(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any] | None:
        lesson = self._lesson
        if lesson is None:
            return None
        hits = sum(teacher.cache.hits for teacher in lesson.teachers.values() if teacher.cache)
        last = {name: float(value) for name, value in lesson.last.items()}
        _close(lesson)
        if self._aside is not None:
            self._aside.put_back(trainer, pl_module)
        self._lesson, self._aside, self._earlier = None, None, None
        return {"act": "end of distillation", "last": last, **({"cache_hits": hits} if self.cache else {})}

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        _close(self._lesson)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        _close(self._lesson)


def _close(lesson: Lesson | None) -> None:
    """Nothing is left on the student, and the teachers are as they were lent."""
    if lesson is not None:
        lesson.detach()
        for teacher in lesson.teachers.values():
            teacher.leave()


def _named(distillers: Sequence[Distiller]) -> dict[str, Distiller]:
    """Distillers by the name that their loss is logged as."""
    names = [STUDENT_LOSS, TOTAL]
    for distiller in distillers:
        if distiller.name in names:
            raise CompressionError(f"distillers: two losses would be logged as {distiller.name!r}; give one a name")
        names.append(distiller.name)
    return {distiller.name: distiller for distiller in distillers}


def _networks(given: Given | Mapping[str, Given] | Sequence[Given] | None) -> dict[str, Given]:
    """Teachers by name."""
    if given is None:
        return {}
    if isinstance(given, Mapping):
        named = dict(given)
    elif isinstance(given, Sequence) and not isinstance(given, str):
        named = {f"teacher_{i}": one for i, one in enumerate(given)} if len(given) != 1 else {"teacher": given[0]}
    else:
        named = {"teacher": given}
    for one in named.values():
        if isinstance(one, str) and one != SELF:
            raise CompressionError(f"teacher is {one!r}; give a module, or {did_you_mean(one, [SELF])}")
    return named
