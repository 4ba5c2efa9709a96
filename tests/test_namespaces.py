"""Modules and Trainers of lightning.pytorch, the other name of Lightning: every strategy works there, too."""

import pytest
import torch
from components import ROWS
from tiny import TinyNet, loaders
from torch import nn

from lightslim import AtomicCheckpointIO, CompressionError, CompressionMonitor, Compressor, load_compressed

lightning = pytest.importorskip("lightning.pytorch")


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = TinyNet()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        scores = self(batch[0])
        self.log("val_loss", nn.functional.cross_entropy(scores, batch[1]))
        self.log("val_acc", (scores.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


def trainer(folder, *callbacks, **settings):
    return lightning.Trainer(
        accelerator="cpu", max_epochs=3, callbacks=list(callbacks), enable_progress_bar=False, logger=False,
        enable_model_summary=False, default_root_dir=folder, plugins=[AtomicCheckpointIO()], **settings,
    )  # fmt: skip


@pytest.mark.parametrize("name", [name for kind, name in ROWS if kind == "strategy"])
def test_a_strategy_acts_and_resumes(tmp_path, name):
    def fit(checkpoint=None):
        lightning.seed_everything(0 if checkpoint is None else 1, verbose=False)
        module = Module()
        saver = lightning.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        fit = trainer(tmp_path, strategy(), CompressionMonitor(), saver)
        fit.fit(module, *loaders(), ckpt_path=checkpoint, weights_only=True)
        return module

    def strategy():
        lightning.seed_everything(0, verbose=False)
        return ROWS["strategy", name]()

    whole = fit()
    resumed = fit(tmp_path / "epoch=1.ckpt")
    for name_, parameter in whole.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name_)), name_
    loaded = load_compressed(Module, tmp_path / "epoch=2.ckpt")
    assert [p.shape for p in loaded.parameters()] == [p.shape for p in whole.parameters()]


def test_a_recipe_says_which_lightning_it_takes(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        'model: {class: "test_namespaces:Module"}\n'
        'data: {class: "experiments.data:Digits"}\n'
        "strategies: {cut: {class: UniformPruneStrategy, target_ratio: 0.5}}\n"
        "compressor: {epoch: 1, strategies: [cut]}\n"
    )
    from lightslim.recipe import Recipe

    with pytest.raises(CompressionError, match=r"model: Module is of lightning\.pytorch; .* Trainer of pytorch"):
        Compressor.from_recipe(Recipe.from_yaml(tmp_path / "recipe.yaml"))
