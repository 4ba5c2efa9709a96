import sys
from pathlib import Path

import pytest
import torch
from recipe_toys import BASE, Bell, FSPDistiller, Model, recipe_fixture, toy_registry  # noqa: F401 - fixtures

from lightslim.errors import CompressionError
from lightslim.recipe import Recipe
from lightslim.yamlfile import dump

pytestmark = pytest.mark.usefixtures("toy_registry")

SNIPPETS = Path(__file__).parent / "recipes"  # the YAML examples of the seed, word for word


def joined(*names):
    return "".join((SNIPPETS / f"{name}.yaml").read_text() for name in names)


@pytest.mark.parametrize("name", ["pruners", "quantization", "fsp", "l2", "soft_label"])
def test_a_snippet_of_the_seed_stands_alone(name):
    recipe = Recipe.from_yaml(SNIPPETS / f"{name}.yaml")
    assert recipe.epoch == (20 if name == "quantization" else None)


def test_two_steps_of_pruning(recipe):
    found = recipe(joined("pruners", "two_steps", "compress_pass"))
    first, second = found.strategies()
    assert (first.name, first.start_epoch, second.name, second.start_epoch) == (
        "pruning_strategy_0", 0, "pruning_strategy_1", 10,
    )  # fmt: skip
    assert first.task.pruner is second.task.pruner
    assert first.task.pruner.criterions == {"*": "l1_norm"}
    assert (found.epoch, found.checkpoint_path, found.eval_epoch) == (120, "./checkpoints/", 1)


def test_quantization_whose_compressor_is_indented_by_one_space():
    found = Recipe.from_yaml(SNIPPETS / "quantization.yaml")
    (strategy,) = found.strategies()
    assert (strategy.start_epoch, strategy.end_epoch, strategy.save_in_nodes) == (0, 10, ["image"])
    assert (found.epoch, found.checkpoint_path) == (20, "./checkpoints_quan/")


@pytest.mark.parametrize(("name", "epoch"), [("uniform", 100), ("sensitive", 200)])
def test_pruning(recipe, name, epoch):
    found = recipe(joined("pruners", name))
    assert found.epoch == epoch
    assert [strategy.name for strategy in found.strategies()] == [f"{name}_pruning_strategy"]


def test_distillation_from_files_that_each_have_distillers(recipe):
    names = ["distillation", "fsp", "l2", "soft_label"]
    found = recipe("include:\n" + "".join(f"- {SNIPPETS / name}.yaml\n" for name in names))
    assert found.unlisted == ("distillation_strategy",)
    assert list(found.resolved()["distillers"]) == ["fsp_distiller", "l2_distiller", "soft_label_distiller"]


def test_distillers_are_found_by_name(recipe):
    listed = f"include: {SNIPPETS}/distillation.yaml\ncompressor: {{epoch: 130, strategies: [distillation_strategy]}}\n"
    found = recipe(
        joined("fsp")
        + "    l2_distiller: {class: L2Distiller, teacher_feature_map: a, student_feature_map: b}\n"
        + listed
    )
    (strategy,) = found.strategies()
    assert [type(distiller).__name__ for distiller in strategy.distillers] == ["FSPDistiller", "L2Distiller"]
    assert isinstance(strategy.distillers[0], FSPDistiller)
    assert strategy.distillers[0].student_pairs == [("depthwise_conv2d_1.tmp_0", "conv2d_3.tmp_0")]


@pytest.mark.parametrize("name", ["two_steps", "uniform", "sensitive", "distillation"])
def test_a_name_that_no_snippet_here_defines_is_an_error(name):
    with pytest.raises(CompressionError, match=r"yaml:\d+: strategies\.\w+\.(pruner|distillers\.0): nothing is named"):
        Recipe.from_yaml(SNIPPETS / f"{name}.yaml")


def test_strategies_are_new_each_time_and_in_the_listed_order(recipe):
    found = recipe(BASE)
    assert [strategy.name for strategy in found.strategies()] == ["halve", "quantize"]
    assert found.strategies()[0] is not found.strategies()[0]
    assert found.strategies()[0].task.pruner is not found.strategies()[0].task.pruner


def test_unlisted_strategies_are_checked_too(recipe):
    assert recipe(BASE.replace("[halve, quantize]", "[quantize]")).unlisted == ("halve",)
    with pytest.raises(CompressionError, match="target_ratio"):
        recipe(BASE.replace("[halve, quantize]", "[quantize]").replace("0.5", "1.5"))


OBJECTS = """\
model: {class: "recipe_toys:Model", width: 8, bell: {class: "recipe_toys:Bell", pitch: 440}}
teacher: {class: "recipe_toys:Model", width: 64, checkpoint: teacher.ckpt}
trainer:
  accelerator: cpu
  precision: 16-mixed
  limit_train_batches: 4
  callbacks: [{class: "recipe_toys:Bell", pitch: 1e3, loud: true}]
"""


def test_objects_are_built_when_asked_for(recipe):
    before = Model.built
    found = recipe(OBJECTS)
    assert Model.built == before
    assert (found.model().width, found.model().bell.pitch) == (8, 440)
    assert found.teacher_checkpoint == "teacher.ckpt"
    with pytest.raises(CompressionError, match=r"recipe.yaml:2: teacher.checkpoint: teacher.ckpt: there is no such"):
        found.teacher()
    assert found.data() is None
    arguments = found.trainer_arguments()
    (bell,) = arguments.pop("callbacks")
    assert isinstance(bell, Bell)
    assert (bell.pitch, bell.loud) == (1000.0, True)
    assert arguments == {"accelerator": "cpu", "precision": "16-mixed", "limit_train_batches": 4}


TEACHERS = """\
teachers:
  big: {class: "torch.nn:Linear", in_features: 2, out_features: 3, checkpoint: CKPT}
  fresh: {class: "torch.nn:Linear", in_features: 2, out_features: 5}
"""


def test_teachers_come_with_the_weights_of_their_checkpoints(recipe, tmp_path):
    trained = torch.nn.Linear(2, 3)
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "big.ckpt")
    found = recipe(TEACHERS.replace("CKPT", str(tmp_path / "big.ckpt"))).teachers()
    assert torch.equal(found["big"].weight, trained.weight)
    assert found["fresh"].out_features == 5


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (torch.nn.Linear(2, 4).state_dict(), "does not fit Linear.*size mismatch"),
        ({"weight": torch.zeros(3, 2)}, "does not fit Linear.*Missing key"),
        ({**torch.nn.Linear(2, 3).state_dict(), "more": torch.zeros(1)}, "does not fit Linear.*Unexpected key"),
        ({"weight": Payload()}, "cannot be read as a checkpoint"),
    ],
    ids=["shape", "missing", "too much", "payload"],
)
def test_a_teachers_checkpoint_that_is_not_its_own_is_refused(recipe, tmp_path, monkeypatch, saved, message):
    monkeypatch.chdir(tmp_path)
    torch.save(saved, tmp_path / "big.ckpt")
    found = recipe(TEACHERS.replace("CKPT", "big.ckpt"))
    with pytest.raises(CompressionError, match=r"(?s)recipe.yaml:2: teachers.big.checkpoint: big.ckpt " + message):
        found.teachers()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "teacher: {class: 'torch.nn:Identity'}\nteachers: {a: {class: 'torch.nn:Identity'}}",
            "there is a teacher section",
        ),
        ("teachers: {a: 3}", "teachers.a: must be a mapping"),
        ("teachers: {a: {class: 'torch.nn:Identity', checkpoint: 3}}", "teachers.a.checkpoint: must be text"),
    ],
)
def test_teachers_that_cannot_be_meant_are_refused(recipe, text, message):
    with pytest.raises(CompressionError, match=message):
        recipe(text)


def test_a_teacher_must_be_a_module(recipe):
    with pytest.raises(CompressionError, match=r"teacher\.class: Bell is no module"):
        recipe("teacher: {class: 'recipe_toys:Bell', pitch: 1}").teachers()


def test_classes_are_found_beside_the_recipe(recipe, tmp_path):
    (tmp_path / "beside_the_recipe.py").write_text("def net(width: int):\n    return ['net', width]\n")
    path = list(sys.path)
    assert recipe("model: {class: 'beside_the_recipe:net', width: 3}").model() == ["net", 3]
    assert sys.path == path


def test_overrides(recipe):
    changes = ["strategies.halve.target_ratio=3e-1", "compressor.strategies=[halve]", "trainer={accelerator: cpu}"]
    found = recipe(BASE, *changes, "pruners.by_l1.criterions={conv1.weight: l1_norm}")
    (halve,) = found.strategies()
    assert halve.task.target_ratio == 0.3
    assert halve.task.pruner.criterions == {"conv1.weight": "l1_norm"}
    assert found.trainer_arguments() == {"accelerator": "cpu"}
    assert found.unlisted == ("quantize",)


def test_the_resolved_recipe_reads_back_the_same(recipe, tmp_path):
    (tmp_path / "pruners.yaml").write_text(
        "version: 1.0\npruners:\n  p: {class: StructurePruner, criterions: {'*': l1_norm}}\n"
    )
    first = recipe("include: [pruners.yaml]\n" + OBJECTS, "trainer.accelerator=gpu")
    again = recipe(dump(first.resolved()), name="resolved.yaml")
    assert again.resolved() == first.resolved()
    assert again.resolved()["trainer"]["accelerator"] == "gpu"
    first.resolved()["trainer"].clear()
    assert first.resolved() == again.resolved()


def test_a_file_included_twice_counts_once(recipe, tmp_path):
    (tmp_path / "pruners.yaml").write_text("pruners: {p: {class: StructurePruner}}\n")
    (tmp_path / "more.yaml").write_text("include: pruners.yaml\n")
    assert list(recipe("include: [pruners.yaml, more.yaml]").resolved()["pruners"]) == ["p"]
