"""What the ranges of a fit are shown before its first step, and that the fit feels nothing of it."""

import copy

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from test_quantize_fit import quantized
from tiny import TinyModule, images, loaders, trainer
from torch import nn
from torch.utils.data import DataLoader

from lightslim import CompressionError
from lightslim.quantize import MovingAverageAbsMax, quantizers
from lightslim.steps import step_probe


class Frozen(TinyModule):
    """Stem and body are fixed and stay in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        for part in (self.net.stem, self.net.body):
            part.requires_grad_(False)
        self.train()

    def train(self, mode=True):
        super().train(mode)
        self.net.stem.eval()
        self.net.body.eval()
        return self


class TwoHeads(TinyModule):
    """The second head is used in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.beside = nn.Linear(3, 4)

    def training_step(self, batch, batch_idx):
        scores = self.beside(batch[0].mean((2, 3)))
        return super().training_step(batch, batch_idx) + nn.functional.cross_entropy(scores, batch[1])


class Transformer(TinyModule):
    """Its layers have a fused way through evaluation."""

    def __init__(self) -> None:
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        super().__init__(net=nn.Sequential(nn.Flatten(2), nn.Linear(64, 8), layer, nn.Flatten(), nn.Linear(24, 4)))


@pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step`", "ignore:.*out_proj are not quantized", "ignore:Found .* in eval mode"
)
@pytest.mark.parametrize(
    ("build", "range_", "validates"),
    [
        (TinyModule, "moving_average_abs_max", False),
        (Frozen, "moving_average_abs_max", False),
        (Frozen, "range_abs_max", False),
        (TwoHeads, "mse", True),
        (Transformer, "mse", True),
        (Transformer, "moving_average_abs_max", False),
    ],
)
def test_every_range_has_seen_data_before_the_first_step(tmp_path, build, range_, validates):
    first = {}

    class Begin(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if not first:
                rules = {name: each.rule for name, each in quantizers(pl_module) if not each.rule.exact}
                first.update({name: rule.eval()(torch.zeros(1)).amax.item() for name, rule in rules.items()
                              if "out_proj" not in name})  # fmt: skip
                pl_module.train()

    train, val = loaders()
    strategy = quantized(start_epoch=0, activation_quantize_type=range_)
    trainer(tmp_path, strategy, Begin(), max_epochs=1).fit(build(), train, *([val] if validates else []))
    assert len(first) >= 3
    assert all(amax > 0 for amax in first.values()), first
    noise = strategy.history[0]["signal_to_noise"]
    assert min(noise.values()) > 10, noise


def test_a_second_module_learns_ranges_of_its_own(tmp_path):
    def ranges(strategy, scale):
        data = images()
        data.tensors = scale * data.tensors[0], data.tensors[1]
        pl.seed_everything(0)
        trainer(tmp_path, strategy, max_epochs=1).fit(TinyModule(), DataLoader(data, 16), DataLoader(data, 16))
        return {name: amax["rule.amax"].item() for name, amax in strategy.ranges().items() if amax}

    reused = quantized(start_epoch=0, activation_quantize_type="max")
    assert ranges(reused, 100.0)["net.stem.0.input_quantizer"] > 100
    assert ranges(reused, 1.0) == ranges(quantized(start_epoch=0, activation_quantize_type="max"), 1.0)


@pytest.mark.parametrize(("asked", "of_trainer", "seen"), [(3, 2, 2), (1, 2, 1), (0, 2, 0)])
def test_as_many_validation_batches_are_seen_as_asked_for_and_the_trainer_takes(
    tmp_path, monkeypatch, asked, of_trainer, seen
):
    shown = []

    def watch(rule, x):
        shown.append(len(x))
        rule(x)

    monkeypatch.setattr(MovingAverageAbsMax, "watch", watch)
    train, val = loaders(batch_size=8)
    strategy = quantized(start_epoch=0, calibration_batches=asked, skip=["net.[bdh]*"])
    trainer(tmp_path, strategy, max_epochs=1, limit_val_batches=of_trainer).fit(TinyModule(), train, val)
    # Nothing seen: a few samples of the training data instead
    assert len(shown) == max(seen, 1)
    with pytest.raises(CompressionError, match="calibration_batches is -1"):
        quantized(calibration_batches=-1)


class Late(TinyModule):
    """Its last layer is made when it is set up."""

    def setup(self, stage):
        if not hasattr(self, "last"):
            self.last = nn.Linear(4, 4)

    def forward(self, x):
        return self.last(super().forward(x))


def test_layers_made_in_setup_are_known(tmp_path):
    strategy = quantized(overrides={"last": {"weight_bits": 4}})
    trainer(tmp_path, strategy).fit(Late(), *loaders())
    assert strategy.history[0]["quantized"] == 6
    with pytest.raises(CompressionError, match="'lasst' matches none"):
        trainer(tmp_path, quantized(skip=["lasst"]), max_epochs=2).fit(Late(), *loaders())


class Hooked(TinyModule):
    """Its validation rests on hooks, and is one of halved weights."""

    def on_validation_start(self):
        self.store = []
        self.whole = copy.deepcopy(self.net.state_dict())
        self.net.load_state_dict({name: value / 2 for name, value in self.whole.items()})

    def on_validation_batch_start(self, batch, batch_idx, **_):
        self.size = len(batch[0])

    def validation_step(self, batch, batch_idx):
        assert len(batch[0]) == self.size
        self.store.append(batch_idx)

    def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        del self.size

    def on_validation_epoch_end(self):
        self.log("batches", float(len(self.store)))

    def on_validation_end(self):
        del self.store
        self.net.load_state_dict(self.whole)


def test_validation_may_rest_on_hooks(tmp_path):
    strategy = quantized()
    trainer(tmp_path, strategy).fit(Hooked(), *loaders())
    assert strategy.history[0]["metrics"]["before"] == {"batches": 2.0}


class Sides(TinyModule):
    """Validates on a batch of each of two loaders at once."""

    def validation_step(self, batch, batch_idx):
        for name in ("one", "two"):
            x, y = batch[name]
            self.log(name, nn.functional.cross_entropy(self(x), y), batch_size=len(x))


class Several(TinyModule):
    """Validates on one loader after the other."""

    def validation_step(self, batch, batch_idx, dataloader_idx):
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("build", "joined", "names"),
    [
        (Several, dict, {"val_loss/dataloader_idx_1", "val_acc/dataloader_idx_0"}),
        (Sides, lambda **both: CombinedLoader(both, "max_size_cycle"), {"one", "two"}),
    ],
)
def test_named_validation_loaders(tmp_path, build, joined, names):
    train, val = loaders()
    strategy = quantized()
    fit = trainer(tmp_path, strategy)
    fit.fit(build(), train, joined(one=val, two=DataLoader(images(16, seed=5), batch_size=4)))
    assert names <= strategy.history[0]["metrics"]["before"].keys() <= fit.callback_metrics.keys()


class ByTrainer(TinyModule):
    """Manual optimization by the Trainer's own list of optimizers, and torch's own backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        loss.backward()
        self.trainer.optimizers[0].step()
        if batch_idx % 2:
            self.trainer.optimizers[0].zero_grad(set_to_none=False)


class Draws(TinyModule):
    """Draws from generators of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.of_torch, self.of_numpy = torch.Generator(), np.random.default_rng(0)

    def forward(self, x):
        noise = torch.rand(x.shape, generator=self.of_torch)
        return super().forward(x + noise * float(self.of_numpy.random()))


class Noisy(torch.utils.data.Dataset):
    """Draws from a generator for each sample."""

    def __init__(self, seed, generator) -> None:
        self.images, self.generator = images(seed=seed), generator

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        x, y = self.images[index]
        return x + torch.rand(x.shape, generator=self.generator), y


@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
@pytest.mark.parametrize("build", [TinyModule, ByTrainer, Draws, Hooked, Sides])
def test_steps_before_it_begins_are_those_of_a_run_without_it(tmp_path, build):
    def losses(*callbacks):
        pl.seed_everything(3)
        module, shared = build(), torch.Generator().manual_seed(0)
        train, val = (DataLoader(Noisy(seed, shared), 16, shuffle=True, generator=shared) for seed in (1, 2))
        validation = CombinedLoader({"one": val, "two": val}, "max_size") if build is Sides else val
        trainer(tmp_path, *callbacks, max_epochs=2).fit(module, train, validation)
        return module.losses

    alone, later = losses(), losses(quantized())
    assert alone[:6] == later[:6]
    assert alone[6:] != later[6:]


def test_a_look_at_manual_optimization_leaves_gradients_as_they_are():
    module = ByTrainer()
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    kept = [parameter.grad for parameter in module.parameters()]
    batch = next(iter(loaders()[1]))
    module.training_step = lambda batch, batch_idx: TinyModule.training_step(module, batch, batch_idx).backward()
    module.log = lambda *_: None
    step_probe(module, batch, batch).run(training=True)
    assert all(parameter.grad is grad for parameter, grad in zip(module.parameters(), kept, strict=True))
    assert all(bool((grad == 1).all()) for grad in kept)
