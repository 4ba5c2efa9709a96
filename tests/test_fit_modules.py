"""Pruning in the fits of modules, loaders and callbacks that are a little unusual, each as some user writes them."""

from collections import deque

import pytest
import pytorch_lightning as pl
import torch
from test_fit import Manual, cut
from tiny import TinyModule, TinyNet, images, loaders, trainer
from torch import nn
from torch.utils.data import DataLoader

from lightslim import CompressionError, load_compressed


class Nested(TinyModule):
    """Collects what it sees in containers of containers, and logs from there."""

    def __init__(self) -> None:
        super().__init__("adam")
        self.kept = {"val": [], "recent": deque(maxlen=100)}
        self.counts: list[int] = []

    def validation_step(self, batch, batch_idx):
        self.kept["val"].append(batch[1])
        self.kept["recent"].append(batch_idx)
        super().validation_step(batch, batch_idx)

    def on_validation_epoch_end(self):
        self.counts.append(len(torch.cat(self.kept["val"])))
        self.kept["val"].clear()


def test_what_the_module_collects_in_validation_is_its_own(tmp_path):
    seen = []
    for callbacks in ([], [cut()]):
        module = Nested()
        trainer(tmp_path, *callbacks, num_sanity_val_steps=0).fit(module, *loaders())
        seen.append((module.counts, list(module.kept["recent"])))
    assert seen[0] == seen[1]


def test_one_strategy_serves_one_module_after_another(tmp_path):
    strategy = cut()
    for _ in range(2):
        module = TinyModule()
        trainer(tmp_path, strategy).fit(module, *loaders())
        assert module.net.stem[0].out_channels < 16
        assert len(strategy.history) == 1
    again = trainer(tmp_path, strategy, max_epochs=2)
    again.fit(module, *loaders())
    assert len(strategy.history) == 1, "the same module is not cut twice"


class Reductions(TinyModule):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("count", float(len(batch[1])), reduce_fx="sum")
        self.log("largest", float(batch_idx), reduce_fx="max")
        self.log("even", float(batch_idx), batch_size=1)


def test_metrics_are_aggregated_as_lightning_does(tmp_path):
    module, strategy = Reductions(), cut(start_epoch=2)
    val = DataLoader(images(37, seed=2), batch_size=16)
    said = []

    class Keep(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            said.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    trainer(tmp_path, strategy, Keep()).fit(module, loaders()[0], val)
    measured = strategy.history[0]["metrics"]["before"]
    assert measured == pytest.approx({name: said[-2][name] for name in measured}, rel=1e-5)
    assert measured["count"] == 37.0


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from images()


@pytest.mark.filterwarnings("ignore:.*IterableDataset.*")
def test_a_stream_without_a_length_is_no_obstacle(tmp_path):
    module = TinyModule()
    trainer(tmp_path, cut()).fit(module, DataLoader(Stream(), batch_size=16), loaders()[1])
    assert module.net.stem[0].out_channels < 16


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_true_precisions(tmp_path, precision):
    module = TinyModule()
    trainer(tmp_path, cut(), precision=precision).fit(module, *loaders())
    assert module.net.stem[0].out_channels < 16


class Masked(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.rand(1, 16, 1, 1), persistent=False)

    def forward(self, x):
        x = self.stem(x) * self.mask
        y = torch.relu(x + self.body(x))
        return self.head(torch.cat([y, self.depthwise(y)], 1))


class MaskedModule(TinyModule):
    def __init__(self) -> None:
        super().__init__("adam", Masked())


def test_buffers_that_are_not_saved_are_cut_on_loading(tmp_path):
    module = MaskedModule()
    fit = trainer(tmp_path, cut())
    fit.fit(module, *loaders())
    fit.save_checkpoint(tmp_path / "x.ckpt")
    loaded = load_compressed(MaskedModule, tmp_path / "x.ckpt")
    assert loaded.net.mask.shape == module.net.mask.shape
    loaded(torch.zeros(1, 3, 8, 8))


class Aux(TinyModule):
    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(16, 4)


@pytest.mark.filterwarnings("ignore:.*find_unused_parameters.*")
def test_parameters_that_no_step_uses_are_named(tmp_path):
    with pytest.warns(UserWarning, match=r"no step uses aux\.weight, aux\.bias now"):
        trainer(tmp_path, cut()).fit(Aux(), *loaders())


def test_a_strategy_that_never_acted_says_so(tmp_path):
    stop = pl.callbacks.EarlyStopping("val_loss", patience=0, min_delta=1e9)
    with pytest.warns(UserWarning, match="never acted"):
        trainer(tmp_path, cut(start_epoch=8), stop, max_epochs=9).fit(TinyModule(), *loaders())


def test_lightnings_own_masks_are_refused(tmp_path):
    masks = pl.callbacks.ModelPruning("l1_unstructured", amount=0.5)
    with pytest.raises(CompressionError, match="ModelPruning"):
        trainer(tmp_path, cut(), masks).fit(TinyModule(), *loaders())


class Penalised(TinyModule):
    """Differentiates inside its only step, as a gradient penalty does."""

    def training_step(self, batch, batch_idx):
        x = batch[0].clone().requires_grad_()
        scores = self(x)
        (gradient,) = torch.autograd.grad(scores.square().sum(), x, create_graph=True)
        return nn.functional.cross_entropy(scores, batch[1]) + 1e-3 * gradient.square().mean()

    validation_step = None


def test_steps_that_differentiate_are_recorded(tmp_path):
    module = Penalised()
    trainer(tmp_path, cut()).fit(module, loaders()[0])
    assert module.net.stem[0].out_channels < 16


class Toggled(Manual):
    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        with first.toggle_model():
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            first.step()
            first.zero_grad()
        second.zero_grad()

    def validation_step(self, batch, i, dataloader_idx=0):  # it does without the model
        self.log(f"acc_{dataloader_idx}", 1.0, add_dataloader_idx=False)


def test_toggled_optimizers_and_named_loaders(tmp_path):
    module = Toggled()
    train, val = loaders()
    trainer(tmp_path, cut(metric_name="acc_1")).fit(module, train, [val, val])
    assert module.net.stem[0].out_channels < 16


def test_sharded_strategies_are_refused(tmp_path):
    from lightslim.infit import refuse_sharded

    class FSDPStrategy:
        pass

    class Fake:
        strategy = FSDPStrategy()

    with pytest.raises(CompressionError, match="FSDPStrategy: compress on one device or with DDP first"):
        refuse_sharded(Fake())
