"""Run a model's own step from outside its loop, and leave no trace.

Looking at a model (recording its graph, counting its FLOPs, evaluating it between two epochs) needs its real step, with
the user's real Python in it. A :class:`Probe` runs that step; random state, modes, buffers, gradients, metrics and the
attributes that the step changed are put back afterwards, and what it logs is caught instead of reaching a logger.
"""

import contextlib
import dataclasses
import inspect
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn

Context = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Logged:
    """One call of ``self.log``: the value and how Lightning was asked to aggregate it."""

    value: Any
    reduce_fx: Any = "mean"
    batch_size: int | None = None
    add_dataloader_idx: bool = True


Log = dict[str, Logged]

_LIGHTNING = ("pytorch_lightning.", "lightning.")
_CONTAINERS = (list, dict, set, deque)
Restore = Callable[[], None]


@dataclass(frozen=True)
class Probe:
    """One way to run a model once, in evaluation or in training mode.

    Args:
        module: the model.
        evaluate: runs it once as in evaluation, returns its output.
        train: the same as in training; None when the model only has one way.
        context: what the step runs in (precision); entered anew for each run.
        batch_size: how many samples to divide the cost of one run by.
        needs_grad: whether the evaluation run differentiates, as a training step may.
    """

    module: nn.Module
    evaluate: Callable[[], Any]
    train: Callable[[], Any] | None = None
    context: Context = field(default=contextlib.nullcontext)
    batch_size: int = 1
    needs_grad: bool = False

    def run(self, training: bool = False) -> tuple[Any, Log]:
        """Run the step once; returns its output and what it logged."""
        step = self.train if training and self.train else self.evaluate
        grad = torch.enable_grad() if training or self.needs_grad else torch.no_grad()
        with untouched(self.module), captured_log(self.module) as log, stubbed_optimizers(self.module), self.context():
            self.module.train(training)
            with grad, torch.compiler.set_stance("force_eager"):
                return step(), log


def forward_probe(module: nn.Module, example_inputs: Any) -> Probe:
    """A probe that calls ``module`` itself on ``example_inputs`` (a tensor, a tuple of arguments or a dict of them)."""

    def call() -> Any:
        if isinstance(example_inputs, Mapping):
            return module(**example_inputs)
        return module(*example_inputs) if isinstance(example_inputs, (tuple, list)) else module(example_inputs)

    return Probe(module, call, call)


def step_probe(module: nn.Module, val_batch: Any, train_batch: Any, context: Context = contextlib.nullcontext) -> Probe:
    """A probe that runs a LightningModule's own ``validation_step`` and ``training_step``, else ``forward``.

    Args:
        module: the module.
        val_batch: what its validation data yields; None if there is none.
        train_batch: what its training data yields; None if there is none.
        context: what each step runs in.
    """
    training = _step(module, "training_step", train_batch)
    evaluation = _step(module, "validation_step", val_batch)
    batch = train_batch if evaluation is None and train_batch is not None else val_batch
    forward = forward_probe(module, batch[0] if isinstance(batch, (tuple, list)) else batch).evaluate
    differentiates = evaluation is None and training is not None
    return Probe(module, evaluation or training or forward, training, context, batch_size_of(batch), differentiates)


def _step(module: nn.Module, name: str, batch: Any) -> Callable[[], Any] | None:
    if batch is None or not overrides(module, name):
        return None
    return lambda: call_step(getattr(module, name), batch, 0)


def overrides(module: nn.Module, name: str) -> bool:
    """Whether the user's class (or instance) defines the hook ``name`` itself."""
    hook = getattr(module, name, None)
    return callable(hook) and not getattr(hook, "__module__", "").startswith(_LIGHTNING)


def call_step(step: Callable[..., Any], batch: Any, batch_index: int, loader_index: int = 0) -> Any:
    """Call a step with those of (batch, batch_idx, dataloader_idx) that it takes."""
    names = list(inspect.signature(step).parameters)
    arguments = [batch, batch_index, loader_index][: 3 if names[2:3] == ["dataloader_idx"] else min(len(names), 2)]
    return step(*arguments)


def batch_size_of(batch: Any) -> int:
    """The leading dimension of the first tensor in ``batch``; 1 if there is none.

    Example:
        >>> batch_size_of([{"image": torch.zeros(4, 3)}, torch.zeros(4)])
        4
    """
    return next((tensor.shape[0] for tensor in tensors_in(batch) if tensor.ndim), 1)


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples, dicts and dataclass-like objects, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        yield from (t for value in tree.values() for t in tensors_in(value))
    elif isinstance(tree, Sequence) and not isinstance(tree, (str, bytes)):
        yield from (t for value in tree for t in tensors_in(value))
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        yield from tensors_in([getattr(tree, field.name) for field in dataclasses.fields(tree)])
    elif hasattr(tree, "__dict__") and not isinstance(tree, (nn.Module, type)):
        yield from tensors_in(vars(tree))


@contextlib.contextmanager
def untouched(module: nn.Module, except_for: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Whatever happens inside, ``module`` and the random state are afterwards as they were before.

    Args:
        module: what to put back: modes, buffers, gradients and the plain attributes of every submodule.
        except_for: submodules whose buffers keep what they learn inside.

    Example:
        >>> net = nn.BatchNorm1d(2)
        >>> with untouched(net):
        ...     _ = net.eval(), net(torch.ones(3, 2)), setattr(net, "seen", 1)
        >>> net.training, hasattr(net, "seen")
        (True, False)
    """
    modes = [(child, child.training) for child in module.modules()]
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    kept = {id(buffer) for child in except_for for buffer in child.buffers()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers() if id(buffer) not in kept]
    attributes = [(child, _own_attributes(child)) for child in module.modules()]
    try:
        with isolate_rng():
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for child, saved in attributes:
            _put_back(child, saved)
        for child, mode in modes:
            child.training = mode


_MODULE_INTERNALS = frozenset(vars(nn.Module())) | {"_trainer", "_fabric"}


def _is_state(name: str, value: Any) -> bool:
    # nn.Module keeps its parameters, hooks and children in underscored dicts of its own; Lightning its trainer.
    return name not in _MODULE_INTERNALS and isinstance(value, (*_CONTAINERS, Tensor, int, float, str, type(None)))


def _own_attributes(module: nn.Module) -> dict[str, tuple[Any, Restore]]:
    """Each plain attribute of ``module``, and how to bring back its content."""
    return {name: (value, _restorer(value)) for name, value in vars(module).items() if _is_state(name, value)}


def _put_back(module: nn.Module, saved: dict[str, tuple[Any, Restore]]) -> None:
    for name in [n for n, value in vars(module).items() if _is_state(n, value) and n not in saved]:
        delattr(module, name)
    for name, (original, restore) in saved.items():
        restore()
        vars(module)[name] = original


def _restorer(value: Any) -> Restore:
    """A function that gives a tensor or container, nested ones too, the content that it has now."""
    if isinstance(value, Tensor):
        content = value.detach().clone()
        return lambda: _refill_tensor(value, content)
    if not isinstance(value, _CONTAINERS):
        return lambda: None
    items = list(value.items()) if isinstance(value, dict) else list(value)
    inner = [_restorer(item) for item in (value.values() if isinstance(value, dict) else items)]

    def restore() -> None:
        value.clear()
        value.extend(items) if isinstance(value, (list, deque)) else value.update(items)
        for refill in inner:
            refill()

    return restore


def _refill_tensor(tensor: Tensor, content: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(content)


@contextlib.contextmanager
def replaced(module: nn.Module, **attributes: Any) -> Iterator[None]:
    """Set attributes on this instance alone for the time being (they hide the class's own, and leave no trace)."""
    before = {name: vars(module)[name] for name in attributes if name in vars(module)}
    vars(module).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            vars(module).pop(name, None)
        vars(module).update(before)


@contextlib.contextmanager
def captured_log(module: nn.Module) -> Iterator[Log]:
    """Collect what ``self.log`` and ``self.log_dict`` are given, by name, instead of letting it reach the Trainer."""
    log: Log = {}

    def log_one(
        name: str, value: Any, *_: Any, reduce_fx: Any = "mean", batch_size: int | None = None,
        add_dataloader_idx: bool = True, **__: Any,
    ) -> None:  # fmt: skip
        log[name] = Logged(value, reduce_fx, batch_size, add_dataloader_idx)

    def log_many(values: Mapping[str, Any], *_: Any, **options: Any) -> None:
        for name, value in values.items():
            log_one(name, value, **options)

    if not hasattr(module, "log"):
        yield log
        return
    with replaced(module, log=log_one, log_dict=log_many), _muted(getattr(module, "_trainer", None)):
        yield log


@contextlib.contextmanager
def _muted(trainer: Any) -> Iterator[None]:
    """What the step says to ``self.logger`` goes nowhere."""
    loggers = getattr(trainer, "loggers", None)
    if not loggers:
        yield
        return
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers


class _NoOptimizer:
    """Stands in for an optimizer or scheduler of manual optimization: takes any call, also as a context."""

    param_groups: Sequence[dict[str, Any]] = ({"lr": 0.0, "params": []},)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *_, **__: self

    def __enter__(self) -> "_NoOptimizer":
        return self

    def __exit__(self, *_: Any) -> None:
        return None


@contextlib.contextmanager
def stubbed_optimizers(module: nn.Module) -> Iterator[None]:
    """Let a manually optimized ``training_step`` run without stepping anything."""
    if getattr(module, "automatic_optimization", True):
        yield
        return

    def optimizers(*_: Any, **__: Any) -> Any:
        real = getattr(getattr(module, "_trainer", None), "optimizers", None) or [None]
        return [_NoOptimizer() for _ in real] if len(real) > 1 else _NoOptimizer()

    def nothing(*_: Any, **__: Any) -> None:
        return None

    stubs = dict.fromkeys(("manual_backward", "toggle_optimizer", "untoggle_optimizer", "clip_gradients"), nothing)
    with replaced(module, optimizers=optimizers, lr_schedulers=optimizers, **stubs):
        yield


def sample_batch(loader: Any) -> Any:
    """A small batch for looking at the model, drawn without disturbing a map-style loader; else its first batch."""
    with isolate_rng():
        batch = collated_samples(loader)
        return next(iter(loader), None) if batch is None else batch


def collated_samples(loader: Any, samples: int = 8) -> Any:
    """The first ``samples`` items of a map-style DataLoader, collated by hand: no worker starts, no sampler moves.

    Returns:
        The batch; None for any other loader.
    """
    dataset: Any = getattr(loader, "dataset", None)
    collate, size = getattr(loader, "collate_fn", None), getattr(loader, "batch_size", None)
    if collate is None or size is None or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        return None
    if len(dataset) == 0:
        return None
    indices = list(range(min(samples, size, len(dataset))))
    fetch = getattr(dataset, "__getitems__", None)
    with isolate_rng():
        return collate(fetch(indices) if fetch else [dataset[i] for i in indices])
