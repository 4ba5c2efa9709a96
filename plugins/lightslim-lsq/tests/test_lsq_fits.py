"""Steps in running fits: trained by the module's own optimizer, in its groups, gone when the fit is over."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from lightslim_lsq import LearnedStepSize
from lightslim_lsq.range import LEAST

from lightslim import QuantizationStrategy, UniformPruneStrategy
from lightslim.export.runtimes import open_in_onnxruntime
from lightslim.quantize import quantizers
from lightslim.registry import registry
from lightslim.testing import TinyModule, TinyNet, assert_exports, assert_range, assert_resumes, assert_trains
from lightslim.testing import tiny_loaders as loaders
from lightslim.testing import tiny_trainer as trainer


def lsq(**arguments):
    ranges = {"weight_quantize_type": "lsq", "activation_quantize_type": "lsq"}
    return QuantizationStrategy(**{"start_epoch": 1, "weight_bits": 4, "activation_bits": 4, **ranges, **arguments})


def width(rule):
    """The step in use."""
    bounds = rule(torch.empty(0))
    return bounds.amax.item() / (15 if bounds.amin is not None else 7)


class Watch(pl.Callback):
    """Keeps the steps after each batch, and looks at the optimizer's groups."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.steps.append({name: width(q.rule) for name, q in quantizers(pl_module)})
        grouped = [p for one in trainer.optimizers for group in one.param_groups for p in group["params"]]
        assert len({id(p) for p in grouped}) == len(grouped)
        assert {id(p) for p in grouped} == {id(p) for p in pl_module.parameters()}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw_fused", "one_cycle"])
def test_steps_are_trained_in_the_groups_of_their_weights(tmp_path, optimizer):
    module, strategy, watch = TinyModule(optimizer), lsq(), Watch()
    fit = trainer(tmp_path, strategy, watch)
    fit.fit(module, *loaders())
    first, last = watch.steps[len(loaders()[0])], watch.steps[-1]
    assert len(first) == 10
    assert all(first[name] != last[name] for name in first)
    assert all(step > 0 for step in last.values())
    assert sum(module.losses[-3:]) < sum(module.losses[:3])
    assert repr(module.net) == repr(TinyNet())
    fit.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == set(TinyModule().state_dict())
    kept = saved["callbacks"][strategy.state_key]["ranges"]["net.stem.0.weight_quantizer"]
    # What the optimizer last wrote, from which the next use takes what is not too small
    assert max(kept["rule.step"], kept["rule.first"] * LEAST) == pytest.approx(last["net.stem.0.weight_quantizer"])


def test_steps_of_outputs_are_trained_with_the_layer_that_gives_them(tmp_path):
    class Body(TinyModule):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.body.parameters(), lr=0.05)

    module, watch = Body(), Watch()
    watch.on_train_batch_end = lambda _, module, *__: watch.steps.append(
        {n: width(q.rule) for n, q in quantizers(module)}
    )
    trainer(tmp_path, lsq(outputs=["net.stem", "net.body"]), watch).fit(module, *loaders())
    first, last = watch.steps[len(loaders()[0])], watch.steps[-1]
    assert first["net.body.3.output_quantizer"] != last["net.body.3.output_quantizer"]
    assert first["net.stem.2.output_quantizer"] == last["net.stem.2.output_quantizer"], "its layer is not trained"


def test_ranges_of_frozen_layers_are_frozen(tmp_path):
    class Head(TinyModule):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.head.parameters(), lr=0.05)

    class Look(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            self.trained = {n for n, q in quantizers(pl_module) if q.rule.step.requires_grad}

    look = Look()
    trainer(tmp_path, lsq(), look).fit(Head(), *loaders())
    assert look.trained == {"net.head.3.weight_quantizer", "net.head.3.input_quantizer"}


def test_inputs_that_nothing_rounds_train_nothing(tmp_path):
    class Outside(TinyNet):
        def forward(self, x):
            stem = self.stem[0]
            x = self.stem[2](self.stem[1](torch.conv2d(x, stem.weight, stem.bias, padding=1)))
            return self.head(torch.cat([x, self.depthwise(x)], 1))

    class Look(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            stem = pl_module.net.stem[0]
            self.flags = stem.input_quantizer.rule.step.requires_grad, stem.weight_quantizer.rule.step.requires_grad

    look = Look()
    with pytest.warns(UserWarning, match="not quantized"):
        trainer(tmp_path, lsq(skip=["net.body.*"]), look).fit(TinyModule(net=Outside()), *loaders())
    assert look.flags == (False, True)


def test_an_average_of_the_weights_averages_the_steps(tmp_path):
    from pytorch_lightning.callbacks import EMAWeightAveraging

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            self.steps = {n: width(q.rule) for n, q in quantizers(average._average_model.module)}

    module, average, look = TinyModule("adam"), EMAWeightAveraging(decay=0.9), Look()
    trainer(tmp_path, lsq(), look, average).fit(module, *loaders())
    assert len(look.steps) == 10
    assert all(step > 0 for step in look.steps.values())
    assert sum(module.losses[-3:]) < sum(module.losses[:3])


def test_it_comes_after_a_cut(tmp_path):
    module, cut = TinyModule("adam"), UniformPruneStrategy(target_ratio=0.5, start_epoch=1)
    trainer(tmp_path, cut, lsq(start_epoch=2)).fit(module, *loaders())
    assert module.net.stem[0].out_channels < 16


@pytest.mark.slow
def test_an_int8_file_computes_what_the_fit_did(tmp_path):
    class Look(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            with torch.no_grad():
                self.outputs = pl_module.eval()(images)

    images, look = loaders()[1].dataset.tensors[0], Look()
    strategy = lsq(weight_bits=8, activation_bits=8, int8_model_save_path="model.onnx")
    trainer(tmp_path, look, strategy).fit(TinyModule("sgd"), *loaders())
    (written,) = (record for record in strategy.history if record["act"] == "export")
    (found,) = open_in_onnxruntime(Path(written["files"]["int8"]["path"]))(images)
    off = (found - look.outputs).abs().amax(1) > 1e-4
    assert off.sum() <= 1, "one image may hold a value between two codes, which goes either way"


def make():
    return lsq()


def test_it_is_known_by_name():
    assert registry().get("range", "lsq") is LearnedStepSize


def test_it_is_a_range():
    assert_range(LearnedStepSize)


def test_it_trains():
    assert_trains(make)


def test_it_resumes(tmp_path):
    assert_resumes(make, tmp_path)


def test_it_exports(tmp_path):
    assert_exports(make, tmp_path)
