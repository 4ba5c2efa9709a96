"""Components as plain as can be, with the signatures that recipes of the seed need, and what else recipes may name."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import pytest
import pytorch_lightning as pl

from lightslim import DistillationStrategy, FSPDistiller, L2Distiller, SoftLabelDistiller
from lightslim.prune import SensitivePruneStrategy, StructurePruner, UniformPruneStrategy, l1_norm
from lightslim.recipe import Recipe, drafts
from lightslim.registry import Registry
from lightslim.strategy import CompressionStrategy

BASE = """\
pruners:
  by_l1: {class: StructurePruner}
strategies:
  halve:
    class: UniformPruneStrategy
    pruner: by_l1
    start_epoch: 2
    target_ratio: 0.5
  quantize: {class: QuantizationStrategy, start_epoch: 6}
compressor:
  epoch: 10
  strategies: [halve, quantize]
"""


class QuantizationStrategy(CompressionStrategy):
    must_be_last: ClassVar[bool] = True

    def __init__(
        self,
        start_epoch: int = 0,
        end_epoch: int | None = None,
        float_model_save_path: str | None = None,
        mobile_model_save_path: str | None = None,
        int8_model_save_path: str | None = None,
        weight_bits: int = 8,
        activation_bits: int = 8,
        weight_quantize_type: Literal["abs_max", "channel_wise_abs_max"] = "abs_max",
        activation_quantize_type: Literal["abs_max", "range_abs_max"] = "abs_max",
        save_in_nodes: Sequence[str] | None = None,
        save_out_nodes: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(start_epoch, end_epoch, name)
        self.save_in_nodes = save_in_nodes


class Distiller:
    """No strategy."""


class Bell(pl.Callback):
    def __init__(self, pitch: float, loud: bool = False) -> None:
        self.pitch, self.loud = pitch, loud


class Model(pl.LightningModule):
    built = 0

    def __init__(self, width: int, bell: Bell | None = None) -> None:
        super().__init__()
        type(self).built += 1
        self.width, self.bell = width, bell


@pytest.fixture
def toy_registry(monkeypatch):
    """Recipes find the toys, and the real components that they go with."""
    found = Registry()
    found.add("criterion", l1_norm)
    found.add("pruner", StructurePruner)
    for distiller in (FSPDistiller, L2Distiller, SoftLabelDistiller):
        found.add("distiller", distiller)
    for strategy in (UniformPruneStrategy, SensitivePruneStrategy, QuantizationStrategy, DistillationStrategy):
        found.add("strategy", strategy)
    monkeypatch.setattr(drafts, "registry", lambda: found)


@pytest.fixture(name="recipe")
def recipe_fixture(tmp_path):
    """From text and overrides to a recipe."""

    def read(text, *overrides, name="recipe.yaml"):
        (tmp_path / name).write_text(text)
        return Recipe.from_yaml(tmp_path / name, overrides)

    return read
