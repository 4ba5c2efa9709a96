"""What strategies do inside a running fit: look at the module, evaluate it, cut it."""

import contextlib
import functools
import gc
import itertools
import math
import random
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten
from torchmetrics import Metric

from lightslim.errors import CompressionError
from lightslim.rng import isolated_rng, kept_generators
from lightslim.steps import (
    BEFORE_BATCH,
    BEFORE_EPOCH,
    Log,
    Probe,
    batch_size_of,
    call_hooks,
    call_step,
    captured_log,
    collated_samples,
    drawn_batches,
    overrides,
    prepares_validation,
    replaced,
    sample_batch,
    step_probe,
)
from lightslim.surgery import Cut, apply, forget_shapes
from lightslim.untouched import untouched

# Lightning's strategies that keep the module whole on every device; by name, so that both of its packages count.
_WHOLE = {"SingleDeviceStrategy", "DDPStrategy"}
_SHARDED = {"DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy"}


def refuse_sharded(trainer: Trainer) -> None:
    """Raise if the Trainer's strategy keeps only shards of the parameters, which cannot be cut in place."""
    kinds = {kind.__name__ for kind in type(trainer.strategy).__mro__}
    if kinds & _SHARDED or not kinds & _WHOLE:
        raise CompressionError(
            f"the model's structure cannot change under {type(trainer.strategy).__name__}: compress on one device or "
            "with DDP first, then train the smaller model as you like"
        )


def refuse_masks(trainer: Trainer) -> None:
    """Raise if Lightning's own ModelPruning is there too: its masks keep the shapes that a cut changes."""
    if any(kind.__name__ == "ModelPruning" for callback in trainer.callbacks for kind in type(callback).__mro__):  # type: ignore[attr-defined]
        raise CompressionError("ModelPruning keeps masks of the old shapes: use it or a compression strategy, not both")


def probe_of(trainer: Trainer, module: LightningModule) -> Probe:
    """A probe that runs the module's steps on a few samples of its own data."""
    loaders, _ = validation_data(trainer)
    val = _sample(trainer, loaders[0] if loaders else None, sample_batch)
    # A training stream may not start again: it is only asked where there is nothing else.
    train = _sample(trainer, trainer.train_dataloader, sample_batch if val is None else collated_samples)
    if val is None and train is None:
        raise CompressionError("there is no data to look at the model with: the Trainer has no dataloader")
    train = val if train is None else train
    probe = step_probe(module, val, train, trainer.precision_plugin.val_step_context)
    return replace(probe, gradients=lambda: mean_gradients(trainer, module))


def _sample(trainer: Trainer, loaders: Any, draw: Callable[[Any], Any]) -> Any:
    """A small batch in the form that a step gets it: loaders side by side make a list or a dict of batches."""
    loaders = loaders.iterables if isinstance(loaders, _SideBySide) else loaders
    if isinstance(loaders, dict):
        batch: Any = {name: draw(loader) for name, loader in loaders.items()}
    elif isinstance(loaders, (list, tuple)):
        batch = [draw(loader) for loader in loaders]
    else:
        batch = None if loaders is None else draw(loaders)
    return None if batch is None else _moved(trainer, batch)


def _moved(trainer: Trainer, batch: Any, loader_index: int = 0) -> Any:
    """A batch as Lightning's loops hand it to a step: in the Trainer's precision and on its device."""
    converted = trainer.precision_plugin.convert_input(batch)
    return trainer.strategy.batch_to_device(converted, dataloader_idx=loader_index)


def mean_gradients(trainer: Trainer, module: LightningModule, batches: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """The mean gradient of the training loss over some batches, the same on all processes; the fit does not notice.

    Args:
        trainer: the running Trainer; its training loaders must be map-style DataLoaders.
        module: the module it fits; its ``training_step`` says the loss (each ``manual_backward``, where it has those).
        batches: how many each process takes, of its own part of the data.
        seed: of the draw, of augmentation and of dropout.

    Returns:
        By parameter name; parameters that no gradient reaches are left out.

    Raises:
        CompressionError: there is no such data, or no loss.
    """
    drawn = _drawn(trainer, batches, seed)
    if not drawn or not overrides(module, "training_step"):
        raise CompressionError(
            "gradients are needed for ranking: that takes a training_step and a map-style DataLoader of training data "
            "with at least one sample for each process"
        )
    named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    totals = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in named.items()}
    reached: set[str] = set()
    for index, batch in enumerate(drawn):
        found = _gradients(trainer, module, _moved(trainer, batch), index, seed + index, named)
        reached |= found.keys()
        for name, gradient in found.items():
            totals[name] += gradient.float() / len(drawn)
    reached = set(trainer.strategy.broadcast(sorted(reached)))  # processes that reduce others would wait for ever
    return {name: trainer.strategy.reduce(totals[name], reduce_op="mean") for name in named if name in reached}


def _drawn(trainer: Trainer, count: int, seed: int) -> list[Any]:
    """Batches in the form that a training step gets them; loaders that end early end all."""
    loaders, rank, size = trainer.train_dataloader, trainer.global_rank, trainer.world_size
    with isolated_rng():
        _seed(seed + rank)
        one = functools.partial(drawn_batches, count=count, seed=seed, part=rank, parts=size)
        if isinstance(loaders, dict):
            return [dict(zip(loaders, row, strict=True)) for row in zip(*map(one, loaders.values()), strict=False)]
        if isinstance(loaders, (list, tuple)):
            return [list(row) for row in zip(*map(one, loaders), strict=False)]
        return one(loaders)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def _gradients(
    trainer: Trainer, module: LightningModule, batch: Any, index: int, seed: int, named: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Those of one batch. Taken by ``autograd.grad``: neither ``.grad`` nor DDP's hooks learn of it."""

    def step() -> list[Tensor | None]:
        _seed(seed)
        losses: list[Tensor] = []
        own = {} if module.automatic_optimization else {"manual_backward": lambda loss, *_, **__: losses.append(loss)}
        with replaced(module, **own):
            output = call_step(module.training_step, batch, index)
        if module.automatic_optimization:
            output = output["loss"] if isinstance(output, Mapping) else output
            losses += [] if output is None else [output]
        if not losses or not named:
            return []
        return list(torch.autograd.grad(torch.stack(losses).sum(), list(named.values()), allow_unused=True))

    probe = Probe(module, step, step, trainer.precision_plugin.train_step_context)
    found = probe.run(training=True)[0]
    return {name: gradient for name, gradient in zip(named, found, strict=False) if gradient is not None}


def logged_names(trainer: Trainer, module: LightningModule, probe: Probe) -> set[str]:
    """The names that the module's own steps and epoch-end hooks log."""
    names = set(probe.run()[1]) | set(evaluate(trainer, module, limit=1))
    return names | set(probe.run(training=True)[1]) if probe.train else names


def evaluate(
    trainer: Trainer, module: LightningModule, limit: int | None = None, learning: Sequence[nn.Module] = (),
    loaders: Sequence[Iterable[Any]] | None = None, call: Callable[..., Any] = call_step,
) -> dict[str, float]:  # fmt: skip
    """The means, over the validation data, of what ``validation_step`` logs, without entering Lightning's own loop.

    Batches count by their size; under DDP the mean is over all processes. The running fit does not notice.

    Args:
        trainer: the running Trainer, whose loaders, devices and precision are used.
        module: the module it fits.
        limit: batches of each loader to use, where the Trainer's own validation takes more.
        learning: submodules that are in training mode meanwhile, and keep what their buffers learn.
        loaders: what to take to its end instead of the Trainer's own validation data.
        call: calls the step with (step, batch, batch index, loader index).

    Returns:
        Metric name to value, epoch-end hooks included; empty where there is no validation data or step.
    """
    own, limits = validation_data(trainer)
    if loaders is not None:
        own, limits = list(loaders), [math.inf] * len(loaders)
    if not own or not overrides(module, "validation_step"):
        return {}
    limits = limits if limit is None else [min(limit, of_one) for of_one in limits]
    with untouched(module, except_for=learning), kept_generators(own), torch.no_grad():
        module.eval()
        for child in learning:
            child.train()
        totals = _aggregate(_batches(trainer, module, own, limits, call))
    return {name: total.over_processes(trainer) for name, total in sorted(totals.items())}


def visit(
    trainer: Trainer, module: LightningModule, loaders: Sequence[Sequence[Any]], call: Callable[..., Any]
) -> None:
    """Let ``call`` have every step of a validation over ``loaders``; end before the epoch does, and log nothing."""
    steps = _batches(trainer, module, list(loaders), [math.inf] * len(loaders), call)
    with untouched(module, parameters=prepares_validation(module)), torch.no_grad(), contextlib.closing(steps):
        module.eval()
        for _ in itertools.islice(steps, sum(map(len, loaders))):  # what would come next is the end of the epoch
            pass


def validation_data(trainer: Trainer) -> tuple[list[Any], list[float]]:
    """The Trainer's validation loaders, and how many batches of each it takes."""
    loaders, limits = trainer.val_dataloaders, trainer.num_val_batches
    if loaders is None:
        return [], []
    mode = getattr(trainer.fit_loop.epoch_loop.val_loop._combined_loader, "_mode", "sequential")
    own = tree_flatten(loaders)[0] if mode == "sequential" else [_SideBySide(loaders, mode)]
    return own, list(limits) if isinstance(limits, list) else [limits] * len(own)


@dataclass(frozen=True)
class _SideBySide:
    """Loaders that a batch of each is taken from at once."""

    iterables: Any
    mode: Any

    def __iter__(self) -> Iterator[Any]:
        for batch, _, _ in CombinedLoader(self.iterables, self.mode):
            yield batch


def _batches(
    trainer: Trainer, module: LightningModule, loaders: list[Any], limits: Sequence[float], call: Callable[..., Any]
) -> Generator[tuple[Log, int], None, None]:
    """What each batch logs, with its size; then what is only known at the end: metric objects, epoch-end hooks."""
    objects: Log = {}
    for child in module.modules():
        if isinstance(child, Metric):
            child.reset()
    with captured_log(module) as log:
        call_hooks(module, BEFORE_EPOCH)
        for index, loader in enumerate(loaders):
            suffix = f"/dataloader_idx_{index}" if len(loaders) > 1 else ""
            for batch_index, batch in enumerate(_limited(loader, limits[index])):
                moved = _moved(trainer, batch, index)
                call_hooks(module, BEFORE_BATCH, moved, batch_index, index)
                with trainer.precision_plugin.val_step_context():
                    output = call(module.validation_step, moved, batch_index, index)
                call_hooks(module, ("on_validation_batch_end",), output, moved, batch_index, index)
                named = {name + (suffix if one.add_dataloader_idx else ""): one for name, one in log.items()}
                objects.update({name: one for name, one in named.items() if isinstance(one.value, Metric)})
                yield named, batch_size_of(moved)
                log.clear()
        call_hooks(module, ("on_validation_epoch_end", "on_validation_end"))
        yield log | {name: replace(one, value=one.value.compute()) for name, one in objects.items()}, 1


def _limited(loader: Any, limit: float) -> Iterator[Any]:
    return itertools.islice(loader, None if math.isinf(limit) else int(limit))


@dataclass
class _Total:
    """A metric on its way through the batches: ``reduce_fx`` says what becomes of its values.

    It is added up in the precision in which Lightning does, so that both come to the same to the last bit.
    """

    reduce: str
    value: Tensor
    weight: int = 0

    def add(self, value: Tensor, weight: int) -> None:
        if self.reduce in ("min", "max"):
            self.value = torch.minimum(self.value, value) if self.reduce == "min" else torch.maximum(self.value, value)
        else:
            self.value = self.value + (value * weight if self.reduce == "mean" else value)
        self.weight += weight

    def over_processes(self, trainer: Trainer) -> float:
        device, operation = trainer.strategy.root_device, "sum" if self.reduce == "mean" else self.reduce
        value = trainer.strategy.reduce(self.value.to(device), reduce_op=operation)
        if self.reduce != "mean":
            return float(value)
        return float(value / trainer.strategy.reduce(torch.tensor(self.weight, device=device), reduce_op="sum"))


def _aggregate(batches: Iterator[tuple[Log, int]]) -> dict[str, _Total]:
    totals: dict[str, _Total] = {}
    for log, size in batches:
        for name, one in log.items():
            if isinstance(one.value, (int, float)) or (isinstance(one.value, Tensor) and one.value.numel()):
                value, reduce = _value_of(one.value), _reduction(one.reduce_fx)
                start = value if reduce in ("min", "max") else torch.zeros_like(value)
                totals.setdefault(name, _Total(reduce, start)).add(value, one.batch_size or size)
    return totals


def _value_of(logged: Any) -> Tensor:
    """One number of single precision or more."""
    value = torch.as_tensor(logged).detach()
    full = value if value.dtype in (torch.float32, torch.float64) else value.to(torch.get_default_dtype())
    return full if full.ndim == 0 else full.mean()


def _reduction(reduce_fx: Any) -> str:
    name = reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", "mean")
    return name if name in ("sum", "min", "max") else "mean"


def cut_in_fit(trainer: Trainer, module: LightningModule, cut: Cut) -> None:
    """Carry out rank 0's ``cut`` on the module that ``trainer`` is fitting, its optimizers and its averaged copies.

    Call it between two epochs: no backward pass may be under way.
    """
    cut = Cut.from_state(trainer.strategy.broadcast(cut.to_state()))
    optimizers = optimizers_of(trainer)
    module.zero_grad(set_to_none=True)
    with _unwrapped(trainer):
        apply(module, cut, optimizers)
        forget_shapes(module, cut)
        for copy in averaged_copies(trainer):
            apply(copy, cut)


def optimizers_of(trainer: Trainer) -> list[Optimizer]:
    """The optimizers at work, and those that a strategy has put aside for a while, without Lightning's wrappers."""
    aside = [one for callback in trainer.callbacks for one in getattr(callback, "optimizers_aside", ())]  # type: ignore[attr-defined]
    return [getattr(optimizer, "_optimizer", optimizer) for optimizer in [*trainer.optimizers, *aside]]


def train_beside(trainer: Trainer, pairs: Iterable[tuple[nn.Parameter, nn.Parameter]]) -> None:
    """Let the optimizers train new parameters of the module, each in the group of one that was there before.

    So they share its learning rate and schedule, and none is there twice. Call it before or between epochs.

    Args:
        trainer: fits the module.
        pairs: the new parameter and the one that was there; if no optimizer trains that, the new one is frozen.
    """
    pairs = list(pairs)
    with _unwrapped(trainer) if pairs else contextlib.nullcontext():
        optimizers = optimizers_of(trainer)
        for new, known in pairs:
            groups = [one for optimizer in optimizers for one in optimizer.param_groups
                      if any(parameter is known for parameter in one["params"])]  # fmt: skip
            new.requires_grad_(bool(groups) and known.requires_grad)
            for group in groups:
                group["params"].append(new)
                if "param_names" in group:
                    group["param_names"].append(f"beside {group['param_names'][-1]}")


def averaged_copies(trainer: Trainer) -> Iterator[nn.Module]:
    """The module's moving averages that Lightning's own averaging callbacks keep."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average: Any = getattr(callback, "_average_model", None)
        if isinstance(average, nn.Module):
            wrapped = getattr(average, "module", None)
            yield wrapped if isinstance(wrapped, nn.Module) else average


@contextlib.contextmanager
def _unwrapped(trainer: Trainer) -> Iterator[None]:
    """Take DDP's wrapper off and put a new one on: its buckets know the old shapes."""
    strategy: Any = trainer.strategy
    if not isinstance(strategy.model, DistributedDataParallel):
        yield
        return
    strategy.model = strategy.lightning_module
    gc.collect()
    yield
    if hasattr(strategy, "_pl_static_graph_delay_done"):
        strategy._pl_static_graph_delay_done = False
    strategy.configure_ddp()
