"""Distillation beside pruning and quantization, under torch.compile and in two processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from test_distill_fit import SCORES, assert_same, data, distil, student, weights, wide
from tiny import TinyModule, TinyNet, trainer

from lightslim import (
    CompressionError,
    L2Distiller,
    QuantizationStrategy,
    SoftLabelDistiller,
    UniformPruneStrategy,
)


def test_prune_then_distil_from_the_unpruned_self(tmp_path):
    """Both at epoch 1: the teacher is the network of the end of epoch 0, on the way and after a resume."""

    def fit(checkpoint=None):
        module = student("adam")
        prune = UniformPruneStrategy(target_ratio=0.5, start_epoch=1)
        strategy = distil(SoftLabelDistiller(), teacher="self", start_epoch=1)
        saver = pl.callbacks.ModelCheckpoint(tmp_path / "c", "{epoch}", save_top_k=-1)
        fit = trainer(tmp_path, prune, strategy, saver, enable_checkpointing=True)
        fit.fit(module, *data(), ckpt_path=checkpoint)
        return module, strategy

    whole, strategy = fit()
    before = torch.load(tmp_path / "c" / "epoch=0.ckpt", weights_only=True)["state_dict"]
    state = torch.load(tmp_path / "c" / "epoch=1.ckpt", weights_only=True)["callbacks"][strategy.state_key]
    assert_same(before, dict(state["earlier"]["weights"]))
    assert whole.net.stem[0].out_channels < 16
    for epoch in (0, 1):
        assert_same(weights(whole), weights(fit(tmp_path / "c" / f"epoch={epoch}.ckpt")[0]))


def test_distil_then_quantize(tmp_path):
    module, strategy = student("adam"), distil(end_epoch=2)
    quantize = QuantizationStrategy(2, activation_quantize_type="moving_average_abs_max")
    fit = trainer(tmp_path, strategy, quantize)
    fit.fit(module, *data())
    assert [record["act"] for record in strategy.history + quantize.history] == [
        "distil", "end of distillation", "quantize",
    ]  # fmt: skip
    assert sum(module.losses[-3:]) < sum(module.losses[:3])


def test_quantize_while_distilling(tmp_path):
    module = student("adam")
    quantize = QuantizationStrategy(1, activation_quantize_type="moving_average_abs_max")
    trainer(tmp_path, distil(L2Distiller("net.head.3", "fc")), quantize).fit(module, *data())
    assert quantize.history[0]["quantized"] == 5
    assert repr(module.net) == repr(TinyNet()).replace("p=0.1", "p=0.0")


def test_a_cut_within_the_phase_reaches_the_optimizers_put_aside(tmp_path):
    module = student("adam")
    prune = UniformPruneStrategy(target_ratio=0.5, start_epoch=2)
    strategy = distil(start_epoch=1, end_epoch=3, distiller_optimizer={"optimizer": "Adam", "lr": 1e-3})
    trainer(tmp_path, strategy, prune, max_epochs=4).fit(module, *data())
    assert module.net.stem[0].out_channels < 16
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_a_cut_that_unfits_what_is_compared_is_named(tmp_path):
    prune = UniformPruneStrategy(target_ratio=0.5, start_epoch=1)
    strategy = distil(L2Distiller("net.stem", "stem"), teacher=wide(width=16))
    with pytest.raises(CompressionError, match=r"the student's 'net.stem' is \(8, \d+, 8, 8\), the teacher's"):
        trainer(tmp_path, strategy, prune).fit(student(), *data())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor.*")  # torch's own, where a hook breaks its graph
@pytest.mark.parametrize("start", [0, 1])
def test_a_compiled_submodule_is_taught_like_any_other(tmp_path, start):
    found = []
    for compiled in (False, True):
        module = student()
        if compiled:
            module.net.compile(backend="aot_eager")
        distillers = SoftLabelDistiller(**SCORES), L2Distiller("net.stem", "stem")
        strategy = distil(*distillers, teacher=wide(width=16), start_epoch=start, end_epoch=2)
        trainer(tmp_path, strategy).fit(module, *data())
        found.append(weights(module))
        assert not any(m._forward_hooks for m in module.modules())
    assert_same(found[0], found[1], rtol=1e-3, atol=1e-4)


SCRIPT = """
import hashlib, json, sys
import pytorch_lightning as pl, torch
from pytorch_lightning.strategies import DDPStrategy
from test_distill_fit import OneByHand, student
from test_distill_resume import projected
from tiny import TinyModule, loaders

options = json.loads(sys.argv[1])
kind = OneByHand if options.pop("manual", False) else TinyModule
module = student("adam", kind=kind)
strategy = projected(start_epoch=1, end_epoch=None, distiller_optimizer={"optimizer": "Adam", "lr": 1e-3})
accumulate = options.pop("accumulate", 1)
trainer = pl.Trainer(
    accelerator="cpu", devices=2, max_epochs=3, callbacks=[strategy], logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=accumulate,
    strategy=DDPStrategy(process_group_backend="gloo", **options), default_root_dir=sys.argv[2],
)
trainer.fit(module, *loaders())
digest = lambda tensors: hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()
state = strategy.state_dict()["projections"]
record = {"weights": digest(module.parameters()), "projections": digest(one["weight"] for one in state.values()),
          "count": len(state), "keys": len(trainer.strategy.model.state_dict()),
          "loss": float(trainer.callback_metrics["distillation_loss"])}
open(f"{sys.argv[2]}/{trainer.global_rank}.json", "w").write(json.dumps(record))
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"static_graph": True}, {"manual": True}],
                         ids=["plain", "accumulated", "static graph", "manual"])  # fmt: skip
def test_two_processes_stay_equal_and_their_projections_too(tmp_path, options):
    script = tmp_path / "fit.py"
    script.write_text(SCRIPT)
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, str(script), json.dumps(options), str(tmp_path)],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{here}:{here.parent}", "OMP_NUM_THREADS": "1",
             "HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one["weights"] == two["weights"]
    assert one["projections"] == two["projections"]
    assert one["count"] == 3
    assert one["keys"] == len(TinyModule().state_dict()), "teacher and projections are no part of it"
    assert one["loss"] != two["loss"], "each process saw its own part of the data"
