"""Two real processes: equal masks, which stay equal."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import hashlib, json, os, sys
import pytorch_lightning as pl
from pytorch_lightning.strategies import DDPStrategy
from lightslim_gradual import GradualPruningStrategy
from lightslim.testing import TinyModule, tiny_loaders

class Watch(pl.Callback):
    seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(sum(int((p == 0).sum()) for p in pl_module.parameters() if p.ndim > 1))

pl.seed_everything(0, verbose=False)
module, strategy, watch = TinyModule(), GradualPruningStrategy(1, 3, sparsity=0.75, ranking="global", every=1), Watch()
trainer = pl.Trainer(
    accelerator="cpu", devices=2, max_epochs=4, callbacks=[strategy, watch], logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, default_root_dir=sys.argv[1],
    strategy=DDPStrategy(process_group_backend="gloo"),
)
trainer.fit(module, *tiny_loaders())
weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in module.parameters())).hexdigest()
open(f"{sys.argv[1]}/{trainer.global_rank}.json", "w").write(json.dumps({"weights": weights, "seen": watch.seen}))
"""


@pytest.mark.slow
def test_two_processes_prune_the_same_weights(tmp_path):
    script = tmp_path / "fit.py"
    script.write_text(SCRIPT)
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": ":".join(sys.path),
        "OMP_NUM_THREADS": "1",
        "HOME": str(tmp_path),
    }
    run = subprocess.run([sys.executable, str(script), str(tmp_path)], env=environment, capture_output=True, text=True,
                         timeout=300)  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one == two
    assert one["seen"] == sorted(one["seen"])
    assert one["seen"][0] == 0 < one["seen"][-1]
