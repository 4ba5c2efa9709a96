"""Distillation in running fits: the loss that is trained on, what stays as it was, resuming, chains."""

import copy

import pytest
import pytorch_lightning as pl
import torch
from test_fit import Manual
from tiny import TinyModule, TinyNet, images, loaders, trainer
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightslim import (
    DistillationStrategy,
    FSPDistiller,
    L2Distiller,
    SoftLabelDistiller,
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


class Twice(TinyModule):
    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]) + self(batch[0]), batch[1])


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
