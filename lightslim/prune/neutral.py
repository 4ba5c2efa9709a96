"""Is removing units the same as zeroing them? If not, something in the model counts, scales or indexes over them."""

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightslim.graph import Axis, Graph, Kept, leaves
from lightslim.steps import Probe, tensors_in
from lightslim.surgery import Cut, apply, plan

# Statistics over the units that are left differ from those over zeroed ones, and ought to.
_NORMS = {"native_layer_norm", "native_group_norm", "_fused_rms_norm", "rms_norm"}
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}


@dataclass(frozen=True)
class Failure:
    """Why a cut model is not to be trusted, and the modules where that showed, the innermost first."""

    reason: str
    where: tuple[str, ...] = ("",)


def changed_result(graph: Graph, probe: Probe, kept: Kept) -> Failure | None:
    """Compare the model cut to ``kept`` with the model whose other units are zeroed, on one evaluation step.

    Groups that a layer or group norm runs over are left whole for this. Both runs see the same random numbers.

    Returns:
        Why the cut is not to be trusted; None if the two agree.
    """
    normalised = _normalised(graph)
    compared = {axis: mask for axis, mask in kept.items() if axis not in normalised}
    if not compared:
        return None
    probe = replace(probe, context=contextlib.nullcontext)
    cut = plan(probe.module, graph, compared)
    tolerance = _TOLERANCE.get(_dtype(probe.module), 0.1)
    first = probe.module, *probe.module.children()
    if all(error <= tolerance for _, error in _differences(probe, cut, first)):
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


def _differences(probe: Probe, cut: Cut, watched: Iterable[nn.Module]) -> list[tuple[str, float]]:
    """How far the outputs of the ``watched`` modules, and of the step, are off when cut instead of zeroed, by path."""
    watched = list(watched)
    with zeroed(probe.module, cut):
        expected = _outputs(probe, watched)
    undo = apply(probe.module, cut)
    try:
        got = _outputs(probe, watched)
    finally:
        undo()
    return [(path, _difference(b, a)) for (path, a), (_, b) in zip(expected, got, strict=False)]


def _normalised(graph: Graph) -> set[Axis]:
    made = (made for made in graph.traces[False] if made.op in _NORMS)
    return {leaf for one in made for axes in one.outputs for axis in axes for leaf in leaves(axis)}


@contextlib.contextmanager
def zeroed(module: nn.Module, cut: Cut) -> Iterator[None]:
    """While in force, the positions that ``cut`` would remove from parameters are zero instead."""
    parameters = dict(module.named_parameters())
    before = {item.tensor: parameters[item.tensor].data for item in cut.slices if item.tensor in parameters}
    try:
        for item in cut.slices:
            if item.tensor in parameters:
                data = parameters[item.tensor].data
                gone = sorted(set(range(item.size)) - set(item.kept))
                parameters[item.tensor].data = data.index_fill(item.dim, torch.tensor(gone, device=data.device), 0)
        yield
    finally:
        for name, data in before.items():
            parameters[name].data = data


def _outputs(probe: Probe, watched: Iterable[nn.Module]) -> list[tuple[str, Tensor]]:
    """What the ``watched`` modules and the step itself return in one evaluation run, in order, by path."""
    found: list[tuple[str, Tensor]] = []
    paths = {id(module): path for path, module in probe.module.named_modules()}

    def keep(module: nn.Module, inputs: object, output: object) -> None:
        found.extend((paths[id(module)], tensor.detach().clone()) for tensor in tensors_in(output))

    handles = [module.register_forward_hook(keep) for module in watched]
    try:
        output, _ = probe.run()
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
