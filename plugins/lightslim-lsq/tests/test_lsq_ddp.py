"""Two real processes: equal steps, which stay equal."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import hashlib, json, os, sys
import pytorch_lightning as pl
from pytorch_lightning.strategies import DDPStrategy
from lightslim import QuantizationStrategy
from lightslim.quantize import quantizers
from lightslim.testing import TinyModule, tiny_loaders

class Watch(pl.Callback):
    seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append([q.rule.step.item() for _, q in quantizers(pl_module)])

pl.seed_everything(0, verbose=False)
module, strategy, watch = TinyModule(), QuantizationStrategy(
    1, weight_bits=4, activation_bits=4, weight_quantize_type="lsq", activation_quantize_type="lsq"
), Watch()
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
def test_two_processes_learn_the_same_steps(tmp_path):
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
    steps = [seen for seen in one["seen"] if seen]
    assert steps[0]
    assert all(first != last for first, last in zip(steps[0], steps[-1], strict=True))
