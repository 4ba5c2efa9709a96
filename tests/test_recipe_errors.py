import random

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recipe_toys import BASE, recipe_fixture, toy_registry  # noqa: F401 - fixtures

from lightslim.errors import CompressionError
from lightslim.recipe import Recipe

pytestmark = pytest.mark.usefixtures("toy_registry")

# What to replace in BASE by what (or a line to put before the compressor section); then the line, the key path and a
# part of the message that follow.
BAD = {
    "unknown section": (("pruners:", "prunners:"), 1, "prunners", "did you mean 'pruners'?"),
    "unknown class": (("UniformPrune", "UniformPrun"), 5, "strategies.halve.class", "mean 'UniformPruneStrategy'?"),
    "no class": (("class: StructurePruner", ""), 2, "pruners.by_l1", "says its 'class'"),
    "unknown argument": (("target_ratio", "target_ratoi"), 8, "strategies.halve.target_ratoi", "mean 'target_ratio'?"),
    "wrong type": (("0.5", "half"), 8, "strategies.halve.target_ratio", "must be a number, not 'half'"),
    "no boolean for a number": (("0.5", "true"), 8, "strategies.halve.target_ratio", "must be a number, not True"),
    "not finite": (("0.5", ".nan"), 8, "strategies.halve.target_ratio", "must be a number, not nan"),
    "octal": (("start_epoch: 2", "start_epoch: 02"), 7, "strategies.halve.start_epoch", "a whole number, not '02'"),
    "out of range": (("0.5", "1.5"), 8, "strategies.halve.target_ratio", "must lie between 0 and 1"),
    "negative epoch": (("start_epoch: 2", "start_epoch: -1"), 7, "strategies.halve.start_epoch", "counted from 0"),
    "never acts": (("start_epoch: 2", "start_epoch: 10"), 7, "strategies.halve.start_epoch", "training ends after 10"),
    "unknown pruner": (("pruner: by_l1", "pruner: by_l2"), 6, "strategies.halve.pruner", "did you mean 'by_l1'?"),
    "unknown criterion": (
        ("StructurePruner}", "StructurePruner, criterions: {'*': l1norm}}"), 2, "pruners.by_l1", "mean 'l1_norm'?",
    ),
    "unknown strategy": (("[halve,", "[halv,"), 12, "compressor.strategies.0", "did you mean 'halve'?"),
    "listed twice": (("[halve, quantize]", "[halve, halve]"), 12, "compressor.strategies.1", "listed twice"),
    "no epochs": (("epoch: 10", "epoch: 0"), 11, "compressor.epoch", "must be 1 or more"),
    "epochs missing": (("epoch: 10", "seed: 1"), 10, "compressor", "needs the argument 'epoch'"),
    "eval_epoch": (("epoch: 10", "epoch: 10\n  eval_epoch: 0"), 12, "compressor.eval_epoch", "must be 1 or more"),
    "seed": (("epoch: 10", "epoch: 10\n  seed: 5000000000"), 12, "compressor.seed", "at most 4294967295"),
    "both names": ("compress_pass: {epoch: 1}", 10, "compress_pass", "another word"),
    "no strategy": (
        ("{class: Quant", "{class: 'recipe_toys:Distiller'}\n  q: {class: Quant"),
        9, "strategies.quantize.class", "is no CompressionStrategy",
    ),
    "one name": (("quantize: {", "quantize: {name: halve, "), 9, "strategies.quantize.name", "another strategy"),
    "order": (("start_epoch: 2", "start_epoch: 7"), 9, "strategies.quantize", "must be the last to act, but 'halve'"),
    "duplicate": (("  quantize:", "  halve:"), 9, "strategies.halve", "is given twice, first at"),
    "a name shared": (
        "distillers: {by_l1: {class: L2Distiller, teacher_feature_map: a, student_feature_map: b}}",
        10, "distillers.by_l1", "is the name of a pruner too",
    ),
    "numbered instance": (("by_l1: {", "1: {"), 2, "pruners.1", "must be text"),
    "section is a list": (("  by_l1: {class: StructurePruner}", "- by_l1"), 1, "pruners", "must be a mapping"),
    "trainer": ("trainer: {max_epoch: 3}", 10, "trainer.max_epoch", "did you mean 'max_epochs'?"),
    "two lengths": ("trainer: {max_epochs: 3}", 10, "trainer.max_epochs", "would fight"),
    "trainer's types": ("trainer: {deterministic: no}", 10, "trainer.deterministic", "'no'"),
    "short name": ("model: {class: Net}", 10, "model.class", "pkg.mod:Name"),
    "no module": ("model: {class: 'nowhere:Net'}", 10, "model.class", "ModuleNotFoundError"),
    "no attribute": ("model: {class: 'recipe_toys:Modle'}", 10, "model.class", "mean 'Model'?"),
    "missing argument": ("model: {class: 'recipe_toys:Model'}", 10, "model", "'width'"),
    "checkpoint": (
        "teacher: {class: 'recipe_toys:Model', width: 1, checkpoint: 3}",
        10, "teacher.checkpoint", "must be text",
    ),
    "nested object": (
        "trainer: {callbacks: [{class: 'recipe_toys:Bell', pich: 3}]}",
        10, "trainer.callbacks.0.pich", "did you mean 'pitch'?",
    ),
    "version": (("pruners:", "version: 2\npruners:"), 1, "version", "must be 1.0"),
    "unquoted star": (("StructurePruner}", "StructurePruner, criterions: {*: l1_norm}}"), 2, None, "quote a name"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "line", "keys", "part"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_named_with_its_place(recipe, tmp_path, change, line, keys, part):
    old, new = change if isinstance(change, tuple) else ("compressor:", f"{change}\ncompressor:")
    assert old in BASE
    with pytest.raises(CompressionError) as caught:
        recipe(BASE.replace(old, new, 1))
    place = f"{tmp_path / 'recipe.yaml'}:{line}: " + (f"{keys}: " if keys else "")
    assert str(caught.value).startswith(place)
    assert part in str(caught.value)


def test_among_strategies_that_start_together_the_listed_order_decides(recipe):
    together = BASE.replace("start_epoch: 2", "start_epoch: 6")
    recipe(together)
    with pytest.raises(CompressionError, match=r"yaml:9: strategies.quantize: .* but 'halve' acts after it"):
        recipe(together.replace("[halve, quantize]", "[quantize, halve]"))


SETTINGS = {
    "compressor.epohc.x=3": "--set compressor.epohc.x: compressor: there is no 'epohc'; did you mean 'epoch'?",
    "compresor.epoch=3": "--set compresor.epoch: there is no 'compresor'; did you mean 'compressor'?",
    "compressor.epohc=3": "--set compressor.epohc: compressor.epohc: compressor has no such argument; did you mean",
    "compressor.epoch=0": "--set compressor.epoch: compressor.epoch: must be 1 or more, not 0",
    "compressor.epoch.x=0": "--set compressor.epoch.x: compressor.epoch: is a single value",
    "compressor.strategies.2=halve": "--set compressor.strategies.2: compressor.strategies: there is no '2'",
    "compressor.strategies.1=halve": "--set compressor.strategies.1: compressor.strategies.1: 'halve' is listed twice",
    "compressor={epoch: 1, epoch: 2}": "--set compressor: epoch: is given twice",
    "model=*x": "--set model: found undefined alias 'x'; quote a name that begins with '*'",
    "include=x.yaml": "--set include: include: there is no such section",
    "version=3": "--set version: version: must be 1.0",
    "compressor.epoch": "--set compressor.epoch: must be written as key.path=value",
    "compressor..epoch=3": "--set compressor..epoch=3: must be written as key.path=value",
    "=3": "--set =3: must be written as key.path=value",
}


@pytest.mark.parametrize(("setting", "message"), SETTINGS.items(), ids=SETTINGS)
def test_a_bad_override_is_named(recipe, setting, message):
    with pytest.raises(CompressionError) as caught:
        recipe(BASE, setting)
    assert str(caught.value).startswith(message)


INCLUDES = {
    "itself": ("include: recipe.yaml", "", r"recipe.yaml:1: include: recipe.yaml -> recipe.yaml goes round"),
    "a circle": (
        "include: more.yaml",
        "include: [recipe.yaml]",
        r"more.yaml:1: include: recipe.yaml -> more.yaml -> r",
    ),
    "missing": ("include: [nowhere.yaml]", "", r"recipe.yaml:1: include: .*nowhere.yaml: cannot be read: No such file"),
    "no name": ("include: 3", "", r"recipe.yaml:1: include: must be a list"),
    "one name twice": (
        "include: more.yaml\npruners:\n  p: {class: StructurePruner}",
        "pruners:\n\n  p: {class: StructurePruner}",
        r"more.yaml:3: pruners.p: is given twice, first at .*recipe.yaml:3$",
    ),
    "a bad value": ("include: more.yaml", "\npruners: {p: {class: 3}}", r"more.yaml:2: pruners.p.class: must be text"),
}


@pytest.mark.parametrize(("text", "more", "message"), INCLUDES.values(), ids=INCLUDES)
def test_a_bad_include_is_named(recipe, tmp_path, text, more, message):
    (tmp_path / "more.yaml").write_text(more)
    with pytest.raises(CompressionError, match=message):
        recipe(text)


def test_what_a_user_module_raises_is_told(recipe, tmp_path):
    (tmp_path / "broken_module.py").write_text("raise SystemExit('bye')")
    with pytest.raises(
        CompressionError, match=r"yaml:1: model.class: 'broken_module' cannot be imported: SystemExit: bye"
    ):
        recipe("model: {class: 'broken_module:Net'}")


def test_what_a_constructor_refuses_later_has_its_place(recipe, tmp_path):
    (tmp_path / "choosy_module.py").write_text("def net(width: int):\n    raise ValueError('width is odd')\n")
    found = recipe("model:\n  class: choosy_module:net\n  width: 3")
    with pytest.raises(CompressionError, match=r"yaml:3: model.width: width is odd"):
        found.model()


VALUES = [None, True, -1, 0, 3, 10**6, 0.5, 1.5, -0.0, float("nan"), float("inf"), "", "none", "*", "(", "by_l1", "a:b"]
VALUES += [[], ["halve"], {}, {"class": "StructurePruner"}, {"class": 3}, [[[]]]]


def mutate(tree, draw):
    """Drop, retype, rename or duplicate something at a random depth."""
    while isinstance(tree, dict | list) and tree:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        key = keys[draw.randrange(len(keys))]
        if isinstance(tree[key], dict | list) and tree[key] and draw.random() < 0.75:
            tree = tree[key]
            continue
        change = draw.choice(["drop", "retype", "rename", "duplicate"])
        if change == "retype":
            tree[key] = draw.choice(VALUES)
        elif change == "duplicate" and isinstance(tree, list):
            tree.append(tree[key])
        elif isinstance(tree, dict) and change != "drop":
            tree[f"{key}{draw.choice(['x', '', '.', ':y'])}"] = tree[key] if change == "duplicate" else tree.pop(key)
        else:
            del tree[key]
        return


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32), st.integers(1, 3))
def test_a_mutated_recipe_is_read_or_refused(tmp_path, seed, count):
    draw = random.Random(seed)
    tree = yaml.safe_load(BASE)
    tree |= {
        "trainer": {"accelerator": "cpu", "callbacks": [{"class": "recipe_toys:Bell", "pitch": 1}]},
        "version": 1.0,
    }
    for _ in range(count):
        mutate(tree, draw)
    lines = yaml.safe_dump(tree, sort_keys=False).splitlines()
    if draw.random() < 0.2:
        lines.insert(draw.randrange(len(lines) + 1), draw.choice(lines))
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(lines))
    told = str(path)
    try:
        Recipe.from_yaml(path).strategies()
    except CompressionError as error:
        told = str(error)
    assert told.startswith(str(path))
