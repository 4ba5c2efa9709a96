"""For each kind of component one that works, to be changed into what its author has in mind."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Kind:
    """The parts of the files that depend on the kind.

    Args:
        summary: one line.
        code: the component.
        test: its test, up to the last one.
        usage: in Python.
        recipe: in a recipe.
        suffix: of the name of a class; empty for a function.
    """

    summary: str
    code: str
    test: str
    usage: str
    recipe: str
    suffix: str = ""

    @property
    def function(self) -> bool:
        """Whether the component is a function."""
        return not self.suffix

    def parts(self) -> dict[str, str]:
        """The texts by the name of their place."""
        return {name: text.strip() for name, text in asdict(self).items() if name != "suffix"}


_PRUNING = """
strategies:
  halve: {class: UniformPruneStrategy, pruner: pruner, target_ratio: 0.5}
compressor: {epoch: 3, strategies: [halve]}"""

_PRUNED = """

def strategy():
    return UniformPruneStrategy({pruner}, start_epoch=1, target_ratio=0.5)


def test_it_works_in_a_fit(tmp_path):
    assert_trains(strategy)
    assert_resumes(strategy, tmp_path)
    assert_exports(strategy, tmp_path)
"""

CRITERION = Kind(
    summary="Ranks units by the largest magnitude of their weights.",
    code='''
from torch import Tensor

from lightslim import hookimpl
from lightslim.registry import Registry


def $component(weight: Tensor, axis: int = 0) -> Tensor:
    """The largest magnitude in each slice along `axis`; larger stays longer.

    With an attribute `reads = "gradient"` it would find the gradient of the loss in `weight.grad`.
    """
    return weight.detach().float().movedim(axis, 0).reshape(weight.shape[axis], -1).abs().amax(1)
''',
    test="""
from $module import $component
from lightslim import StructurePruner, UniformPruneStrategy
from lightslim.registry import registry
from lightslim.testing import assert_criterion, assert_exports, assert_resumes, assert_trains


def test_it_is_a_criterion():
    assert_criterion($component)
"""
    + _PRUNED.format(pruner='StructurePruner(criterions={"*": "$component"})'),
    usage='As a function `prune(model, example_inputs, criterion="$component")`, as a callback\n'
    '`UniformPruneStrategy(StructurePruner(criterions={"*": "$component"}))`.',
    recipe='pruners:\n  pruner: {class: StructurePruner, criterions: {"*": $component}}' + _PRUNING,
)

PRUNER = Kind(
    summary="Ranks units by how they compare with the best of their group.",
    code='''
from collections.abc import Mapping

from torch import Tensor

from lightslim import StructurePruner, hookimpl
from lightslim.graph import Group
from lightslim.registry import Registry


class $component(StructurePruner):
    """Scores relative to the largest of the group; arguments as of `StructurePruner`."""

    def importance(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """One score per unit, the best has 1."""
        scores = super().importance(group, tensors)
        return scores / scores.max().clamp_min(1e-30)
''',
    test="""
from $module import $component
from lightslim import UniformPruneStrategy
from lightslim.registry import registry
from lightslim.testing import assert_exports, assert_resumes, assert_trains
"""
    + _PRUNED.format(pruner="$component()"),
    usage="As a callback `UniformPruneStrategy($component())`.",
    recipe="pruners:\n  pruner: {class: $component}" + _PRUNING,
    suffix="Pruner",
)

STRATEGY = Kind(
    summary="Clips the weights that lie far from the others, once, and goes on training.",
    code='''
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer

from lightslim import CompressionError, CompressionStrategy, hookimpl
from lightslim.registry import Registry


class $component(CompressionStrategy):
    """Clip each weight tensor to `limit` standard deviations at `start_epoch`.

    Args:
        start_epoch: it acts before the first step of this epoch.
        end_epoch: it has none.
        limit: in standard deviations, positive.
        name: tells strategies of one class apart.
    """

    def __init__(
        self, start_epoch: int = 0, end_epoch: int | None = None, limit: float = 2.5, name: str | None = None
    ) -> None:
        super().__init__(start_epoch, end_epoch, name)
        if limit <= 0:
            raise CompressionError(f"limit is {limit}; it must be positive")
        self.limit = limit

    def rehearse(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """What it would do, said before the training."""
        return f"clips {len(_weights(pl_module))} weights to {self.limit} standard deviations"

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Act; the record goes into `history`."""
        clipped = 0
        with torch.no_grad():
            for weight in _weights(pl_module):
                limit = self.limit * float(weight.std())
                clipped += int((weight.abs() > limit).sum())
                weight.clamp_(-limit, limit)
        return {"act": "clip", "clipped": clipped}


def _weights(module: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter for parameter in module.parameters() if parameter.ndim > 1]
''',
    test="""
import pytest

from $module import $component
from lightslim import CompressionError
from lightslim.registry import registry
from lightslim.testing import assert_exports, assert_resumes, assert_trains


def strategy():
    return $component(start_epoch=1)


def test_it_works_in_a_fit(tmp_path):
    assert_trains(strategy)
    assert_resumes(strategy, tmp_path)
    assert_exports(strategy, tmp_path)


def test_what_cannot_work_is_refused():
    with pytest.raises(CompressionError, match="limit is 0"):
        $component(limit=0)
""",
    usage="As a callback `Trainer(callbacks=[$component(start_epoch=1)])`.",
    recipe="strategies:\n  mine: {class: $component, start_epoch: 1}\ncompressor: {epoch: 3, strategies: [mine]}",
    suffix="Strategy",
)

RANGE = Kind(
    summary="The range of a quantized tensor: the largest magnitude seen in training so far.",
    code='''
import torch
from torch import Tensor

from lightslim import hookimpl
from lightslim.quantize import Bounds, Range
from lightslim.registry import Registry


class $component(Range):
    """The largest magnitude of all tensors seen in training mode.

    Args:
        axis: None for one range of the whole tensor.
        bits: width of the integers.
    """

    def __init__(self, axis: int | None = None, bits: int = 8) -> None:
        super().__init__(axis, bits)
        self.amax: Tensor
        self.register_buffer("amax", torch.zeros(()))

    def forward(self, x: Tensor) -> Bounds:
        """The bounds, after learning from `x` in training mode."""
        if not self.training:
            return Bounds(self.amax.clone())
        peak = self.magnitude(x).max()
        if self.learns:  # not where activation checkpointing runs a layer again
            self.amax.copy_(torch.maximum(self.amax, peak.to(self.amax)))
        return self.given(peak, Bounds(self.amax.clone()))  # there: what it gave for this tensor before
''',
    test="""
from $module import $component
from lightslim import QuantizationStrategy
from lightslim.registry import registry
from lightslim.testing import assert_exports, assert_range, assert_resumes, assert_trains


def strategy():
    return QuantizationStrategy(start_epoch=1, activation_quantize_type="$component")


def test_it_is_a_range():
    assert_range($component)


def test_it_works_in_a_fit(tmp_path):
    assert_trains(strategy)
    assert_resumes(strategy, tmp_path)
    assert_exports(strategy, tmp_path)
""",
    usage='As a function `transform(model, activation_quantize_type="$component")`, as a callback\n'
    '`QuantizationStrategy(activation_quantize_type="$component")`.',
    recipe="strategies:\n  quantize: {class: QuantizationStrategy, activation_quantize_type: $component}\n"
    "compressor: {epoch: 3, strategies: [quantize]}",
    suffix="Range",
)

DISTILLER = Kind(
    summary="Compares a map of the student with one of the teacher by their mean absolute difference.",
    code='''
from collections.abc import Sequence

import torch
from torch import Tensor

from lightslim import hookimpl
from lightslim.distill import Distiller
from lightslim.registry import Registry


class $component(Distiller):
    """The mean absolute difference of two maps.

    Args:
        student_map: path of a submodule of the student; nothing at all for its output.
        teacher_map: the same of the teacher.
        distillation_loss_weight: what the loss is multiplied with.
        project: where the channels differ, put a trained linear map between.
        teacher: which of several teachers.
        name: what the loss is logged as.
    """

    def __init__(
        self,
        student_map: str = "",
        teacher_map: str = "",
        distillation_loss_weight: float = 1.0,
        project: bool = False,
        teacher: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__([student_map], [teacher_map], distillation_loss_weight, project, teacher, name)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """The loss, a scalar."""
        return torch.nn.functional.l1_loss(student[0], teacher[0].detach())
''',
    test="""
from $module import $component
from lightslim import DistillationStrategy
from lightslim.registry import registry
from lightslim.testing import TinyModule, assert_distiller, assert_exports, assert_resumes


def distiller():
    return $component("net.stem", "net.stem")


def strategy():
    return DistillationStrategy([distiller()], teacher=TinyModule(), start_epoch=1)


def test_it_is_a_distiller():
    assert_distiller(distiller)


def test_it_works_in_a_fit(tmp_path):
    assert_resumes(strategy, tmp_path)
    assert_exports(strategy, tmp_path)
""",
    usage='As a callback `DistillationStrategy([$component("stem", "stem")], teacher=network)`.',
    recipe="distillers:\n  mine: {class: $component, student_map: stem, teacher_map: stem}\n"
    "strategies:\n  distil: {class: DistillationStrategy, distillers: [mine]}\n"
    "compressor: {epoch: 3, strategies: [distil]}",
    suffix="Distiller",
)

EXPORTER = Kind(
    summary="Writes the weights in half precision.",
    code='''
import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lightslim import hookimpl
from lightslim.export import Exporter, Run
from lightslim.registry import Registry


def _write(model: nn.Module, example_inputs: Sequence[Tensor], path: Path) -> None:
    """The state dict, its floating-point tensors in float16."""
    half = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    torch.save(half, path)


def _open(path: Path, model: nn.Module | None = None, threads: int | None = None) -> Run:
    """The file as a function: it holds weights alone, so `model` says what to compute."""
    loaded = copy.deepcopy(model)
    assert loaded is not None, "this format holds weights only"
    loaded.load_state_dict(torch.load(path, weights_only=True))
    return lambda *inputs: [loaded.eval()(*inputs)]


$component = Exporter(_write, open=_open, cuts=False, name="$component")
''',
    test="""
from $module import $component
from lightslim import UniformPruneStrategy
from lightslim.registry import registry
from lightslim.testing import assert_exports


def test_a_pruned_model_is_exported(tmp_path):
    assert_exports(lambda: UniformPruneStrategy(start_epoch=1, target_ratio=0.5), tmp_path, format="$component")
""",
    usage='As a function `export(model, example_inputs, path, format="$component")`, on the command line\n'
    "`lightslim export CKPT --as $component OUT`.",
    recipe="strategies:\n  halve: {class: UniformPruneStrategy, target_ratio: 0.5}\n"
    "compressor: {epoch: 3, strategies: [halve]}",
)

TEMPLATES = {
    "criterion": CRITERION,
    "pruner": PRUNER,
    "strategy": STRATEGY,
    "range": RANGE,
    "distiller": DISTILLER,
    "exporter": EXPORTER,
}
