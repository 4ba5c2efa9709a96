"""What of a model goes into a file: which inputs and outputs, cut where the user says."""

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from lightslim.errors import CompressionError, did_you_mean


@dataclass(frozen=True)
class Program:
    """A module that takes ``inputs`` by position and returns what the file is to return."""

    module: nn.Module
    inputs: tuple[Tensor, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    outputs: tuple[Tensor, ...]


def program_of(
    model: nn.Module, example_inputs: Any, ins: Sequence[str] | None = None, outs: Sequence[str] | None = None
) -> Program:
    """Run ``model`` once and say what goes in and what comes out.

    Args:
        model: in evaluation mode.
        example_inputs: a tensor, a tuple of them, or a dict by the names that ``forward`` has for them.
        ins: where the program begins: inputs of ``forward``, or submodules, whose outputs become inputs.
        outs: where it ends: submodules, whose outputs it returns.

    Raises:
        CompressionError: a name that is not there, or a cut that leaves something out that is needed.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> program = program_of(net, torch.zeros(1, 4), ins=["0"], outs=["2"])
        >>> program.inputs[0].shape, program.outputs[0].shape, program.input_names
        (torch.Size([1, 3]), torch.Size([1, 2]), ('0',))
    """
    given = _by_name(model, example_inputs)
    if ins is None and outs is None and not isinstance(example_inputs, Mapping):
        return _whole(model, given)
    return _cut(model, given, list(given) if ins is None else list(ins), outs)


def _by_name(model: nn.Module, example_inputs: Any) -> dict[str, Tensor]:
    if isinstance(example_inputs, Mapping):
        given = dict(example_inputs)
    else:
        values = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
        names = _input_names(model)
        names += [f"input_{index}" for index in range(len(names), len(values))]
        given = dict(zip(names, values, strict=False))
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise CompressionError(f"the example input {name!r} is a {type(value).__name__}, not a tensor")
    return given


def _input_names(model: nn.Module) -> list[str]:
    if isinstance(model, Part):
        return list(model.ins)
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _whole(model: nn.Module, given: Mapping[str, Tensor]) -> Program:
    inputs = tuple(given.values())
    names, outputs = _named(run(model, inputs))
    if isinstance(model, Part) and model.outs is not None and len(model.outs) == len(outputs):
        names = model.outs
    return Program(model, inputs, tuple(given), names, outputs)


@torch.no_grad()
def run(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """What ``model`` returns, without gradient.

    Raises:
        CompressionError: it does not run on ``inputs``.
    """
    try:
        return model(*inputs)
    except CompressionError:
        raise
    except Exception as error:
        raise CompressionError(f"the model does not run on the example inputs: {error}") from error


def flat(outputs: Any) -> tuple[Tensor, ...]:
    """The tensors in what a model returned, in order."""
    return _named(outputs)[1]


def _named(outputs: Any) -> tuple[tuple[str, ...], tuple[Tensor, ...]]:
    leaves = [(path, leaf) for path, leaf in pytree.tree_flatten_with_path(outputs)[0] if isinstance(leaf, Tensor)]
    if not leaves:
        raise CompressionError(f"the model returns no tensor but a {type(outputs).__name__}")
    names = tuple("_".join(["output"] * (not _keyed(path)) + [_key(step) for step in path]) for path, _ in leaves)
    return names, tuple(leaf for _, leaf in leaves)


def _keyed(path: Sequence[Any]) -> bool:
    return bool(path) and isinstance(path[0], pytree.MappingKey)


def _key(step: Any) -> str:
    return str(getattr(step, "key", getattr(step, "idx", getattr(step, "name", step))))


def _cut(model: nn.Module, given: Mapping[str, Tensor], ins: Sequence[str], outs: Sequence[str] | None) -> Program:
    modules = {name: child for name, child in model.named_modules() if name}
    _check(ins, [*given, *modules], "save_in_nodes")
    _check(outs or (), modules, "save_out_nodes")
    values = {**given, **_outputs_of({name: modules[name] for name in ins if name not in given}, model, given)}
    part = Part(model, given, ins, outs)
    program = _whole(part, {name: values[name] for name in ins})
    part.change_what_is_given()
    if any(not torch.equal(a, b) for a, b in zip(program.outputs, flat(run(part, program.inputs)), strict=True)):
        raise CompressionError(f"save_in_nodes: what is asked for needs more than {', '.join(ins)}")
    return program


def _check(names: Sequence[str], known: Any, argument: str) -> None:
    for name in names:
        if name not in known:
            raise CompressionError(f"{argument}: there is no {name!r}; {did_you_mean(name, known)}")


def _outputs_of(modules: Mapping[str, nn.Module], model: nn.Module, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What each of ``modules`` returns when the model runs as a whole."""
    if not modules:
        return {}
    caught = run(Part(model, given, list(given), list(modules)), tuple(given.values()))
    for name, value in zip(modules, caught, strict=True):
        if not isinstance(value, Tensor):
            raise CompressionError(f"save_in_nodes: {name!r} returns a {type(value).__name__}, not a tensor")
    return dict(zip(modules, caught, strict=True))


class _AllCaught(Exception):
    """What follows is not asked for, and may not even run on what the cut leaves."""


class Part(nn.Module):
    """``model`` between some of its inputs or submodules' outputs and others.

    Args:
        model: the whole.
        given: the example inputs of its ``forward``, which stand in where they are not in ``ins``.
        ins: what ``forward`` here takes, in order.
        outs: the submodules whose first outputs it returns; None for what the model returns.
    """

    def __init__(
        self, model: nn.Module, given: Mapping[str, Tensor], ins: Sequence[str], outs: Sequence[str] | None
    ) -> None:
        super().__init__()
        self.model, self.training = model, model.training
        self.names, self.ins = tuple(given), tuple(ins)
        self.outs = None if outs is None else tuple(outs)
        for name, value in given.items():
            self.register_buffer(f"given_{name}", value.clone(), persistent=False)

    def change_what_is_given(self) -> None:
        """Nothing may depend on what only stands in for an input."""
        for name in self.names:
            value = self.get_buffer(f"given_{name}")
            setattr(self, f"given_{name}", ~value if value.dtype == torch.bool else value + 1)

    def forward(self, *inputs: Tensor) -> Any:
        """What ``outs`` return, or the model."""
        values = dict(zip(self.ins, inputs, strict=True))
        call = {name: values.get(name, self.get_buffer(f"given_{name}")) for name in self.names}
        caught: dict[str, Any] = {}
        with contextlib.ExitStack() as stack:
            for name in (name for name in self.ins if name not in call):
                stack.callback(self._hook(name, _returning(values[name])).remove)
            for name in self.outs or ():
                stack.callback(self._hook(name, _catching(caught, name, len(self.outs or ()))).remove)
            with contextlib.suppress(_AllCaught):
                returned = self.model(**call)
        return self._caught(caught) if self.outs is not None else returned

    def _hook(self, name: str, hook: Any) -> RemovableHandle:
        return self.model.get_submodule(name).register_forward_hook(hook)

    def _caught(self, caught: Mapping[str, Any]) -> tuple[Any, ...]:
        silent = next((name for name in self.outs or () if name not in caught), None)
        if silent is not None:
            raise CompressionError(f"{silent!r} is never called when the model runs")
        return tuple(caught[name] for name in self.outs or ())


def _returning(value: Tensor) -> Callable[..., Tensor]:
    return lambda _module, _arguments, _output: value


def _catching(caught: dict[str, Any], name: str, wanted: int) -> Callable[..., None]:
    def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
        caught.setdefault(name, output)
        # torch.export wants each module left in order; it drops what nothing reads
        if len(caught) == wanted and not torch.compiler.is_compiling():
            raise _AllCaught

    return hook
