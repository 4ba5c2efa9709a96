"""Show what the strategies did: their histories, in TensorBoard or any other logger."""

from collections.abc import Iterator, Mapping
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from lightslim.strategy import strategies_of


class CompressionMonitor(Callback):
    """Logs every record of every strategy: FLOPs, parameters, units kept per layer, metrics before and after the act.

    Scalars go to all of the Trainer's loggers, under ``lightslim/``; a table of each act goes to those that take text.

    Example:
        >>> CompressionMonitor().shown
        {}
    """

    def __init__(self) -> None:
        self.shown: dict[str, int] = {}

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer)

    def _show(self, trainer: Trainer) -> None:
        for strategy in strategies_of(trainer):
            for record in strategy.history[self.shown.get(strategy.state_key, 0) :]:
                for logger in trainer.loggers:
                    _write(logger, strategy.name, record)
            self.shown[strategy.state_key] = len(strategy.history)


def _write(logger: Any, name: str, record: Mapping[str, Any]) -> None:
    step = record["step"]
    for tag, before, after in _pairs(record):
        logger.log_metrics({f"lightslim/{tag}": before}, step=max(step - 1, 0))
        logger.log_metrics({f"lightslim/{tag}": after}, step=step)
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_text"):
        experiment.add_text(f"lightslim/{name}", markdown(record), step)


def _pairs(record: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    """Everything a record holds in a before-and-after form, with its tag."""
    for key in ("flops", "params"):
        if key in record:
            yield (key, *record[key])
    for layer, (before, after) in record.get("units", {}).items():
        yield f"units/{layer}", before, after
    metrics = record.get("metrics", {"before": {}, "after": {}})
    for name in metrics["before"].keys() & metrics["after"].keys():
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
    rows = [f"| {tag} | {before:,} | {after:,} |" for tag, before, after in _pairs(record)]
    return "\n".join(
        [f"**{record['act']}**, epoch {record['epoch']}", "", "| | before | after |", "|---|---:|---:|", *rows]
    )
