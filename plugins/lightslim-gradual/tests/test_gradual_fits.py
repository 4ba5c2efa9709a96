"""The strategy in running fits: zeros stay zeros, whatever the optimizer remembers, and whoever cuts the layers."""

import pytest
import pytorch_lightning as pl
import torch
from lightslim_gradual import GradualPruningStrategy, cubic

from lightslim import CompressionError, QuantizationStrategy, UniformPruneStrategy
from lightslim.registry import registry
from lightslim.testing import TinyModule, TinyNet, assert_exports, assert_resumes, assert_trains
from lightslim.testing import tiny_loaders as loaders
from lightslim.testing import tiny_trainer as trainer


def gradual(**arguments):
    return GradualPruningStrategy(**{"start_epoch": 1, "end_epoch": 3, "sparsity": 0.75, "every": 2, **arguments})


class Watch(pl.Callback):
    """Looks at the weights after each batch: share of zeros, by layer, and what must never come back."""

    def __init__(self):
        self.zeros, self.gone = [], {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        now = {name: weight == 0 for name, weight in pl_module.named_parameters() if weight.ndim > 1}
        for name, mask in self.gone.items():
            if mask.shape == now[name].shape:
                assert bool((now[name] | ~mask).all()), name
        self.gone = now
        self.zeros.append({name: mask.float().mean().item() for name, mask in now.items()})


OPTIMIZERS = ["sgd", "adam", "adamw_foreach", "adamw_fused", "adafactor", "rmsprop", "nadam"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_stay_zeros_and_follow_the_schedule(tmp_path, optimizer):
    module, strategy, watch = TinyModule(optimizer), gradual(), Watch()
    keys = list(module.state_dict())
    trainer(tmp_path, strategy, watch, max_epochs=4).fit(module, *loaders())
    steps = len(loaders()[0])
    for index, zeros in enumerate(watch.zeros):
        done = (index - index % steps % 2 - steps) / (2 * steps)
        wanted = cubic(done, 0.0, 0.75) if index >= steps else 0.0
        for name, share in zeros.items():
            size = dict(module.named_parameters())[name].numel()
            assert share == pytest.approx(round(wanted * size) / size, abs=1e-6), (index, name)
    assert sum(module.losses[-3:]) < sum(module.losses[:3])
    assert [record["epoch"] for record in strategy.history] == [1, 2, 3]
    assert strategy.history[-1]["sparsity"]["net.body.0.weight"][1] == 0.75
    assert list(module.state_dict()) == keys
    assert repr(module.net) == repr(TinyNet())
    assert not any(child._forward_pre_hooks or child._forward_hooks for child in module.modules())
    assert not any(parameter._backward_hooks for parameter in module.parameters())


def test_what_is_gone_gets_no_gradient_and_is_forgotten(tmp_path):
    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            (optimizer,) = trainer.optimizers
            for weight in pl_module.parameters():
                gone = (weight == 0) if weight.ndim > 1 else torch.zeros_like(weight, dtype=torch.bool)
                for value in (weight.grad, *optimizer.state.get(weight, {}).values()):
                    if value is not None and value.shape == weight.shape:
                        assert not value[gone].any()
                        self.seen = self.seen or bool(gone.any())

    look = Look()
    look.seen = False
    trainer(tmp_path, gradual(), look, max_epochs=4, gradient_clip_val=0.1).fit(TinyModule("adam"), *loaders())
    assert look.seen


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_masks_are_cut_with_the_layers(tmp_path, pattern):
    share = {"sparsity": None} if pattern else {}
    module, strategy, watch = TinyModule("adamw"), gradual(end_epoch=2, pattern=pattern, **share), Watch()
    cut = UniformPruneStrategy(target_ratio=0.5, start_epoch=3, round_to=4)
    trainer(tmp_path, strategy, cut, watch, max_epochs=5).fit(module, *loaders())
    assert module.net.stem[0].out_channels < 16
    for name, mask in strategy.held.masks.items():
        weight = dict(module.named_parameters())[name]
        assert mask.shape == weight.shape
        assert not weight[mask].any()
        if pattern and weight.shape[1] % 4 == 0:
            zeros = (weight == 0).movedim(1, -1).reshape(-1, 4).sum(1)
            assert (zeros >= 2).all(), name


def test_quantized_weights_keep_their_zeros(tmp_path):
    module, strategy = TinyModule("adamw"), gradual(end_epoch=2)
    quantize = QuantizationStrategy(2, weight_quantize_type="channel_wise_abs_max",
                                    activation_quantize_type="moving_average_abs_max")  # fmt: skip
    trainer(tmp_path, strategy, quantize, max_epochs=4).fit(module, *loaders())
    assert (module.net.body[0].weight == 0).float().mean() == 0.75


def test_an_average_of_the_weights_has_the_zeros_too(tmp_path):
    from pytorch_lightning.callbacks import EMAWeightAveraging

    module, average = TinyModule("adamw"), EMAWeightAveraging(decay=0.9)
    trainer(tmp_path, gradual(), average, max_epochs=4).fit(module, *loaders())
    assert (module.net.body[0].weight == 0).float().mean() == 0.75


def test_half_of_the_epochs_left_are_the_default(tmp_path):
    strategy = GradualPruningStrategy(start_epoch=1)
    trainer(tmp_path, strategy, max_epochs=5).fit(TinyModule(), *loaders())
    assert [record["epoch"] for record in strategy.history] == [1, 2, 3]
    assert strategy.history[-1]["sparsity"]["net.body.0.weight"][1] == 0.5


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ({"end_epoch": 4}, {}, "no epoch to recover in"),
        ({"end_epoch": None}, {"max_epochs": -1}, "say end_epoch"),
        ({"pruned_params": "conv*"}, {}, "matches none"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(tmp_path, arguments, options, message):
    module = TinyModule()
    with pytest.raises(CompressionError, match=message):
        trainer(tmp_path, gradual(**arguments), **{"max_epochs": 4, **options}).fit(module, *loaders())
    assert not module.losses


def make():
    return gradual(end_epoch=2, sparsity=0.5)


def test_it_is_known_by_name():
    assert registry().get("strategy", "GradualPruningStrategy") is GradualPruningStrategy


def test_it_trains():
    assert_trains(make)


def test_it_resumes(tmp_path):
    assert_resumes(make, tmp_path)


def test_it_exports(tmp_path):
    assert_exports(make, tmp_path)
