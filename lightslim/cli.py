"""The ``lightslim`` command."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from lightslim.compare import as_csv, as_markdown, as_text, find_runs, rows_of
from lightslim.errors import CompressionError
from lightslim.files import replacing
from lightslim.pareto import picture
from lightslim.registry import KINDS, registry
from lightslim.rundir import default_sweep_folder, recipe_of
from lightslim.show import exports_table, number, result_table, sensitivity_table
from lightslim.tables import table

# What needs torch is imported by the command that needs it: compare, --help and a typo need not wait for Lightning.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 after a :class:`CompressionError`, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    # Lightning's use of a deprecated corner of torch is nothing a user can act on.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    try:
        options.command(options)
    except CompressionError as error:
        print("lightslim: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lightslim: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightslim", description="Compress a model inside its own training run.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command, text in (
        ("run", _run, "train and compress as a recipe says"),
        ("check", _check, "say what a recipe would do, and train nothing"),
    ):
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("recipe", metavar="RECIPE", help="a YAML file")
        sub.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="change one setting")
        sub.set_defaults(command=command)
        if name == "run":
            sub.add_argument("--resume", metavar="CKPT|auto", help="continue from a checkpoint of this run")
            sub.add_argument("--out", metavar="DIR", help="the run directory (default: runs/<recipe>)")
            sub.add_argument(
                "--sweep",
                action="append",
                default=[],
                metavar="KEY.PATH=VALUE,VALUE",
                help="a run for each value, or combination of several sweeps; repeat the command to go on",
            )
            sub.add_argument("--seeds", type=int, metavar="N", help="N runs of each, from the recipe's seed on")
    sensitivity = commands.add_parser("sensitivity", help="measure what each layer can spare, and train nothing")
    sensitivity.add_argument("recipe", metavar="RECIPE", help="its SensitivePruneStrategy says what to measure")
    sensitivity.add_argument("--out", required=True, metavar="FILE", help="JSON; one that is there is continued")
    sensitivity.add_argument(
        "--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="as compressor.init_model=CKPT"
    )
    sensitivity.set_defaults(command=_sensitivity)
    plugins = commands.add_parser("plugins", help="list the components at hand and the packages that bring them")
    plugins.set_defaults(command=_plugins)
    new = plugins.add_subparsers(metavar="COMMAND").add_parser(
        "new", help="write a package with a component of your own"
    )
    new.add_argument("name", metavar="NAME", help="of the package, as lightslim-mine")
    new.add_argument("--kind", default="criterion", help=f"of the component: {', '.join(KINDS)} (default: criterion)")
    new.add_argument("--out", metavar="DIR", default=".", help="where its folder goes (default: here)")
    new.set_defaults(command=_new_plugin)
    inspect = commands.add_parser("inspect", help="say what a checkpoint has been through")
    inspect.add_argument("checkpoint", metavar="CKPT")
    inspect.set_defaults(command=_inspect)
    export = commands.add_parser("export", help="write the model of a checkpoint for a runtime")
    export.add_argument("checkpoint", metavar="CKPT", help="of a run of lightslim")
    export.add_argument("--as", dest="format", required=True, metavar="NAME", help="the format, see lightslim plugins")
    export.add_argument("out", metavar="OUT", help="the file to write")
    export.add_argument("--recipe", metavar="RECIPE", help="default: the one in the run directory of the checkpoint")
    export.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the format")
    export.set_defaults(command=_export)
    bench = commands.add_parser("bench", help="time exported files beside each other, in their runtimes")
    bench.add_argument("files", metavar="FILE", nargs="+", type=Path)
    bench.add_argument("--rounds", type=int, default=50)
    bench.add_argument("--threads", type=int)
    bench.add_argument("--batch", type=int, default=1)
    bench.set_defaults(command=_bench)
    compare = commands.add_parser("compare", help="set finished runs side by side")
    compare.add_argument("runs", metavar="RUN_DIR", nargs="+", type=Path, help="runs, or folders of them")
    compare.add_argument("--latency", action="store_true", help="time the exported files, too")
    compare.add_argument("--out", action="append", default=[], metavar="FILE", type=Path, help=".md, .csv or .png")
    compare.add_argument("--x", default="flops", metavar="COLUMN", help="what the picture's cost is (default: flops)")
    compare.add_argument("--y", metavar="COLUMN", help="what its quality is (default: the first metric)")
    compare.add_argument("--mode", choices=("max", "min"), default="max", help="whether more or less of it is better")
    compare.set_defaults(command=_compare)
    return parser


def _run(options: argparse.Namespace) -> None:
    from pytorch_lightning.utilities.rank_zero import rank_zero_only

    from lightslim.compressor import Compressor
    from lightslim.recipe import Recipe

    if options.sweep or options.seeds is not None:
        _sweep(options)
        return
    compressor = Compressor.from_recipe(Recipe.from_yaml(options.recipe, options.set), out=options.out)
    result = compressor.run(resume=options.resume).result
    tables = (result_table(result), exports_table(result["exports"]))
    rank_zero_only(print)(*filter(None, tables), f"everything is in {compressor.folder}", sep="\n")


def _sweep(options: argparse.Namespace) -> None:
    from lightslim.recipe import Recipe
    from lightslim.sweep import grid, run_grid, seeds_from

    if options.resume:
        raise CompressionError("--resume is for one run: a sweep goes on by itself when the command is given again")
    if options.seeds is not None and options.seeds < 1:
        raise CompressionError(f"--seeds {options.seeds}: it takes 1 or more")
    recipe = Recipe.from_yaml(options.recipe, options.set)
    out = Path(options.out) if options.out else default_sweep_folder(recipe.path)
    cells = grid(options.sweep, list(seeds_from(recipe.seed, options.seeds)) if options.seeds else [])
    folders = run_grid(recipe.path, cells, options.set, out)
    print(as_text(rows_of(folders)), f"everything is in {out}", sep="\n")


def _check(options: argparse.Namespace) -> None:
    from lightslim.compressor import Compressor
    from lightslim.recipe import Recipe

    compressor = Compressor.from_recipe(Recipe.from_yaml(options.recipe, options.set))
    for name, text in compressor.check().items():
        print(f"{name}: {text}")


def _sensitivity(options: argparse.Namespace) -> None:
    from lightslim.compressor import Compressor
    from lightslim.recipe import Recipe

    compressor = Compressor.from_recipe(Recipe.from_yaml(options.recipe, options.set))
    print(sensitivity_table(compressor.sensitivity(options.out, progress=sys.stderr.isatty())))
    print(f"everything is in {options.out}")


def _plugins(options: argparse.Namespace) -> None:
    found = registry()
    rows = [(entry.name, entry.kind, entry.distribution, entry.version) for entry in found.entries()]
    print(table(("name", "kind", "distribution", "version"), rows, left=4))
    for problem in found.problems:
        print(f"not taken in: {problem}", file=sys.stderr)


def _new_plugin(options: argparse.Namespace) -> None:
    from lightslim.skeleton import new_plugin

    folder = new_plugin(options.name, options.kind, options.out)
    print(f"{folder} is written; next: pip install -e {folder}, then pytest {folder}")


def _inspect(options: argparse.Namespace) -> None:
    from lightslim.inspection import inspection

    print(inspection(options.checkpoint))


def _export(options: argparse.Namespace) -> None:
    from lightslim.compressor import Compressor
    from lightslim.recipe import Recipe
    from lightslim.recipe.sources import settings_of

    recipe = Recipe.from_yaml(options.recipe or recipe_of(options.checkpoint))
    manifest = Compressor.from_recipe(recipe).export(
        options.checkpoint, options.format, options.out, **settings_of(options.option, "--option")
    )
    rows = [(name, number(value)) for name, value in manifest["metrics"].items()]
    rows += [("bytes", number(manifest["bytes"])), ("largest difference", f"{manifest['max_abs_diff']:.2g}")]
    print(table((options.out, ""), rows))


def _bench(options: argparse.Namespace) -> None:
    import torch

    from lightslim.export.bench import bench, report

    threads = options.threads or torch.get_num_threads()
    print(report(bench(options.files, options.rounds, threads, options.batch), threads, options.batch))


def _compare(options: argparse.Namespace) -> None:
    finished, begun = find_runs(options.runs)
    rows = rows_of(finished, _milliseconds if options.latency else None)
    write = {
        ".md": lambda: as_markdown(rows).encode(),
        ".csv": lambda: as_csv(rows).encode(),
        ".png": lambda: picture(rows, options.x, options.y, options.mode),
    }
    for path in options.out:
        if path.suffix not in write:
            raise CompressionError(f"--out {path}: the ending must be one of {', '.join(write)}")
    contents = {path: write[path.suffix]() for path in options.out}
    print(as_text(rows))
    for folder in begun:
        print(f"not finished: {folder}", file=sys.stderr)
    for path, content in contents.items():
        with replacing(path) as partial:
            partial.write_bytes(content)


def _milliseconds(path: Path) -> float:
    from lightslim.export.bench import bench

    return float(bench([path])[0]["median"])
