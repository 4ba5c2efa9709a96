"""The zoo: what each method makes of each network, from finished runs: ``python -m experiments.zoo RUNS_DIR``.

Every folder below with a ``result.json`` is one run; its resolved recipe says what was done to which network. The table
goes into README.md, between its two markers. ``zoo.sh`` produces the runs.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments.bench.table import markdown
from lightslim.errors import CompressionError
from lightslim.export.bench import bench, machine
from lightslim.rundir import RECIPE, RESULT, read_result

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- zoo: begin; python -m experiments.zoo writes it -->", "<!-- zoo: end -->"
COLUMNS = (
    "network", "method", "seeds", "accuracy %", "FLOPs", "parameters", "bytes", "int8 bytes", "float ms", "int8 ms",
    "on ImageNet, published",
)  # fmt: skip
FILES = ("float", "int8")
NETWORKS = {"mobilenet_v1": "MobileNet V1", "mobilenet_v2": "MobileNet V2", "resnet20": "ResNet-20"}
BOTH, CHANNELS = "QAT, both abs_max", "QAT, channel-wise and moving average"
MOVING = "QAT, abs_max and moving average"
METHODS = (
    "baseline", "uniform -50 %", "uniform -60 %", "uniform -70 %", "sensitive -50 %", BOTH, MOVING, CHANNELS,
    "distillation", f"uniform -50 % + {CHANNELS}", f"distillation + {CHANNELS}",
)  # fmt: skip
PUBLISHED = {
    ("mobilenet_v1", "baseline"): "70.91",
    ("mobilenet_v1", "uniform -50 %"): "70.91 -> 69.83",
    ("mobilenet_v1", "uniform -60 %"): "70.91 -> 68.24",
    ("mobilenet_v1", "uniform -70 %"): "70.91 -> 66.57",
    ("mobilenet_v1", "sensitive -50 %"): "70.91 -> 68.68",
    ("mobilenet_v1", BOTH): "70.92 -> 71.01",
    ("mobilenet_v1", MOVING): "70.92 -> 70.84",
    ("mobilenet_v1", CHANNELS): "70.92 -> 71.00, inputs abs_max",
    ("mobilenet_v1", "distillation"): "70.91 -> 71.97, from ResNet-50",
    ("mobilenet_v1", f"uniform -50 % + {CHANNELS}"): "70.91 -> 69.70 (later 69.20), both abs_max",
    ("mobilenet_v1", f"distillation + {CHANNELS}"): "70.91 -> 72.08 (later 72.01)",
    ("mobilenet_v2", "baseline"): "72.15",
    ("mobilenet_v2", "uniform -50 %"): "72.15 -> 65.79",
    ("mobilenet_v2", CHANNELS): "72.15 -> 72.05",
    ("mobilenet_v2", "distillation"): "72.15 -> 70.66 (later 74.28)",
    ("resnet20", "uniform -50 %"): "ResNet-34: 74.57 -> 70.99",
    ("resnet20", BOTH): "ResNet-50: 76.35 -> 76.61",
    ("resnet20", MOVING): "ResNet-50: 76.35 -> 76.46",
    ("resnet20", CHANNELS): "ResNet-50: 76.35 -> 76.73, inputs abs_max",
    ("resnet20", "distillation"): "ResNet-50: 76.50 -> 77.29, from ResNet-101",
}


@dataclass(frozen=True)
class Run:
    """One finished run, and what it is an instance of."""

    folder: Path
    network: str
    method: str
    seed: int
    result: Mapping[str, Any]


def find(folder: Path, metric: str = "val_acc") -> list[Run]:
    """The finished runs below ``folder`` that belong into the table; the others are named.

    Raises:
        CompressionError: a damaged result, or two runs of one method with one seed.
    """
    found: dict[tuple[str, str, int], Run] = {}
    for path in sorted(folder.rglob(RESULT)):
        result, recipe = read_result(path.parent), yaml.safe_load((path.parent / RECIPE).read_text(encoding="utf-8"))
        network, method = recipe.get("model", {}).get("network"), method_of(recipe)
        fits = recipe.get("data", {}).get("class") == "experiments.data:FashionMNIST" and network in NETWORKS
        if not fits or method not in METHODS or metric not in result["after"]["metrics"]:
            print(f"left out: {path.parent}: {network}, {method}", file=sys.stderr)
            continue
        run = Run(path.parent, network, method, result["seed"], result)
        other = found.setdefault((network, method, run.seed), run)
        if other is not run:
            raise CompressionError(f"{run.folder} and {other.folder} are both {network}, {method}, seed {run.seed}")
    return list(found.values())


def method_of(recipe: Mapping[str, Any]) -> str:
    """What a recipe does to its network, in the words of the table.

    Example:
        >>> method_of({"strategies": {"a": {"class": "UniformPruneStrategy", "target_ratio": 0.6}},
        ...            "compressor": {"strategies": ["a"]}})
        'uniform -60 %'
    """
    strategies = [recipe["strategies"][name] for name in recipe["compressor"]["strategies"]]
    return " + ".join(map(_named, strategies)) or "baseline"


def _named(strategy: Mapping[str, Any]) -> str:
    ratio = f"-{100 * strategy.get('target_ratio', 0.5):.0f} %"
    ranges = [strategy.get(f"{of}_quantize_type", "abs_max") for of in ("weight", "activation")]
    quantized = {
        ("abs_max", "abs_max"): BOTH,
        ("abs_max", "moving_average_abs_max"): MOVING,
        ("channel_wise_abs_max", "moving_average_abs_max"): CHANNELS,
    }
    names = {
        "UniformPruneStrategy": f"uniform {ratio}",
        "SensitivePruneStrategy": f"sensitive {ratio}",
        "QuantizationStrategy": quantized.get(tuple(ranges), f"QAT, {' and '.join(ranges)}"),
        "DistillationStrategy": "distillation",
    }
    return names.get(strategy["class"], strategy["class"])


def latencies(runs: Sequence[Run], rounds: int = 50) -> dict[str, float]:
    """Milliseconds of one image in ONNX Runtime by file, one thread: all files together, so that all meet the same."""
    files = [path for run in runs for kind in FILES for path in (run.folder / "exports").glob(f"{kind}.onnx")]
    return {one["path"]: one["median"] for one in bench(files, rounds, threads=1)} if files else {}


def cells(network: str, method: str, runs: Sequence[Run], times: Mapping[str, float]) -> tuple[str, ...]:
    """One line of the table: means over the seeds, and the spread of the accuracy."""
    after = [run.result["after"] for run in runs]
    files = {kind: [path for run in runs if (path := run.folder / "exports" / f"{kind}.onnx").is_file()]
             for kind in FILES}  # fmt: skip
    return (
        NETWORKS[network], method, str(len(runs)), spread([100 * one["metrics"]["val_acc"] for one in after]),
        *(f"{statistics.mean(one[key] for one in after):,.0f}" for key in ("flops", "params", "bytes")),
        mean([path.stat().st_size for path in files["int8"]], ",.0f"),
        *(mean([times[str(path)] for path in paths if str(path) in times], ".3f") for paths in files.values()),
        PUBLISHED.get((network, method), ""),
    )  # fmt: skip


def mean(values: Sequence[float], form: str) -> str:
    """The mean as text; nothing where there is none."""
    return format(statistics.mean(values), form) if values else ""


def spread(values: Sequence[float]) -> str:
    """The mean and, of several, the least and the largest.

    Example:
        >>> spread([92.0, 92.5]), spread([92.0])
        ('92.25 (92.00 .. 92.50)', '92.00')
    """
    middle = f"{statistics.mean(values):.2f}"
    return f"{middle} ({min(values):.2f} .. {max(values):.2f})" if len(values) > 1 else middle


def table(runs: Sequence[Run], times: Mapping[str, float]) -> str:
    """The table, what is not in it for want of runs, and the machine."""
    of = {(network, method): [run for run in runs if (run.network, run.method) == (network, method)]
          for network in NETWORKS for method in METHODS}  # fmt: skip
    lines = [cells(*row, found, times) for row, found in of.items() if found]
    lacking = {network: [method for method in METHODS if not of[network, method]] for network in NETWORKS}
    missing = "; ".join(
        f"{NETWORKS[network]}: {'all' if len(methods) == len(METHODS) else ', '.join(methods)}"
        for network, methods in lacking.items()
        if methods
    )
    parts = [
        markdown(COLUMNS, lines, left=2) if lines else "",
        f"No runs yet of {missing}." if missing else "",
        f"{machine()}, one thread, one image." if times else "",
    ]
    return "\n\n".join(filter(None, parts))


def write(readme: Path, text: str) -> None:
    """Put ``text`` between the two markers of a page.

    Raises:
        CompressionError: the page has no markers.
    """
    before, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise CompressionError(f"{readme} has no lines {BEGIN!r} and {END!r}, between which the table belongs")
    readme.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Read the runs, time their files, write the table."""
    parser = argparse.ArgumentParser(prog="python -m experiments.zoo", description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, metavar="RUNS_DIR")
    parser.add_argument("--readme", type=Path, default=README, help="the page with the markers")
    options = parser.parse_args()
    try:
        runs = find(options.runs)
        write(options.readme, table(runs, latencies(runs)))
    except CompressionError as error:
        raise SystemExit(f"zoo: {error}") from error


if __name__ == "__main__":
    main()
