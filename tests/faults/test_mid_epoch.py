"""Stopped between two batches of an epoch, with a loader that keeps its place, a run goes on to the same bits."""

import pytest
import pytorch_lightning as pl
import torch
from components import ROWS
from tiny import TinyModule, images, loaders

BATCHES = 4


class KeepsItsPlace:
    """A shuffling loader that can be asked where it is, as torchdata's StatefulDataLoader."""

    def __init__(self):
        self.data, self.epoch, self.index = images(16 * BATCHES, seed=1), 0, 0

    def __len__(self):
        return BATCHES

    def __iter__(self):
        if self.index == BATCHES:
            self.epoch, self.index = self.epoch + 1, 0
        order = torch.randperm(16 * BATCHES, generator=torch.Generator().manual_seed(self.epoch)).split(16)
        while self.index < BATCHES:
            self.index += 1
            yield self.data[order[self.index - 1]]

    def state_dict(self):
        return {"epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state):
        self.epoch, self.index = state["epoch"], state["index"]


@pytest.mark.parametrize("name", [name for kind, name in ROWS if kind == "strategy"])
@pytest.mark.parametrize("optimizer", ["adam", "one_cycle"])  # the latter asks for the number of steps
def test_every_strategy_goes_on_in_the_middle_of_an_epoch(tmp_path, name, optimizer):
    def fit(seed, checkpoint=None):
        pl.seed_everything(0, verbose=False)
        strategy = ROWS["strategy", name]()
        pl.seed_everything(seed, verbose=False)
        module = TinyModule(optimizer)
        saver = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=3, callbacks=[strategy, saver], logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path / str(seed),
        )  # fmt: skip
        trainer.fit(module, KeepsItsPlace(), loaders()[1], ckpt_path=checkpoint)
        return module

    whole = fit(0)
    for step in (2, 5, 7, 10):
        resumed = fit(step, tmp_path / f"step={step}.ckpt")
        for name_, parameter in whole.named_parameters():
            assert torch.equal(parameter, resumed.get_parameter(name_)), (step, name_)
