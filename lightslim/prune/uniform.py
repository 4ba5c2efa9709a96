"""Uniform pruning: one common ratio for all layers. The function :func:`prune`, and the strategy that says when."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightslim.errors import CompressionError
from lightslim.graph import Axis, Graph, Group, Kept, kept_sizes, record
from lightslim.infit import cut_in_fit, evaluate, logged_names, probe_of
from lightslim.patterns import check_pattern, select
from lightslim.prune.pruner import StructurePruner
from lightslim.prune.ranking import global_widths
from lightslim.prune.report import PruneReport, coupled_report, frozen_report, layers_report, units_report
from lightslim.prune.trial import feasible
from lightslim.prune.widths import TOLERANCE, Rounding, Solution, uniform_widths
from lightslim.steps import Probe, forward_probe
from lightslim.strategy import CompressionStrategy, changed_metrics, check_metric
from lightslim.surgery import Cut, apply, forget_shapes, parameters_after

RANKINGS = ("layer", "global")


@dataclass(frozen=True)
class UniformPruning:
    """What to prune and how far; the same for a plain model and for a running fit.

    Args:
        pruner: ranks units.
        target_ratio: share of the model's present FLOPs to remove, in (0, 1).
        pruned_params: pattern of the parameters whose units may go.
        ignore: patterns of parameters whose units stay although ``pruned_params`` names them.
        rounding: the widths allowed.
        ranking: "layer" takes the same ratio from every group, "global" all units below one bar.

    Raises:
        CompressionError: ``target_ratio`` does not lie between 0 and 1, ``ranking`` is unknown.
    """

    pruner: StructurePruner
    target_ratio: float
    pruned_params: str = "*"
    ignore: Sequence[str] = ()
    rounding: Rounding = field(default_factory=Rounding)
    ranking: str = "layer"

    def __post_init__(self) -> None:
        if self.ranking not in RANKINGS:
            raise CompressionError(f"ranking is {self.ranking!r}; choose from {', '.join(RANKINGS)}")
        if not 0 < self.target_ratio < 1:
            raise CompressionError(
                f"target_ratio is {self.target_ratio}; it is the share of FLOPs to remove and must lie between 0 and 1"
            )
        for argument, pattern in (("pruned_params", self.pruned_params), *(("ignore", one) for one in self.ignore)):
            check_pattern(pattern, argument)

    def plan(self, probe: Probe) -> tuple[Cut, PruneReport]:
        """Record the model, choose widths and units, and try the cut; the model is left as it was."""
        graph, kept, cut, solution = self.tried(probe)
        return cut, self._report(probe.module, graph, kept, cut, solution)

    def tried(self, probe: Probe) -> tuple[Graph, Kept, Cut, Solution]:
        """The model's recording, with what does not stand the cut frozen, the units to keep, the cut and its widths."""
        found: list[Solution] = []
        known: dict[Axis, Tensor] = {}
        tensors = self.pruner.tensors(probe.module, probe.gradients)

        def choose(graph: Graph) -> Kept:
            groups = self.pruner.selected(graph, self.pruned_params, self.ignore)
            known.update({g.axis: self.pruner.importance(g, tensors) for g in groups if g.axis not in known})
            scores = {group.axis: known[group.axis] for group in groups}
            found.append(self.solve(graph, groups, scores))
            return {axis: self.pruner.keep(score, found[-1].widths[axis]) for axis, score in scores.items()}

        return *feasible(self.pruner.narrowed(record(probe)), probe, choose), found[-1]

    def solve(self, graph: Graph, groups: Sequence[Group], scores: Mapping[Axis, Tensor]) -> Solution:
        """How many units each of ``groups`` keeps; ``scores`` are those of its units."""
        if self.ranking == "global":
            return global_widths(graph, groups, scores, self.target_ratio, self.rounding)
        return uniform_widths(graph, groups, self.target_ratio, self.rounding)

    def _report(self, module: nn.Module, graph: Graph, kept: Kept, cut: Cut, solution: Solution) -> PruneReport:
        if abs(solution.share - self.target_ratio) > TOLERANCE:
            rank_zero_warn(
                f"asked to remove {self.target_ratio:.1%} of the FLOPs, the nearest that can be reached is "
                f"{solution.share:.1%}; name more pruned_params, or allow every width with round_to=1"
            )
        return PruneReport(
            flops=(graph.flops(), graph.flops(kept_sizes(kept))),
            params=(sum(p.numel() for p in module.parameters()), parameters_after(module, cut)),
            units=units_report(graph, kept),
            layers=layers_report(graph, kept),
            ratio=solution.ratio,
            target_ratio=self.target_ratio,
            frozen=frozen_report(graph),
            unused=tuple(name for name in graph.unreached if name not in graph.untrained),
            chosen=solution.shares,
            coupled=coupled_report(graph, kept),
        )


def prune(
    model: nn.Module,
    example_inputs: Any,
    target_ratio: float = 0.5,
    criterion: str = "l1_norm",
    pruned_params: str = "*",
    ignore: Sequence[str] = (),
    round_to: int = 8,
    min_units: int = 1,
    embeddings: bool = False,
    ranking: str = "layer",
) -> PruneReport:
    """Remove a share of a plain module's FLOPs, in place, by taking units from its layers.

    Args:
        model: any module; its parameters stay the same objects.
        example_inputs: a tensor, a tuple of arguments or a dict of them; the batch should hold two samples or more.
        target_ratio: share of FLOPs to remove, in (0, 1).
        criterion: name of a registered criterion; one that reads gradients takes them from the parameters' ``.grad``.
        pruned_params: pattern (glob or regular expression) of the parameters whose units may go.
        ignore: patterns of parameters whose units stay.
        round_to: layers of ``4 * round_to`` units or more keep a multiple of it.
        min_units: no layer keeps fewer units than this.
        embeddings: whether the residual stream of a transformer may lose units too.
        ranking: "layer" takes the same ratio of units from every layer, "global" all units below one bar.

    Returns:
        What was cut, and what could not be and why.

    Raises:
        CompressionError: bad arguments, a pattern that fits nothing, NaN weights; the model is untouched then.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3))
        >>> report = prune(net, torch.zeros(2, 3, 8, 8), target_ratio=0.5)
        >>> net[0].out_channels, net[2].in_channels, net[2].out_channels
        (8, 8, 4)
    """
    pruner = StructurePruner(criterions={"*": criterion}, embeddings=embeddings)
    task = UniformPruning(pruner, target_ratio, pruned_params, ignore, Rounding(round_to, min_units), ranking)
    cut, report = task.plan(forward_probe(model, example_inputs))
    apply(model, cut)
    forget_shapes(model, cut)
    return report


def find_groups(model: nn.Module, example_inputs: Any) -> Graph:
    """The groups of units of a plain module that live or die together; iterate over the result.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple of arguments or a dict of them.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3))
        >>> [(group.name, group.size) for group in find_groups(net, torch.zeros(2, 3, 8, 8))]
        [('0', 6)]
    """
    return record(forward_probe(model, example_inputs))


class UniformPruneStrategy(CompressionStrategy):
    """Cut the same ratio of units from every layer at ``start_epoch``, then go on training the smaller model.

    Args:
        pruner: ranks units; in a recipe the name of one. Default: ``StructurePruner()``, by l1 norm.
        start_epoch: the cut happens before the first step of this epoch.
        end_epoch: accepted for symmetry with other strategies; a cut has no end.
        target_ratio: share of FLOPs to remove, in (0, 1), of the model as it is then: two cuts compound.
        metric_name: a metric that the module logs, shown before and after the cut.
        pruned_params: pattern (glob or regular expression) of the parameters whose units may go.
        round_to: layers of ``4 * round_to`` units or more keep a multiple of it: runtimes are faster so.
        min_units: no layer keeps fewer units than this.
        ignore: patterns of parameters whose units stay although ``pruned_params`` names them.
        name: tells strategies of one class apart.

    Raises:
        CompressionError: ``target_ratio`` outside (0, 1), bad epochs; in ``setup`` a start beyond the last epoch or a
            pattern that fits nothing; before the first step a metric that nothing logs.

    Example:
        >>> UniformPruneStrategy(target_ratio=0.5, start_epoch=3, pruned_params="*conv*").start_epoch
        3
    """

    def __init__(
        self,
        pruner: StructurePruner | None = None,
        start_epoch: int = 0,
        end_epoch: int | None = None,
        target_ratio: float = 0.5,
        metric_name: str | None = None,
        pruned_params: str = "*",
        round_to: int = 8,
        min_units: int = 1,
        ignore: Sequence[str] = (),
        name: str | None = None,
    ) -> None:
        super().__init__(start_epoch, end_epoch, name)
        rounding = Rounding(round_to, min_units)
        self.metric_name = metric_name
        self.task = UniformPruning(pruner or StructurePruner(), target_ratio, pruned_params, tuple(ignore), rounding)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        names = [name for name, _ in pl_module.named_parameters()]
        if stage == "fit" and names:  # a module may also build its layers later, in configure_model
            select(self.task.pruned_params, names, f"{self.name}: pruned_params")

    @override
    def rehearse(self, trainer: Trainer, pl_module: LightningModule) -> str:
        probe = probe_of(trainer, pl_module)
        check_metric(self.metric_name, logged_names(trainer, pl_module, probe))
        report = self.task.plan(probe)[1]
        if report.unused:
            rank_zero_warn(
                f"{self.name}: no step uses {', '.join(report.unused[:5])} now ({len(report.unused)} parameters in "
                "all); if a later step does, what feeds it must keep its width: name that in ignore"
            )
        return str(report)

    @override
    def begin(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        before = evaluate(trainer, pl_module)
        cut, report = self.task.plan(probe_of(trainer, pl_module))
        cut_in_fit(trainer, pl_module, cut)
        after = evaluate(trainer, pl_module)
        changed = changed_metrics(before, after, self.metric_name)
        rank_zero_info(f"{self.name}, epoch {trainer.current_epoch}: {report.summary}{changed}")
        return {"act": "prune", **report.to_record(), "metrics": {"before": before, "after": after}}
