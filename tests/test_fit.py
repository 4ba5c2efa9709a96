"""Uniform pruning inside a running fit: any optimizer and schedule goes on, nothing is dead, nothing is left behind."""

import copy
import warnings

import pytest
import pytorch_lightning as pl
import torch
from tiny import OPTIMIZERS, TinyModule, TinyNet, images, loaders, trainer
from torch import nn
from torch.utils.data import DataLoader

from lightslim import CompressionError, CompressionMonitor, UniformPruneStrategy, load_compressed
from lightslim.cost import cost

X = torch.zeros(1, 3, 8, 8)


def cut(**arguments):
    return UniformPruneStrategy(**{"target_ratio": 0.5, "start_epoch": 1, **arguments})


class Witness(pl.Callback):
    """Checks, right after the cut and after the step that follows, that no parameter is dead."""

    def __init__(self) -> None:
        self.checked = 0

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            groups = [p for o in trainer.optimizers for group in o.param_groups for p in group["params"]]
            trainable = [p for p in pl_module.parameters() if p.requires_grad]
            assert sorted(map(id, groups)) == sorted(map(id, trainable)), "each parameter in exactly one group"
            for optimizer in trainer.optimizers:
                for parameter, state in optimizer.state.items():
                    for value in (v for v in state.values() if isinstance(v, torch.Tensor) and v.numel() > 1):
                        assert all(a in (1, b) for a, b in zip(value.shape, parameter.shape, strict=True))
            self.weights = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
            self.gradients = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.current_epoch == 1 and not self.checked:
            self.gradients = {
                n: bool((p.grad.abs() > 1e-6).any()) for n, p in pl_module.named_parameters() if p.grad is not None
            }

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and self.gradients and not self.checked:
            moved = {n for n, p in pl_module.named_parameters() if not torch.equal(p, self.weights[n])}
            assert {n for n, live in self.gradients.items() if live} <= moved, (
                "a step changes every weight with a gradient"
            )
            self.checked = len(moved)


WAYS = {
    "plain": {},
    "accumulate": {"accumulate_grad_batches": 3},
    "clip": {"gradient_clip_val": 0.5},
    "bf16": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_training_goes_on_after_the_cut(tmp_path, optimizer, way):
    pl.seed_everything(0)
    module, witness, strategy = TinyModule(optimizer), Witness(), cut()
    before, types = cost(module.net, X).flops, (type(module), module.training_step.__func__)
    fit = trainer(tmp_path, strategy, witness, **WAYS[way])
    fit.fit(module, *loaders())
    assert witness.checked > 10
    assert 1 - cost(module.net, X).flops / before == pytest.approx(0.5, abs=0.01)
    assert (type(module), module.training_step.__func__) == types
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert sum(module.losses[-3:]) < sum(module.losses[:3])


class Manual(TinyModule):
    """Manual optimization with two optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        for optimizer in (first, second):
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in (first, second):
            optimizer.step()
        self.losses.append(float(loss.detach()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.stem.parameters(), lr=0.05, momentum=0.9), torch.optim.Adam(
            [p for n, p in self.net.named_parameters() if not n.startswith("stem")], lr=0.01
        )


class OnlyTraining(pl.LightningModule):
    """No validation_step, no forward: only a training step over two submodules."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.decoder = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))
        self.seen = 0
        self.outputs: list[torch.Tensor] = []

    def training_step(self, batch, batch_idx):
        self.seen += 1
        self.outputs.append(batch[1])
        return nn.functional.cross_entropy(self.decoder(self.encoder(batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("build", [Manual, OnlyTraining])
def test_unusual_modules_are_cut_too(tmp_path, build):
    module, strategy = build(), cut()
    size = sum(p.numel() for p in module.parameters())
    train, val = loaders()
    trainer(tmp_path, strategy).fit(module, train, val if build is Manual else None)
    assert sum(p.numel() for p in module.parameters()) < size
    if build is OnlyTraining:
        assert module.seen == len(module.outputs) == 3 * len(train), "looking at the model leaves no trace"
        assert module.encoder[0].out_channels < 16
        assert module.decoder[2].out_features == 4


@pytest.mark.filterwarnings("ignore:asked to remove")  # so small a net moves in large steps
def test_two_strategies_of_one_class_compound_and_keep_their_own_state(tmp_path):
    module = TinyModule()
    flops = cost(module.net, X).flops
    first, second = cut(target_ratio=0.2, round_to=1), cut(target_ratio=0.2, start_epoch=2, round_to=1)
    assert first.state_key != second.state_key
    fit = trainer(tmp_path, first, second)
    fit.fit(module, *loaders())
    assert cost(module.net, X).flops / flops == pytest.approx(0.64, abs=0.04)
    assert [record["epoch"] for record in first.history + second.history] == [1, 2]
    fit.save_checkpoint(tmp_path / "x.ckpt")
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["callbacks"]
    assert [state[s.state_key]["history"][0]["epoch"] for s in (first, second)] == [1, 2]


def losses_of(tmp_path, *callbacks):
    pl.seed_everything(7)
    module = TinyModule("adam")
    trainer(tmp_path, *callbacks, max_epochs=2).fit(module, *loaders())
    return module


def test_until_it_acts_the_run_is_bit_for_bit_the_run_without_it(tmp_path):
    """The rehearsal before the first step runs the module's own steps; nobody may notice."""
    alone, watched = losses_of(tmp_path), losses_of(tmp_path, cut(start_epoch=1), CompressionMonitor())
    steps = len(loaders()[0])
    assert watched.losses[:steps] == alone.losses[:steps]
    assert watched.losses[steps:] != alone.losses[steps:]


def test_a_trainer_without_our_callbacks_gives_the_run_it_gave_before_import(tmp_path):
    import subprocess
    import sys

    script = (
        "import sys; sys.path.insert(0, {tests!r})\n{first}\nimport pytorch_lightning as pl, torch\n"
        "from tiny import TinyModule, loaders, trainer\npl.seed_everything(3, verbose=False)\nm = TinyModule('adam')\n"
        "trainer({folder!r}, max_epochs=1).fit(m, *loaders())\n"
        "print([x.hex() for x in m.losses], sum(float(p.double().sum()) for p in m.parameters()).hex())"
    )
    tests = __file__.rpartition("/")[0]
    runs = [
        subprocess.run(
            [sys.executable, "-c", script.format(tests=tests, folder=str(tmp_path), first=first)],
            capture_output=True, text=True, check=True,
        ).stdout
        for first in ("", "import lightslim")
    ]  # fmt: skip
    assert runs[0] == runs[1]
    assert "0x" in runs[0]


HOOKS = [
    "setup",
    "on_fit_start",
    "on_sanity_check_end",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_start",
    "on_train_end",
]


@pytest.mark.parametrize("hook", [*HOOKS, None])
def test_nothing_of_ours_is_left_on_the_module(tmp_path, hook):
    class Bomb(pl.Callback):
        pass

    def explode(*_, **__):
        raise RuntimeError("boom")

    module = TinyModule()
    attributes, keys = set(vars(module)), set(module.state_dict())
    callbacks = [cut(), CompressionMonitor(), Bomb()]
    if hook:
        setattr(callbacks[-1], hook, explode)
        with pytest.raises(RuntimeError, match="boom"):
            trainer(tmp_path, *callbacks).fit(module, *loaders())
    else:
        trainer(tmp_path, *callbacks).fit(module, *loaders())
    assert {"on_load_checkpoint", "on_save_checkpoint", "validation_step"}.isdisjoint(vars(module))
    # Lightning itself keeps its own wrapped log on the instance; nothing else may be new.
    assert {name for name in set(vars(module)) - attributes if not name.startswith("_")} == set()
    assert set(module.state_dict()) == keys
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in module.modules())


def test_resume_before_and_after_the_cut_and_test_on_the_larger_best(tmp_path):
    saver = pl.callbacks.ModelCheckpoint(tmp_path / "c", "{epoch}", save_top_k=-1)
    module, strategy = TinyModule("adam"), cut()
    fit = trainer(tmp_path, strategy, saver, enable_checkpointing=True)
    fit.fit(module, *loaders())
    size = sum(p.numel() for p in module.parameters())
    for epoch in (0, 1):
        again, same = TinyModule("adam"), cut()
        keep = pl.callbacks.ModelCheckpoint(tmp_path / "c", "{epoch}", save_top_k=-1)
        resumed = trainer(tmp_path, same, keep, enable_checkpointing=True)
        resumed.fit(again, *loaders(), ckpt_path=tmp_path / "c" / f"epoch={epoch}.ckpt")
        assert sum(p.numel() for p in again.parameters()) == size
        assert len(same.history) == 1
    larger = fit.validate(module, loaders()[1], ckpt_path=tmp_path / "c" / "epoch=0.ckpt", verbose=False)
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in TinyModule().parameters())
    assert larger[0]["val_acc"] >= 0


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoints_load_without_a_trainer(tmp_path, weights_only):
    saver = pl.callbacks.ModelCheckpoint(tmp_path / "c", "last", save_weights_only=weights_only)
    module = TinyModule("adam")
    trainer(tmp_path, cut(), saver, enable_checkpointing=True).fit(module, *loaders())
    loaded = load_compressed(TinyModule, tmp_path / "c" / "last.ckpt")
    assert loaded.hparams.optimizer == "adam"
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(loaded(x), module.eval()(x), rtol=0, atol=0)
    fresh = load_compressed(TinyModule, tmp_path / "c" / "last.ckpt", optimizer="sgd")
    assert fresh.hparams.optimizer == "sgd"


def test_averaged_copies_are_cut_with_the_model(tmp_path):
    from pytorch_lightning.callbacks import EMAWeightAveraging

    module, average = TinyModule("adam"), EMAWeightAveraging()
    trainer(tmp_path, cut(), average).fit(module, *loaders())
    assert sum(p.numel() for p in module.parameters()) < sum(p.numel() for p in TinyModule().parameters())


class TwoFormats(TinyModule):
    """Training batches are dictionaries, validation batches pairs."""

    def training_step(self, batch, batch_idx):
        return super().training_step((batch["image"], batch["label"]), batch_idx)


class Named(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        image, label = images()[index]
        return {"image": image, "label": label}


def test_training_and_validation_batches_may_have_different_forms(tmp_path):
    module = TwoFormats()
    trainer(tmp_path, cut()).fit(module, DataLoader(Named(), batch_size=16), loaders()[1])
    assert module.net.stem[0].out_channels < 16


class TalksToItsLogger(TinyModule):
    def training_step(self, batch, batch_idx):
        self.logger.experiment.add_scalar("mine", 1.0, self.global_step)
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_end(self):
        self.logger.experiment.add_scalar("mine_too", 1.0, self.global_step)


def test_looking_at_the_model_says_nothing_to_its_logger(tmp_path):
    from pytorch_lightning.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    counts = []
    for callbacks in ([], [cut()]):
        folder = tmp_path / str(len(counts))
        train, val = loaders()
        trainer(folder, *callbacks, logger=TensorBoardLogger(folder, version=0)).fit(TalksToItsLogger(), train, val)
        events = EventAccumulator(str(folder / "lightning_logs" / "version_0")).Reload()
        counts.append([len(events.Scalars("mine")), len(events.Scalars("mine_too"))])
    assert counts[0] == counts[1]


@pytest.mark.slow
def test_a_submodule_compiled_in_place_is_cut(tmp_path):
    module = TinyModule()
    module.net.compile(backend="aot_eager")
    trainer(tmp_path, cut()).fit(module, *loaders())
    assert module.net.stem[0].out_channels < 16
    assert sum(module.losses[-3:]) < sum(module.losses[:3])


class LogsAtEpochEnd(TinyModule):
    def __init__(self) -> None:
        super().__init__(net=TinyNet())

    def on_validation_epoch_end(self):
        self.log("epoch_metric", 1.0)


@pytest.mark.parametrize(
    ("strategy", "fit_arguments", "message"),
    [
        (lambda: cut(start_epoch=3), {}, "start_epoch is 3, but training ends after 3 epochs: it never acts"),
        (lambda: cut(start_epoch=2), {"max_steps": 4}, "training ends after 4 steps, before start_epoch 2"),
        (lambda: cut(pruned_params="net.body.9.*"), {}, "matches none of .* nearest: net.body"),
        (lambda: cut(metric_name="val_ac"), {}, "nothing logs 'val_ac'; did you mean 'val_acc'"),
        (lambda: cut(pruned_params="net.head.3.bias"), {}, "names nothing that can lose units"),
    ],
)
def test_what_cannot_work_fails_before_the_first_step(tmp_path, strategy, fit_arguments, message):
    module = TinyModule()
    with pytest.raises(CompressionError, match=message):
        trainer(tmp_path, strategy(), **fit_arguments).fit(module, *loaders())
    assert module.losses == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_ratio": 1.5}, "target_ratio is 1.5"),
        ({"start_epoch": -1}, "start_epoch is -1"),
        ({"start_epoch": 5, "end_epoch": 4}, "end_epoch is 4"),
    ],
)
def test_bad_arguments_fail_in_the_constructor(arguments, message):
    with pytest.raises(CompressionError, match=message):
        UniformPruneStrategy(**arguments)


def test_metrics_of_epoch_end_hooks_and_of_training_count_as_logged(tmp_path):
    for name in ("epoch_metric", "train_loss"):
        trainer(tmp_path, cut(metric_name=name), max_epochs=2).fit(LogsAtEpochEnd(), *loaders())


def test_fast_dev_run_stays_a_dry_run(tmp_path):
    module = TinyModule()
    trainer(tmp_path, cut(start_epoch=5), fast_dev_run=True).fit(module, *loaders())
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in TinyModule().parameters())


def test_the_metric_before_the_cut_is_lightnings_own_value(tmp_path):
    class Keep(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                self.last = float(trainer.callback_metrics["val_loss"])
                self.values = [*getattr(self, "values", []), self.last]

    keep, strategy = Keep(), cut()
    module = TinyModule()
    train, _ = loaders()
    val = DataLoader(images(37, seed=2), batch_size=16)  # the last batch is smaller
    trainer(tmp_path, strategy, keep).fit(module, train, val)
    assert strategy.history[0]["metrics"]["before"]["val_loss"] == pytest.approx(keep.values[0], rel=1e-5)


def test_an_unfinished_state_is_plain_and_loads_weights_only(tmp_path):
    strategy = cut()
    module = TinyModule()
    fit = trainer(tmp_path, strategy)
    fit.fit(module, *loaders())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit.save_checkpoint(tmp_path / "x.ckpt")
    loaded = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert loaded["callbacks"][strategy.state_key]["history"] == copy.deepcopy(strategy.history)
    assert loaded["lightslim"]["cuts"][0]["slices"][0]["kept"]
