"""How much a metric suffers when a layer loses its least important units: the analysis, and the function for it."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from tqdm.auto import tqdm

from lightslim.errors import CompressionError
from lightslim.graph import Graph, Group, record
from lightslim.infit import mean_gradients, validation_data
from lightslim.prune.evaluation import Evaluation
from lightslim.prune.pruner import StructurePruner
from lightslim.prune.sensitivity_file import Sensitivities, SensitivityFile, model_fingerprint
from lightslim.prune.unitwise import chains
from lightslim.steps import replaced, sample_batch, step_probe
from lightslim.strategy import check_metric
from lightslim.surgery import Cut, plan

GIB = 2**30
T = TypeVar("T")
MODES = ("max", "min")


@dataclass(frozen=True)
class Measure:
    """What to measure, and on what.

    Args:
        metric_name: a metric that ``validation_step`` or the hooks around a validation epoch log.
        mode: ``max`` if more of it is better, ``min`` if less is.
        ratios: the shares of units to mask, ascending, in (0, 1).
        rate: the share of the validation data to use, the same samples for every point; None for all.
        memory: in GiB, for the batches and what is computed once for each of them.

    Raises:
        CompressionError: one of them is out of bounds.
    """

    metric_name: str
    mode: str = "max"
    ratios: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
    rate: float | None = None
    memory: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise CompressionError(f"mode is {self.mode!r}; it must be 'max' or 'min'")
        if not self.ratios or list(self.ratios) != sorted(set(self.ratios)) or not all(0 < r < 1 for r in self.ratios):
            raise CompressionError(f"ratios are {list(self.ratios)}; they must ascend and lie between 0 and 1")
        if self.rate is not None and not 0 < self.rate <= 1:
            raise CompressionError(f"eval_rate is {self.rate}; it is a share of the data: more than 0, at most 1")
        if not self.memory >= 0:
            raise CompressionError(f"memory is {self.memory}; it is in GiB and must not be negative")

    def loss(self, baseline: float, value: float) -> float:
        """How much worse ``value`` is."""
        return baseline - value if self.mode == "max" else value - baseline


def masked_units(size: int, ratio: float) -> int:
    """How many of ``size`` units a share ``ratio`` is; one always stays.

    Example:
        >>> masked_units(16, 0.2), masked_units(2, 0.9)
        (3, 1)
    """
    return min(round(size * ratio), size - 1)


def parameter_names(groups: Iterable[Group], pruner: StructurePruner, names: Sequence[str]) -> dict[str, Group]:
    """Groups by the first parameter whose slices are their units; numbered where one holds several."""
    found: dict[str, Group] = {}
    for group in groups:
        ranked = {slot.tensor for slot in group.weights if pruner.ranks(slot)} or {s.tensor for s in group.weights}
        first = key = min(ranked, key=names.index)
        number = 2
        while key in found:
            key, number = f"{first}#{number}", number + 1
        found[key] = group
    return found


@dataclass
class Analysis:
    """Masks units group by group, ratio by ratio, and evaluates.

    Args:
        trainer: whose devices and precision are used.
        module: the model; it is left as it was.
        graph: its recording.
        groups: those to look at, by the name that stands for them.
        pruner: ranks units.
        measure: what to measure.
        data: validation loaders and how many batches of each; None for the Trainer's own.
    """

    trainer: Trainer
    module: LightningModule
    graph: Graph
    groups: Mapping[str, Group]
    pruner: StructurePruner
    measure: Measure
    data: tuple[list[Any], list[float]] | None = None
    evaluation: Evaluation = field(init=False)
    _tensors: Mapping[str, Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        loaders, limits = self.data or validation_data(self.trainer)
        rate, memory = self.measure.rate, int(self.measure.memory * GIB)
        self.evaluation = Evaluation(self.trainer, self.module, loaders, limits, rate, memory)
        # All processes take part in gradients, so they are not left to rank 0
        self._tensors = self.pruner.tensors(self.module, lambda: mean_gradients(self.trainer, self.module))

    def fingerprint(self) -> dict[str, Any]:
        """What the points depend on."""
        return {
            "lightslim": version("lightslim"),
            "torch": torch.__version__,
            **static_fingerprint(self.measure, self.pruner),
            "processes": self.trainer.world_size,
            "data": [samples.fingerprint() for samples in self.evaluation.samples],
            "model": model_fingerprint(self.module),
        }

    def run(self, path: Path | None = None, progress: bool = True) -> tuple[Sensitivities, float]:
        """Measure every point that the file does not hold yet.

        Args:
            path: the file of sensitivities; written after every point, by rank 0. None for none.
            progress: show a bar with the remaining time.

        Returns:
            The curves by parameter, and the metric without any mask.

        Raises:
            CompressionError: the file is damaged or was made of something else, or nothing logs the metric.
        """
        with torch.compiler.set_stance("force_eager"):
            points = self._points(path)
            if points.baseline is None:
                metrics = self.evaluation.metrics()
                check_metric(self.measure.metric_name, metrics)
                points.baseline = metrics[self.measure.metric_name]
                points.save()
            sizes = self._agreed({name: group.size for name, group in self.groups.items()})
            missing = {name: self._missing(points, name) for name in sizes}
            total = sum(map(len, missing.values()))
            shown = progress and self.trainer.is_global_zero and total
            with tqdm(total=total, desc="sensitivity", unit="point", disable=not shown, leave=False) as bar:
                for name, ratio, value in self._values({n: ratios for n, ratios in missing.items() if ratios}):
                    points.add(name, sizes[name], ratio, self.measure.loss(points.baseline, value))
                    bar.update()
        return {name: points.sensitivities[name] for name in sizes}, points.baseline

    def _agreed(self, value: T) -> T:
        """Rank 0's value: what is masked, and when, must be the same in all processes."""
        return self.trainer.strategy.broadcast(value)

    def _points(self, path: Path | None) -> SensitivityFile:
        """What is known already; all processes know, or fail, alike."""
        fingerprint = self.fingerprint()
        points, error = SensitivityFile(None, fingerprint), ""
        if self.trainer.is_global_zero:
            try:
                points = SensitivityFile(path, fingerprint)
            except CompressionError as found:
                error = str(found)
        error, points.baseline, points.sensitivities = self._agreed((error, points.baseline, points.sensitivities))
        if error:
            raise CompressionError(error)
        return points

    def _missing(self, points: SensitivityFile, name: str) -> tuple[float, ...]:
        done = points.sensitivities.get(name, {"pruned_percent": []})["pruned_percent"]
        return tuple(ratio for ratio in self.measure.ratios if ratio not in done)

    def _values(self, missing: Mapping[str, Sequence[float]]) -> Iterator[tuple[str, float, float]]:
        """The metric at each missing point; groups come in the order in which a step reads their weights."""
        weights = {name: self._weights(self._cuts(name, missing[name][-1:])[0]) for name in missing}
        order, ways = self._agreed(self.evaluation.order(weights)), chains(self.graph, self.groups)
        if order:
            last = order[-1]
            self.evaluation.check(weights[last], self._cuts(last, missing[last][-1:])[0], ways.get(last))
        for name in order:
            cuts, known = self._cuts(name, missing[name]), dict[Cut, float]()
            self.evaluation.prepare(weights[name], cuts[-1], ways.get(name))
            for ratio, cut in zip(missing[name], cuts, strict=True):
                if cut not in known:  # of few units two shares may be the same
                    known[cut] = self.evaluation.masked(cut)[self.measure.metric_name]
                yield name, ratio, known[cut]

    def _weights(self, cut: Cut) -> list[Tensor]:
        parameters = dict(self.module.named_parameters())
        return [parameters[item.tensor] for item in cut.slices if item.tensor in parameters]

    def _cuts(self, name: str, ratios: Sequence[float]) -> list[Cut]:
        """What to mask of a group, by ratio."""
        cuts = []
        if self.trainer.is_global_zero:
            group = self.groups[name]
            scores = self.pruner.importance(group, self._tensors)
            kept = [self.pruner.keep(scores, group.size - masked_units(group.size, ratio)) for ratio in ratios]
            cuts = [Cut(plan(self.module, self.graph, {group.axis: mask}).slices) for mask in kept]
        return [Cut.from_state(state) for state in self._agreed([cut.to_state() for cut in cuts])]


def static_fingerprint(measure: Measure, pruner: StructurePruner) -> dict[str, Any]:
    """What the points depend on and the arguments alone tell."""
    return {
        "metric_name": measure.metric_name,
        "mode": measure.mode,
        "ratios": list(measure.ratios),
        "eval_rate": measure.rate,
        "ranking": {"pruning_axis": pruner.pruning_axis, "criterions": pruner.criterions},
    }


def sensitivity(
    module: LightningModule,
    loader: Any,
    metric_name: str,
    ratios: Sequence[float] = (0.2, 0.4, 0.6, 0.8),
    pruned_params: str = "*",
    mode: Literal["max", "min"] = "max",
    *,
    pruner: StructurePruner | None = None,
    ignore: Sequence[str] = (),
    eval_rate: float | None = None,
    sensitivities_file: str | Path | None = None,
    memory: float = 1.0,
    progress: bool = False,
) -> Sensitivities:
    """How much a metric suffers when single layers lose their least important units.

    The units are masked, not removed: zeros take the place of every weight, bias and batch norm entry that belongs to
    them. Layers that must agree are masked together. The module is left as it was.

    Args:
        module: its ``validation_step`` logs the metric; the device that it is on is used.
        loader: validation data.
        metric_name: a metric that the module logs in validation.
        ratios: the shares of units to mask, ascending, in (0, 1).
        pruned_params: pattern (glob or regular expression) of the parameters to look at.
        mode: ``max`` if more of the metric is better, ``min`` if less is.
        pruner: ranks units. Default: ``StructurePruner()``, by l1 norm.
        ignore: patterns of parameters to leave out.
        eval_rate: the share of the data to use, the same samples for every point; None for all.
        sensitivities_file: a file that is written after every point; what it holds already is not measured again.
        memory: GiB for the batches and for what is computed once for each; beyond it steps run whole.
        progress: show a bar with the remaining time.

    Returns:
        ``{parameter: {"pruned_percent": [...], "loss": [...], "size": units}}``; loss is how much worse the metric is.

    Raises:
        CompressionError: bad arguments, a pattern that fits nothing, a metric that is not logged, a file that was made
            of something else.

    Example:
        >>> from torch import nn
        >>> class Net(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
        ...     def validation_step(self, batch):
        ...         self.log("val_loss", self.net(batch).square().mean())
        >>> batches = [torch.randn(8, 2) for _ in range(3)]
        >>> found = sensitivity(Net(), batches, "val_loss", ratios=[0.25, 0.5], mode="min")
        >>> list(found), found["net.0.weight"]["pruned_percent"], found["net.0.weight"]["size"]
        (['net.0.weight'], [0.25, 0.5], 4)
    """
    measure = Measure(metric_name, mode, tuple(map(float, ratios)), eval_rate, memory)
    pruner, trainer = pruner or StructurePruner(), _trainer_for(module)
    attached = {} if vars(module).get("_trainer") else {"_trainer": trainer}
    with replaced(module, **attached):
        batch = trainer.strategy.batch_to_device(sample_batch(loader))
        if batch is None:
            raise CompressionError("the loader yields no batch")
        graph = pruner.narrowed(record(step_probe(module, batch, None)))
        names = [name for name, _ in module.named_parameters()]
        groups = parameter_names(pruner.selected(graph, pruned_params, ignore), pruner, names)
        data = [loader], [float("inf")]
        analysis = Analysis(trainer, module, graph, groups, pruner, measure, data)
        path = Path(sensitivities_file) if sensitivities_file is not None else None
        return analysis.run(path, progress)[0]


def _trainer_for(module: LightningModule) -> Trainer:
    """A Trainer that knows the module's device and does nothing else, nor says what it finds."""
    device, logger = module.device, logging.getLogger("pytorch_lightning.utilities.rank_zero")
    with replaced(logger, disabled=True):
        return Trainer(
            accelerator=device.type,
            devices=1 if device.index is None else [device.index],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
