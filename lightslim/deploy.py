"""From a running fit to files: write the module in a format and measure the file, not the module, on the data."""

import copy
import inspect
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils import _pytree as pytree

from lightslim.errors import CompressionError
from lightslim.files import check_writable
from lightslim.infit import evaluate, probe_of
from lightslim.registry import registry
from lightslim.steps import replaced


def write(
    trainer: Trainer, module: LightningModule, format_: str, path: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Write ``module`` as it is now, run the file on the validation data, and say what came of it.

    Rank 0 writes. The file is written whole or not at all.

    Args:
        trainer: runs the module; relative paths start at its ``default_root_dir``.
        module: compressed, its fake quantization in place.
        format_: name of an exporter.
        path: of the file.
        options: for the exporter.

    Returns:
        ``path``, ``bytes``, ``max_abs_diff`` and the rest of the manifest, and ``metrics``: what ``validation_step``
        logs when the file computes in the place of ``forward``; none for a part of the model.

    Raises:
        CompressionError: whatever :func:`lightslim.export.export` raises, or the module's steps never call ``forward``.
    """
    exporter, target = registry().get("exporter", format_), target_of(trainer, path)
    inputs = forward_inputs(trainer, module)
    manifest: dict[str, Any] = {}
    if trainer.is_global_zero:
        target.parent.mkdir(parents=True, exist_ok=True)
        manifest = exporter(module, inputs, target, **options)
    manifest = trainer.strategy.broadcast(manifest)
    whole = not {"save_in_nodes", "save_out_nodes"} & options.keys()
    metrics = measured(trainer, module, exporter.open(target, model=copy.deepcopy(module))) if whole else {}
    return {"path": str(target), **manifest, "metrics": metrics}


def target_of(trainer: Trainer, path: str) -> Path:
    """Where a file goes: relative paths start at the run directory."""
    return Path(trainer.default_root_dir) / path


def forward_inputs(trainer: Trainer, module: LightningModule) -> tuple[Any, ...] | dict[str, Any]:
    """The arguments with which the module's own step calls its ``forward`` on a few samples.

    Returns:
        A tuple of them; a dict by name where ``forward`` takes some by keyword only.

    Raises:
        CompressionError: it never does, so nothing says what a file would have to compute.
    """
    calls: list[inspect.BoundArguments] = []
    forward = module.forward

    def spy(*arguments: Any, **options: Any) -> Any:
        calls.append(inspect.signature(forward).bind(*arguments, **options))
        return forward(*arguments, **options)

    probe = probe_of(trainer, module)
    with replaced(module, forward=spy):
        probe.run()
    if not calls:
        raise CompressionError(
            f"{type(module).__name__}'s steps never call its forward: a file holds what forward computes, so call "
            "self(...) in validation_step"
        )
    return dict(calls[0].arguments) if calls[0].kwargs else calls[0].args


def measured(trainer: Trainer, module: LightningModule, run: Any) -> dict[str, float]:
    """The validation metrics with ``run``, an opened file, in the place of the module's ``forward``."""
    forward, signature = module.forward, inspect.signature(module.forward)
    structure: list[Any] = []

    def by_file(*arguments: Any, **options: Any) -> Any:
        if not structure:
            # How forward packs its outputs: a file only knows their order
            structure.append(pytree.tree_flatten(forward(*arguments, **options))[1])
        given = signature.bind(*arguments, **options).arguments
        tensors = [leaf.detach().float().cpu() if leaf.is_floating_point() else leaf.cpu()
                   for leaf in pytree.tree_leaves(dict(given)) if isinstance(leaf, Tensor)]  # fmt: skip
        return pytree.tree_unflatten([out.to(module.device) for out in run(*tensors)], structure[0])

    with replaced(module, forward=by_file):
        return evaluate(trainer, module)


def rehearse(
    trainer: Trainer,
    module: LightningModule,
    inputs: Any,
    formats: Mapping[str, Mapping[str, Any]],
    paths: Sequence[str],
) -> None:
    """Write ``module`` in each format to nowhere, so that what cannot be written is known before the training.

    Args:
        trainer: knows the run directory.
        module: a stand-in for what will be written.
        inputs: for its ``forward``, from :func:`forward_inputs`.
        formats: names of exporters, each with its options.
        paths: where the files will go.

    Raises:
        CompressionError: whatever :func:`write` would raise.
    """
    if trainer.is_global_zero:
        for path in paths:
            check_writable(target_of(trainer, path))
    with tempfile.TemporaryDirectory() as folder:
        for format_, options in formats.items():
            registry().get("exporter", format_)(module, inputs, Path(folder) / format_, **options)
