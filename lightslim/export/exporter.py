"""What a file format is: how a file is written, how it is run again, and what must be installed for that."""

import copy
import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightslim.errors import CompressionError, did_you_mean
from lightslim.export.compare import differences
from lightslim.export.files import write_manifest
from lightslim.export.manifest import describe
from lightslim.export.program import Program, flat, program_of
from lightslim.files import replacing
from lightslim.surgery import cuts_of

CUTS = ("save_in_nodes", "save_out_nodes")
FAR = 0.1
"""Share of the norm of an output: other kernels move codes by one, but no output by so much."""

# What `open` returns: the file, loaded once, as a function from inputs to outputs.
Run = Callable[..., Sequence[Tensor]]


class Opens(Protocol):
    """Loads a file into its runtime."""

    def __call__(self, path: Path, model: nn.Module | None = None, threads: int | None = None) -> Run:
        """The file as a function.

        Args:
            path: the file.
            model: for formats that hold weights only; others do without.
            threads: how many the runtime uses; None for its own choice.

        Raises:
            CompressionError: the file is missing, damaged or foreign.
        """


@dataclass(eq=False)
class Exporter:
    """A file format, named and described after its ``write`` function.

    Args:
        write: ``write(model, example_inputs, path, **options)`` writes the one file ``path`` and returns nothing. The
            model is a copy in evaluation mode, on the CPU, with its fake quantization in place; it belongs to the
            function. ``example_inputs`` are tensors that it takes by position. Each option is a parameter that can
            only be given by keyword and has a default.
        open: loads a file into the runtime it is meant for, see :class:`Opens`.
        modules: what both need to import; the first is the one that runs the file.
        pip: how to get them, as it follows ``pip install``.
        cuts: whether a part of the model can be written; not so for formats that hold weights only.
        name: what to call it; None for the name of ``write``.
        rounds: whether the file rounds and clips what the model does, and so ought to give the same.

    Example:
        >>> def ternary(model, example_inputs, path, *, threshold: float = 0.7) -> None:
        ...     "Three values a weight."
        >>> exporter = Exporter(ternary, open=print, modules=("tern",), pip="tern-runtime")
        >>> exporter.check_available()
        Traceback (most recent call last):
            ...
        lightslim.errors.CompressionError: writing 'ternary' files needs tern: pip install 'tern-runtime'
    """

    write: Callable[..., None]
    open: Opens
    modules: tuple[str, ...] = ()
    pip: str = ""
    cuts: bool = True
    name: str = ""
    rounds: bool = True

    def __post_init__(self) -> None:
        functools.update_wrapper(self, self.write)
        self.name = self.__name__ = self.name or self.write.__name__

    def check_available(self) -> None:
        """Raise unless everything needed is installed.

        Raises:
            CompressionError: with the line that installs it.
        """
        missing = [module for module in self.modules if importlib.util.find_spec(module) is None]
        if missing:
            needed = " and ".join(missing)
            raise CompressionError(f"writing {self.name!r} files needs {needed}: pip install '{self.pip}'")

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise unless each of ``options`` is one of this format.

        Raises:
            CompressionError: naming the one that is not, and the nearest that is.
        """
        known = [*(self.write.__kwdefaults__ or ()), *(CUTS if self.cuts else ())]
        for option in options:
            if option not in known:
                raise CompressionError(f"{self.name!r} files have no option {option!r}; {did_you_mean(option, known)}")

    def versions(self) -> dict[str, str]:
        """The version of each of ``modules``."""
        return {module: _version(module) for module in self.modules}

    def __call__(
        self, model: nn.Module, example_inputs: Any, path: str | PathLike[str], **options: Any
    ) -> dict[str, Any]:
        """Write ``path`` whole or not at all, run it, and write down beside it what it is; see :func:`export`."""
        path = Path(path)
        self.check_available()
        self.check_options(options)
        if path.is_dir():
            raise CompressionError(f"{path} is a folder: name a file")
        program = _program(model, example_inputs, options)
        of_write = {key: value for key, value in options.items() if key not in CUTS}
        with replacing(path) as partial:
            self.write(copy.deepcopy(program.module), program.inputs, partial, **of_write)
            found = differences(flat(self.open(partial, model=program.module)(*program.inputs)), program.outputs)
            manifest = {**describe(self.name, self.versions(), program, partial, options), **found}
        write_manifest(path, manifest)
        if self.rounds and found["rel_diff"] > FAR:
            rank_zero_warn(
                f"{path}: the outputs of the {self.name!r} file are off by {found['rel_diff']:.0%} on the example "
                "inputs: do not use it without measuring"
            )
        return manifest


def _program(model: nn.Module, example_inputs: Any, options: Mapping[str, Any]) -> Program:
    copied = copy.deepcopy(model).cpu().eval()
    cuts_of(copied).extend(cuts_of(model))
    inputs = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), example_inputs)
    return program_of(copied, inputs, *(options.get(name) for name in CUTS))


def _version(module: str) -> str:
    try:
        return version(module)
    except PackageNotFoundError:  # the distribution has another name, as onnxruntime-gpu
        return version(packages_distributions()[module][0])
