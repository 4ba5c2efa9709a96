"""Distillation with state: projections, an optimizer of its own, schedules; interrupted anywhere."""

import pytest
import pytorch_lightning as pl
import torch
from test_distill_fit import assert_same, data, distil, student, weights
from test_fit import Manual
from tiny import trainer

from lightslim import (
    FSPDistiller,
    L2Distiller,
    SoftLabelDistiller,
)


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
