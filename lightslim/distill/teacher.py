"""A teacher: a frozen network beside the student, which answers once for each batch."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn

from lightslim.distill.cache import Arguments, Cache, fingerprint
from lightslim.distill.spots import Spot, Tap, Watch
from lightslim.errors import CompressionError


def check_apart(name: str, teacher: nn.Module, student: nn.Module) -> None:
    """Raise if ``teacher`` is no network, or has parameters in common with ``student``, which could not learn then."""
    if not isinstance(teacher, nn.Module):
        raise CompressionError(f"{name} is a {type(teacher).__name__}; a teacher is a module, or 'self'")
    own = {id(parameter): path for path, parameter in student.named_parameters()}
    shared = next((own[id(parameter)] for parameter in teacher.parameters() if id(parameter) in own), None)
    if teacher is student or shared is not None:
        raise CompressionError(
            f"{name} and the student share {shared or 'everything'}: give a copy, or 'self' to have one made; a "
            "teacher that lies inside the student's module must be taken out"
        )


class Teacher:
    """Runs a network without gradients, in evaluation mode, and keeps what passes some spots.

    The network is lent: what :meth:`enter` changes of it, :meth:`leave` puts back.

    Args:
        name: for messages.
        network: trained.
        spots: where to look in it.
    """

    def __init__(self, name: str, network: nn.Module, spots: Sequence[Spot]) -> None:
        self.name, self.lent = name, network
        self.network = network
        self.watch = Watch(network, [Tap(spot) for spot in spots])
        self.cache: Cache | None = None
        self._before: list[tuple[Any, str, Any]] = []
        self._home = torch.device("cpu")

    def enter(self, trainer: Trainer, module: LightningModule) -> None:
        """Freeze, convert and move the network to where the student is, and start to watch it."""
        self._home = next((tensor.device for tensor in self.lent.state_dict().values()), self._home)
        self._before = [(p, "requires_grad", p.requires_grad) for p in self.lent.parameters()]
        self._before += [(child, "training", child.training) for child in self.lent.modules()]
        plugin = trainer.precision_plugin
        # A conversion to half precision loses what the user's own object knows
        converts = plugin.precision.endswith("-true") and not plugin.precision.startswith("32")
        network = plugin.convert_module(copy.deepcopy(self.lent)) if converts else self.lent
        self.network = self.watch.network = network.to(module.device).eval().requires_grad_(False)
        self.watch.attach()

    def leave(self) -> None:
        """Give the network back as it was."""
        self.watch.detach()
        for owner, attribute, value in self._before:
            setattr(owner, attribute, value)
        if self._before:
            self.lent.to(self._home)
        self.network = self.lent
        self._before = []

    def answer(self, arguments: Arguments) -> list[Tensor]:
        """What passes the spots when the network is called with ``arguments``.

        Raises:
            CompressionError: a spot is not reached.
        """
        if self.cache is None:
            return self._computed(arguments)
        return self.cache.get(arguments, lambda: self._computed(arguments))

    def _computed(self, arguments: Arguments) -> list[Tensor]:
        args, options = arguments
        watch = self.watch
        watch.clear()
        if self.network.training:
            self.network.eval()
        watch.on = True
        try:
            with torch.no_grad():
                watch.whole_call(args, dict(options))
                watch.whole_result(self.network(*args, **options))
            return [tap.value() for tap in watch.taps]
        finally:
            watch.on = False

    def remember(self, folder: Path, most: int, precision: str) -> None:
        """Keep answers on disk; call it after :meth:`enter`."""
        spots = [(tap.spot.path, tap.spot.side, tap.spot.call, tap.spot.index) for tap in self.watch.taps]
        self.cache = Cache(folder, most, f"{fingerprint(self.network)}{spots}{precision}")

    def rehearsed(self, arguments: Arguments) -> list[Tensor]:
        """Answer for the first time, and find out what has to be copied because it is overwritten later.

        Raises:
            CompressionError: it cannot answer, or it is not clear with what.
        """
        try:
            self._computed(arguments)
            for tap in self.watch.taps:
                tap.check_calls()
                tap.copies = tap.copies or tap.spoiled
            return self._computed(arguments)
        except CompressionError:
            raise
        except Exception as error:  # whatever a network does that gets what it cannot take
            shapes = [tuple(x.shape) for x in arguments[0] if isinstance(x, Tensor)]
            raise CompressionError(
                f"{self.name} cannot be called as the student is, with {shapes}: {type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else ''}; teacher_input says which call to take after"
            ) from error
