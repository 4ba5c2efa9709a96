"""Show what the strategies did: their histories, in TensorBoard or any other logger."""

from collections.abc import Iterator, Mapping
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from lightslim.prune import curves
from lightslim.strategy import strategies_of


class CompressionMonitor(Callback):
    """Logs every record of every strategy: FLOPs, parameters, units kept per layer, metrics before and after the act.

    Scalars go to all of the Trainer's loggers, under ``lightslim/``, as steps over the whole run; a table of each act
    goes to those that take text.

    Example:
        >>> CompressionMonitor().shown
        {}
    """

    def __init__(self) -> None:
        self.shown: dict[str, int] = {}
        self._now: dict[str, float] = {}

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _scalars(trainer, self._now, trainer.global_step)

    def _show(self, trainer: Trainer) -> None:
        for strategy in strategies_of(trainer):
            for record in strategy.history[self.shown.get(strategy.state_key, 0) :]:
                self._draw(trainer, record)
                _text(trainer, strategy.name, record)
                if "sensitivities" in record:
                    _curves(trainer, strategy.name, record)
            self.shown[strategy.state_key] = len(strategy.history)

    def _draw(self, trainer: Trainer, record: Mapping[str, Any]) -> None:
        """A stair: level from the start (or the last act) to the step before, then the new level."""
        lasting = {tag: pair for tag, *pair in _lasting(record)}
        before = {tag: pair[0] for tag, pair in lasting.items()}
        _scalars(trainer, {tag: value for tag, value in before.items() if tag not in self._now}, 0)
        self._now |= {tag: pair[1] for tag, pair in lasting.items()}
        measured = {tag: pair for tag, *pair in _measured(record)}
        _scalars(trainer, before | {tag: pair[0] for tag, pair in measured.items()}, max(record["step"] - 1, 0))
        _scalars(trainer, self._now | {tag: pair[1] for tag, pair in measured.items()}, record["step"])


def _scalars(trainer: Trainer, values: Mapping[str, float], step: int) -> None:
    for logger in trainer.loggers if values else ():
        logger.log_metrics({f"lightslim/{tag}": value for tag, value in values.items()}, step=step)


def _text(trainer: Trainer, name: str, record: Mapping[str, Any]) -> None:
    for logger in trainer.loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(experiment, "add_text"):
            experiment.add_text(f"lightslim/{name}", markdown(record), record["step"])


def _curves(trainer: Trainer, name: str, record: Mapping[str, Any]) -> None:
    """Each layer's loss over the percentage of its units masked, and all layers in one picture."""
    tag = f"lightslim/{name}/sensitivity/epoch{record['epoch']}"
    for logger in trainer.loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(experiment, "add_scalar"):  # steps here are percent: a logger that is no TensorBoard would be lost
            for layer, curve in record["sensitivities"].items():
                for share, loss in zip((0.0, *curve["pruned_percent"]), (0.0, *curve["loss"]), strict=True):
                    experiment.add_scalar(f"{tag}/{layer}", loss, round(100 * share))
        if hasattr(experiment, "add_image") and curves.can_draw():
            experiment.add_image(tag, curves.pixels(record), record["step"], dataformats="HWC")


Change = tuple[str, float, float]


def _lasting(record: Mapping[str, Any]) -> Iterator[Change]:
    """What the act changed for good: tag, before, after."""
    for key in ("flops", "params"):
        if key in record:
            yield (key, *record[key])
    for key in ("units", "sparsity"):
        for layer, (before, after) in record.get(key, {}).items():
            yield f"{key}/{layer}", before, after


def _worst(record: Mapping[str, Any]) -> list[str]:
    """Layers by how much of their signal quantization keeps, the worst first, as the end of a table."""
    noise = record.get("signal_to_noise", {})
    rows = [f"| {layer} | {decibels:.1f} |" for layer, decibels in noise.items()]
    return ["", "| layer | signal to noise, dB |", "|---|---:|", *rows] if rows else []


def _chosen(record: Mapping[str, Any]) -> list[str]:
    """What share of each layer went, the most sensitive layer first, as the end of a table."""
    rows = [f"| {' | '.join(row)} |" for row in curves.rows(record)] if "sensitivities" in record else []
    return ["", f"| {' | '.join(curves.HEADER)} |", "|---|---:|---:|---:|", *rows] if rows else []


def _measured(record: Mapping[str, Any]) -> Iterator[Change]:
    """What was measured right before and right after the act."""
    metrics = record.get("metrics", {"before": {}, "after": {}})
    for name in sorted(metrics["before"].keys() & metrics["after"].keys()):
        yield f"at_act/{name}", metrics["before"][name], metrics["after"][name]


def markdown(record: Mapping[str, Any]) -> str:
    """A record as a Markdown table of before and after.

    Example:
        >>> print(markdown({"act": "prune", "epoch": 3, "flops": [100, 50]}))
        **prune**, epoch 3
        <BLANKLINE>
        | | before | after |
        |---|---:|---:|
        | flops | 100 | 50 |
    """
    changes = [*_lasting(record), *_measured(record)]
    rows = [f"| {tag} | {before:,} | {after:,} |" for tag, before, after in changes]
    return "\n".join(
        [
            f"**{record['act']}**, epoch {record['epoch']}",
            "",
            "| | before | after |",
            "|---|---:|---:|",
            *rows,
            *_worst(record),
            *_chosen(record),
        ]
    )
