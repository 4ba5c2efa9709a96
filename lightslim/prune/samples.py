"""The batches that every point of an analysis sees: a seeded part of the validation data, read once if it fits."""

import copy
import hashlib
import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from lightslim.rng import isolated_rng, kept_generators
from lightslim.steps import batch_size_of, tensors_in


class Room:
    """Memory that may still be taken.

    Args:
        left: bytes.

    Example:
        >>> room = Room(100)
        >>> room.take(80), room.take(30), room.left
        (True, False, 20)
    """

    def __init__(self, left: int) -> None:
        self.left = left

    def take(self, size: int) -> bool:
        """Take ``size`` bytes, if there are as many."""
        if size > self.left:
            return False
        self.left -= size
        return True


class Copies(list[Any]):
    """A list that hands out copies of what it holds: a step may write into its batch.

    Example:
        >>> batches = Copies([torch.zeros(1)])
        >>> [float(batch.add_(1)) for _ in range(2) for batch in batches]
        [1.0, 1.0]
    """

    def __iter__(self) -> Iterator[Any]:
        return map(copy.deepcopy, super().__iter__())


class Samples:
    """A loader's batches, the same in the same order each time.

    Args:
        loader: any iterable of batches.
        limit: how many batches of it to take; infinity for all.
        rate: the share of those to use; None for all. Of a map-style DataLoader samples are drawn, of others batches.
        room: batches stay in memory while there is room; the others are read anew each time.
        seed: of the draw.

    Attributes:
        kept: the batches that are in memory.
        whole: whether those are all.

    Example:
        >>> samples = Samples([torch.zeros(2), torch.ones(2)], math.inf, None, Room(8))
        >>> len(samples.kept), [float(batch.sum()) for batch in samples]
        (1, [0.0, 2.0])
    """

    def __init__(self, loader: Any, limit: float, rate: float | None, room: Room, seed: int = 0) -> None:
        self._loader, self._limit, self._rate, self._seed = loader, limit, rate, seed
        self.kept = Copies()
        self.whole = True
        with isolated_rng(), kept_generators([loader]):
            self._subset = None if rate is None else _subset(loader, self._most, rate, seed)
            for batch in self._read():
                self.whole = room.take(sum(t.numel() * t.element_size() for t in tensors_in(batch)))
                if not self.whole:
                    break
                self.kept.append(batch)

    def __iter__(self) -> Iterator[Any]:
        yield from self.kept
        if not self.whole:
            with kept_generators([self._loader]):
                yield from itertools.islice(self._read(), len(self.kept), None)

    @property
    def _most(self) -> int | None:
        return None if math.isinf(self._limit) else int(self._limit)

    def _read(self) -> Iterator[Any]:
        if self._subset is not None:
            return iter(self._subset)
        batches = itertools.islice(self._loader, self._most)
        return batches if self._rate is None else _some(batches, self._rate, self._seed)

    def fingerprint(self) -> dict[str, Any]:
        """What tells these batches from others: how many samples there are, and a digest of the first batch."""
        digest = hashlib.sha256()
        first = self.kept[0] if self.kept else next(iter(self), None)
        for tensor in tensors_in(first):
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        count = sum(map(batch_size_of, self.kept)) if self.whole else "more than fit in memory"
        return {"samples": count, "first_batch": digest.hexdigest()}


def _some(batches: Iterator[Any], rate: float, seed: int) -> Iterator[Any]:
    """About a share ``rate`` of the batches, the first one always."""
    draw = random.Random(seed)
    return (batch for at, batch in enumerate(batches) if draw.random() < rate or not at)


def _subset(loader: Any, most: int | None, rate: float, seed: int) -> DataLoader[Any] | None:
    """A loader of a share ``rate`` of the samples; None where they cannot be told apart without reading them."""
    if not isinstance(loader, DataLoader) or loader.batch_sampler is None:
        return None
    if isinstance(loader.dataset, IterableDataset):
        return None
    batches = [list(batch) for batch in itertools.islice(loader.batch_sampler, most)]
    indices = list(itertools.chain.from_iterable(batches))
    if not indices:
        return None
    chosen = sorted(random.Random(seed).sample(range(len(indices)), max(1, round(rate * len(indices)))))
    size = max(map(len, batches))
    return DataLoader(
        loader.dataset,
        batch_sampler=[[indices[i] for i in chosen[at : at + size]] for at in range(0, len(chosen), size)],
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        pin_memory=loader.pin_memory,
    )
