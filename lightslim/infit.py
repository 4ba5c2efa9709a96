"""What strategies do inside a running fit: look at the module, evaluate it, cut it."""

import contextlib
import gc
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import Metric

from lightslim.errors import CompressionError
from lightslim.steps import (
    Log,
    Probe,
    batch_size_of,
    call_step,
    captured_log,
    collated_samples,
    overrides,
    sample_batch,
    step_probe,
    untouched,
)
from lightslim.surgery import Cut, apply

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


def probe_of(trainer: Trainer, module: LightningModule) -> Probe:
    """A probe that runs the module's steps on a few samples of its own data."""
    val = _sample(trainer, _first(trainer.val_dataloaders), sample_batch)
    # A training stream may not start again: it is only asked where there is nothing else.
    train = _sample(trainer, trainer.train_dataloader, sample_batch if val is None else collated_samples)
    if val is None and train is None:
        raise CompressionError("there is no data to look at the model with: the Trainer has no dataloader")
    train = val if train is None else train
    return step_probe(module, val, train, trainer.precision_plugin.val_step_context)


def _first(loaders: Any) -> Any:
    if isinstance(loaders, dict):
        loaders = list(loaders.values())
    return (loaders[0] if loaders else None) if isinstance(loaders, (list, tuple)) else loaders


def _sample(trainer: Trainer, loaders: Any, draw: Callable[[Any], Any]) -> Any:
    """A small batch in the form that a step gets it: several training loaders make a list or a dict of batches."""
    if isinstance(loaders, dict):
        batch: Any = {name: draw(loader) for name, loader in loaders.items()}
    elif isinstance(loaders, (list, tuple)):
        batch = [draw(loader) for loader in loaders]
    else:
        batch = None if loaders is None else draw(loaders)
    return None if batch is None else trainer.strategy.batch_to_device(batch)


def logged_names(trainer: Trainer, module: LightningModule, probe: Probe) -> set[str]:
    """The names that the module's own steps and epoch-end hooks log."""
    names = set(probe.run()[1]) | set(evaluate(trainer, module, limit=1))
    return names | set(probe.run(training=True)[1]) if probe.train else names


def evaluate(
    trainer: Trainer, module: LightningModule, limit: int | None = None, learning: Sequence[nn.Module] = ()
) -> dict[str, float]:
    """The means, over the validation data, of what ``validation_step`` logs, without entering Lightning's own loop.

    Batches count by their size; under DDP the mean is over all processes. The running fit does not notice.

    Args:
        trainer: the running Trainer, whose loaders, devices and precision are used.
        module: the module it fits.
        limit: batches of each loader to use; None for as many as the Trainer's own validation.
        learning: submodules that are in training mode meanwhile, and keep what their buffers learn.

    Returns:
        Metric name to value, epoch-end hooks included; empty where there is no validation data or step.
    """
    loaders = trainer.val_dataloaders
    if loaders is None or not overrides(module, "validation_step"):
        return {}
    loaders = list(loaders) if isinstance(loaders, (list, tuple)) else [loaders]
    limits = [limit] * len(loaders) if limit else _limits(trainer, len(loaders))
    sums: dict[str, Tensor] = {}
    with untouched(module, except_for=learning), torch.no_grad():
        module.eval()
        for child in learning:
            child.train()
        for values, weight in _batches(trainer, module, loaders, limits):
            for name, value in values.items():
                pair = torch.tensor([value * weight, weight], dtype=torch.float64)
                sums[name] = sums.get(name, 0) + pair
    return {name: _mean(trainer, pair) for name, pair in sorted(sums.items())}


def _limits(trainer: Trainer, count: int) -> list[float]:
    limits = trainer.num_val_batches
    return list(limits) if isinstance(limits, list) else [limits] * count


def _batches(
    trainer: Trainer, module: LightningModule, loaders: list[Any], limits: Sequence[float]
) -> Iterator[tuple[dict[str, float], int]]:
    """What each batch logs, with its size; then what is only known at the end: metric objects, epoch-end hooks."""
    objects: dict[str, Metric] = {}
    for child in module.modules():
        if isinstance(child, Metric):
            child.reset()
    with captured_log(module) as log:
        _call(module, "on_validation_epoch_start")
        for index, loader in enumerate(loaders):
            suffix = f"/dataloader_idx_{index}" if len(loaders) > 1 else ""
            for batch_index, batch in enumerate(_limited(loader, limits[index])):
                moved = trainer.strategy.batch_to_device(batch, dataloader_idx=index)
                with trainer.precision_plugin.val_step_context():
                    call_step(module.validation_step, moved, batch_index, index)
                objects.update({name + suffix: value for name, value in log.items() if isinstance(value, Metric)})
                yield _numbers(log, suffix), batch_size_of(moved)
                log.clear()
        _call(module, "on_validation_epoch_end")
        yield _numbers(log | {name: metric.compute() for name, metric in objects.items()}, ""), 1


def _limited(loader: Any, limit: float) -> Iterator[Any]:
    return itertools.islice(loader, None if math.isinf(limit) else int(limit))


def _call(module: LightningModule, hook: str) -> None:
    if overrides(module, hook):
        getattr(module, hook)()


def _numbers(log: Log, suffix: str) -> dict[str, float]:
    values = {name: value for name, value in log.items() if isinstance(value, (int, float)) or _is_numeric(value)}
    return {name + suffix: float(torch.as_tensor(value).detach().double().mean()) for name, value in values.items()}


def _is_numeric(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() > 0


def _mean(trainer: Trainer, pair: Tensor) -> float:
    device = trainer.strategy.root_device
    pair = pair.to(device, torch.float32 if device.type == "mps" else torch.float64)
    summed = trainer.strategy.reduce(pair, reduce_op="sum")
    return float(summed[0] / summed[1])


def cut_in_fit(trainer: Trainer, module: LightningModule, cut: Cut) -> None:
    """Carry out rank 0's ``cut`` on the module that ``trainer`` is fitting, its optimizers and its averaged copies.

    Call it between two epochs: no graph of the old shapes may be alive.
    """
    cut = Cut.from_state(trainer.strategy.broadcast(cut.to_state()))
    optimizers = [getattr(optimizer, "_optimizer", optimizer) for optimizer in trainer.optimizers]
    module.zero_grad(set_to_none=True)
    with _unwrapped(trainer):
        apply(module, cut, optimizers)
        for copy in _averaged_copies(trainer):
            apply(copy, cut)


def _averaged_copies(trainer: Trainer) -> Iterator[nn.Module]:
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
