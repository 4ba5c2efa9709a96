"""One recipe on two processes, started by Lightning, by torchrun, and as two nodes: the same weights, one report."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

RECIPE = """
model: {class: "experiments.models:ImageClassifier", network: resnet20, width: 0.25}
data: {class: "experiments.data:Digits", batch_size: 64}
trainer: {accelerator: cpu, devices: 2, strategy: ddp, enable_progress_bar: false, limit_train_batches: 4}
strategies:
  halve: {class: UniformPruneStrategy, start_epoch: 1, target_ratio: 0.5, metric_name: val_acc}
  quantize: {class: QuantizationStrategy, start_epoch: 2, activation_quantize_type: moving_average_abs_max}
compressor: {epoch: 3, strategies: [halve, quantize], checkpoint_path: checkpoints}
"""


def free_port():
    with contextlib.closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def launch(folder, name):
    """Run the recipe into ``folder/name``; returns what the processes print."""
    end = ["-m", "lightslim", "run", "recipe.yaml", "--out", name]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    node = ["--set", "trainer.devices=1", "--set", "trainer.num_nodes=2"]
    port = free_port()
    commands = {
        "lightning": [[sys.executable, *end]],
        "torchrun": [[*torchrun, "--nproc-per-node", "2", "--master-port", port, *end]],
        "nodes": [
            [*torchrun, "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", rank, "--master-addr", "127.0.0.1",
             "--master-port", port, *end, *node]
            for rank in "01"
        ],
    }  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    running = [
        subprocess.Popen(one, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for one in commands[name]
    ]
    printed = [process.communicate(timeout=300) for process in running]
    for process, (_, error) in zip(running, printed, strict=True):
        assert process.returncode == 0, error[-6000:]
    return "".join(out for out, _ in printed)


@pytest.mark.slow
def test_however_two_processes_are_started_they_end_with_the_same_weights(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    weights = {}
    for name in ("lightning", "torchrun", "nodes"):
        assert launch(tmp_path, name).count("everything is in") == 1
        checkpoint = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
        weights[name] = checkpoint["state_dict"]
        assert checkpoint["lightslim"]["random"]["states"]["torch"].shape[0] == 2
        assert (tmp_path / name / "result.json").exists()
    for name in ("torchrun", "nodes"):
        assert weights[name].keys() == weights["lightning"].keys()
        assert all(torch.equal(weights[name][key], value) for key, value in weights["lightning"].items())
