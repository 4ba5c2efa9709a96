"""Distillation in running fits: the loss that is trained on, what stays as it was, resuming, chains."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from test_fit import Manual
from tiny import TinyModule, TinyNet, images, loaders, trainer
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightslim import (
    CompressionError,
    DistillationStrategy,
    FSPDistiller,
    L2Distiller,
    QuantizationStrategy,
    SoftLabelDistiller,
    UniformPruneStrategy,
)
from lightslim.distill import l2_loss, soft_label_loss

SCORES = {"student_temperature": 2.0, "teacher_temperature": 3.0}


class Wide(nn.Module):
    """A teacher that was written for nothing in particular."""

    def __init__(self, width=24, classes=4):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.fc = nn.Linear(width, classes)
        self.seen = []

    def forward(self, x):
        self.seen.append((self.training, torch.is_grad_enabled(), x.dtype, len(x)))
        return self.fc(self.stem(x).mean(dim=(2, 3)))


def wide(**arguments):
    torch.manual_seed(11)
    return Wide(**arguments)


def student(optimizer="sgd", kind=TinyModule, **arguments):
    pl.seed_everything(5, verbose=False)
    module = kind(optimizer, **arguments) if kind is TinyModule else kind(**arguments)
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.p = 0.0
    return module


def distil(*distillers, **arguments):
    distillers = distillers or (SoftLabelDistiller(**SCORES), L2Distiller("net.head.3:output", "fc", 0.5))
    return DistillationStrategy(distillers, **{"teacher": wide(), **arguments})


def data(count=64, batch_size=16):
    return DataLoader(images(count, seed=1), batch_size=batch_size), DataLoader(images(32, seed=2), batch_size=16)


def weights(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


def by_hand(module, batches, step, task=1.0, accumulate=1, context=None):
    """The same training written out."""
    teacher = wide().eval()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    module.train()
    for i, (x, y) in enumerate(batches):
        with context or torch.enable_grad():
            scores = module.net(x)
            with torch.no_grad():
                wanted = teacher(x)
            loss = task * cross_entropy(scores, y) + step(scores, wanted)
        (loss / accumulate).backward()
        if (i + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return weights(module)


def both(scores, wanted):
    return soft_label_loss(scores, wanted, 2.0, 3.0) + 0.5 * l2_loss(scores, wanted)


class InADict(TinyModule):
    def __init__(self):
        super().__init__("sgd")

    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), "mine": batch_idx}


class ByForward(TinyModule):
    """Calls forward itself, where no hook of the module fires."""

    def __init__(self):
        super().__init__("sgd")

    def training_step(self, batch):
        return cross_entropy(self.forward(batch[0]), batch[1])


class WithoutForward(TinyModule):
    def __init__(self):
        super().__init__("sgd")

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])


class OneByHand(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Closure(OneByHand):
    def training_step(self, batch, batch_idx):
        def closure():
            self.optimizers().zero_grad()
            self.manual_backward(cross_entropy(self(batch[0]), batch[1]))

        self.optimizers().step(closure)


@pytest.mark.parametrize("kind", [TinyModule, InADict, ByForward, WithoutForward, OneByHand, Closure])
def test_the_training_is_the_one_written_out_by_hand(tmp_path, kind):
    module = student(kind=kind)
    expected = by_hand(copy.deepcopy(module), data()[0], both)
    distillers = (SoftLabelDistiller(**SCORES), L2Distiller("", "fc", 0.5))
    if kind is WithoutForward:
        distillers = (SoftLabelDistiller("net", **SCORES), L2Distiller("net.head.3", "fc", 0.5))
    trainer(tmp_path, distil(*distillers), max_epochs=1).fit(module, *data())
    assert_same(expected, weights(module), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "hand"),
    [
        ({"accumulate_grad_batches": 2}, {"accumulate": 2}),
        ({"precision": "bf16-mixed"}, {"context": "bf16"}),
        ({}, {"task": 0.25}),
        ({}, {"task": 0.0}),
    ],
    ids=["accumulated", "autocast", "task weight", "distillation alone"],
)
def test_accumulation_autocast_and_the_weight_of_the_task(tmp_path, arguments, hand):
    module = student()
    context = torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if hand.pop("context", None) else None
    expected = by_hand(copy.deepcopy(module), data()[0], both, context=context, **hand)
    strategy = distil(task_loss_weight=hand.get("task", 1.0))
    trainer(tmp_path, strategy, max_epochs=1, **arguments).fit(module, *data())
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if context else {"rtol": 1e-5, "atol": 1e-6}
    assert_same(expected, weights(module), **tolerance)


class Overwritten(TinyNet):
    def __init__(self):
        super().__init__()
        self.stem[2] = nn.ReLU(inplace=True)


def test_a_map_that_is_overwritten_in_place_is_compared_as_it_was(tmp_path):
    class Stem(Overwritten):
        def forward(self, x):
            self.before = self.stem[1](self.stem[0](x)).clone()
            return self.head(torch.cat([torch.relu(self.before)] * 2, 1))

    class Inplace(Overwritten):
        def forward(self, x):
            return self.head(torch.cat([self.stem(x)] * 2, 1))

    module, plain = student(net=Inplace()), student(net=Stem())
    plain.load_state_dict(module.state_dict())
    teacher = wide(width=16).eval()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    plain.train()
    for x, y in data()[0]:
        with torch.no_grad():
            wanted = teacher.stem[1](teacher.stem[0](x))
        loss = cross_entropy(plain(x), y) + l2_loss(plain.net.before, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fit = trainer(tmp_path, distil(L2Distiller("net.stem.1", "stem.1"), teacher=wide(width=16)), max_epochs=1)
    fit.fit(module, *data())
    assert_same(weights(plain), weights(module), rtol=1e-5, atol=1e-6)


class Calls(pl.Callback):
    """Counts the teacher's calls in each stretch of the fit."""

    def __init__(self, teacher):
        self.teacher, self.in_batches, self.elsewhere, self._at = teacher, [], [], 0

    def _since(self):
        found, self._at = len(self.teacher.seen) - self._at, len(self.teacher.seen)
        return found

    def on_train_batch_start(self, *_):
        self.elsewhere.append(self._since())

    def on_train_batch_end(self, *_):
        self.in_batches.append(self._since())


def test_a_teacher_answers_once_per_training_batch_frozen_and_is_given_back_as_it_was(tmp_path):
    teacher = wide().train()
    teacher.fc.weight.requires_grad_(False)
    before, calls = weights(teacher), Calls(teacher)
    module = student("adam")
    fit = trainer(tmp_path, distil(teacher=teacher, start_epoch=1, end_epoch=2), calls)
    fit.fit(module, *data())
    assert calls.in_batches == [0] * 4 + [1] * 4 + [0] * 4
    assert sum(calls.elsewhere[1:4] + calls.elsewhere[5:]) == 0, "only in rehearsals before a phase"
    assert {(training, grad) for training, grad, _, _ in teacher.seen} == {(False, False)}
    assert_same(before, weights(teacher))
    assert all(child.training for child in teacher.modules())
    assert [p.requires_grad for p in teacher.parameters()] == [True] * 4 + [False, True]
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(child._forward_hooks for child in teacher.modules())
    fit.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == set(TinyModule().state_dict())
    held = sum(len(group["params"]) for state in checkpoint["optimizer_states"] for group in state["param_groups"])
    assert held == len(list(module.parameters()))


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_teacher_computes_in_the_students_precision_and_keeps_its_own(tmp_path, precision):
    teacher, module = wide(), student()
    trainer(
        tmp_path,
        distil(
            L2Distiller("net.stem", "stem", project=True),
            teacher=teacher,
            distiller_optimizer={"optimizer": "SGD", "lr": 0.1},
        ),
        precision=precision,
    ).fit(module, *data())
    assert all(p.dtype == torch.float32 for p in teacher.parameters())
    assert next(module.parameters()).dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float64)


def test_every_part_is_logged_under_its_own_name(tmp_path):
    from pytorch_lightning.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            self.bar, self.metrics = dict(trainer.progress_bar_metrics), dict(trainer.callback_metrics)

    keep = Keep()
    distillers = [
        SoftLabelDistiller("net.head.3", "fc", **SCORES),
        L2Distiller("net.head.3", "fc", name="l2"),
        FSPDistiller([("net.stem", "net.body")], [("stem.0", "stem.1")], project=True),
    ]
    names = {"soft_label_loss_net.head.3_fc", "l2", "fsp_distillation_loss", "student_loss", "distillation_loss"}
    logger = TensorBoardLogger(tmp_path, version=0)
    fit = trainer(
        tmp_path, distil(*distillers, distiller_optimizer=torch.optim.Adam), keep, logger=logger, max_epochs=1
    )
    fit.fit(student(), *data())
    parts = {name: float(keep.metrics[name]) for name in names}
    total = parts.pop("distillation_loss")
    assert total == pytest.approx(sum(parts.values()), rel=1e-5)
    assert names <= keep.bar.keys()
    events = EventAccumulator(str(tmp_path / "lightning_logs" / "version_0")).Reload()
    assert names <= set(events.Tags()["scalars"])
    assert len(events.Scalars("l2")) == 4


class Bomb(pl.Callback):
    pass


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_epoch_start", "on_train_batch_start",
                                  "on_before_backward", "on_validation_start", "on_train_end", None])  # fmt: skip
def test_nothing_is_left_on_the_module_or_the_teacher(tmp_path, hook):
    def explode(*_, **__):
        raise RuntimeError("boom")

    module, teacher, bomb = student(), wide(), Bomb()
    attributes, keys = set(vars(module)), set(module.state_dict())
    step = module.training_step
    fit = trainer(tmp_path, distil(teacher=teacher, end_epoch=None if hook else 2), bomb, num_sanity_val_steps=0)
    if hook:
        setattr(bomb, hook, explode)
        with pytest.raises(RuntimeError, match="boom"):
            fit.fit(module, *data())
    else:
        fit.fit(module, *data())
    assert {name for name in set(vars(module)) - attributes if not name.startswith("_")} <= {"forward", "log"}
    assert module.training_step == step
    assert type(module) is TinyModule
    assert set(module.state_dict()) == keys
    for network in (module, teacher):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert all(p.requires_grad for p in teacher.parameters())


def losses_of(tmp_path, *callbacks):
    module = student("adam")
    module.net.head[2].p = 0.1  # draws random numbers
    trainer(tmp_path, *callbacks, max_epochs=2).fit(module, *loaders())
    return module.losses


def test_until_it_acts_the_run_is_bit_for_bit_the_run_without_it(tmp_path):
    alone, later = losses_of(tmp_path), losses_of(tmp_path, distil(start_epoch=1))
    steps = len(loaders()[0])
    assert alone[:steps] == later[:steps]
    assert alone[steps + 1 :] != later[steps + 1 :]


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*")
def test_after_the_phase_the_run_is_bit_for_bit_the_run_without_it(tmp_path):
    saver = pl.callbacks.ModelCheckpoint(tmp_path / "c", "{epoch}", save_top_k=-1)
    module = student("adam")
    fit = trainer(tmp_path, distil(end_epoch=1), saver, enable_checkpointing=True)
    fit.fit(module, *data())
    alone = student("adam")
    trainer(tmp_path).fit(alone, *data(), ckpt_path=tmp_path / "c" / "epoch=0.ckpt")
    assert_same(weights(module), weights(alone))


class Stateful:
    """A loader that goes on where it was, in the middle of an epoch."""

    def __init__(self):
        self.batches, self.at = list(data()[0]), 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.at %= len(self)
        while self.at < len(self):
            self.at += 1
            yield self.batches[self.at - 1]

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def projected(**arguments):
    """Everything at once that has a state: projections, an optimizer of its own, schedules on both sides."""

    def make(parameters):
        optimizer = torch.optim.Adam(parameters, lr=3e-3)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    fsp = FSPDistiller([("net.stem", "net.body")], [("stem.0", "stem.1")], project=True)
    return distil(L2Distiller("net.stem", "stem", project=True), fsp, SoftLabelDistiller(),
                  **{"distiller_optimizer": make, "start_epoch": 1, "end_epoch": 3, **arguments})  # fmt: skip


@pytest.mark.parametrize("optimizer", ["one_cycle", "sgd"])
def test_a_resume_anywhere_ends_in_the_same_bits(tmp_path, optimizer):
    """Before the phase, in it and after it, within epochs of four steps and between them."""

    def fit(checkpoint=None):
        module, strategy = student(optimizer), projected()
        every = [
            pl.callbacks.ModelCheckpoint(tmp_path / "c", "{step}", save_top_k=-1, every_n_train_steps=1),
            pl.callbacks.ModelCheckpoint(tmp_path / "c", "{epoch}", save_top_k=-1, save_on_train_epoch_end=True),
        ]
        fit = trainer(tmp_path, strategy, *every, enable_checkpointing=True, max_epochs=4)
        fit.fit(module, Stateful(), data()[1], ckpt_path=checkpoint)
        return weights(module), strategy, fit.optimizers[0].state_dict()["state"]

    whole, strategy, state = fit()
    acts = [(record["epoch"], record["act"]) for record in strategy.history]
    assert acts == [(1, "distil"), (3, "end of distillation")]
    between = ["step=4", "epoch=0", "epoch=1", "epoch=2"]
    # A schedule that asks the Trainer for its length makes Lightning lose its place in an epoch, distilled or not
    within = [f"step={step}" for step in (2, 5, 6, 11, 14)] if optimizer == "sgd" else []
    for name in between + within:
        resumed, again, same = fit(tmp_path / "c" / f"{name}.ckpt")
        assert_same(whole, resumed)
        assert again.history == strategy.history
        for index, values in state.items():
            assert all(torch.equal(torch.as_tensor(values[key]), torch.as_tensor(same[index][key])) for key in values)


class Optimizers(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, *_):
        (optimizer,) = trainer.optimizers
        rates = [group["lr"] for group in optimizer.param_groups]
        self.seen.append((optimizer, type(optimizer).__name__, len(trainer.lr_scheduler_configs), rates[0]))


def test_the_distillers_optimizer_works_in_its_phase_and_the_modules_own_goes_on_after_it(tmp_path):
    seen, module = Optimizers(), student("one_cycle")
    strategy = projected(distiller_optimizer={"optimizer": "SGD", "lr": 0.02})
    fit = trainer(tmp_path, strategy, seen, max_epochs=4)
    fit.fit(module, *data())
    names = [name for _, name, _, _ in seen.seen]
    assert names == ["AdamW"] * 4 + ["SGD"] * 8 + ["AdamW"] * 4
    assert seen.seen[0][0] is seen.seen[-1][0], "the very object"
    assert [count for _, _, count, _ in seen.seen] == [1] * 4 + [0] * 8 + [1] * 4
    assert {rate for _, name, _, rate in seen.seen if name == "SGD"} == {0.02}
    schedule = torch.optim.lr_scheduler.OneCycleLR(torch.optim.AdamW(module.parameters()), max_lr=1e-2, total_steps=16)
    rates = []
    for _ in range(8):
        rates.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    assert [rate for _, name, _, rate in seen.seen if name == "AdamW"] == pytest.approx(rates)
    assert {int(state["step"]) for state in fit.optimizers[0].state.values()} == {8}


def test_the_projections_are_trained_and_are_no_part_of_the_student(tmp_path):
    strategy, module = projected(end_epoch=None), student()
    saver = pl.callbacks.ModelCheckpoint(tmp_path / "c", "{epoch}", save_top_k=-1)
    fit = trainer(tmp_path, strategy, saver, enable_checkpointing=True)
    fit.fit(module, *data())
    states = [torch.load(tmp_path / "c" / f"epoch={e}.ckpt", weights_only=True)["callbacks"][strategy.state_key]
              for e in (1, 2)]  # fmt: skip
    projections = [state["projections"] for state in states]
    assert {tuple(one["weight"].shape) for one in projections[0].values()} == {(24, 16)}
    for key, one in projections[0].items():
        assert not torch.equal(one["weight"], projections[1][key]["weight"])
    owned = {id(p) for group in fit.optimizers[0].param_groups for p in group["params"]}
    assert {id(p) for p in module.parameters()} < owned
    assert len(owned) == len(list(module.parameters())) + len(projections[0])


def test_monitors_of_learning_rates_follow_the_switch(tmp_path):
    from pytorch_lightning.loggers import CSVLogger

    monitor = pl.callbacks.LearningRateMonitor("step")
    fit = trainer(tmp_path, projected(), monitor, max_epochs=4, logger=CSVLogger(tmp_path, version=0))
    fit.fit(student("one_cycle"), *data())
    fit.logger.save()
    header = next((tmp_path / "lightning_logs" / "version_0").glob("metrics.csv")).read_text().splitlines()[0]
    assert {"lr-AdamW", "lr-Adam"} <= set(header.split(","))


def test_manual_optimization_with_two_optimizers_and_their_stand_ins(tmp_path):
    def make(parameters):
        parameters = list(parameters)
        return [torch.optim.SGD(parameters[:4], lr=0.05), torch.optim.SGD(parameters[4:], lr=0.05)]

    module, seen = student(kind=Manual), []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            seen.append([type(optimizer).__name__ for optimizer in trainer.optimizers])

    trainer(tmp_path, distil(distiller_optimizer=make, end_epoch=1), Look()).fit(module, *data())
    assert seen == [["SGD", "SGD"]] * 4 + [["SGD", "Adam"]] * 8
    assert sum(module.losses[-3:]) < sum(module.losses[:3])


def test_an_average_of_the_weights_stays_their_average(tmp_path):
    from pytorch_lightning.callbacks import EMAWeightAveraging

    class Follow(pl.Callback):
        mine = None

        def on_train_batch_end(self, trainer, pl_module, *_):
            now = [p.detach().clone() for p in pl_module.parameters()]
            self.mine = [0.5 * a + 0.5 * b for a, b in zip(self.mine, now, strict=True)] if self.mine else now

    average, follow = EMAWeightAveraging(decay=0.5), Follow()
    module = student("adam")
    start = [p.detach().clone() for p in module.parameters()]
    follow.mine = start
    trainer(tmp_path, projected(), average, follow).fit(module, *data())
    for kept, mine in zip(average._average_model.module.parameters(), follow.mine, strict=True):
        torch.testing.assert_close(kept, mine, rtol=1e-3, atol=1e-4)


def test_the_cache_spares_the_teacher_and_changes_nothing(tmp_path):
    runs = []
    for cache in (None, "answers", "answers"):
        module, teacher = student(), wide()
        calls = Calls(teacher)
        trainer(tmp_path, distil(teacher=teacher, cache=cache, end_epoch=2), calls).fit(module, *data())
        runs.append((weights(module), calls.in_batches))
    assert_same(runs[0][0], runs[1][0])
    assert_same(runs[0][0], runs[2][0])
    assert [sum(calls) for _, calls in runs] == [8, 4, 0]
    assert len(list((tmp_path / "answers").glob("*.pt"))) == 4


def test_one_strategy_serves_several_teachers(tmp_path):
    teachers = {"big": wide(width=30), "small": wide(width=6)}
    calls = [Calls(teacher) for teacher in teachers.values()]
    distillers = [SoftLabelDistiller(teacher="big", name="a"), L2Distiller(teacher="small", name="b"),
                  L2Distiller("", "fc", teacher="big", name="c")]  # fmt: skip
    fit = trainer(tmp_path, distil(*distillers, teacher=teachers), *calls, max_epochs=1)
    fit.fit(student(), *data())
    assert [one.in_batches for one in calls] == [[1] * 4] * 2
    assert {"a", "b", "c"} <= set(fit.callback_metrics)


@pytest.mark.parametrize("listed", [(0, 1), (1, 0)])
def test_one_phase_follows_another_whichever_is_listed_first(tmp_path, listed):
    module, step = student(), None
    phases = [
        distil(L2Distiller(name="first"), end_epoch=1, name="one"),
        distil(L2Distiller(name="second"), start_epoch=1, end_epoch=2, name="two"),
    ]
    seen = []

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append({"training_step" in vars(pl_module), *(trainer.callback_metrics.keys() & {"first", "second"})})

    step = module.training_step
    trainer(tmp_path, *(phases[i] for i in listed), Look()).fit(module, *data())
    assert seen == [{True, "first"}, {True, "first", "second"}, {False, "first", "second"}]
    assert module.training_step == step


class LikeTheTeacher(pl.LightningModule):
    """Student and teacher are of one class: every name is there twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(torch.relu(self.stem(x)).mean(dim=(2, 3)))

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_equal_names_in_student_and_teacher_are_no_matter(tmp_path):
    module, teacher = LikeTheTeacher(), LikeTheTeacher()
    before = weights(teacher)
    trainer(tmp_path, distil(L2Distiller("stem", "stem"), teacher=teacher), max_epochs=1).fit(module, data()[0])
    assert_same(before, weights(teacher))


class Direct(OneByHand):
    def training_step(self, batch, batch_idx):
        cross_entropy(self(batch[0]), batch[1]).backward()


class Before(OneByHand):
    """The backward comes before what is compared."""

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.net.stem(batch[0]).mean())
        self(batch[0])


class Logs(TinyModule):
    def training_step(self, batch, batch_idx):
        self.log("l2", 1.0)
        self.log("student_loss", 2.0)
        return super().training_step(batch, batch_idx)


class Twice(TinyModule):
    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]) + self(batch[0]), batch[1])


class Inside(TinyModule):
    def __init__(self):
        super().__init__("sgd")
        self.teacher = Wide()


L2 = L2Distiller("", "fc", name="l2")
BAD = {
    "no teacher": (lambda: distil(teacher=None), TinyModule, "there is no teacher"),
    "no module": (lambda: distil(teacher=3), TinyModule, "is a int; a teacher is a module, or 'self'"),
    "student map": (lambda: distil(L2Distiller("net.had", "fc")), TinyModule, "student map: 'net.had' matches none.*net.head"),
    "teacher map": (lambda: distil(L2Distiller("", "fx")), TinyModule, "teacher map: 'fx' matches none.*nearest: fc"),
    "two maps": (lambda: distil(L2Distiller("net.*.3", "fc")), TinyModule, r"matches 2 modules, net\.body\.3, net\.head\.3"),
    "shapes": (lambda: distil(L2Distiller("net.stem", "stem")), TinyModule, r"\(8, 16, 8, 8\).*\(8, 24, 8, 8\).*project"),
    "no optimizer": (lambda: distil(L2Distiller("net.stem", "stem", project=True)), TinyModule, "give a distiller_optimizer"),
    "other input size": (lambda: distil(SoftLabelDistiller(), teacher=nn.Sequential(nn.Flatten(), nn.Linear(48, 4))),
                         TinyModule, r"teacher cannot be called as the student is, with \[\(8, 3, 8, 8\)\]: RuntimeError"),
    "classes": (lambda: distil(SoftLabelDistiller(), teacher=Wide(classes=7)), TinyModule, r"\(8, 4\).*\(8, 7\)"),
    "which teacher": (lambda: distil(L2, teacher=[wide(), wide()]), TinyModule, "several teachers; say which.*teacher_0"),
    "unknown teacher": (lambda: distil(L2Distiller(teacher="big")), TinyModule, "there is no teacher 'big': teacher"),
    "direct backward": (lambda: distil(L2), Direct, "no self.manual_backward comes after"),
    "early backward": (lambda: distil(L2), Before, "no self.manual_backward comes after"),
    "count": (lambda: distil(L2, distiller_optimizer=torch.optim.SGD), Manual, "makes 1.*by hand with 2"),
    "name taken": (lambda: distil(L2), Logs, "the module logs 'l2', too"),
    "called twice": (lambda: distil(L2), Twice, "called 2 times in a step; say which"),
    "inside": (lambda: distil(L2, teacher=SHARED.teacher), lambda: SHARED, "share teacher.stem.0.weight"),
    "input": (lambda: distil(L2, teacher_input="net.sten"), TinyModule, "teacher_input: 'net.sten' matches none"),
    "output": (lambda: distil(L2Distiller("", "fc", name="a"), teacher=nn.ModuleDict({"fc": nn.Linear(1, 1)})),
               TinyModule, "cannot be called as the student is.*forward"),
    "never reached": (lambda: distil(L2Distiller("spare", "fc")), lambda: Spare(), "called 0 times"),
    "self": (lambda: distil(L2Distiller("net.head.3", "net.head.9"), teacher="self"), TinyModule, "teacher map: .*none"),
}  # fmt: skip


class Spare(TinyModule):
    def __init__(self):
        super().__init__("sgd")
        self.spare = nn.Linear(2, 2)


SHARED = Inside()


@pytest.mark.parametrize(("strategy", "kind", "message"), BAD.values(), ids=BAD)
def test_what_cannot_work_fails_before_the_first_step(tmp_path, strategy, kind, message):
    module = kind()
    before = weights(module)
    with pytest.raises(CompressionError, match=message):
        trainer(tmp_path, strategy()).fit(module, *data())
    assert_same(before, weights(module))
    assert "training_step" not in vars(module)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_two_phases_at_once_are_refused(tmp_path):
    both = distil(end_epoch=2, name="one"), distil(start_epoch=1, name="two")
    with pytest.raises(CompressionError, match="one and two distil at once"):
        trainer(tmp_path, *both).fit(student(), *data())


def test_a_name_of_ours_that_the_module_logs_is_its_own(tmp_path):
    fit = trainer(tmp_path, distil(L2Distiller(name="other")), max_epochs=1)
    fit.fit(Logs(), *data())
    assert float(fit.callback_metrics["student_loss"]) == 2.0


def test_an_end_past_the_end_of_training_is_said_and_distils_to_the_end(tmp_path):
    strategy = distil(end_epoch=9)
    fit = trainer(tmp_path, strategy, max_epochs=2)
    with pytest.warns(UserWarning, match="end_epoch is 9, but training ends after 2 epochs, still distilling"):
        fit.fit(student(), *data())
    assert [record["act"] for record in strategy.history] == ["distil"]
    assert "distillation_loss" in fit.callback_metrics


def test_frozen_maps_are_said(tmp_path):
    module = student()
    module.net.stem.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"no gradient goes back from \['net.stem'\]: frozen"):
        trainer(tmp_path, distil(L2Distiller("net.stem", "stem"), teacher=wide(width=16)), max_epochs=1).fit(
            module, *data()
        )


def test_a_call_that_is_said_serves_a_step_with_several(tmp_path):
    distiller = L2Distiller("@1", "fc")
    trainer(tmp_path, distil(distiller, teacher_input="@1"), max_epochs=1).fit(Twice(), *data())


def test_the_input_of_a_submodule_can_be_the_teachers(tmp_path):
    class Doubles(TinyModule):
        def forward(self, x):
            return self.net(2 * x)

    class Sum(nn.Module):
        def forward(self, x):
            self.last = x
            return x.flatten(1)[:, :4]

    teacher = Sum()
    module = student(kind=Doubles)
    trainer(tmp_path, distil(L2Distiller(), teacher=teacher, teacher_input="net"), max_epochs=1).fit(module, *data())
    *_, (x, _) = data()[0]
    assert torch.equal(teacher.last, 2 * x)


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
from test_distill_fit import OneByHand, data, projected, student, distil, wide
from tiny import TinyModule, loaders
from lightslim import SoftLabelDistiller, L2Distiller

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
