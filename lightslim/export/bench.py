"""How long exported files take, measured in the runtimes that they are meant for, one beside the other."""

import hashlib
import json
import platform
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightslim.errors import CompressionError
from lightslim.export.exporter import Run
from lightslim.registry import registry
from lightslim.tables import table

FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm")
"""What decides whether integers are fast on a CPU."""


def bench(
    paths: Sequence[str | PathLike[str]], rounds: int = 50, threads: int | None = None, batch: int | None = None
) -> list[dict[str, Any]]:
    """Time exported files on random inputs, in an order drawn anew for each round, so that a drift meets all alike.

    Args:
        paths: files with their manifests beside them.
        rounds: how often each runs; the first tenth, at least one, is thrown away.
        threads: of each runtime; None for torch's number.
        batch: samples in an input; None for one.

    Returns:
        For each file ``path``, ``format``, ``runtime``, ``bytes``, and in milliseconds ``median``, ``p10``, ``p90``.

    Raises:
        CompressionError: a file without a manifest, a damaged or foreign one, or a runtime that is not installed.

    Example:
        >>> import tempfile
        >>> from lightslim.export import export
        >>> path = Path(tempfile.mkdtemp()) / "net.onnx"
        >>> _ = export(torch.nn.Linear(4, 3), torch.zeros(1, 4), path, format="onnx")
        >>> bench([path], rounds=3)[0]["runtime"]
        'onnxruntime'
    """
    if rounds < 2:
        raise CompressionError(f"rounds is {rounds}; it takes 2 or more")
    threads = threads or torch.get_num_threads()
    manifests = [read_manifest(Path(path)) for path in paths]
    runs = [_opened(Path(path), manifest, threads) for path, manifest in zip(paths, manifests, strict=True)]
    inputs = [random_inputs(manifest, batch or 1) for manifest in manifests]
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for index in random.sample(range(len(runs)), len(runs)):
            start = time.perf_counter()
            runs[index](*inputs[index])
            seconds[index].append(time.perf_counter() - start)
    return [
        {
            "path": str(path), "format": manifest["format"], "runtime": _runtime(manifest), "bytes": manifest["bytes"],
            **_spread(times[max(1, rounds // 10) :]),
        }
        for path, manifest, times in zip(paths, manifests, seconds, strict=True)
    ]  # fmt: skip


def report(found: Sequence[Mapping[str, Any]], threads: int, batch: int) -> str:
    """What :func:`bench` found, as a table, with the machine it was found on; ratios are to the first file."""
    first = found[0]
    rows = [
        (one["path"], one["format"], one["runtime"], f"{one['bytes']:,}", f"{one['median']:.3f}",
         f"{one['p10']:.3f} .. {one['p90']:.3f}", f"{first['median'] / one['median']:.2f}",
         f"{first['bytes'] / one['bytes']:.2f}")
        for one in found
    ]  # fmt: skip
    columns = ("file", "format", "runtime", "bytes", "median ms", "p10 .. p90", "times faster", "times smaller")
    return f"{table(columns, rows, left=3)}\n{machine()}, {threads} threads, batch {batch}"


def machine() -> str:
    """The CPU and those of its features that matter to integers."""
    name, flags = platform.processor() or platform.machine(), set[str]()
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        if key.strip() in ("flags", "Features"):
            flags |= set(value.split())
    return f"{name} ({', '.join(feature for feature in FEATURES if feature in flags) or 'no known features'})"


def read_manifest(path: Path) -> dict[str, Any]:
    """What was written down beside an exported file.

    Raises:
        CompressionError: there is no such file or no manifest, or it is damaged.
    """
    beside = path.with_name(path.name + ".json")
    if not path.is_file():
        raise CompressionError(f"{path}: there is no such file")
    try:
        manifest = json.loads(beside.read_text(encoding="utf-8"))
        expected = manifest["format"], manifest["inputs"], manifest["bytes"], manifest["sha256"]
    except FileNotFoundError:
        raise CompressionError(f"{path} has no {beside.name} beside it: it was not exported by lightslim") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CompressionError(f"{beside} is not the manifest of an exported file: {error}") from error
    if hashlib.sha256(path.read_bytes()).hexdigest() != expected[-1]:
        raise CompressionError(f"{path} is not the file that {beside.name} describes: damaged, or written by another")
    return dict(manifest)


def random_inputs(manifest: Mapping[str, Any], batch: int) -> tuple[Tensor, ...]:
    """Inputs of the shapes and types that the file takes; dimension 0 counts the samples.

    Example:
        >>> manifest = {"inputs": {"x": {"shape": [8, 3], "dtype": "float32"}}}
        >>> random_inputs(manifest, batch=2)[0].shape
        torch.Size([2, 3])
    """
    fixed = manifest.get("options", {}).get("dynamic_batch") is False

    def one(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = list(shape) if fixed or not shape else [batch, *shape[1:]]
        return torch.rand(size, dtype=dtype) if dtype.is_floating_point else torch.zeros(size, dtype=dtype)

    return tuple(one(spec["shape"], getattr(torch, spec["dtype"])) for spec in manifest["inputs"].values())


def _opened(path: Path, manifest: Mapping[str, Any], threads: int) -> Run:
    exporter = registry().get("exporter", manifest["format"])
    exporter.check_available()
    run: Run = exporter.open(path, threads=threads)
    return run


def _runtime(manifest: Mapping[str, Any]) -> str:
    modules = registry().get("exporter", manifest["format"]).modules
    return str(modules[0]) if modules else "torch"


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(1e3 * value for value in seconds)
    at = [ordered[round(share * (len(ordered) - 1))] for share in (0.1, 0.9)]
    return {"median": statistics.median(ordered), "p10": at[0], "p90": at[1]}
