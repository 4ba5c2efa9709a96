"""Two real processes (gloo): every strategy does the same on both, and their weights never differ by a bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
from pathlib import Path
import pytorch_lightning as pl, torch
from components import ROWS
from pytorch_lightning.strategies import DDPStrategy
from test_fit import Manual
from tiny import TinyModule, loaders
from lightslim import SensitivePruneStrategy

folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
manual, batches = options.pop("manual", False), options.pop("accumulate_grad_batches", 1)
kinds = {name: make for (kind, name), make in ROWS.items() if kind == "strategy"}
kinds["in two steps"] = lambda: SensitivePruneStrategy(
    target_ratio=0.5, start_epoch=1, metric_name="val_loss", mode="min", num_steps=2, step_epochs=1, eval_rate=0.7
)


class Spread(pl.Callback):
    "Measures before each step how far the processes are apart."

    largest = 0.0

    def on_train_batch_start(self, trainer, pl_module, *_):
        learned = [t.detach().flatten() for n, t in pl_module.state_dict().items() if "running" not in n]
        everything = pl_module.all_gather(torch.cat(learned).double())
        self.largest = max(self.largest, float((everything[0] - everything[1]).abs().max()))


said = {}
for name, make in kinds.items():
    pl.seed_everything(0, verbose=False)
    strategy, module, spread = make(), Manual() if manual else TinyModule("adam"), Spread()
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, max_epochs=3, callbacks=[strategy, spread], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accumulate_grad_batches=batches,
        strategy=DDPStrategy(process_group_backend="gloo", **options), default_root_dir=folder / name,
    )
    trainer.fit(module, *loaders())
    weights = [float(p.detach().double().sum()) for p in module.parameters()]
    said[name] = {"history": strategy.history, "losses": module.losses, "spread": spread.largest, "weights": weights,
                  "sizes": [p.numel() for p in module.parameters()]}
(folder / f"{trainer.global_rank}.json").write_text(json.dumps(said))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"manual": True, "find_unused_parameters": True},
        {"static_graph": True},
        {"gradient_as_bucket_view": True},
        {"accumulate_grad_batches": 2},
    ],
    ids=str,
)
def test_two_processes_act_alike_and_stay_equal(tmp_path, options):
    script = tmp_path / "fit.py"
    script.write_text(SCRIPT)
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path), json.dumps(options)],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{here}:{here.parent}", "OMP_NUM_THREADS": "1",
             "HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one.keys() == two.keys()
    for name, said in one.items():
        assert said["spread"] == two[name]["spread"] == 0.0, name
        assert said["weights"] == two[name]["weights"], name
        assert said["history"], name
        assert said["history"] == two[name]["history"], f"{name}: what it measured is that of all processes"
        assert said["losses"] != two[name]["losses"], "each process saw its own part of the data"
    from tiny import TinyModule

    full = sum(p.numel() for p in TinyModule().parameters())
    assert sum(one["UniformPruneStrategy"]["sizes"]) < full
    assert sum(one["in two steps"]["sizes"]) < full
