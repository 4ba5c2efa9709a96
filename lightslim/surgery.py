"""Change a live model: remove units from its parameters, its optimizers' state and the sizes its modules remember.

Parameters stay the same objects (only their ``.data`` changes), so optimizers, schedulers and tied weights stay valid.
Everything is computed before anything is changed: a cut happens whole or not at all.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightslim.errors import CompressionError
from lightslim.graph import Graph, Kept, kept_sizes, masks_of
from lightslim.sizes import HOLD_SIZES, sizes_from_axes, sizes_from_shapes

CHECKPOINT_KEY = "lightslim"


@dataclass(frozen=True)
class Slice:
    """Positions ``kept`` of the ``size`` positions along dimension ``dim`` of one parameter or buffer."""

    tensor: str
    dim: int
    size: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Rewrite:
    """A size that a module remembers as a plain attribute, before and after."""

    module: str
    attribute: str
    before: Any
    after: Any


@dataclass(frozen=True)
class Cut:
    """One structural change of a model; made of plain values, so it travels in checkpoints and between processes."""

    slices: tuple[Slice, ...] = ()
    rewrites: tuple[Rewrite, ...] = ()

    def to_state(self) -> dict[str, Any]:
        """Lists, dicts, numbers and strings only."""
        return {
            "slices": [{**asdict(item), "kept": list(item.kept)} for item in self.slices],
            "rewrites": [asdict(item) for item in self.rewrites],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Cut":
        """The inverse of :meth:`to_state`."""
        slices = (Slice(**{**item, "kept": tuple(item["kept"])}) for item in state["slices"])
        return cls(tuple(slices), tuple(Rewrite(**item) for item in state["rewrites"]))


# The cuts a module has been through live beside it, not on it: the user's object gains no attribute.
_CUTS: "WeakKeyDictionary[nn.Module, list[Cut]]" = WeakKeyDictionary()


def cuts_of(module: nn.Module) -> list[Cut]:
    """The cuts that ``module`` has been through, oldest first."""
    return _CUTS.setdefault(module, [])


def plan(module: nn.Module, graph: Graph, kept: Kept) -> Cut:
    """The cut that leaves the units ``kept`` (one bool mask per group's axis) and everything that hangs on them."""
    masks = masks_of(graph.slots, kept)
    positions = {id(mask): tuple(mask.nonzero().flatten().tolist()) for mask in masks.values()}
    slices = tuple(Slice(slot.tensor, slot.dim, len(mask), positions[id(mask)]) for slot, mask in masks.items())
    return Cut(slices, tuple(_with_python_sizes(module, graph, kept, _rewrites(module, _shapes_after(module, slices)))))


def _with_python_sizes(module: nn.Module, graph: Graph, kept: Kept, rewrites: Iterable[Rewrite]) -> Iterator[Rewrite]:
    """The sizes read off the shapes of weights, then those in the code of modules that are to follow the cut."""
    done = set()
    for item in rewrites:
        done.add((item.module, item.attribute))
        yield item
    sizes = kept_sizes(kept)
    for path, child in module.named_modules():
        if path in graph.follow or isinstance(child, HOLD_SIZES):
            readings = sizes_from_axes(child, graph.made_by(path), sizes) or [{}]
            for attribute, value in readings[min(graph.follow.get(path, 0), len(readings) - 1)].items():
                before = getattr(child, attribute)
                if (path, attribute) not in done and before != value:
                    yield Rewrite(path, attribute, before, value)


def parameters_after(module: nn.Module, cut: Cut) -> int:
    """How many parameters ``module`` will have after ``cut``."""
    shapes = _shapes_after(module, cut.slices)
    return sum(math.prod(shapes[name]) for name, _ in module.named_parameters())


def _shapes_after(module: nn.Module, slices: Iterable[Slice]) -> dict[str, list[int]]:
    """Shapes by name; the names of a shared tensor share theirs."""
    tensors = _tensors(module)
    shapes = {id(tensor): list(tensor.shape) for tensor in tensors.values()}
    after = {name: shapes[id(tensor)] for name, tensor in tensors.items()}
    for item in slices:
        after[item.tensor][item.dim] = len(item.kept)
    return after


def _rewrites(module: nn.Module, shapes: Mapping[str, list[int]]) -> Iterator[Rewrite]:
    for path, child in module.named_modules():
        prefix = f"{path}." if path else ""
        own = {
            name: shapes[prefix + name]
            for name in (*child._parameters.keys(), *child._buffers.keys())
            if prefix + name in shapes
        }
        for attribute, value in sizes_from_shapes(child, own).items():
            before = getattr(child, attribute)
            if before != value:
                yield Rewrite(path, attribute, before, value)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under every name it has."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def apply(module: nn.Module, cut: Cut, optimizers: Iterable[Optimizer] = ()) -> Callable[[], None]:
    """Carry out ``cut`` on ``module`` in place, optimizer state included.

    Args:
        module: the model; its parameters keep their identity, their gradients are dropped.
        cut: from :func:`plan`, for a model of these very shapes.
        optimizers: state tensors of a parameter's old shape (or 1 along some dimensions) are cut like it, scalars
            stay, any other is dropped with a warning (the optimizer starts that parameter afresh).

    Returns:
        A function that undoes it all, optimizer state excepted.

    Raises:
        CompressionError: the cut does not fit the model; nothing has been changed then.
    """
    tensors = _tensors(module)
    wanted = _by_tensor(cut, tensors)
    new = {name: _cut_tensor(tensors[name].data, slices) for name, slices in wanted.items()}
    old = {name: (tensors[name].data, tensors[name].grad) for name in wanted}
    states = [(optimizer, tensors[name], wanted[name]) for optimizer in optimizers for name in wanted]
    for optimizer, tensor, slices in states:
        cut_optimizer_state(optimizer, tensor, slices)
    for name, data in new.items():
        tensors[name].data = data
        tensors[name].grad = None
    _rewrite(module, {(item.module, item.attribute): item.after for item in cut.rewrites})
    cuts_of(module).append(cut)

    def undo() -> None:
        for name, (data, grad) in old.items():
            tensors[name].data = data
            tensors[name].grad = grad
        _rewrite(module, {(item.module, item.attribute): item.before for item in cut.rewrites})
        cuts_of(module).remove(cut)

    return undo


def forget_shapes(module: nn.Module, cut: Cut) -> None:
    """Let autograd forget what shapes the parameters had before ``cut``, which has been applied for good.

    While a module holds on to something that it computed before, gradients of the old shapes would be expected. What a
    wrapper such as DDP hooked on is forgotten, too: take it off first and put a new one on.
    """
    parameters = dict(module.named_parameters())
    for name in {item.tensor for item in cut.slices} & set(parameters):
        data = parameters[name].data
        # Only a change of type makes it do so
        parameters[name].data = data.new_empty(0, dtype=torch.float32 if data.dtype == torch.float64 else torch.float64)
        parameters[name].data = data


def _by_tensor(cut: Cut, tensors: Mapping[str, Tensor]) -> dict[str, list[Slice]]:
    wanted: dict[str, list[Slice]] = {}
    for item in cut.slices:
        shape = tensors[item.tensor].shape if item.tensor in tensors else ()
        if len(shape) <= item.dim or shape[item.dim] != item.size:
            raise CompressionError(
                f"the cut was planned for {item.tensor} with {item.size} positions along dimension {item.dim}, "
                f"but the model has {tuple(shape) if shape else 'no such tensor'}"
            )
        wanted.setdefault(item.tensor, []).append(item)
    return wanted


def _cut_tensor(tensor: Tensor, slices: Iterable[Slice]) -> Tensor:
    last = tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    for item in slices:
        tensor = tensor.index_select(item.dim, _index(item.kept, tensor.device))
    return tensor.contiguous(memory_format=torch.channels_last) if last else tensor


@lru_cache(maxsize=64)  # the many tensors that lie along an axis all lose the same positions, one after the other
def _index(kept: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(kept, dtype=torch.int64, device=device)


def cut_optimizer_state(optimizer: Optimizer, parameter: Tensor, slices: Iterable[Slice]) -> None:
    """Cut the optimizer's memory of ``parameter`` like the parameter, whose old shape is still in place."""
    if hasattr(optimizer, "_numel_cache"):  # LBFGS keeps one flat history of all parameters
        if optimizer.state:
            _warn_dropped(optimizer, {"the history of all parameters": ()})
        optimizer.state.clear()
        optimizer._numel_cache = None
        return
    state = optimizer.state.get(parameter)
    if not state:
        return
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.numel() > 1}
    if all(_lies_along(value, parameter) for value in tensors.values()):
        state.update({key: _cut_state(value, parameter, slices) for key, value in tensors.items()})
    else:
        del optimizer.state[parameter]
        _warn_dropped(optimizer, {key: tuple(value.shape) for key, value in tensors.items()})


def _lies_along(state: Tensor, parameter: Tensor) -> bool:
    """Whether ``state`` has the parameter's shape, or 1 where it keeps one number for a whole dimension (Adafactor)."""
    return state.ndim == parameter.ndim and all(a in (1, b) for a, b in zip(state.shape, parameter.shape, strict=True))


def _cut_state(state: Tensor, parameter: Tensor, slices: Iterable[Slice]) -> Tensor:
    return _cut_tensor(state, [item for item in slices if state.shape[item.dim] == parameter.shape[item.dim]])


def _warn_dropped(optimizer: Optimizer, shapes: Mapping[str, tuple[int, ...]]) -> None:
    rank_zero_warn(
        f"{type(optimizer).__name__} keeps state whose shape is not its parameter's ({shapes}); "
        "it cannot be cut and starts afresh for that parameter"
    )


def _rewrite(module: nn.Module, values: Mapping[tuple[str, str], Any]) -> None:
    for (path, attribute), value in values.items():
        setattr(module.get_submodule(path), attribute, value)


def conform(module: nn.Module, state_dict: Mapping[str, Tensor], record: Mapping[str, Any] | None) -> None:
    """Give ``module`` the structure that a checkpoint's weights have, larger or smaller; the values come with the load.

    Args:
        module: the model, at any stage of its cutting.
        state_dict: the weights about to be loaded.
        record: what :func:`structure` wrote into the checkpoint; None where there is none, then sizes that torch's own
            layers remember are still read off the shapes.
    """
    tensors = _tensors(module)
    # Back to the sizes it was built with first: what a layer once was (depthwise or not) tells what its shapes mean.
    _rewrite(module, {(r.module, r.attribute): r.before for cut in reversed(cuts_of(module)) for r in cut.rewrites})
    shapes = {name: list(state_dict[name].shape) for name in tensors if name in state_dict}
    read_off = {(r.module, r.attribute): r.after for r in _rewrites(module, shapes)}
    cuts = [Cut.from_state(state) for state in (record or {}).get("cuts", [])]
    recorded = {(r.module, r.attribute): r.after for cut in cuts for r in cut.rewrites}
    for name, shape in shapes.items():
        if list(tensors[name].shape) != shape and len(shape) == tensors[name].ndim:
            tensors[name].data = tensors[name].data.new_empty(shape)
            tensors[name].grad = None
    _cut_what_is_not_saved(module, set(shapes), cuts)
    _rewrite(module, {**read_off, **recorded})
    _CUTS[module] = cuts


def _cut_what_is_not_saved(module: nn.Module, saved: set[str], cuts: list[Cut]) -> None:
    """Buffers that checkpoints leave out (``persistent=False``) lose the positions that the cuts took from them."""
    done = cuts_of(module)
    buffers = {name: buffer for name, buffer in module.named_buffers() if name not in saved}
    for item in (item for cut in cuts[len(done) :] if cuts[: len(done)] == done for item in cut.slices):
        if item.tensor in buffers:
            buffers[item.tensor].data = _cut_tensor(buffers[item.tensor].data, [item])


def structure(module: nn.Module) -> dict[str, Any]:
    """What a checkpoint must hold so that :func:`conform` can rebuild this model's structure: plain values only."""
    return {"cuts": [cut.to_state() for cut in cuts_of(module)]}
