"""Distillation by recipe: the seed's YAML word for word, teachers from checkpoints, the Compressor's arguments."""

import json
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from test_distill_fit import data, wide
from tiny import TinyModule, images
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightslim import CompressionError, Compressor
from lightslim.cli import main

SNIPPETS = Path(__file__).parent / "recipes"
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


def placed(root, path, module):
    """Put ``module`` at ``path``, with plain modules on the way."""
    *way, last = path.split(".")
    for name in way:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = getattr(root, name)
    root.add_module(last, module)
    return module


class Named(pl.LightningModule):
    """Two feature maps of equal size, scores and probabilities, under the names that it is told."""

    def __init__(self, first, second, scores, last, width):
        super().__init__()
        self.layers = [
            placed(self, first, nn.Conv2d(3, 6, 3, padding=1)),
            placed(self, second, nn.Conv2d(6, 8, 3, padding=1)),
            placed(self, scores, nn.Linear(8, width)),
            placed(self, last, nn.Linear(width, 4)),
        ]

    def forward(self, x):
        first, second, scores, last = self.layers
        return last(torch.relu(scores(torch.relu(second(torch.relu(first(x)))).mean(dim=(2, 3)))))

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


STUDENT = ("depthwise_conv2d_1.tmp_0", "conv2d_3.tmp_0", "fc_0.tmp_0", "student.tmp_1")
TEACHER = (
    "res2a_branch2a.conv2d.output.1.tmp_0",
    "res3a_branch2a.conv2d.output.1.tmp_0",
    "fc_1.tmp_0",
    "teacher.tmp_1",
)


def test_the_seeds_recipe_runs_word_for_word(tmp_path, monkeypatch):
    """Names with dots are paths of submodules here, so modules of those paths are all it takes."""
    monkeypatch.chdir(tmp_path)
    included = "".join(f"- {SNIPPETS / name}.yaml\n" for name in ("distillation", "fsp", "l2", "soft_label"))
    (tmp_path / "distil.yaml").write_text(
        f"include:\n{included}compressor: {{epoch: 2, strategies: [distillation_strategy]}}\n"
    )
    compressor = Compressor(
        Named(*STUDENT, 5), *data(), teachers=[Named(*TEACHER, 5)], distiller_optimizer=torch.optim.Adam, trainer=QUIET
    )
    with pytest.warns(UserWarning, match="end_epoch is 130, but training ends after 2 epochs"):
        _, result = compressor.config("distil.yaml").run()
    (strategy,) = result["strategies"]
    assert strategy["history"][0]["losses"] == ["fsp_distillation_loss", "l2loss_fc_0.tmp_0_fc_1.tmp_0"]


RECIPE = """
model: {class: "tiny:TinyModule", optimizer: adam}
teacher: {class: "test_distill_fit:Wide", checkpoint: teacher.pt}
data: {class: "quadrants:Quadrants"}
trainer: {accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
pruners: {by_l1: {class: StructurePruner}}
distillers:
  scores: {class: SoftLabelDistiller, student_temperature: 4, teacher_temperature: 4, scale_by_temperature: true}
  stems: {class: L2Distiller, student_feature_map: net.stem, teacher_feature_map: stem, project: true}
strategies:
  distil:
    class: DistillationStrategy
    distillers: [scores, stems]
    end_epoch: 1
    distiller_optimizer: {optimizer: AdamW, lr: 1e-3}
  halve: {class: UniformPruneStrategy, pruner: by_l1, start_epoch: 1, target_ratio: 0.5}
  heal: {class: DistillationStrategy, distillers: [scores], teacher: self, start_epoch: 1, end_epoch: 2}
  quantize: {class: QuantizationStrategy, start_epoch: 2, activation_quantize_type: moving_average_abs_max}
compressor: {epoch: 3, seed: 1, strategies: [distil, halve, heal, quantize]}
"""


class Quadrants(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(images(64, seed=1), batch_size=16)

    def val_dataloader(self):
        return DataLoader(images(32, seed=2), batch_size=16)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quadrants.py").write_text("from test_distill_run import Quadrants\n")
    torch.save(wide().state_dict(), tmp_path / "teacher.pt")
    (tmp_path / "chain.yaml").write_text(RECIPE)
    return tmp_path / "chain.yaml"


def test_a_chain_of_four_in_one_recipe(recipe, capsys):
    """Distil from a checkpoint, prune, distil from the unpruned self, quantize."""
    assert main(["check", str(recipe)]) == 0
    said = capsys.readouterr().out
    assert "(8, 24, 8, 8)" in said
    assert main(["run", str(recipe), "--out", "run"]) == 0
    result = json.loads(Path("run/result.json").read_text())
    acts = [(one["name"], record["act"], record["epoch"]) for one in result["strategies"] for record in one["history"]]
    assert acts == [
        ("distil", "distil", 0), ("distil", "end of distillation", 1), ("halve", "prune", 1),
        ("heal", "distil", 1), ("heal", "end of distillation", 2), ("quantize", "quantize", 2),
    ]  # fmt: skip
    assert result["after"]["flops"] < 0.6 * result["before"]["flops"]
    checkpoint = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == set(TinyModule().state_dict())
    assert main(["inspect", "run/checkpoints/last.ckpt"]) == 0
    assert "distil at epoch 0" in capsys.readouterr().out


def test_teachers_of_the_compressor_stand_for_those_of_the_recipe(recipe):
    (recipe.parent / "teacher.pt").unlink()
    mine = wide(width=30)
    Compressor(TinyModule("adam"), *data(), teachers={"teacher": mine}, trainer=QUIET).config(recipe).run()
    assert mine.seen


def test_a_recipe_without_its_teachers_checkpoint_says_so_before_anything_is_made(recipe):
    (recipe.parent / "teacher.pt").unlink()
    with pytest.raises(CompressionError, match=r"teacher\.checkpoint: teacher\.pt: there is no such checkpoint"):
        Compressor(TinyModule("adam"), *data(), trainer=QUIET, out="made").config(recipe).run()
    assert not Path("made").exists()


@pytest.mark.filterwarnings("ignore:.*not listed under compressor.strategies.*")
def test_several_teachers_by_name(recipe):
    text = RECIPE.replace("teacher: {class", "teachers:\n  big: {class").replace("scores: {", "scores: {teacher: big, ")
    text = text.replace("checkpoint: teacher.pt}", 'checkpoint: teacher.pt}\n  small: {class: "test_distill_fit:Wide"}')
    text = text.replace("stems: {", "stems: {teacher: small, ").replace("[distil, halve, heal, quantize]", "[distil]")
    recipe.write_text(text)
    _, result = Compressor(TinyModule("adam"), *data(), trainer=QUIET).config(recipe).run()
    assert result["strategies"][0]["history"][0]["teachers"] == ["big", "small"]
