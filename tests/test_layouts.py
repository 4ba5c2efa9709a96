"""Convolutions whose weights lie channels last, as they do where somebody wants them fast."""

import pytest
import pytorch_lightning as pl
import torch
from components import ROWS
from tiny import TinyModule, loaders, trainer


@pytest.mark.parametrize("name", [name for kind, name in ROWS if kind == "strategy"])
def test_the_layout_stays_and_the_numbers_are_those_of_the_other(tmp_path, name):
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last):
        pl.seed_everything(0, verbose=False)
        module = TinyModule().to(memory_format=layout)
        strategy = ROWS["strategy", name]()
        torch.manual_seed(1)
        trainer(tmp_path / str(layout), strategy).fit(module, *loaders())
        assert strategy.history
        ends.append(dict(module.named_parameters()))
        kernels = [p for p in module.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
        assert kernels
        assert all(kernel.is_contiguous(memory_format=layout) for kernel in kernels)
    assert all(ends[0][key].shape == ends[1][key].shape for key in ends[0])
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, rtol=0.05, atol=0.02)
