"""``trainer.test(ckpt_path="best")``: whatever the model has become since, the best one is what is tested."""

import copy

import pytest
import pytorch_lightning as pl
import torch
from components import ROWS
from tiny import TinyModule, images, loaders, trainer
from torch.utils.data import DataLoader


class Graded(TinyModule):
    """Says which epoch was the best, and keeps the scores that it gives in the test."""

    best: int

    def on_validation_epoch_end(self):
        self.log("grade", float(self.current_epoch == self.best))

    def test_step(self, batch, batch_idx):
        self.scores = self(batch[0])
        self.log("test_loss", torch.nn.functional.cross_entropy(self.scores, batch[1]))


class Keep(pl.Callback):
    """The scores of each epoch's model, as validation would give them."""

    def __init__(self):
        self.scores = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            with torch.no_grad():
                self.scores.append(copy.deepcopy(pl_module).eval()(images(32, seed=2)[:][0]))


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*")
@pytest.mark.parametrize("fresh", [False, True], ids=["same process", "later"])
@pytest.mark.parametrize("best", [0, 1, 2])
@pytest.mark.parametrize("name", [name for kind, name in ROWS if kind == "strategy"])
def test_the_best_model_is_tested_be_it_from_before_the_act_or_after(tmp_path, name, best, fresh):
    pl.seed_everything(0)
    keep, saver = Keep(), pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", monitor="grade", mode="max")
    module, strategy = Graded("adam"), ROWS["strategy", name]()
    module.best = best
    fit = trainer(tmp_path, strategy, keep, saver, enable_checkpointing=True)
    fit.fit(module, *loaders())
    data = DataLoader(images(32, seed=2), batch_size=32)
    if fresh:
        module = Graded("adam")
        trainer(tmp_path, ROWS["strategy", name]()).test(module, data, ckpt_path=saver.best_model_path)
    else:
        fit.test(module, data, ckpt_path="best")
    assert torch.equal(module.scores, keep.scores[best])
