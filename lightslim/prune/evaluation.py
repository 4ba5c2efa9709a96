"""One number for a model: the same evaluation under every mask, and what comes before the mask is computed once."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightslim.infit import evaluate, visit
from lightslim.memory import keep_freed_memory
from lightslim.prune.modules import Looks, calls_seen_by
from lightslim.prune.neutral import zeroed
from lightslim.prune.noting import FirstReads, Noting, Stop
from lightslim.prune.prefix import NOTHING, Prefix
from lightslim.prune.replay import Diverged, FastForward
from lightslim.prune.samples import Copies, Room, Samples
from lightslim.prune.sources import Lasting
from lightslim.prune.unitwise import Batch, Chain, Constants, Masked
from lightslim.steps import call_step
from lightslim.surgery import Cut


class Evaluation:
    """Evaluates a module again and again, with different weights masked; the running fit does not notice.

    Args:
        trainer: whose devices and precision are used.
        module: what it evaluates.
        loaders: of the validation data.
        limits: how many batches of each to take.
        rate: the share of the data to use; None for all.
        memory: bytes that batches and what is computed once may take together. Without them every step runs whole.

    Attributes:
        samples: the batches of each loader.
        replaying: whether what comes before a mask is computed once. It is given up, and that is said, for a module
            whose step does not give the same to the last bit that way.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, loaders: Sequence[Any], limits: Sequence[float],
        rate: float | None, memory: int,
    ) -> None:  # fmt: skip
        self.trainer, self.module = trainer, module
        self._room = Room(memory)
        self.samples = [Samples(loader, limit, rate, self._room) for loader, limit in zip(loaders, limits, strict=True)]
        self.replaying = memory > 0
        if self.replaying and trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
        self._prefixes: dict[Batch, Prefix] = {}
        self._masked = Masked({}, None)
        self._looks = Looks(module)
        self._step: FastForward | None = None
        tensors = (*module.parameters(), *module.buffers()) if self.replaying else ()
        self._lasting = {id(tensor): Lasting.of(tensor) for tensor in tensors}

    def metrics(self) -> dict[str, float]:
        """What the module logs, by the plain loop."""
        return evaluate(self.trainer, self.module, loaders=self.samples)

    def masked(self, cut: Cut) -> dict[str, float]:
        """The same with zeros where ``cut`` would take units away; see :meth:`prepare`."""
        with zeroed(self.module, cut):
            if self.replaying:
                self._masked.mask(cut)
                with contextlib.suppress(Diverged), calls_seen_by(self._called):
                    return evaluate(self.trainer, self.module, loaders=self.samples, call=self._replay)
                self._give_up("a step began in another way than before")
            return self.metrics()

    def order(self, masks: Mapping[str, Sequence[Tensor]]) -> list[str]:
        """The names of ``masks`` by when a step first reads one of their weights."""
        if not self.replaying:
            return list(masks)
        first = FirstReads()

        def watch(*step: Any) -> None:
            with first:
                call_step(*step)

        visit(self.trainer, self.module, self._one_batch(), watch)
        if self.trainer.strategy.reduce_boolean_decision(first.collective, all=False):
            self._give_up("its validation step talks to other processes")
        end = first.count + 1
        return sorted(masks, key=lambda name: min((first.at.get(a, end) for a in _addresses(masks[name])), default=end))

    def check(self, weights: Sequence[Tensor], cut: Cut, chain: Chain | None = None) -> None:
        """Compare one batch with the plain loop, while ``cut``, which touches ``weights``, is masked.

        What is not computed is full of NaN meanwhile, so that whoever reads it in secret is found out. ``weights`` had
        better be those that a step reads last: then everything before them is looked at.
        """
        if not self.replaying:
            return
        one = self._one_batch()
        self._prepare(one, weights, cut, chain)
        with zeroed(self.module, cut):
            plain = evaluate(self.trainer, self.module, loaders=one)
            self._masked.mask(cut)
            try:
                with calls_seen_by(self._called):
                    got = evaluate(self.trainer, self.module, loaders=one, call=self._poisoned)
            except Diverged:  # processes wait for each other at the end of an evaluation
                got = dict.fromkeys(evaluate(self.trainer, self.module, loaders=one), float("nan"))
        self._forget()
        if not self.trainer.strategy.reduce_boolean_decision(repr(got) == repr(plain)):
            self._give_up("it gives other results on a batch of its data")

    def prepare(self, weights: Sequence[Tensor], cut: Cut, chain: Chain | None = None) -> None:
        """Compute once what each step does before it reads one of ``weights``, from where the last call ended on.

        Args:
            weights: what is to be masked.
            cut: the largest mask there will be.
            chain: as long as it lasts the step is computed once, too, even if it reads ``weights``.
        """
        if self.replaying:
            self._prepare([sample.kept for sample in self.samples], weights, cut, chain)

    def _prepare(
        self, loaders: Sequence[Sequence[Any]], weights: Sequence[Tensor], cut: Cut, chain: Chain | None
    ) -> None:
        self._masked = Masked({}, None)  # its copies go before new ones come
        constants = self._masked_units(weights, cut, chain) if chain else None
        chain, until = chain if constants else None, _addresses(weights)

        def note(step: Any, batch: Any, batch_index: int, loader_index: int) -> None:
            start = self._prefixes.pop((loader_index, batch_index), NOTHING)
            self._room.left += start.bytes
            noted = self._noted(start, until, self._room.left, (step, batch, batch_index, loader_index), chain)
            covered = noted is None or constants is None or constants.cover(noted)
            if noted is not None and covered and self._room.take(noted.bytes):
                self._prefixes[loader_index, batch_index] = noted

        with calls_seen_by(self._called):
            visit(self.trainer, self.module, loaders, note)
        self._masked = Masked(self._prefixes, constants)

    def _masked_units(self, weights: Sequence[Tensor], cut: Cut, chain: Chain) -> Constants | None:
        """What masked units are at the end of ``chain``, by one batch."""
        found: list[Constants | None] = [None]

        def look(step: Any, batch: Any, batch_index: int, loader_index: int) -> None:
            start = self._prefixes.get((loader_index, batch_index), NOTHING)
            call = (step, batch, batch_index, loader_index)
            noted = self._noted(start, _addresses(weights), self._room.left, call, chain)
            found[0] = Constants.found(chain, cut, noted) if noted else None

        with zeroed(self.module, cut), calls_seen_by(self._called):
            visit(self.trainer, self.module, self._one_batch(), look)
        return found[0]

    def _noted(
        self, start: Prefix, until: set[int], room: int, call: tuple[Any, Any, int, int], chain: Chain | None
    ) -> Prefix | None:
        start = NOTHING if start.reads(until) else start
        run = Noting(start, self._lasting, self._looks, until, room, chain)
        # Diverged: this batch is to run whole
        with contextlib.suppress(Stop, Diverged), self._running(run):
            call_step(*call)
        return run.noted

    def _replay(self, step: Any, batch: Any, batch_index: int, loader_index: int, poisoned: bool = False) -> Any:
        prefix = self._masked.prefixes.get((loader_index, batch_index))
        if prefix is None:
            return call_step(step, batch, batch_index, loader_index)
        with self._running(FastForward(prefix, self._lasting, poisoned)):
            return call_step(step, batch, batch_index, loader_index)

    @contextlib.contextmanager
    def _running(self, step: FastForward) -> Iterator[None]:
        self._step = step
        try:
            with step.running():
                yield
        finally:
            self._step = None

    def _called(self, call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self._step is None or self._step.left:
            return call(module, *args, **kwargs)
        return self._step.called(call, module, args, kwargs)

    def _poisoned(self, step: Any, batch: Any, batch_index: int, loader_index: int) -> Any:
        return self._replay(step, batch, batch_index, loader_index, poisoned=True)

    def _one_batch(self) -> list[Sequence[Any]]:
        """Loaders of which the first that has any has one batch."""
        first = next((i for i, sample in enumerate(self.samples) if sample.kept), 0)
        return [Copies(sample.kept[:1]) if i == first else [] for i, sample in enumerate(self.samples)]

    def _forget(self) -> None:
        self._room.left += sum(prefix.bytes for prefix in self._prefixes.values())
        self._prefixes.clear()
        self._masked = Masked({}, None)

    def _give_up(self, reason: str) -> None:
        self.replaying = False
        self._forget()
        rank_zero_info(f"sensitivity: every step of {type(self.module).__name__} is computed whole: {reason}")


def _addresses(tensors: Sequence[Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors}
