"""What a strategy must do in a real run: act, leave the module trainable, resume to the last bit, export."""

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from lightslim.export import export
from lightslim.strategy import CompressionStrategy
from lightslim.testing.tiny import TinyModule, tiny_images, tiny_loaders, tiny_trainer

Make = Callable[[], CompressionStrategy]
# Relative to the norm of the outputs: weights that are only written and read back, and integers
_TOLERANCE = {"float": 1e-4}


def assert_trains(make: Make) -> None:
    """Fit :class:`TinyModule` for three epochs: the strategy acts at epoch 1, and all that must hold then holds.

    The module stays of its class with its own ``training_step``; the weights are finite; each trainable parameter is in
    one optimizer group and its state has its shape; a checkpoint of plain types restores the strategy's state.

    Args:
        make: builds a fresh strategy that acts at epoch 1.

    Raises:
        AssertionError: says what does not hold.

    Example:
        >>> from lightslim import UniformPruneStrategy
        >>> assert_trains(lambda: UniformPruneStrategy(target_ratio=0.5, start_epoch=1))
    """
    with tempfile.TemporaryDirectory() as folder:
        module, strategy, trainer = _fit(make, Path(folder))
        saved = torch.load(Path(folder) / "epoch=2.ckpt", weights_only=True)["callbacks"]
    epochs = [record.get("epoch") for record in strategy.history]
    assert epochs[:1] == [1], f"{strategy.name} is to act first at epoch 1; its history has the epochs {epochs}"
    assert type(module) is TinyModule, f"{strategy.name} changed the module's class to {type(module).__name__}"
    assert "training_step" not in vars(module), f"{strategy.name} left its own training_step on the module"
    _check_parameters(module, trainer)
    again = make()
    assert strategy.state_key in saved, f"{strategy.name}: the checkpoint holds no state of it"
    again.load_state_dict(saved[strategy.state_key])
    assert _same(again.state_dict(), strategy.state_dict()), f"{strategy.name}: its state differs when read back"


def assert_resumes(make: Make, folder: str | Path) -> None:
    """Resume from the checkpoints before and after the act with a fresh module: bitwise the uninterrupted run.

    Args:
        make: builds a fresh strategy that acts at epoch 1.
        folder: for the checkpoints.

    Raises:
        AssertionError: names the first parameter or buffer that differs.
    """
    folder = Path(folder)
    whole = _fit(make, folder)[0].state_dict()
    for epoch in (0, 1):
        resumed = _fit(make, folder, seed=1 + epoch, checkpoint=folder / f"epoch={epoch}.ckpt")[0].state_dict()
        assert resumed.keys() == whole.keys(), f"resumed after epoch {epoch}, the module holds other tensors"
        for name, value in whole.items():
            same = _same(value, resumed[name])
            assert same, f"resumed after epoch {epoch}, {name} differs from the run without interruption"


def assert_exports(make: Make, folder: str | Path, format: str = "float") -> None:
    """Export the fitted module, run the file, and compare it with the module.

    Args:
        make: builds a fresh strategy that acts at epoch 1.
        folder: for the file.
        format: the name of an exporter.

    Raises:
        AssertionError: the file gives something else.
        CompressionError: the format or its runtime is not there, or the model does not fit it.
    """
    module, strategy, _ = _fit(make, Path(folder))
    inputs = tiny_images(32, seed=2).tensors[0]
    manifest = export(module, inputs, Path(folder) / f"model.{format}", format=format)
    difference, allowed = manifest["rel_diff"], _TOLERANCE.get(format, 0.05)
    assert difference <= allowed, (
        f"{strategy.name}: the {format} file's outputs are {difference:.2g} from the module's, more than {allowed:g}"
    )


def _fit(
    make: Make, folder: Path, seed: int = 0, checkpoint: Path | None = None
) -> tuple[TinyModule, CompressionStrategy, Trainer]:
    """Three epochs, saved after each; shuffled data and dropout, so that a state left out of a checkpoint shows."""
    seed_everything(0, verbose=False)
    strategy = make()  # what it draws, as a teacher, is to be the same each time
    seed_everything(seed, verbose=False)
    module = TinyModule("adam")
    saver = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, enable_version_counter=False)
    trainer = tiny_trainer(folder, strategy, saver, enable_checkpointing=True)
    trainer.fit(module, *tiny_loaders(), ckpt_path=checkpoint)
    return module, strategy, trainer


def _check_parameters(module: TinyModule, trainer: Trainer) -> None:
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    trained = [id(parameter) for group in groups for parameter in group["params"]]
    states: dict[Any, Any] = dict(itertools.chain.from_iterable(o.state.items() for o in trainer.optimizers))
    for name, parameter in module.named_parameters():
        assert bool(torch.isfinite(parameter).all()), f"{name} holds NaN or infinite values after the fit"
        times = trained.count(id(parameter))
        assert times == 1 or not parameter.requires_grad, f"{name} is in {times} optimizer groups; it must be in one"
        for key, value in states.get(parameter, {}).items():
            fits = not isinstance(value, Tensor) or value.ndim == 0 or value.shape == parameter.shape
            assert fits, f"{name} is {tuple(parameter.shape)}, but its optimizer's {key} is {tuple(value.shape)}"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and bool(torch.equal(a, b))
    return bool(a == b)
