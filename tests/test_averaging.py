"""Every strategy beside Lightning's weight averaging: the average is compressed with the model, and resumes with it."""

import pytest
import pytorch_lightning as pl
import torch
from components import ROWS
from pytorch_lightning.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from tiny import TinyModule, images, loaders, trainer
from torch.utils.data import DataLoader

from lightslim import load_compressed

STRATEGIES = [name for kind, name in ROWS if kind == "strategy"]
AVERAGES = {
    "ema": lambda: EMAWeightAveraging(decay=0.5),
    "swa": lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
}


def fit(folder, name, *callbacks, checkpoint=None, **arguments):
    pl.seed_everything(0)
    strategy, module = ROWS["strategy", name](), TinyModule("adam")
    module.net.head[2].p = 0.0
    data = DataLoader(images(seed=1), batch_size=16)
    trainer(folder, strategy, *callbacks, **arguments).fit(module, data, loaders()[1], ckpt_path=checkpoint)
    return module, strategy


def assert_equal(module, other):
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in other.named_parameters()]
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


@pytest.mark.parametrize("name", STRATEGIES)
def test_an_average_that_forgets_all_is_no_average(tmp_path, name):
    """With a decay of 0 the average is the model: the swaps around each validation must not change anything."""
    alone, without = fit(tmp_path / "alone", name)
    beside, with_average = fit(tmp_path / "beside", name, EMAWeightAveraging(decay=0.0))
    assert_equal(alone, beside)
    assert without.history == with_average.history


class Mean(pl.Callback):
    """The mean of the weights at the start of the last two epochs, reckoned by hand."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch in (2, 3):
            self.seen.append([parameter.detach().double().clone() for parameter in pl_module.parameters()])


@pytest.mark.parametrize("name", STRATEGIES)
def test_stochastic_averaging_after_the_act_ends_at_the_mean(tmp_path, name):
    mean, swa = Mean(), StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=3)
    module, strategy = fit(tmp_path, name, mean, swa, max_epochs=4)
    assert [record["epoch"] for record in strategy.history] == [1]
    for parameter, *seen in zip(module.parameters(), *mean.seen, strict=True):
        torch.testing.assert_close(parameter.double(), sum(seen) / 2, rtol=1e-5, atol=1e-6)
    assert all(bool(buffer.isfinite().all()) for buffer in module.buffers())


@pytest.mark.filterwarnings("ignore:.*SWA is initializing after swa_start.*")
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("name", STRATEGIES)
def test_an_average_from_before_the_act_goes_through_it_and_resumes(tmp_path, name, average):
    def run(checkpoint=None):
        saver = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        return fit(
            tmp_path, name, AVERAGES[average](), saver, checkpoint=checkpoint, max_epochs=4, enable_checkpointing=True
        )[0]

    whole = run()
    loaded = load_compressed(TinyModule, tmp_path / "epoch=3.ckpt")
    assert [p.shape for p in loaded.parameters()] == [p.shape for p in whole.parameters()]
    for epoch in (0, 1, 2):
        assert_equal(whole, run(tmp_path / f"epoch={epoch}.ckpt"))
