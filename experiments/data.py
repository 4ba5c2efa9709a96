"""Two sets of real images: one small enough to lie in the repository, one that tells models apart."""

import os
from pathlib import Path

import torch
from torch import Tensor

from experiments.idx import fetch, read_idx
from experiments.images import Augment, Images, InMemory, shift_and_flip
from lightslim.errors import CompressionError

FASHION_URL = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion"
FASHION_FILES = {  # SHA-256 of the unpacked content: Debian packs the same bytes behind another header
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


class Digits(InMemory):
    """1,797 handwritten digits of 8 by 8 pixels, which lie beside this file: nothing to download.

    Args:
        batch_size: images in a batch.
        val_images: how many are kept for validation.
        seed: which ones; the same in every run, whatever the run's own seed.
        num_workers: processes that prepare batches.

    Example:
        >>> digits = Digits()
        >>> digits.setup()
        >>> len(digits.train), len(digits.val), digits.train[0][0].shape
        (1437, 360, torch.Size([1, 8, 8]))
    """

    def __init__(self, batch_size: int = 64, val_images: int = 360, seed: int = 0, num_workers: int = 0) -> None:
        super().__init__(batch_size, num_workers)
        self.val_images = val_images
        self.seed = seed

    def setup(self, stage: str | None = None) -> None:
        """Read the file and split it."""
        table = read_idx(Path(__file__).with_name("digits.idx2.gz"))
        order = torch.randperm(len(table), generator=torch.Generator().manual_seed(self.seed))
        self.val = self._images(table[order[: self.val_images]])
        self.train = self._images(table[order[self.val_images :]])

    def _images(self, table: Tensor) -> Images:
        """Rows of 64 pixels from 0 to 16 and a label."""
        return Images(table[:, :64].reshape(-1, 1, 8, 8), table[:, 64].long(), mean=4.884, std=6.017)


class FashionMNIST(InMemory):
    """Fashion-MNIST: 60,000 images of clothes to train on and 10,000 to validate on, 28 by 28 pixels, 10 classes.

    Looked for in ``folder`` and nowhere else when it is given; else in ``$LIGHTSLIM_DATA``, where Debian's package
    ``dataset-fashion-mnist`` puts it, and in the user's cache, into which it is downloaded (30 MB) if no place has it.

    Args:
        batch_size: images in a batch.
        folder: where the four files ``*-ubyte.gz`` lie.
        limit: use only the first so many images of each part.
        augment: shift and mirror the training images at random.
        num_workers: processes that prepare batches.
    """

    def __init__(
        self,
        batch_size: int = 128,
        folder: str | None = None,
        limit: int | None = None,
        augment: bool = False,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.folder = folder
        self.limit = limit
        self.augment = augment

    def prepare_data(self) -> None:
        """Download the files when no folder has them."""
        if find_fashion(self.folder) is None:
            for name, sha256 in FASHION_FILES.items():
                fetch(f"{FASHION_URL}/{name}", _cache() / name, sha256)

    def setup(self, stage: str | None = None) -> None:
        """Read the files."""
        folder = find_fashion(self.folder)
        if folder is None:
            raise CompressionError("Fashion-MNIST is not on this machine yet: call prepare_data() first")
        self.train = self._read(folder, "train", shift_and_flip if self.augment else None)
        self.val = self._read(folder, "t10k", None)

    def _read(self, folder: Path, part: str, augment: Augment | None) -> Images:
        images = read_idx(folder / f"{part}-images-idx3-ubyte.gz")[: self.limit]
        labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz")[: self.limit]
        return Images(images.unsqueeze(1), labels.long(), mean=72.94, std=90.02, augment=augment)


def find_fashion(folder: str | None = None) -> Path | None:
    """The folder that holds all four files: ``folder`` if given, else the first of the usual places that does.

    Raises:
        CompressionError: ``folder`` is given and does not hold them.
    """
    if folder is None:
        return next((place for place in _usual_places() if not _missing(place)), None)
    if missing := _missing(Path(folder)):
        raise CompressionError(
            f"the folder {folder!r} has no {missing[0]}; name one that holds the four files of Fashion-MNIST, or leave "
            f"folder out to have them looked for in $LIGHTSLIM_DATA, {DEBIAN} and {_cache()}, else downloaded"
        )
    return Path(folder)


def _usual_places() -> list[Path]:
    named = os.environ.get("LIGHTSLIM_DATA")
    return [*([Path(named)] if named else []), DEBIAN, _cache()]


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightslim" / "fashion-mnist"


def _missing(folder: Path) -> list[str]:
    return [name for name in FASHION_FILES if not (folder / name).is_file()]
