"""What any strategy must do in a fit, whoever wrote it: ``make()`` builds a fresh one that acts at epoch 1."""

import pytorch_lightning as pl
import torch
from tiny import TinyModule, loaders, trainer

from lightslim import load_compressed
from lightslim.export import export


def fitted(make, folder, seed=0, checkpoint=None):
    """A module after three epochs, every one of which is saved, and the strategy."""
    pl.seed_everything(0, verbose=False)
    strategy = make()  # a teacher is to be the same
    pl.seed_everything(seed, verbose=False)
    module, saver = TinyModule("adam"), pl.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    trainer(folder, strategy, saver, enable_checkpointing=True).fit(module, *loaders(), ckpt_path=checkpoint)
    return module, strategy


def assert_trains(make, folder):
    """It acts at epoch 1, the loss falls, and nothing is left on the module."""
    module, strategy = fitted(make, folder)
    plain = TinyModule("adam")
    assert strategy.history[0]["epoch"] == 1
    assert sum(module.losses[-3:]) < sum(module.losses[:3])
    assert repr(module) == repr(plain)
    assert module.state_dict().keys() == plain.state_dict().keys()
    assert all(not (child._forward_hooks or child._forward_pre_hooks) for child in module.modules())


def assert_resumes(make, folder):
    """From each of its checkpoints, a fresh module ends with the same bits and the same history."""
    whole, strategy = fitted(make, folder)
    for epoch in (0, 1):
        resumed, same = fitted(make, folder, 1 + epoch, folder / f"epoch={epoch}.ckpt")
        assert same.history == strategy.history
        for name, parameter in whole.named_parameters():
            assert torch.equal(parameter, resumed.get_parameter(name)), name


def assert_exports(make, folder):
    """The float file opens in a fresh module, which computes the same."""
    module, _ = fitted(make, folder)
    x = torch.randn(2, 3, 8, 8)
    export(module, x, folder / "float.pt", format="float")
    loaded = load_compressed(TinyModule, folder / "float.pt")
    assert torch.equal(loaded(x), module.eval()(x))
