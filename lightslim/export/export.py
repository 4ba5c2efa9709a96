"""From a model to a file that a runtime opens."""

from os import PathLike
from typing import Any

from torch import nn

from lightslim.registry import registry


def export(
    model: nn.Module, example_inputs: Any, path: str | PathLike[str], format: str = "float", **options: Any
) -> dict[str, Any]:
    """Write a model to ``path``, run the file in its runtime and compare it with the model.

    Args:
        model: any module, quantized or not, in whatever mode and on whatever device: a copy is exported, in evaluation
            mode, its fake quantization included.
        example_inputs: a tensor, a tuple of them, or a dict by the names that ``forward`` has for them.
        path: the file; it is replaced when the new one is complete and has run, not before.
        format: the name of a registered exporter: ``float``, ``int8``, ...
        **options: of that exporter; those that hold a whole program take ``save_in_nodes`` and ``save_out_nodes``,
            names of inputs or submodules at which it begins and ends.

    Returns:
        The manifest, also written to ``path`` + ``.json``: versions, inputs, outputs, ``bytes``, and how far the file's
        outputs are from the model's on the example inputs: ``max_abs_diff``, ``rel_diff`` (of the norms) and
        ``argmax_differs`` of ``argmax_of`` predictions. A tenth of the norm is warned of, but for float formats.

    Raises:
        CompressionError: a format or an option that there is not, something that is not installed, a model that does
            not fit the format, or a file that cannot be written; what ``path`` held before is still there then.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> path = Path(tempfile.mkdtemp()) / "net.pt"
        >>> manifest = export(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4), path, format="float")
        >>> manifest["outputs"], manifest["max_abs_diff"]
        (['output'], 0.0)
    """
    exporter = registry().get("exporter", format)
    manifest: dict[str, Any] = exporter(model, example_inputs, path, **options)
    return manifest


def check_available(format: str) -> None:
    """Raise unless everything that ``format`` needs is installed: a strategy asks before the training.

    Raises:
        CompressionError: there is no such format, or something is missing; says how to install it.
    """
    registry().get("exporter", format).check_available()
