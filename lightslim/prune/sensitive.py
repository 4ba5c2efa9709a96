"""Sensitive pruning: each layer loses what it can spare. The strategy measures, chooses, cuts, and does so again."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightslim.errors import CompressionError
from lightslim.files import check_writable
from lightslim.infit import cut_in_fit, evaluate, probe_of
from lightslim.patterns import lookup, select
from lightslim.pictures import can_draw, save
from lightslim.prune import curves
from lightslim.prune.analysis import Analysis, Measure, masked_units, parameter_names, static_fingerprint
from lightslim.prune.budget import SensitivePruning
from lightslim.prune.pruner import StructurePruner
from lightslim.prune.ratios import Curve, measured_ratios, step_target
from lightslim.prune.sensitivity_file import Sensitivities, check, read
from lightslim.prune.uniform import UniformPruning
from lightslim.prune.widths import Rounding
from lightslim.strategy import CompressionStrategy, changed_metrics, check_metric

SETTLED = 0.005  # relative change of the metric from one validation to the next


class SensitivePruneStrategy(CompressionStrategy):
    """Cut most where it hurts least: measure each layer's sensitivity, then let all lose the same of the metric.

    Args:
        pruner: ranks units; in a recipe the name of one. Default: ``StructurePruner()``, by l1 norm.
        start_epoch: the analysis and the first cut happen before the first step of this epoch.
        end_epoch: accepted for symmetry with other strategies; a cut has no end.
        delta_rate: the shares of units measured are this, twice this, three times this ... below 1.
        target_ratio: share of FLOPs to remove in all steps together, in (0, 1), of the model as it is then.
        num_steps: in how many equal steps; each measures anew and removes ``1 - (1 - target_ratio)^(1 / num_steps)``.
        eval_rate: the share of the validation data that points are measured on, the same samples for all; None for all.
        pruned_params: pattern (glob or regular expression) of the parameters whose units may go.
        sensitivities_file: written after every point, so that a killed analysis goes on; relative to the run directory.
            Later steps add ``.epoch<N>`` to the name.
        metric_name: the metric that tells how good the model is; the module must log it in validation.
        mode: ``max`` if more of the metric is better, ``min`` if less is.
        step_epochs: the next step comes when the metric has settled (two validations in a row within 0.5 %), but no
            later than this many epochs after the last. None: as many as give all steps a place before the end.
        max_ratio: no layer loses a larger share of its units in one step; a number, or pattern of parameters to number.
        round_to: layers of ``4 * round_to`` units or more keep a multiple of it: runtimes are faster so.
        min_units: no layer keeps fewer units than this.
        ignore: patterns of parameters whose units stay although ``pruned_params`` names them.
        memory: GiB that the analysis may take for batches, and for what is computed once for each of them.
        name: tells strategies of one class apart.

    Raises:
        CompressionError: an argument out of bounds, bad epochs; in ``setup`` a start too late for all steps or a
            pattern that fits nothing; before the first step a metric that validation does not log, or a file of another
            analysis.

    Example:
        >>> strategy = SensitivePruneStrategy(delta_rate=0.1, target_ratio=0.5, num_steps=3, metric_name="val_acc")
        >>> round(strategy.task.target_ratio, 4), strategy.measure.ratios[:3]
        (0.2063, (0.1, 0.2, 0.3))
    """

    def __init__(
        self,
        pruner: StructurePruner | None = None,
        start_epoch: int = 0,
        end_epoch: int | None = None,
        delta_rate: float = 0.2,
        target_ratio: float = 0.5,
        num_steps: int = 1,
        eval_rate: float | None = None,
        pruned_params: str = "*",
        sensitivities_file: str = "sensitivities.json",
        metric_name: str | None = None,
        mode: str = "max",
        step_epochs: int | None = None,
        max_ratio: float | Mapping[str, float] = 0.9,
        round_to: int = 8,
        min_units: int = 1,
        ignore: Sequence[str] = (),
        memory: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(start_epoch, end_epoch, name)
        for argument, value in (("num_steps", num_steps), ("step_epochs", step_epochs)):
            if value is not None and value < 1:
                raise CompressionError(f"{argument} is {value}; it must be 1 or more")
        self.num_steps, self.step_epochs = num_steps, step_epochs
        self.max_ratio = dict(max_ratio) if isinstance(max_ratio, Mapping) else {"*": max_ratio}
        for pattern, most in self.max_ratio.items():
            if not 0 < most <= 1:
                raise CompressionError(f"max_ratio {pattern!r} is {most}; it must lie above 0 and be at most 1")
        self.metric_name = metric_name
        self.measure = Measure(metric_name or "", mode, measured_ratios(delta_rate), eval_rate, memory)
        whole = SensitivePruning(
            pruner or StructurePruner(), target_ratio, pruned_params, tuple(ignore), Rounding(round_to, min_units)
        )
        self.task = replace(whole, target_ratio=step_target(target_ratio, num_steps))
        self.sensitivities_file = sensitivities_file
        self._since: list[float] = []

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "since": self._since}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._since = list(state_dict["since"])

    @property
    def steps_done(self) -> int:
        """How many of the steps have been made."""
        return sum(record["act"] == "prune" for record in self.history)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        names = [name for name, _ in pl_module.named_parameters()]
        if names:  # a module may also build its layers later, in configure_model
            select(self.task.pruned_params, names, f"{self.name}: pruned_params")
        last = trainer.max_epochs
        if last is not None and 0 <= last < self.start_epoch + self.num_steps and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise CompressionError(
                f"{self.name}: num_steps is {self.num_steps}, but from epoch {self.start_epoch} on there are only "
                f"{last - self.start_epoch} epochs"
            )

    @override
    def rehearse(self, trainer: Trainer, pl_module: LightningModule) -> str:
        logged = evaluate(trainer, pl_module, limit=1)
        if self.metric_name is None:
            choices = ", ".join(sorted(logged)) or "nothing that validation logs"
            raise CompressionError(
                f"{self.name}: metric_name says what to measure sensitivity by; choose from: {choices}"
            )
        check_metric(self.metric_name, logged)
        self._check_file(trainer)
        report = self._uniform().plan(probe_of(trainer, pl_module))[1]
        if report.unused:
            rank_zero_warn(
                f"{self.name}: no step uses {', '.join(report.unused[:5])} now ({len(report.unused)} parameters in "
                "all); if a later step does, what feeds it must keep its width: name that in ignore"
            )
        note = "; the widths are uniform pruning's, until sensitivities are measured"
        return f"step 1 of {self.num_steps}{note}\n{report}"

    def _uniform(self) -> UniformPruning:
        """The same task with one ratio for all: tells what can be cut at all."""
        task = self.task
        return UniformPruning(task.pruner, task.target_ratio, task.pruned_params, task.ignore, task.rounding)

    def _path(self, trainer: Trainer) -> Path:
        path = Path(trainer.default_root_dir) / self.sensitivities_file
        return path.with_name(f"{path.name}.epoch{trainer.current_epoch}") if self.steps_done else path

    def _check_file(self, trainer: Trainer) -> None:
        """Fail now over a file that could not be used then."""
        path = self._path(trainer)
        if trainer.is_global_zero:
            check_writable(path)
        if path.exists() and not self._begun:
            check(path, read(path)["fingerprint"], static_fingerprint(self.measure, self.task.pruner))
            if self.start_epoch > trainer.current_epoch == 0:
                raise CompressionError(
                    f"{path} holds the sensitivities of another run, and the weights will not be the same in epoch "
                    f"{self.start_epoch}; delete it or name another sensitivities_file"
                )

    @override
    def begin(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return self._step(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        done = self.steps_done
        super().on_train_epoch_start(trainer, pl_module)
        if done == self.steps_done and 0 < done < self.num_steps and self._due(trainer):
            self._note(trainer, self._step(trainer, pl_module))

    def _due(self, trainer: Trainer) -> bool:
        """Whether it is time for the next step; rank 0 decides."""
        waited = trainer.current_epoch - max(r["epoch"] for r in self.history if r["act"] == "prune")
        before, now = self._since[-2:] if len(self._since) > 1 else (0.0, math.inf)
        settled = abs(now - before) <= SETTLED * abs(now) if math.isfinite(now) else False
        return bool(trainer.strategy.broadcast(settled or waited >= self._patience(trainer)))

    def _patience(self, trainer: Trainer) -> float:
        if self.step_epochs is not None:
            return self.step_epochs
        last = trainer.max_epochs
        return math.inf if last is None or last < 0 else max((last - self.start_epoch) // self.num_steps, 1)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        value = trainer.callback_metrics.get(self.metric_name or "")
        if self._begun and not trainer.sanity_checking and trainer.state.fn == "fit" and value is not None:
            self._since.append(float(value))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if 0 < self.steps_done < self.num_steps and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"{self.name}: training ended after {self.steps_done} of {self.num_steps} steps, before the target was "
                "reached; give it more epochs or a smaller step_epochs"
            )

    def _step(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        before, probe = evaluate(trainer, module), probe_of(trainer, module)
        shown = trainer.progress_bar_callback is not None
        sensitivities, baseline = self.analyse(trainer, module, self._path(trainer), shown)
        curves_ = {name: self._curve(name, found) for name, found in sensitivities.items()}
        cut, report = replace(self.task, curves=curves_).plan(probe)
        cut_in_fit(trainer, module, cut)
        self._since = []
        after = evaluate(trainer, module)
        record = {"act": "prune", **report.to_record(), "metrics": {"before": before, "after": after}}
        record |= {
            "step_of": [self.steps_done + 1, self.num_steps],
            "metric_name": self.metric_name,
            "baseline": baseline,
            "loss_level": record.pop("ratio"),
            "sensitivities": sensitivities,
            "chosen": dict(report.chosen),
        }
        changed = changed_metrics(before, after, self.metric_name)
        rank_zero_info(
            f"{self.name}, epoch {trainer.current_epoch}: {report.summary}{changed}\n{curves.chosen(record)}"
        )
        if trainer.is_global_zero and can_draw():
            picture = Path(trainer.default_root_dir) / f"{self.name}-epoch{trainer.current_epoch}.png"
            save(curves.figure(record), picture)
        return record

    def analyse(
        self, trainer: Trainer, module: LightningModule, path: Path | None, progress: bool
    ) -> tuple[Sensitivities, float]:
        """Measure the sensitivity of everything that can be cut now; the run does not notice.

        Args:
            trainer: the running Trainer.
            module: the module that it fits.
            path: of the file of sensitivities; None for none.
            progress: show a bar with the remaining time.

        Returns:
            ``{parameter: {"pruned_percent": [...], "loss": [...], "size": units}}``, and the metric without a mask.
        """
        task = self.task
        graph = self._uniform().tried(probe_of(trainer, module))[0]
        groups = parameter_names(
            task.pruner.selected(graph, task.pruned_params, task.ignore), task.pruner, graph.parameters
        )
        analysis = Analysis(trainer, module, graph, groups, task.pruner, self.measure)
        found, baseline = analysis.run(path, progress)
        if all(loss < 0 for curve in found.values() for loss in curve["loss"]):
            rank_zero_warn(
                f"{self.name}: every mask makes {self.metric_name} better: is mode {self.measure.mode!r} right?"
            )
        return found, baseline

    def _curve(self, name: str, found: Mapping[str, Any]) -> Curve:
        """The points measured, at the shares that were masked; those of few units may be the same."""
        size = found["size"]
        counts = [masked_units(size, ratio) for ratio in found["pruned_percent"]]
        losses = {count: loss for count, loss in zip(counts, found["loss"], strict=True) if count}
        most = lookup(self.max_ratio, name.partition("#")[0])
        shares = tuple(count / size for count in losses)
        return Curve(shares, tuple(losses.values()), 1.0 if most is None else most)
