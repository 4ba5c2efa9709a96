"""Quantization-aware training in running fits."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from test_fit import Manual
from test_quantize import on_grid
from tiny import TinyModule, TinyNet, loaders, trainer
from torch import nn

from lightslim import CompressionError, QuantizationStrategy, UniformPruneStrategy
from lightslim.quantize import quantizers
from lightslim.quantize.transform import quantized_layers


def quantized(**arguments):
    return QuantizationStrategy(
        **{"start_epoch": 1, "activation_quantize_type": "moving_average_abs_max",
           "weight_quantize_type": "channel_wise_abs_max", **arguments}
    )  # fmt: skip


class Look(pl.Callback):
    """Keeps what the ranges are after training and after validation, and what the weights were."""

    def on_train_epoch_end(self, trainer, pl_module):
        self.after_validation = {n: q.rule.amax.item() for n, q in quantizers(pl_module) if hasattr(q.rule, "amax")}
        self.on_grid = on_grid(pl_module.net.stem[0].weight.detach(), 8, 0)

    def on_validation_start(self, trainer, pl_module):
        self.after_training = {n: q.rule.amax.item() for n, q in quantizers(pl_module) if hasattr(q.rule, "amax")}


@pytest.mark.parametrize("arguments", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_goes_on_and_checkpoints_stay_plain(tmp_path, optimizer, arguments):
    pl.seed_everything(0)
    module, strategy, look = TinyModule(optimizer), quantized(), Look()
    fit = trainer(tmp_path, strategy, look, **arguments)
    fit.fit(module, *loaders())
    assert sum(module.losses[-3:]) < sum(module.losses[:3])
    assert look.on_grid
    assert look.after_training == look.after_validation != {}
    fit.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == set(TinyModule().state_dict())
    assert checkpoint["callbacks"][strategy.state_key]["ranges"]
    assert strategy.history[0]["quantized"] == len(strategy.history[0]["signal_to_noise"]) == 5
    assert repr(module.net) == repr(TinyNet()), "nothing of ours is left after the fit"


@pytest.mark.parametrize(
    "arguments",
    [
        {"outputs": ["net.stem", "net.body.3"], "overrides": {"net.body.0": {"activation_bits": None}}},
        {"outputs": "auto"},
    ],
)
def test_resume_goes_on_with_the_learned_ranges(tmp_path, arguments):
    def fit(checkpoint=None):
        pl.seed_everything(0)
        strategy = quantized(**arguments)
        module = TinyModule("adam")
        module.net.head[2].p = 0.0
        saver = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        data = torch.utils.data.DataLoader(loaders()[0].dataset, batch_size=16)
        fit = trainer(tmp_path, strategy, saver, enable_checkpointing=True)
        fit.fit(module, data, loaders()[1], ckpt_path=checkpoint)
        return module, strategy

    whole, ranges = fit()
    assert {"net.stem.2.output_quantizer", "net.body.3.output_quantizer"} < ranges.ranges().keys()
    resumed, same = fit(tmp_path / "epoch=1.ckpt")
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name
    assert all(
        torch.equal(t, same.ranges()[q][k]) for q, buffers in ranges.ranges().items() for k, t in buffers.items()
    )


def test_it_composes_with_pruning_in_one_fit(tmp_path):
    module = TinyModule("adam")
    prune = UniformPruneStrategy(target_ratio=0.5, start_epoch=1)
    trainer(tmp_path, prune, quantized(start_epoch=2)).fit(module, *loaders())
    assert module.net.stem[0].out_channels < 16
    assert sum(module.losses[-3:]) < sum(module.losses[:3])


def test_a_run_without_it_is_the_run_before_it(tmp_path):
    def losses(*callbacks):
        pl.seed_everything(3)
        module = TinyModule("adam")
        trainer(tmp_path, *callbacks, max_epochs=2).fit(module, *loaders())
        return module.losses

    alone, later = losses(), losses(quantized())
    steps = len(loaders()[0])
    assert alone[:steps] == later[:steps]
    assert alone[steps:] != later[steps:]


def test_weights_used_from_outside_their_layer_are_reported(tmp_path):
    class Outside(TinyNet):
        def forward(self, x):
            stem = self.stem[0]
            x = self.stem[2](self.stem[1](nn.functional.conv2d(x, stem.weight, stem.bias, padding=1)))
            return self.head(torch.cat([x, self.depthwise(x)], 1))

    with pytest.warns(UserWarning, match=r"net\.stem\.0, .*not quantized"):
        trainer(tmp_path, quantized(start_epoch=0), max_epochs=1).fit(TinyModule(net=Outside()), *loaders())


def test_an_average_of_the_weights_is_quantized_like_them(tmp_path):
    """Lightning's average pairs its tensors with the module's by position, and swaps them for validation."""
    from pytorch_lightning.callbacks import EMAWeightAveraging

    class Compare(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            copies = zip(average._average_model.module.named_parameters(), pl_module.named_parameters(), strict=True)
            assert all(one == other for (one, _), (other, _) in copies)

        def on_validation_epoch_end(self, trainer, pl_module):
            if quantized_layers(pl_module):
                layer = pl_module.net.stem[0]
                self.on_grid = on_grid(layer.weight.detach(), 8, 0)

    module, average, compare, strategy = TinyModule("adam"), EMAWeightAveraging(decay=0.5), Compare(), quantized()
    trainer(tmp_path, strategy, compare, average).fit(module, *loaders())
    assert compare.on_grid
    assert sum(module.losses[-3:]) < sum(module.losses[:3])
    assert repr(module.net) == repr(TinyNet())
    assert not quantized_layers(average._average_model)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_resume_beside_an_average_goes_on_with_both(tmp_path, optimizer):
    from pytorch_lightning.callbacks import EMAWeightAveraging

    def fit(checkpoint=None):
        pl.seed_everything(0)
        module = TinyModule(optimizer)
        module.net.head[2].p = 0.0
        saver = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        data = torch.utils.data.DataLoader(loaders()[0].dataset, batch_size=16)
        fit = trainer(tmp_path, quantized(), EMAWeightAveraging(decay=0.9), saver, enable_checkpointing=True)
        fit.fit(module, data, loaders()[1], ckpt_path=checkpoint)
        return module

    whole, resumed = fit(), fit(tmp_path / "epoch=1.ckpt")
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(parameter, resumed.get_parameter(name), rtol=0, atol=0, msg=name)


def test_manual_optimization(tmp_path):
    module = Manual()
    trainer(tmp_path, quantized()).fit(module, *loaders())
    assert sum(module.losses[-3:]) < sum(module.losses[:3])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_submodule_is_quantized_and_trains(tmp_path, backend):
    losses = {}
    for compiled in (False, True):
        pl.seed_everything(0)
        module = TinyModule()
        module.net.head[2].p = 0.0
        if compiled:
            module.net.compile(backend=backend)
        strategy = quantized()
        trainer(tmp_path, strategy).fit(module, *loaders())
        assert len(strategy.history[0]["signal_to_noise"]) == 5
        losses[compiled] = module.losses
    assert losses[True] == pytest.approx(losses[False], rel=0.05, abs=0.02)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*")
def test_evaluation_of_a_checkpoint_uses_its_ranges_or_none(tmp_path):
    saver = pl.callbacks.ModelCheckpoint(tmp_path / "c", "{epoch}", save_top_k=-1)
    module, strategy = TinyModule("adam"), quantized()
    fit = trainer(tmp_path, strategy, saver, enable_checkpointing=True)
    fit.fit(module, *loaders())
    last = tmp_path / "c" / "epoch=2.ckpt"

    def validate(strategy, path):
        fresh = trainer(tmp_path, *([strategy] if strategy else []))
        return fresh.validate(TinyModule("adam"), loaders()[1], ckpt_path=path, verbose=False)[0]["val_loss"]

    expected = fit.validate(module, loaders()[1], ckpt_path=last, verbose=False)[0]["val_loss"]
    assert validate(quantized(), last) == expected
    assert validate(None, last) != expected, "in float"
    before = tmp_path / "c" / "epoch=0.ckpt"
    assert validate(quantized(), before) == validate(None, before), "nothing was quantized yet"
    assert fit.validate(module, loaders()[1], ckpt_path=before, verbose=False)[0]["val_loss"] == validate(None, before)
    assert repr(module.net) == repr(TinyNet())


class Zeroed(TinyNet):
    def __init__(self, value=0.0):
        super().__init__()
        nn.init.constant_(self.body[3].weight, value)


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class Spare(TinyNet):
    def __init__(self, called=False):
        super().__init__()
        self.spare, self.called = Pair(), called

    def forward(self, x):
        return super().forward(self.spare(x)[0] if self.called else x)


@pytest.mark.parametrize(
    ("arguments", "net", "message"),
    [
        ({"start_epoch": 0}, Zeroed, r"net\.body\.3 is all zeros"),
        ({}, lambda: Zeroed(float("nan")), r"net\.body\.3 holds nan"),
        ({"weight_bits": 17}, TinyNet, "weight_bits is 17"),
        ({"weight_bits": 8.0}, TinyNet, "weight_bits is 8.0"),
        ({"save_in_nodes": ["net.stm"]}, TinyNet, r"save_in_nodes: there is no 'net.stm'; did you mean 'net.stem'"),
        ({"save_out_nodes": ["net.had"]}, TinyNet, "save_out_nodes: there is no 'net.had'"),
        ({"activation_quantize_type": "mse", "calibration_batches": 0}, TinyNet, "learns in calibration only"),
        ({"activation_range": {"rat": 0.5}}, TinyNet, "did you mean 'rate'"),
        ({"activation_range": {"rate": 1.5}}, TinyNet, "rate is 1.5"),
        ({"skip": ["*"]}, TinyNet, "nothing to quantize"),
        ({"metric_name": "val_ac"}, TinyNet, "did you mean 'val_acc'"),
        ({"outputs": ["net.bdy"]}, TinyNet, "outputs: 'net.bdy' matches none of .* nearest: net.body"),
        ({"outputs": "net.stem"}, TinyNet, "outputs is 'net.stem'; it takes a list of patterns, or 'auto'"),
        ({"outputs": "auto", "activation_bits": None}, TinyNet, "activation_bits is None"),
        ({"outputs": ["net.spare"]}, Spare, "outputs: the step never calls net.spare"),
        ({"outputs": ["net.spare"]}, lambda: Spare(called=True), "outputs: net.spare gives a tuple"),
    ],
)
def test_what_cannot_work_fails_before_the_first_step(tmp_path, arguments, net, message):
    module = TinyModule(net=net())
    with pytest.raises(CompressionError, match=message):
        trainer(tmp_path, quantized(**arguments), num_sanity_val_steps=0).fit(module, *loaders())
    assert module.losses == []
    assert not quantized_layers(module)


def test_a_weight_that_is_zero_at_first_may_learn_until_it_is_quantized(tmp_path):
    module = TinyModule("adam", net=Zeroed())
    trainer(tmp_path, quantized()).fit(module, *loaders())
    assert module.net.body[3].weight.abs().max() > 0


@pytest.mark.parametrize("rule", ["percentile", "mse", "entropy", "max", "range_abs_max", "moving_average_min_max"])
def test_every_range_trains(tmp_path, rule):
    module, strategy = TinyModule("adam"), quantized(activation_quantize_type=rule)
    trainer(tmp_path, strategy).fit(module, *loaders())
    assert sum(module.losses[-3:]) < sum(module.losses[:3])
    worst = min(strategy.history[0]["signal_to_noise"].values())
    assert worst > 15, "8 bits keep far more than this"


def test_losses_stay_finite_and_ranges_clean_after_an_overflow(tmp_path):
    class Overflows(TinyModule):
        def training_step(self, batch, batch_idx):
            if self.trainer.current_epoch == 1 and batch_idx == 2:
                with torch.no_grad():
                    self(torch.full_like(batch[0], torch.inf))
            return super().training_step(batch, batch_idx)

    module, strategy = Overflows("sgd"), quantized()
    trainer(tmp_path, strategy).fit(module, *loaders())
    assert all(torch.isfinite(t).all() for buffers in strategy.ranges().values() for t in buffers.values())


SCRIPT = """
import hashlib, json, sys
import pytorch_lightning as pl, torch
from pytorch_lightning.strategies import DDPStrategy
from tiny import TinyModule, loaders
from lightslim import QuantizationStrategy

options = json.loads(sys.argv[1])
pl.seed_everything(0, verbose=False)
module = TinyModule("adam")
strategy = QuantizationStrategy(1, weight_quantize_type="channel_wise_abs_max",
                                activation_quantize_type=options.pop("rule"),
                                calibration_batches=options.pop("calibration_batches", 8))
calls = []
trainer = pl.Trainer(
    accelerator="cpu", devices=2, max_epochs=3, callbacks=[strategy], logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
    strategy=DDPStrategy(process_group_backend="gloo", **options), default_root_dir=sys.argv[2],
)
trainer.fit(module, *loaders())
digest = lambda tensors: hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()
kept = ("rule.amax", "rule.window", "rule.state")
learned = [t for q in strategy.ranges().values() for name, t in q.items() if name in kept]
record = {"weights": digest(module.parameters()), "ranges": digest(learned), "count": len(learned),
          "after": strategy.history[0]["metrics"]["after"], "losses": module.losses}
open(f"{sys.argv[2]}/{trainer.global_rank}.json", "w").write(json.dumps(record))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"rule": "moving_average_abs_max"},
        {"rule": "moving_average_abs_max", "calibration_batches": 0},
        {"rule": "range_abs_max", "static_graph": True},
        {"rule": "percentile", "gradient_as_bucket_view": True},
    ],
    ids=lambda options: options["rule"],
)
def test_two_processes_share_their_ranges_and_stay_equal(tmp_path, options):
    script = tmp_path / "fit.py"
    script.write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, str(script), json.dumps(options), str(tmp_path)],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1",
             "HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one["weights"] == two["weights"]
    assert one["ranges"] == two["ranges"]
    assert one["count"] > 0
    assert one["after"] == two["after"]
    assert one["losses"] != two["losses"], "each process saw its own part of the data"


def test_weights_that_are_no_numbers_any_more_stop_it_before_a_file_is_replaced(tmp_path):
    class Spoil(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            pl_module.net.stem[0].weight.data[0, 0] = math.nan

    (tmp_path / "a.onnx").write_text("of the run before")
    strategy = quantized(int8_model_save_path=str(tmp_path / "a.onnx"))
    with pytest.raises(CompressionError, match=r"weight of net\.stem\.0 holds nan"):
        trainer(tmp_path, strategy, Spoil()).fit(TinyModule(), *loaders())
    assert (tmp_path / "a.onnx").read_text() == "of the run before"


@pytest.mark.parametrize("other", ["a.bin", "./a.bin", "a.bin.json"])
def test_two_files_in_one_place_are_refused(other):
    with pytest.raises(CompressionError, match="another file is written there"):
        quantized(int8_model_save_path="a.bin", float_model_save_path=other)
