import doctest
import gzip
import hashlib
import importlib
import pickle
import struct
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml
from torch import nn

from experiments import data, idx
from experiments.data import Digits, FashionMNIST, find_fashion
from experiments.images import as_it_is, shift_and_flip
from experiments.models import NETWORKS, ImageClassifier, MobileNetV1, MobileNetV2, ResNet20
from experiments.models.schedule import cosine_cycles
from lightslim import patterns
from lightslim.errors import CompressionError

FOLDER = Path(data.__file__).parent
RECIPES = sorted(FOLDER.glob("*/recipe.yaml"))


def idx_bytes(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + bytes(array.byte().flatten().tolist())


def write_fashion(folder, count=20):
    folder.mkdir(parents=True, exist_ok=True)
    for name in data.FASHION_FILES:
        shape = (count, 28, 28) if "images" in name else (count,)
        array = torch.arange(count * 784)[: torch.Size(shape).numel()].remainder(10).view(shape)
        (folder / name).write_bytes(gzip.compress(idx_bytes(array)))
    return folder


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A machine without Fashion-MNIST: every usual place is an empty folder."""
    monkeypatch.delenv("LIGHTSLIM_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "debian")
    return tmp_path


@pytest.fixture
def digits():
    digits = Digits()
    digits.setup()
    return digits


def test_digits_are_the_uci_ones():
    table = idx.read_idx(FOLDER / "digits.idx2.gz")
    assert table.shape == (1797, 65)
    assert table[:, 64].bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    digest = hashlib.sha256(bytes(table.flatten().tolist())).hexdigest()
    assert digest == "68aea062d35a127749050fa0e52dca09d6569ac08092c925610e0954e172dde2"


def test_digits_come_normalised_in_batches(digits):
    batches = list(digits.train_dataloader())
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    assert images.shape == (1437, 1, 8, 8)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert batches[0][0].shape == (64, 1, 8, 8)
    assert abs(images.mean()) < 0.02
    assert abs(images.std() - 1) < 0.02


def test_the_split_is_the_same_whatever_the_seed_of_the_run(digits):
    torch.manual_seed(123)
    again = Digits()
    again.setup("fit")
    assert torch.equal(again.val.images, digits.val.images)
    assert digits.val.labels[:20].tolist() == [6, 5, 5, 7, 9, 9, 8, 4, 6, 8, 6, 0, 6, 8, 3, 2, 2, 3, 1, 2]
    assert digits.val.labels.bincount(minlength=10).min() >= 25


def test_the_two_parts_of_the_digits_make_the_whole(digits):
    both = torch.cat([digits.train.images, digits.val.images]).view(-1, 64)
    whole = idx.read_idx(FOLDER / "digits.idx2.gz")[:, :64]
    assert torch.equal(both.unique(dim=0), whole.unique(dim=0))


def test_shuffling_follows_the_global_generator(digits):
    def epoch(seed):
        torch.manual_seed(seed)
        return torch.cat([labels for _, labels in digits.train_dataloader()])

    assert torch.equal(epoch(1), epoch(1))
    assert not torch.equal(epoch(1), epoch(2))
    first, second = (torch.cat([labels for _, labels in digits.val_dataloader()]) for _ in range(2))
    assert torch.equal(first, second)


def test_one_image_is_the_same_as_in_its_batch(digits):
    images, labels = digits.val.__getitems__([5, 3])
    image, label = digits.val[3]
    assert torch.equal(image, images[1])
    assert label == labels[1]


def test_batches_can_be_made_in_worker_processes(digits):
    images, collate = pickle.loads(pickle.dumps((digits.val, as_it_is)))
    assert torch.equal(collate(images.__getitems__([1, 2]))[0], digits.val.__getitems__([1, 2])[0])


def test_shift_and_flip_moves_each_image_by_itself():
    images = torch.zeros(200, 2, 9, 9, dtype=torch.uint8)
    images[:, 0, 4, 4] = 7
    images[:, 1, 4, 4] = 9
    torch.manual_seed(0)
    moved = shift_and_flip(images)
    assert moved.shape == images.shape
    assert moved.dtype == torch.uint8
    count, row, column = moved[:, 0].nonzero().T
    assert count.tolist() == list(range(200))
    assert set(row.tolist()) == set(column.tolist()) == {2, 3, 4, 5, 6}
    assert torch.equal(moved[:, 0] // 7, moved[:, 1] // 9)


def test_shift_and_flip_mirrors_about_half():
    images = torch.arange(3, dtype=torch.uint8).expand(400, 1, 3, 3)
    torch.manual_seed(0)
    mirrored = (shift_and_flip(images, most=0)[:, 0, 0, 0] == 2).sum()
    assert 150 < mirrored < 250


def test_fashion_is_read_from_the_given_folder(tmp_path):
    fashion = FashionMNIST(batch_size=8, folder=str(write_fashion(tmp_path)), limit=15, augment=True)
    fashion.prepare_data()
    fashion.setup()
    images, labels = next(iter(fashion.train_dataloader()))
    assert images.shape == (8, 1, 28, 28)
    assert labels.shape == (8,)
    assert len(fashion.train) == len(fashion.val) == 15
    assert fashion.val.augment is None


def test_a_folder_without_the_files_is_named(tmp_path):
    with pytest.raises(CompressionError, match=r"absent.*LIGHTSLIM_DATA") as caught:
        FashionMNIST(folder=str(tmp_path / "absent")).prepare_data()
    assert "\n" not in str(caught.value)


def test_the_usual_places_are_tried_in_order(nowhere, monkeypatch):
    assert find_fashion() is None
    places = [nowhere / "cache" / "lightslim" / "fashion-mnist", nowhere / "debian", nowhere / "mine"]
    monkeypatch.setenv("LIGHTSLIM_DATA", str(nowhere / "mine"))
    for place in places:
        write_fashion(place)
        assert find_fashion() == place


def test_setup_without_the_files_says_what_to_call(nowhere):
    with pytest.raises(CompressionError, match="prepare_data"):
        FashionMNIST().setup()


def test_what_is_nowhere_is_downloaded_to_the_cache(nowhere, monkeypatch):
    origin = write_fashion(nowhere / "origin")
    monkeypatch.setattr(data, "FASHION_URL", origin.as_uri())
    for path in origin.iterdir():
        digest = hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest()
        monkeypatch.setitem(data.FASHION_FILES, path.name, digest)
    fashion = FashionMNIST()
    fashion.prepare_data()
    fashion.setup()
    assert find_fashion() == nowhere / "cache" / "lightslim" / "fashion-mnist"
    assert len(fashion.train) == 20


@pytest.mark.parametrize("url", ["wrong content", "damaged", "absent"])
def test_a_download_that_fails_leaves_nothing_behind(tmp_path, url):
    origin = tmp_path / url
    if url != "absent":
        content = gzip.compress(b"something else")
        origin.write_bytes(content if url == "wrong content" else content[:-4])
    with pytest.raises(CompressionError, match=r"SHA-256|cannot be"):
        idx.fetch(origin.as_uri(), tmp_path / "cache" / "file.gz", "0" * 64)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.skipif(data._missing(data.DEBIAN) != [], reason="dataset-fashion-mnist is not installed")
def test_the_checksums_are_those_of_debians_files():
    for name, sha256 in data.FASHION_FILES.items():
        assert hashlib.sha256(gzip.decompress((data.DEBIAN / name).read_bytes())).hexdigest() == sha256
    fashion = FashionMNIST(folder=str(data.DEBIAN))
    fashion.setup()
    assert len(fashion.train) == 60_000
    assert len(fashion.val) == 10_000
    assert fashion.train.labels.bincount().tolist() == [6000] * 10
    assert abs(fashion.train.__getitems__(list(range(5000)))[0].mean()) < 0.02


DAMAGED = {
    "cut short": (gzip.compress(idx_bytes(torch.zeros(3, 4)))[:-6], "cannot be read"),
    "not gzip": (b"not gzip at all", "cannot be read"),
    "short": (gzip.compress(b"short"), "not an IDX file"),
    "empty": (gzip.compress(b""), "not an IDX file"),
    "of floats": (gzip.compress(b"\0\0\x0d\1" + bytes(8)), "not an IDX file"),
    "one byte missing": (gzip.compress(idx_bytes(torch.zeros(3, 4))[:-1]), "11 bytes of data, 12 expected"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named(tmp_path, content, message):
    path = tmp_path / "broken.gz"
    path.write_bytes(content)
    with pytest.raises(CompressionError, match=message) as caught:
        idx.read_idx(path)
    assert str(path) in str(caught.value)


def test_a_flipped_bit_is_noticed(tmp_path):
    content = bytearray(gzip.compress(idx_bytes(torch.arange(200))))
    content[len(content) // 2] ^= 0x10
    (tmp_path / "broken.gz").write_bytes(content)
    with pytest.raises(CompressionError, match="cannot be read"):
        idx.read_idx(tmp_path / "broken.gz")


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("size", [8, 28])
def test_scores_for_each_image(network, size):
    model = ImageClassifier(network, num_classes=7, in_channels=3, width=0.25)
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 7)


@pytest.mark.parametrize(
    ("network", "classes", "parameters"),
    [(ResNet20, 10, 272_474), (MobileNetV1, 1000, 4_231_976), (MobileNetV2, 1000, 3_504_872)],
)
def test_networks_are_as_large_as_in_their_papers(network, classes, parameters):
    assert sum(p.numel() for p in network(in_channels=3, num_classes=classes).parameters()) == parameters


def test_mobilenet_has_thirteen_pointwise_convolutions():
    names = [name for name, _ in ImageClassifier("mobilenet_v1", width=0.25).named_parameters()]
    assert len(patterns.select(".*pointwise.weight", names, "pruned_params")) == 13


def test_unknown_names_list_the_choices():
    with pytest.raises(ValueError, match=r"network is 'resnet50'.*resnet20"):
        ImageClassifier("resnet50")
    with pytest.raises(ValueError, match=r"optimizer is 'lion'.*adamw"):
        ImageClassifier(optimizer="lion")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_without_a_trainer_there_is_an_optimizer_and_no_schedule(optimizer):
    found = ImageClassifier(width=0.25, optimizer=optimizer, learning_rate=0.3).configure_optimizers()
    assert set(found) == {"optimizer"}
    assert found["optimizer"].param_groups[0]["lr"] == 0.3


def test_every_cycle_rises_and_falls():
    factor = cosine_cycles(steps=60, starts=[40, 70])
    factors = [factor(step) for step in range(60)]
    assert all(0 < value <= 1 for value in factors)
    assert factors[3] == factors[41] == 1
    assert factors[39] < 0.01
    assert factors[59] < 0.02
    assert factor(60) == 0


def test_a_short_training_learns_the_digits(digits):
    pl.seed_everything(0, workers=True, verbose=False)
    model = ImageClassifier("resnet20", width=0.5, restarts=[2])
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    (before,) = trainer.validate(model, digits, verbose=False)
    trainer.fit(model, digits)
    assert before["val_acc"] < 0.3
    assert trainer.callback_metrics["val_acc"] > 0.85
    assert trainer.callback_metrics["val_loss"] < before["val_loss"]
    assert {"train_loss", "val_loss", "val_acc"} <= set(trainer.callback_metrics)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_recipes_fit_what_they_name(path):
    recipe = yaml.safe_load(path.read_text())
    model, loaders = (build(dict(recipe[part])) for part in ("model", "data"))
    assert isinstance(loaders, pl.LightningDataModule)
    names = [name for name, _ in model.named_parameters()]
    strategies = [recipe["strategies"][name] for name in recipe["compressor"]["strategies"]]
    for strategy in strategies:
        assert strategy["start_epoch"] < recipe["compressor"]["epoch"]
        if "pruner" in strategy:
            assert strategy["pruner"] in recipe["pruners"]
            assert patterns.select(strategy["pruned_params"], names, "pruned_params")
        for distiller in (recipe["distillers"][name] for name in strategy.get("distillers", ())):
            teacher = build(dict(recipe["teacher"])) if "teacher" in recipe else model
            assert {distiller["student_feature_map"]} <= dict(model.named_modules()).keys()
            assert {distiller["teacher_feature_map"]} <= dict(teacher.named_modules()).keys()
    start = strategies[0]["start_epoch"]
    assert list(model.hparams.restarts) == ([start] if start else [])


def build(section):
    section.pop("checkpoint", None)
    module, _, name = section.pop("class").partition(":")
    return getattr(importlib.import_module(module), name)(**section)


@pytest.mark.parametrize(
    "module", ["images", "data", "models.classifier", "models.mobilenet", "models.resnet", "models.schedule"]
)
def test_examples_run(module):
    found = doctest.testmod(importlib.import_module(f"experiments.{module}"))
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize("network", NETWORKS)
def test_no_network_has_the_convolutions_that_onednn_writes_past_its_memory_for(network):
    strided = [
        child for child in NETWORKS[network]().modules() if isinstance(child, nn.Conv2d) and child.stride != (1, 1)
    ]
    assert all(child.kernel_size != (1, 1) for child in strided)
