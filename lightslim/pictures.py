"""Pictures, where matplotlib is installed: as a file, or as pixels for a logger."""

import importlib.util
from pathlib import Path
from typing import Any

from lightslim.errors import CompressionError
from lightslim.files import replacing


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def check_can_draw() -> None:
    """Ask for matplotlib.

    Raises:
        CompressionError: it is not installed.
    """
    if not can_draw():
        raise CompressionError("a picture needs matplotlib: pip install matplotlib")


def pixels(figure: Any) -> Any:
    """A matplotlib figure as an array of bytes, height x width x 3."""
    import numpy
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return numpy.asarray(canvas.buffer_rgba())[..., :3].copy()


def save(figure: Any, path: Path) -> None:
    """Write a matplotlib figure, whole or not at all; the suffix names the format.

    Raises:
        CompressionError: the file cannot be written, or matplotlib does not know the format.
    """
    known = figure.canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise CompressionError(f"{path}: pictures are written as {', '.join(sorted(known))}")
    with replacing(path) as partial:
        figure.savefig(partial)
