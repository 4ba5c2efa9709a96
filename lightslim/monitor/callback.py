"""Show what the strategies did and do, in TensorBoard or any other logger."""

from collections.abc import Mapping
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from torch.utils.tensorboard.summary import hparams
from typing_extensions import override

from lightslim.monitor.layout import layout, settings_by_path
from lightslim.monitor.text import lasting, markdown, measured
from lightslim.pictures import can_draw, pixels
from lightslim.prune import couplings, curves
from lightslim.strategy import strategies_of


class CompressionMonitor(Callback):
    """Logs every record of every strategy: FLOPs, parameters, units kept per layer, metrics before and after the act.

    Scalars go to all of the Trainer's loggers, under ``lightslim/``, as steps over the whole run; a table of each act
    goes to those that take text. TensorBoard gets histograms of what is quantized, a page under "Custom Scalars" with
    the whole story, and, at the end, a line under "HParams".

    Args:
        settings: shown as hyperparameters beside the module's own, nested as they come; a run of a recipe gives it.

    Example:
        >>> CompressionMonitor().settings
        {}
    """

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        self.settings = dict(settings or {})
        self.shown: dict[str, int] = {}
        self._now: dict[str, float] = {}
        self._tags: set[str] = set()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # What a checkpoint brings has been shown by the run that wrote it
        for strategy in strategies_of(trainer):
            self.shown[strategy.state_key] = len(strategy.history)
            for record in strategy.history:
                self._now |= {tag: after for tag, _, after in lasting(record)}

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer)
        self._scalars(trainer, self._now, trainer.global_step)  # each epoch, or smoothing turns stairs into slopes
        for strategy in strategies_of(trainer):
            self._scalars(trainer, strategy.figures(), trainer.global_step)
            for tag, values in strategy.distributions().items():
                _call(trainer, "add_histogram", f"lightslim/{tag}", values.float().cpu(), trainer.global_step)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        names = (name for name in trainer.logged_metrics if not name.startswith("lightslim/"))
        _call(trainer, "add_custom_scalars", layout([*trainer.callback_metrics, *names], self._tags))

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Beside what is set, what came of it."""
        shown = dict(settings_by_path({**pl_module.hparams, **self.settings}))
        ends = {name: float(value) for name, value in trainer.callback_metrics.items()}
        ends |= {f"lightslim/{name}": self._now[name] for name in ("flops", "params") if name in self._now}
        if shown and ends and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            for writer in _writers(trainer, "add_hparams"):
                for summary in hparams(shown, ends):
                    writer.file_writer.add_summary(summary)

    def _show(self, trainer: Trainer) -> None:
        for strategy in strategies_of(trainer):
            for record in strategy.history[self.shown.get(strategy.state_key, 0) :]:
                self._draw(trainer, record)
                _call(trainer, "add_text", f"lightslim/{strategy.name}", markdown(record), record["step"])
                if "sensitivities" in record:
                    _curves(trainer, strategy.name, record)
                if can_draw() and _writers(trainer, "add_image"):
                    _pictures(trainer, strategy.name, record)
            self.shown[strategy.state_key] = len(strategy.history)

    def _draw(self, trainer: Trainer, record: Mapping[str, Any]) -> None:
        """A stair: level from the start (or the last act) to the step before, then the new level."""
        changed = {tag: pair for tag, *pair in lasting(record)}
        before = {tag: pair[0] for tag, pair in changed.items()}
        self._scalars(trainer, {tag: value for tag, value in before.items() if tag not in self._now}, 0)
        self._now |= {tag: pair[1] for tag, pair in changed.items()}
        metrics = {tag: pair for tag, *pair in measured(record)}
        self._scalars(trainer, before | {tag: pair[0] for tag, pair in metrics.items()}, max(record["step"] - 1, 0))
        noise = {f"signal_to_noise/{layer}": value for layer, value in record.get("signal_to_noise", {}).items()}
        self._scalars(trainer, self._now | {tag: pair[1] for tag, pair in metrics.items()} | noise, record["step"])

    def _scalars(self, trainer: Trainer, values: Mapping[str, float], step: int) -> None:
        tagged = {f"lightslim/{tag}": value for tag, value in values.items()}
        self._tags |= tagged.keys()
        for logger in trainer.loggers if tagged else ():
            logger.log_metrics(tagged, step=step)


def _writers(trainer: Trainer, method: str) -> list[Any]:
    """The loggers' writers that have a method of TensorBoard's; on the first process, for the others' are dummies."""
    writers = [getattr(logger, "experiment", None) for logger in trainer.loggers if trainer.is_global_zero]
    return [writer for writer in writers if hasattr(writer, method)]


def _call(trainer: Trainer, method: str, *arguments: Any) -> None:
    for writer in _writers(trainer, method):
        getattr(writer, method)(*arguments)


def _curves(trainer: Trainer, name: str, record: Mapping[str, Any]) -> None:
    """Each layer's loss over the percentage of its units masked."""
    tag = f"lightslim/{name}/sensitivity/epoch{record['epoch']}"
    for writer in _writers(trainer, "add_scalar"):  # steps here are percent: other loggers would be lost
        for layer, curve in record["sensitivities"].items():
            for share, loss in zip((0.0, *curve["pruned_percent"]), (0.0, *curve["loss"]), strict=True):
                writer.add_scalar(f"{tag}/{layer}", loss, round(100 * share))


def _pictures(trainer: Trainer, name: str, record: Mapping[str, Any]) -> None:
    """All layers' curves of sensitivity, and which layers were cut together."""
    figures = {}
    if "sensitivities" in record:
        figures[f"sensitivity/epoch{record['epoch']}"] = curves.figure(record)
    if record.get("coupled"):
        figures[f"groups/epoch{record['epoch']}"] = couplings.figure(
            record["coupled"], record["units"], list(record["layers"])
        )
    for tag, figure in figures.items():
        _call(trainer, "add_image", f"lightslim/{name}/{tag}", pixels(figure), record["step"], None, "HWC")
