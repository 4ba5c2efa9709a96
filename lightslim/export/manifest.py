"""What is known about an exported file: from what it was made, what it takes, and how near it comes to the model."""

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightslim.export.program import Program


def describe(
    format_: str, runtimes: Mapping[str, str], program: Program, path: Path, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Plain values only, for JSON.

    Args:
        format_: the name of the exporter.
        runtimes: modules that write and run the file, with their versions.
        program: what was written.
        path: the file.
        options: what was asked for.
    """
    content = path.read_bytes()
    return {
        "format": format_,
        "options": {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()},
        "versions": {name: version(name) for name in ("lightslim", "torch")} | dict(runtimes),
        "inputs": {
            name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
            for name, tensor in zip(program.input_names, program.inputs, strict=True)
        },
        "outputs": list(program.output_names),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
