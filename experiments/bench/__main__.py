"""All measurements in one table: ``python -m experiments.bench --out bench.md``."""

import argparse
import importlib
import random
import sys
from dataclasses import replace
from pathlib import Path

import torch

from experiments.bench.paired import prepare
from experiments.bench.table import report

BENCHES = ("fake_quant", "qat_step", "distill_step", "graph", "sensitivity", "exports")


def main() -> None:
    """Measure, print the table and write it."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=BENCHES, metavar="NAME", help=", ".join(BENCHES))
    parser.add_argument("--quick", action="store_true", help="small sizes and two rounds: does everything run?")
    parser.add_argument("--rounds", type=int, help="default: 15, or 2 with --quick")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="the file to write the table to")
    options = parser.parse_args()
    prepare(options.threads)
    found = []
    for name in options.only:
        random.seed(0)
        torch.manual_seed(0)
        print(f"{name} ...", file=sys.stderr, flush=True)
        bench = importlib.import_module(f"experiments.bench.{name}")
        rows = bench.rows(options.rounds or (2 if options.quick else 15), options.quick)
        # Two rounds of small sizes miss or reach a goal by chance
        found.append((name, [replace(row, goal=None) if options.quick else row for row in rows]))
    text = report(found)
    print(text, end="")
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
