"""Two real processes (gloo): one plan, equal weights after the cut, and they stay equal."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import hashlib, json, sys
import pytorch_lightning as pl, torch
from pytorch_lightning.strategies import DDPStrategy
from tiny import TinyModule, loaders
from lightslim import SensitivePruneStrategy, UniformPruneStrategy

strategies = {
    "uniform": lambda: UniformPruneStrategy(target_ratio=0.5, start_epoch=1),
    "sensitive": lambda: SensitivePruneStrategy(
        target_ratio=0.5, start_epoch=1, metric_name="val_loss", mode="min", num_steps=2, step_epochs=1, eval_rate=0.7
    ),
}
options = json.loads(sys.argv[1])
batches = options.pop("accumulate_grad_batches", 1)
pl.seed_everything(0, verbose=False)
module = TinyModule("adam")
strategy = strategies[sys.argv[3]]()
trainer = pl.Trainer(
    accelerator="cpu", devices=2, max_epochs=3, callbacks=[strategy], logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=batches,
    strategy=DDPStrategy(process_group_backend="gloo", **options),
    default_root_dir=sys.argv[2],
)
trainer.fit(module, *loaders())
weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in module.parameters())).hexdigest()
record = {"weights": weights, "params": sum(p.numel() for p in module.parameters()),
          "before": strategy.history[0]["metrics"]["before"], "losses": module.losses,
          "sensitivities": [act.get("sensitivities") for act in strategy.history]}
open(f"{sys.argv[2]}/{trainer.global_rank}.json", "w").write(json.dumps(record))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("uniform", {}),
        ("uniform", {"static_graph": True}),
        ("uniform", {"gradient_as_bucket_view": True}),
        ("uniform", {"find_unused_parameters": True}),
        ("uniform", {"accumulate_grad_batches": 2}),
        ("sensitive", {}),
    ],
    ids=str,
)
def test_two_processes_cut_the_same_units_and_stay_equal(tmp_path, kind, options):
    script = tmp_path / "fit.py"
    script.write_text(SCRIPT)
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, str(script), json.dumps(options), str(tmp_path), kind],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{here}:{here.parent}", "OMP_NUM_THREADS": "1",
             "HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one["weights"] == two["weights"]
    assert one["before"] == two["before"], "metrics are those of all processes"
    assert one["losses"] != two["losses"], "each process saw its own part of the data"
    assert one["sensitivities"] == two["sensitivities"], "curves are those of all processes"
    from tiny import TinyModule

    assert one["params"] == two["params"] < sum(p.numel() for p in TinyModule().parameters())
