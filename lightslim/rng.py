"""The state of the random generators: put back after use, and as plain tensors for checkpoints."""

import contextlib
import functools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_leaves


@contextlib.contextmanager
def isolated_rng() -> Iterator[None]:
    """Whatever is drawn inside, all generators go on from where they were; Lightning's own forgets that after an error.

    Example:
        >>> before = random_state()["python"]
        >>> with contextlib.suppress(KeyboardInterrupt), isolated_rng():
        ...     raise KeyboardInterrupt(random.random())
        >>> torch.equal(random_state()["python"], before)
        True
    """
    isolation = isolate_rng()
    isolation.__enter__()
    try:
        yield
    finally:
        isolation.__exit__(None, None, None)


@contextlib.contextmanager
def kept_generators(owners: Iterable[Any]) -> Iterator[None]:
    """The same for generators of their own, among the attributes of ``owners`` and of the samplers and data in them.

    Example:
        >>> own = torch.Generator()
        >>> loader = torch.utils.data.DataLoader([1, 2, 3], shuffle=True, generator=own)
        >>> with kept_generators([loader]):
        ...     _ = list(loader)
        >>> torch.equal(own.get_state(), torch.Generator().get_state())
        True
    """
    found = [restorer for owner in owners for restorer in _generators(owner, depth=4)]
    try:
        yield
    finally:
        for restorer in found:
            restorer()


def _generators(owner: Any, depth: int) -> Iterator[Callable[[], None]]:
    for name, value in getattr(owner, "__dict__", {}).items():
        restorer = restorer_of(value)
        if restorer is not None:
            yield restorer
        elif depth > 1 and name in ("iterables", "sampler", "batch_sampler", "dataset", "data_source"):
            for inner in tree_leaves(value) if name == "iterables" else [value]:
                yield from _generators(inner, depth - 1)


def restorer_of(generator: Any) -> Callable[[], None] | None:
    """What lets a generator of torch, numpy or Python go on from where it is now; None if it is something else."""
    if isinstance(generator, torch.Generator):
        return functools.partial(_set_state, generator, generator.get_state())
    if isinstance(generator, random.Random) and not isinstance(generator, random.SystemRandom):
        return functools.partial(generator.setstate, generator.getstate())
    if isinstance(generator, np.random.RandomState):
        return functools.partial(_set_state, generator, generator.get_state())
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        return functools.partial(setattr, bits, "state", bits.state)
    return None


def _set_state(generator: Any, state: Any) -> None:
    generator.set_state(state)


def random_state() -> dict[str, Tensor]:
    """What torch (CPU and the current CUDA device), numpy and Python draw next, each in a tensor of fixed size.

    Example:
        >>> before = random_state()
        >>> drawn = torch.rand(1), random.random(), np.random.rand()
        >>> restore(before)
        >>> (torch.rand(1), random.random(), np.random.rand()) == drawn
        True
    """
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if cuda else torch.empty(0, dtype=torch.uint8),
        "python": torch.tensor(words),
        "python_gauss": torch.tensor([math.nan if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position]),  # type: ignore[union-attr]
        "numpy_gauss": torch.tensor([has_gauss, cached], dtype=torch.float64),
    }


def restore(state: Mapping[str, Tensor]) -> None:
    """Let all generators go on from ``state``."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"].numel() and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    gauss = state["python_gauss"].item()
    random.setstate((3, tuple(state["python"].tolist()), None if math.isnan(gauss) else gauss))
    *keys, position = state["numpy"].tolist()
    has_gauss, cached = state["numpy_gauss"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, int(has_gauss), cached))


def random_states(trainer: Trainer) -> dict[str, Tensor]:
    """Those of all processes, one row each; every process has to call it."""
    if trainer.world_size == 1:
        return {name: value[None] for name, value in random_state().items()}
    device = trainer.strategy.root_device
    gathered: Any = {
        name: trainer.strategy.all_gather(value.to(device)) if value.numel() else value.expand(trainer.world_size, 0)
        for name, value in random_state().items()
    }
    return {name: value.cpu() for name, value in gathered.items()}


def restore_own(trainer: Trainer, states: Mapping[str, Tensor]) -> None:
    """Let this process go on from its row of ``states``."""
    if len(states["torch"]) != trainer.world_size:
        rank_zero_warn(
            f"the checkpoint is of {len(states['torch'])} processes and this run has {trainer.world_size}: random "
            "numbers do not go on where they were"
        )
        return
    restore({name: value[trainer.global_rank] for name, value in states.items()})
