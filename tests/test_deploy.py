"""Files written by a running fit and by the command line, measured in their runtimes."""

import json
import sys

import pytest
import pytorch_lightning as pl
import torch
from test_compressor import DATA
from test_quantize_fit import quantized
from tiny import TinyModule, TinyNet, images, loaders, trainer

from lightslim import CompressionError, load_compressed
from lightslim.cli import main
from lightslim.export.exporter import Exporter
from lightslim.registry import registry
from lightslim.rundir import read_result

pytest.importorskip("onnxruntime")

RECIPE = """
model: {class: "tiny:TinyModule", optimizer: adam}
data: {class: "tinydata:Quadrants"}
trainer: {accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
strategies:
    halve: {class: UniformPruneStrategy, start_epoch: 1, target_ratio: 0.4}
    quantize:
        class: QuantizationStrategy
        start_epoch: 2
        weight_quantize_type: channel_wise_abs_max
        activation_quantize_type: moving_average_abs_max
        int8_model_save_path: exports/model.onnx
        float_model_save_path: exports/model.pt
compressor: {epoch: 3, strategies: [halve, quantize]}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tinydata.py").write_text(DATA)
    monkeypatch.delitem(sys.modules, "tinydata", raising=False)
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


def test_a_recipe_ends_with_files_and_the_command_line_writes_the_same(recipe, capsys):
    assert main(["run", str(recipe), "--out", "run"]) == 0
    result = read_result(recipe.parent / "run")
    int8, rounded = result["exports"]["int8"], result["exports"]["float"]
    assert int8["metrics"].keys() == {"val_loss", "val_acc"}
    assert int8["max_abs_diff"] < 0.5  # a value between two codes, which goes either way, moves a score by 0.1
    assert rounded["metrics"]["val_acc"] > 0.5
    written = recipe.parent / "run" / "exports" / "model.onnx"
    assert int8["path"] == str(written) or written.samefile(int8["path"])
    assert int8["bytes"] == written.stat().st_size
    assert json.loads(written.with_name("model.onnx.json").read_text())["format"] == "int8"
    loaded = load_compressed(TinyModule, written.with_name("model.pt"))
    assert loaded.net.stem[0].out_channels < 16

    assert main(["export", "run/checkpoints/last.ckpt", "--as", "int8", "again.onnx"]) == 0
    assert (recipe.parent / "again.onnx").read_bytes() == written.read_bytes()
    assert main(["export", "run/checkpoints/last.ckpt", "--as", "onnx", "float.onnx", "--option", "opset=20"]) == 0
    capsys.readouterr()
    assert main(["bench", "again.onnx", "float.onnx", "--rounds", "5", "--threads", "1"]) == 0
    said = capsys.readouterr().out
    assert "onnxruntime" in said
    assert "1 threads" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "run.ckpt", "--as", "int8", "x"], "there is no such checkpoint"),
        (["export", "weights.pt", "--as", "int8", "x"], "lies in no run directory"),
        (["export", "weights.pt", "--as", "int9", "x", "--recipe", "small.yaml"], "did you mean 'int8'"),
        (["export", "weights.pt", "--as", "int8", "x", "--recipe", "small.yaml", "--option", "opst=3"], "'opset'"),
        (
            ["export", "weights.pt", "--as", "int8", "x", "--recipe", "small.yaml", "--option", "opset"],
            "key.path=value",
        ),
        (["bench", "weights.pt"], "was not exported by lightslim"),
        (["bench", "nowhere.onnx"], "there is no such file"),
    ],
)
def test_what_the_command_line_cannot_do_is_one_line(recipe, capsys, arguments, message):
    torch.save(TinyModule().state_dict(), "weights.pt")
    before = {path.name for path in recipe.parent.iterdir()}
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said
    assert {path.name for path in recipe.parent.iterdir()} == before


def test_files_are_written_at_the_end_of_the_phase_and_of_the_fit(tmp_path):
    module, strategy = TinyModule("adam"), quantized(end_epoch=2, int8_model_save_path="model.onnx")
    trainer(tmp_path, strategy, max_epochs=4).fit(module, *loaders())
    exports = [record for record in strategy.history if record["act"] == "export"]
    assert [record["epoch"] for record in exports] == [2, 4]
    assert json.loads(json.dumps(exports)) == exports, "plain values"
    short = quantized(end_epoch=3, int8_model_save_path="model.onnx")
    trainer(tmp_path, short, max_epochs=3).fit(TinyModule("adam"), *loaders())
    assert len([record for record in short.history if record["act"] == "export"]) == 1


class Headless(TinyModule):
    """Its steps never call ``forward``."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch[0]).sum())

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (TinyModule, {"int8_model_save_path": "taken"}, "taken"),
        (Headless, {"int8_model_save_path": "x.onnx"}, "never call its forward"),
        (TinyModule, {"int8_model_save_path": "x", "weight_bits": 9}, "9 bits"),
        (TinyModule, {"int8_model_save_path": "x", "export_options": {"int8": {"opst": 18}}}, "'opset'"),
        (TinyModule, {"export_options": {"int8": {"opset": 18}}}, "no int8_model_save_path"),
        (TinyModule, {"int8_model_save_path": "x", "save_out_nodes": ["net.sten"]}, "did you mean 'net.stem'"),
    ],
)
def test_what_cannot_be_written_is_known_before_the_first_step(tmp_path, build, arguments, message):
    (tmp_path / "taken").mkdir()
    module = build()
    with pytest.raises(CompressionError, match=message):
        trainer(tmp_path, quantized(**arguments), num_sanity_val_steps=0).fit(module, *loaders())
    assert module.losses == []
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_missing_runtime_is_known_in_setup(tmp_path, monkeypatch):
    exporter = registry().get("exporter", "int8")
    monkeypatch.setattr(exporter, "modules", ("no_such_runtime",))
    with pytest.raises(CompressionError, match=r"needs no_such_runtime: pip install 'lightslim\[onnx\]'"):
        trainer(tmp_path, quantized(int8_model_save_path="x")).fit(TinyModule(), *loaders())


def test_a_written_model_can_be_cut(tmp_path):
    strategy = quantized(int8_model_save_path="model.onnx", save_in_nodes=["net.stem"], save_out_nodes=["net.head"])
    trainer(tmp_path, strategy).fit(TinyModule("adam"), *loaders())
    (file,) = strategy.history[-1]["files"].values()
    assert file["inputs"]["net.stem"]["shape"][1:] == [16, 8, 8]
    assert file["metrics"] == {}, "a part does not stand for the whole"


def test_the_average_of_the_weights_is_what_is_written(tmp_path):
    from pytorch_lightning.callbacks import EMAWeightAveraging

    module, strategy = TinyModule("adam"), quantized(float_model_save_path="model.pt")
    trainer(tmp_path, strategy, EMAWeightAveraging(decay=0.9)).fit(module, *loaders())
    loaded, step = load_compressed(TinyModule, tmp_path / "model.pt"), 1 / 127
    for name, parameter in loaded.named_parameters():
        difference = (parameter - module.get_parameter(name)).abs().max()
        assert difference <= step * module.get_parameter(name).abs().max(), name


def test_a_fast_dev_run_writes_nothing(tmp_path):
    strategy = quantized(start_epoch=0, int8_model_save_path="model.onnx")
    trainer(tmp_path, strategy, fast_dev_run=True).fit(TinyModule(net=TinyNet()), *loaders())
    assert not list(tmp_path.glob("model*"))


def test_a_run_that_is_stopped_leaves_no_half_file(tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.current_epoch == 2:
                raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        trainer(tmp_path, quantized(int8_model_save_path="model.onnx"), Stop()).fit(TinyModule(), *loaders())
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_far_off_is_warned_of(tmp_path):
    def doubled(model, example_inputs, path):
        path.write_text("twice")

    exporter = Exporter(doubled, open=lambda path, model=None, threads=None: lambda *inputs: [1.2 * model(*inputs)])
    with pytest.warns(UserWarning, match="'doubled' file are off by 20%"):
        exporter(TinyNet(), images(4).tensors[0], tmp_path / "a.bin")
