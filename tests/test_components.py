"""What every component must do, whoever wrote it; runs over the registry."""

import inspect
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from components import ROWS
from tiny import TinyModule, loaders, trainer

import lightslim
from lightslim.registry import registry

ENTRIES = [(entry.kind, entry.name) for entry in registry().entries() if entry.distribution == "lightslim"]
OF = {kind: [name for k, name in ENTRIES if k == kind] for kind, _ in ENTRIES}
CARDS = "\n".join(path.read_text() for path in Path(lightslim.__file__).parent.glob("*/README.md"))


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_every_component_has_its_row_its_docstring_and_its_place_on_a_card(kind, name):
    component = registry().get(kind, name)
    assert (kind, name) in ROWS
    assert inspect.getdoc(component)
    assert "Example" in inspect.getdoc(component)
    assert f"`{name}`" in CARDS or name in CARDS


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, n in ENTRIES if inspect.isclass(registry().get(k, n))])
def test_constructor_arguments_are_hinted_and_have_defaults(kind, name):
    for parameter in inspect.signature(registry().get(kind, name)).parameters.values():
        assert parameter.annotation is not parameter.empty
        assert parameter.default is not parameter.empty


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("name", OF["strategy"])
def test_a_strategy_trains_acts_and_is_read_back_from_its_checkpoint(tmp_path, name):
    pl.seed_everything(0)
    module, strategy = TinyModule("adam"), ROWS["strategy", name]()
    saver = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit = trainer(tmp_path, strategy, saver, enable_checkpointing=True)
    fit.fit(module, *loaders())
    assert [record["epoch"] for record in strategy.history] == [1]
    state = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)["callbacks"][strategy.state_key]
    again = ROWS["strategy", name]()
    again.load_state_dict(state)
    assert again.history == strategy.history
    assert same(again.state_dict(), strategy.state_dict())


@pytest.mark.parametrize("name", OF["strategy"])
def test_a_strategy_resumes_with_a_fresh_module_to_the_same_weights(tmp_path, name):
    """Epoch-end checkpoints, shuffled data, dropout: the checkpoint holds all that determines the rest of the run."""

    def fit(seed, checkpoint=None):
        pl.seed_everything(0)
        strategy = ROWS["strategy", name]()  # a teacher is to be the same
        pl.seed_everything(seed)
        module = TinyModule("adam")
        saver = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        fit = trainer(tmp_path, strategy, saver, enable_checkpointing=True)
        fit.fit(module, *loaders(), ckpt_path=checkpoint)
        return module

    whole = fit(0)
    for epoch in (0, 1):
        resumed = fit(1 + epoch, tmp_path / f"epoch={epoch}.ckpt")
        for name_, parameter in whole.named_parameters():
            assert torch.equal(parameter, resumed.get_parameter(name_)), name_


@pytest.mark.parametrize("name", OF["criterion"])
def test_a_criterion_scores_the_slices_of_any_axis(name):
    criterion = registry().get("criterion", name)
    weight = torch.randn(4, 3, 2)
    for axis in range(3):
        scores = criterion(weight, axis=axis)
        assert scores.shape == (weight.shape[axis],)
        moved = criterion(weight.movedim(axis, 0), axis=0)
        torch.testing.assert_close(scores, moved)
    empty = torch.cat([weight, torch.zeros(1, 3, 2)])
    assert criterion(empty).argmin() == 4, "a slice of zeros is the least important"
