"""Gradients for ranking, taken inside a fit: repeatable, equal on all processes, and the run does not notice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from tiny import TinyModule, images, loaders, trainer
from torch.utils.data import DataLoader

from lightslim import CompressionError
from lightslim.infit import mean_gradients
from lightslim.steps import drawn_batches


class Taking(pl.Callback):
    """Takes gradients before every epoch."""

    def __init__(self, **options):
        self.options, self.taken = options, []

    def on_train_epoch_start(self, trainer, pl_module):
        before = {name: parameter.grad for name, parameter in pl_module.named_parameters()}
        self.taken.append(mean_gradients(trainer, pl_module, **self.options))
        assert all(parameter.grad is before[name] for name, parameter in pl_module.named_parameters())


class ByHand(TinyModule):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def fit(folder, *callbacks, kind=TinyModule, **arguments):
    pl.seed_everything(0, verbose=False)
    module = kind("adam")
    trainer(folder, *callbacks, max_epochs=2, **arguments).fit(module, *loaders())
    return module


@pytest.mark.parametrize("kind", [TinyModule, ByHand])
def test_the_run_is_bitwise_the_one_without(tmp_path, kind):
    plain, taking = fit(tmp_path, kind=kind), Taking()
    watched = fit(tmp_path, taking, kind=kind)
    assert watched.losses == plain.losses
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name
    first, second = taking.taken
    assert first.keys() == dict(plain.named_parameters()).keys()
    assert not torch.equal(first["net.stem.0.weight"], second["net.stem.0.weight"])


def test_they_are_the_mean_over_the_batches_drawn(tmp_path):
    class Undisturbed(TinyModule):
        """No dropout, so that there is one right answer."""

        def __init__(self, optimizer="sgd"):
            super().__init__(optimizer)
            self.net.head[2].p = 0.0

    taking = Taking(batches=3, seed=5)
    fit(tmp_path, taking, kind=Undisturbed)
    pl.seed_everything(0, verbose=False)
    module = Undisturbed("adam")
    expected = torch.zeros_like(module.net.stem[0].weight)
    for x, y in drawn_batches(loaders()[0], 3, seed=5):
        loss = torch.nn.functional.cross_entropy(module(x), y)
        expected += torch.autograd.grad(loss, module.net.stem[0].weight)[0] / 3
    torch.testing.assert_close(taking.taken[0]["net.stem.0.weight"], expected)


def test_parts_of_a_draw_are_disjoint_and_of_equal_length():
    loader = DataLoader(images(31), batch_size=4)
    parts = [drawn_batches(loader, 9, part=part, parts=3) for part in range(3)]
    assert [[len(y) for _, y in part] for part in parts] == [[4, 4]] * 3
    seen = torch.cat([x for part in parts for x, _ in part]).flatten(1)
    assert len(seen.unique(dim=0)) == 24


def test_a_stream_is_refused(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(images(32))

    with pytest.raises(CompressionError, match="map-style DataLoader of training data"):
        trainer(tmp_path, Taking()).fit(TinyModule(), DataLoader(Stream(), batch_size=8), loaders()[1])


SCRIPT = """
import json, sys
import pytorch_lightning as pl
from pytorch_lightning.strategies import DDPStrategy
from test_gradients import Taking
from tiny import TinyModule, loaders

pl.seed_everything(0, verbose=False)
taking = Taking(batches=2)
trainer = pl.Trainer(
    accelerator="cpu", devices=2, max_epochs=2, callbacks=[taking], logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, strategy=DDPStrategy(process_group_backend="gloo"),
    default_root_dir=sys.argv[1],
)
trainer.fit(TinyModule("adam"), *loaders())
sums = [{name: g.flatten()[:3].tolist() for name, g in taken.items()} for taken in taking.taken]
open(f"{sys.argv[1]}/{trainer.global_rank}.json", "w").write(json.dumps(sums))
"""


@pytest.mark.slow
def test_two_processes_have_the_same(tmp_path):
    script = tmp_path / "fit.py"
    script.write_text(SCRIPT)
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{here}:{here.parent}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert any(first[0]["net.stem.0.weight"])
