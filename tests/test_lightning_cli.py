"""Every strategy from LightningCLI, by its short name: as arguments, in YAML, from the config it saved, and resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml
from cli_user import Teacher, classes
from tiny import trainer

from lightslim.registry import registry

HERE = Path(__file__).parent
ARGUMENTS = {
    "UniformPruneStrategy": {
        "pruner": {"class_path": "StructurePruner", "init_args": {"criterions": {"*": "l2_norm"}}},
        "target_ratio": 0.5,
    },
    "SensitivePruneStrategy": {"target_ratio": 0.5, "metric_name": "val_acc", "max_ratio": {"*": 0.5}},
    "QuantizationStrategy": {
        "activation_quantize_type": "moving_average_abs_max",
        "skip": ["net.stem.0"],
        "overrides": {"net.head.3": {"weight_bits": 4}},
    },
    "DistillationStrategy": {
        "distillers": [
            {"class_path": "SoftLabelDistiller", "init_args": {"student_temperature": 4.0}},
            {
                "class_path": "L2Distiller",
                "init_args": {"student_feature_map": "net.stem", "teacher_feature_map": "stem"},
            },
        ],
        "teacher": {"class_path": "cli_user.Teacher", "init_args": {"seed": 3}},
        "distiller_optimizer": {"optimizer": "SGD", "lr": 0.1},
    },
}
STRATEGIES = [
    entry.name for entry in registry().entries() if (entry.kind, entry.distribution) == ("strategy", "lightslim")
]
WAYS = ["arguments", "yaml", "saved", "resumed"]


def options(prefix, values):
    return [f"{prefix}.{key}={v if isinstance(v, str) else json.dumps(v)}" for key, v in values.items()]


def runs(folder, name):
    """The arguments of each way to say the same."""
    given = {**ARGUMENTS[name], "start_epoch": 1}
    (folder / f"{name}.yaml").write_text(
        yaml.safe_dump({"trainer": {"callbacks": [{"class_path": name, "init_args": given}]}})
    )

    def fit(way, *arguments):
        quiet = {"max_epochs": 3, "accelerator": "cpu", "logger": False, "log_every_n_steps": 1,
                 "enable_progress_bar": False, "enable_model_summary": False,
                 "default_root_dir": str(folder / f"{name}-{way}")}  # fmt: skip
        return ["fit", *arguments, *options("--trainer", quiet)]

    by_name = [f"--trainer.callbacks={name}", *options("--trainer.callbacks", given)]
    config = f"--config={folder / name}.yaml"
    saver = ["--trainer.callbacks+=ModelCheckpoint", f"--trainer.callbacks.dirpath={folder / name}",
             "--trainer.callbacks.filename={epoch}", "--trainer.callbacks.save_top_k=-1"]  # fmt: skip
    return {
        f"{name}-arguments": fit("arguments", *by_name),
        f"{name}-yaml": fit("yaml", config, *saver),
        f"{name}-saved": fit("saved", f"--config={folder / name}-yaml/config.yaml"),
        f"{name}-resumed": fit("resumed", config, "--seed_everything=1", f"--ckpt_path={folder / name}/epoch=1.ckpt"),
    }


@pytest.fixture(scope="module", params=["pytorch_lightning", "lightning.pytorch"])
def finished(request, tmp_path_factory):
    """The folder in which one process of one Lightning has done all runs."""
    pytest.importorskip("jsonargparse")
    pytest.importorskip(request.param)
    folder = tmp_path_factory.mktemp("runs")
    every = {run: arguments for name in STRATEGIES for run, arguments in runs(folder, name).items()}
    # The last, since it ends the process
    every["printed"] = ["fit", f"--config={folder}/UniformPruneStrategy.yaml", "--print_config"]
    (folder / "runs.json").write_text(json.dumps(every))
    command = [sys.executable, "-c", f"import cli_user; cli_user.main({request.param!r}, {str(folder)!r})"]
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "printed.yaml").write_text(done.stdout[done.stdout.rindex("seed_everything:") :])
    return folder


def built(value):
    """What the command line makes of a value, written by hand."""
    if isinstance(value, list):
        return [built(one) for one in value]
    if not isinstance(value, dict) or "class_path" not in value:
        return value
    kinds = {entry.name: entry.component for entry in registry().entries()} | {"cli_user.Teacher": Teacher}
    return kinds[value["class_path"]](**value.get("init_args", {}))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The weights of the same fits by a Trainer, from strategies that were built by hand."""

    def fit(name):
        pl.seed_everything(0, verbose=False)
        module, data = (each() for each in classes(pl))
        strategy = registry().get("strategy", name)(
            **{key: built(value) for key, value in ARGUMENTS[name].items()}, start_epoch=1
        )
        trainer(tmp_path_factory.mktemp(name), strategy).fit(module, data)
        return module.state_dict()

    return {name: fit(name) for name in STRATEGIES}


def test_every_strategy_is_tried():
    assert ARGUMENTS.keys() == set(STRATEGIES)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_command_line_ends_with_the_weights_of_a_plain_fit(finished, plain, name, way):
    found = torch.load(finished / f"{name}-{way}.pt", weights_only=True)
    assert [record["epoch"] for record in found["histories"][0]] == [1]
    assert found["weights"].keys() == plain[name].keys()
    for key, tensor in found["weights"].items():
        assert torch.equal(tensor, plain[name][key]), key


@pytest.mark.slow
@pytest.mark.parametrize("path", ["UniformPruneStrategy-yaml/config.yaml", "printed.yaml"])
def test_a_config_that_is_saved_or_printed_holds_every_argument(finished, path):
    saved = yaml.safe_load((finished / path).read_text())
    (strategy,) = [
        each for each in saved["trainer"]["callbacks"] if each["class_path"].endswith("UniformPruneStrategy")
    ]
    assert strategy["init_args"]["target_ratio"] == 0.5
    assert strategy["init_args"]["pruned_params"] == "*"
    assert strategy["init_args"]["pruner"]["init_args"]["criterions"] == {"*": "l2_norm"}
