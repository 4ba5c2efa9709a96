"""Is removing units the same as zeroing them? If not, something in the model counts, scales or indexes over them."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from lightslim.graph import Axis, Graph, Kept, Made, ShapeTrace, leaves
from lightslim.prune.unitwise import OF_TWO, UNIT_BY_UNIT
from lightslim.steps import Probe, tensors_in
from lightslim.surgery import Cut, apply, plan

# Statistics over the units that are left differ from those over zeroed ones, and ought to.
_NORMS = {"native_layer_norm", "native_group_norm", "_fused_rms_norm", "rms_norm"}
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
Outputs = list[tuple[str, Tensor]]


@dataclass(frozen=True)
class Failure:
    """Why a cut model is not to be trusted, and the modules where that showed, the innermost first."""

    reason: str
    where: tuple[str, ...] = ("",)


def comparable(graph: Graph, kept: Kept) -> Kept:
    """The part of ``kept`` that should change no result: not the groups that a layer or group norm runs over."""
    normalised = _normalised(graph)
    return {axis: mask for axis, mask in kept.items() if axis not in normalised}


def cannot_count(run: Sequence[Made], cut: ShapeTrace) -> bool:
    """Whether no op of a run could tell how many units there are: there is no number, index or order among them.

    Then to remove units is to zero them, by what the ops are, if the run of the cut model was of the same ones.
    """
    ops = [made.op for made in run]
    names = ((op.rstrip("_"), len(made.inputs)) for op, made in zip(ops, run, strict=True))
    return ops == [op for op, _ in cut.seen] and all(
        name in UNIT_BY_UNIT or (name in OF_TWO and operands == 2) for name, operands in names
    )


def changed_result(graph: Graph, probe: Probe, kept: Kept, got: Outputs | None = None) -> Failure | None:
    """Compare the model cut to ``kept`` with the model whose other units are zeroed, on one evaluation step.

    Only what is :func:`comparable` is cut for this. Both runs see the same random numbers.

    Args:
        graph: the recording of the uncut model.
        probe: how to run the model.
        kept: the units to keep.
        got: the :func:`outputs` of the model so cut, where they are known already.

    Returns:
        Why the cut is not to be trusted; None if the two agree.
    """
    compared = comparable(graph, kept)
    if not compared:
        return None
    probe = replace(probe, context=contextlib.nullcontext)
    cut = plan(probe.module, graph, compared)
    tolerance = _TOLERANCE.get(_dtype(probe.module), 0.1)
    if all(error <= tolerance for _, error in _differences(probe, cut, outermost(probe.module), got)):
        return None
    differ = ((path, error) for path, error in _differences(probe, cut, probe.module.modules()) if error > tolerance)
    path, error = next(differ, ("", math.inf))
    reason = f"removing these units is not zeroing them, the result differs by {error:.1%}: the code counts over them"
    return Failure(reason, enclosing(path))


def enclosing(path: str) -> tuple[str, ...]:
    """``path`` and those of the modules around it, the innermost first.

    Example:
        >>> enclosing("layer.0.conv")
        ('layer.0.conv', 'layer.0', 'layer', '')
    """
    parts = path.split(".") if path else []
    return tuple(".".join(parts[:end]) for end in range(len(parts), -1, -1))


def _differences(
    probe: Probe, cut: Cut, watched: Iterable[nn.Module], got: Outputs | None = None
) -> list[tuple[str, float]]:
    """How far the outputs of the ``watched`` modules, and of the step, are off when cut instead of zeroed, by path."""
    watched = list(watched)
    with zeroed(probe.module, cut):
        expected = outputs(probe, watched)
    if got is None:
        undo = apply(probe.module, cut)
        try:
            got = outputs(probe, watched)
        finally:
            undo()
    return [(path, _difference(b, a)) for (path, a), (_, b) in zip(expected, got, strict=False)]


def _normalised(graph: Graph) -> set[Axis]:
    ops = {leaf for made in graph.traces[False] for axis in _statistics_over(made) for leaf in leaves(axis)}
    return ops | graph.normalised


def _statistics_over(made: Made) -> Iterator[Axis]:
    """The axes that a norm runs over: all, or, of a batch norm (of standardised weights, say), all but the channels."""
    for axes in made.outputs:
        if made.op in _NORMS:
            yield from axes
        elif "batch_norm" in made.op:
            yield from (axis for dim, axis in enumerate(axes) if dim != 1 and len(axes) > 1)


@contextlib.contextmanager
def zeroed(module: nn.Module, cut: Cut) -> Iterator[None]:
    """While in force, the positions that ``cut`` would remove from parameters are zero instead."""
    parameters = dict(module.named_parameters())
    before = {item.tensor: parameters[item.tensor].data for item in cut.slices if item.tensor in parameters}
    try:
        for name, data in before.items():
            parameters[name].data = data.clone()
        for item in (item for item in cut.slices if item.tensor in parameters):
            data = parameters[item.tensor].data
            gone = sorted(set(range(item.size)) - set(item.kept))
            data.index_fill_(item.dim, torch.tensor(gone, dtype=torch.int64, device=data.device), 0)
        yield
    finally:
        for name, data in before.items():
            parameters[name].data = data


def outermost(module: nn.Module) -> tuple[nn.Module, ...]:
    """The module and its children: whose outputs are enough to see that two runs differ."""
    return module, *module.children()


def outputs(
    probe: Probe, watched: Iterable[nn.Module], within: contextlib.AbstractContextManager[Any] | None = None
) -> Outputs:
    """What the ``watched`` modules and the step itself return in one evaluation run, in order, by path."""
    found: list[tuple[str, Tensor]] = []
    paths = {id(module): path for path, module in probe.module.named_modules()}

    def keep(module: nn.Module, inputs: object, output: object) -> None:
        with _disable_current_modes():  # a copy is no op of the model
            found.extend((paths[id(module)], tensor.detach().clone()) for tensor in tensors_in(output))

    handles = [module.register_forward_hook(keep) for module in watched]
    try:
        output, _ = probe.run(within=within)
    finally:
        for handle in handles:
            handle.remove()
    return [*found, *(("", tensor.detach()) for tensor in tensors_in(output))]


def _difference(got: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest value; 0 where there is nothing to compare."""
    if got.shape != expected.shape or not expected.is_floating_point() or not expected.numel():
        return 0.0
    scale = expected.abs().max().double()
    if not bool(torch.isfinite(expected).all()) or not float(scale):
        return 0.0
    return float((got.double() - expected.double()).abs().max() / scale)


def _dtype(module: nn.Module) -> torch.dtype:
    return next((parameter.dtype for parameter in module.parameters()), torch.float32)
