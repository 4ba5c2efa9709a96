"""Run a model's own step from outside its loop, and leave no trace.

Looking at a model (recording its graph, counting its FLOPs, evaluating it between two epochs) needs its real step, with
the user's real Python in it. A :class:`Probe` runs that step; random state, modes, buffers, gradients, metrics and the
attributes that the step changed are put back afterwards, and what it logs is caught instead of reaching a logger.
"""

import contextlib
import dataclasses
import functools
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from pytorch_lightning.loggers.logger import DummyLogger
from torch import Tensor, nn

from lightslim.rng import isolated_rng, kept_generators
from lightslim.untouched import untouched

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
        train_needs_grad: whether the training run does; without, it keeps nothing for a backward pass.
        prepare: called before each evaluation run, as the hooks of validation are; may change parameters meanwhile.
        gradients: takes the mean gradients of the loss by parameter name, from training data; None where that cannot
            be done.
    """

    module: nn.Module
    evaluate: Callable[[], Any]
    train: Callable[[], Any] | None = None
    context: Context = field(default=contextlib.nullcontext)
    batch_size: int = 1
    needs_grad: bool = False
    train_needs_grad: bool = True
    prepare: Callable[[], Any] | None = None
    gradients: Callable[[], Mapping[str, Tensor]] | None = None

    def run(self, training: bool = False, within: AbstractContextManager[Any] | None = None) -> tuple[Any, Log]:
        """Run the step once, ``within`` a context if one is given; returns its output and what it logged."""
        step = self.train if training and self.train else self.evaluate
        grad = torch.set_grad_enabled(self.train_needs_grad if training else self.needs_grad)
        with contextlib.ExitStack() as stack:
            stack.enter_context(untouched(self.module, parameters=self.prepare is not None and not training))
            log = stack.enter_context(captured_log(self.module))
            stack.enter_context(stubbed_optimizers(self.module))
            stack.enter_context(self.context())
            self.module.train(training)
            if self.prepare is not None and not training:
                with torch.no_grad():
                    self.prepare()
            with grad, torch.compiler.set_stance("force_eager"), _plain_attention(), within or contextlib.nullcontext():
                return step(), log


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """``nn.TransformerEncoderLayer`` has a fused way through evaluation that hides its steps; off meanwhile."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def forward_probe(module: nn.Module, example_inputs: Any) -> Probe:
    """A probe that calls ``module`` itself on ``example_inputs`` (a tensor, a tuple of arguments or a dict of them)."""

    def call() -> Any:
        if isinstance(example_inputs, Mapping):
            return module(**example_inputs)
        return module(*example_inputs) if isinstance(example_inputs, (tuple, list)) else module(example_inputs)

    return Probe(module, call, call, train_needs_grad=False)


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
    run, size = evaluation or training or forward, batch_size_of(batch)
    hooked = evaluation is not None and prepares_validation(module)
    prepare = functools.partial(prepare_validation, module, val_batch) if hooked else None
    return Probe(module, run, training, context, size, differentiates, prepare=prepare)


def _step(module: nn.Module, name: str, batch: Any) -> Callable[[], Any] | None:
    if batch is None or not overrides(module, name):
        return None
    return lambda: call_step(getattr(module, name), batch, 0)


BEFORE_EPOCH = ("on_validation_start", "on_validation_epoch_start")
BEFORE_BATCH = ("on_validation_batch_start",)
"""Hooks that may prepare what ``validation_step`` needs, and put other weights in place for it."""


def prepares_validation(module: nn.Module) -> bool:
    """Whether the user's class defines such hooks."""
    return any(overrides(module, hook) for hook in BEFORE_EPOCH + BEFORE_BATCH)


def prepare_validation(module: nn.Module, batch: Any) -> None:
    """Call them, as before the first batch."""
    call_hooks(module, BEFORE_EPOCH)
    call_hooks(module, BEFORE_BATCH, batch, 0, 0)


def call_hooks(module: nn.Module, hooks: Sequence[str], *arguments: Any) -> None:
    """Call those of ``hooks`` that the user's class defines, with as many of the arguments as they take."""
    for hook in filter(lambda name: overrides(module, name), hooks):
        method = getattr(module, hook)
        parameters = inspect.signature(method).parameters.values()
        several = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
        places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        method(*arguments[: None if several else len(places)])


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
    elif tree is None or isinstance(tree, (int, float, str, bytes)):
        return
    elif isinstance(tree, Mapping):
        yield from (t for value in tree.values() for t in tensors_in(value))
    elif isinstance(tree, Sequence):
        yield from (t for value in tree for t in tensors_in(value))
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        yield from tensors_in([getattr(tree, field.name) for field in dataclasses.fields(tree)])
    elif hasattr(tree, "__dict__") and not isinstance(tree, (nn.Module, type)):
        yield from tensors_in(vars(tree))


@contextlib.contextmanager
def replaced(module: object, **attributes: Any) -> Iterator[None]:
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

    def step(self, closure: Callable[[], Any] | None = None, **_: Any) -> Any:
        return None if closure is None else closure()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *_, **__: self

    def __enter__(self) -> "_NoOptimizer":
        return self

    def __exit__(self, *_: Any) -> None:
        return None


@contextlib.contextmanager
def stubbed_optimizers(module: nn.Module) -> Iterator[None]:
    """Let a manually optimized ``training_step`` run without stepping anything, however it finds its optimizers."""
    if getattr(module, "automatic_optimization", True):
        yield
        return
    real = getattr(getattr(module, "_trainer", None), "optimizers", None) or []

    def optimizers(*_: Any, **__: Any) -> Any:
        return [_NoOptimizer() for _ in real] if len(real) > 1 else _NoOptimizer()

    def nothing(*_: Any, **__: Any) -> None:
        return None

    stubs = dict.fromkeys(("manual_backward", "toggle_optimizer", "untoggle_optimizer", "clip_gradients"), nothing)
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(module, optimizers=optimizers, lr_schedulers=optimizers, **stubs))
        for optimizer in real:
            stack.enter_context(replaced(optimizer, step=_NoOptimizer().step, zero_grad=nothing))
        for parameter in module.parameters():
            parameter.grad = None  # which a backward pass of the step's own would add to
        yield


def sample_batch(loader: Any) -> Any:
    """A small batch for looking at the model, drawn without disturbing a map-style loader; else its first batch."""
    with isolated_rng(), kept_generators([loader]):
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
    with isolated_rng(), kept_generators([loader]):
        return _collated(dataset, collate, range(min(samples, size, len(dataset))))


def _collated(dataset: Any, collate: Callable[[Any], Any], indices: Sequence[int]) -> Any:
    fetch = getattr(dataset, "__getitems__", None)
    return collate(fetch(list(indices)) if fetch else [dataset[i] for i in indices])


def drawn_batches(loader: Any, count: int, seed: int = 0, part: int = 0, parts: int = 1) -> list[Any]:
    """Up to ``count`` batches of samples drawn by ``seed``, collated by hand: no worker starts, no sampler moves.

    Args:
        loader: a map-style DataLoader.
        count: how many batches, of the loader's size.
        seed: of the draw; augmentation draws from the global generators, which the caller seeds.
        part: which of ``parts`` of the samples to draw from: those are disjoint, and all give as many batches.
        parts: how many there are.

    Returns:
        The batches; empty for any other loader.

    Example:
        >>> loader = torch.utils.data.DataLoader(torch.arange(6), batch_size=2)
        >>> [len(batch) for batch in drawn_batches(loader, 2)]
        [2, 2]
    """
    dataset: Any = getattr(loader, "dataset", None)
    collate, batched = getattr(loader, "collate_fn", None), getattr(loader, "batch_sampler", None)
    size = getattr(loader, "batch_size", None) or getattr(batched, "batch_size", None)
    if collate is None or size is None or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        return []
    shuffled = list(range(len(dataset)))
    random.Random(seed).shuffle(shuffled)
    own = shuffled[part::parts][: len(dataset) // parts]
    size = min(size, len(own)) or 1
    starts = range(0, len(own) - size + 1, size)
    return [_collated(dataset, collate, own[at : at + size]) for at in starts[:count]]
