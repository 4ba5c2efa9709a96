"""Images in memory, handed out by the batch."""

from collections.abc import Callable

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset

Batch = tuple[Tensor, Tensor]
Augment = Callable[[Tensor], Tensor]


class Images(Dataset[Batch]):
    """Images held in memory as bytes, handed out a whole batch at a time.

    Stacking 128 single items in Python takes longer than a small network's step. A loader asks ``__getitems__`` for a
    batch where a data set has it; :func:`as_it_is` then has nothing left to collate.

    Args:
        images: ``uint8 [n, channels, height, width]``.
        labels: ``int64 [n]``.
        mean: subtracted from the bytes.
        std: divides what is left.
        augment: changes a batch of bytes before it is normalised.

    Example:
        >>> images = Images(torch.zeros(10, 1, 8, 8, dtype=torch.uint8), torch.arange(10), mean=0.0, std=16.0)
        >>> pixels, labels = next(iter(DataLoader(images, batch_size=4, collate_fn=as_it_is)))
        >>> pixels.shape, labels
        (torch.Size([4, 1, 8, 8]), tensor([0, 1, 2, 3]))
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: float,
        std: float,
        augment: Augment | None = None,
    ) -> None:
        self.images = images
        self.labels = labels
        self.mean = mean
        self.std = std
        self.augment = augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        """The images and labels at ``indices``, stacked."""
        chosen = torch.tensor(indices)
        images = self.images[chosen]
        if self.augment is not None:
            images = self.augment(images)
        return images.float().sub_(self.mean).div_(self.std), self.labels[chosen]


def as_it_is(batch: Batch) -> Batch:
    """The collate function for what is a batch already."""
    return batch


def shift_and_flip(images: Tensor, most: int = 2) -> Tensor:
    """Move each image by up to ``most`` pixels each way and mirror about half of them, by torch's global generator."""
    count, _, height, width = images.shape
    rows = torch.randint(2 * most + 1, (count, 1)) + torch.arange(height)
    columns = torch.randint(2 * most + 1, (count, 1)) + torch.arange(width)
    columns = torch.where(torch.rand(count, 1) < 0.5, columns, columns.flip(1))
    # advanced indices around a slice put the channels last
    moved = pad(images, [most] * 4)[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return moved.movedim(-1, 1)


class InMemory(pl.LightningDataModule):
    """Loaders over two :class:`Images`; a subclass sets ``train`` and ``val`` in its ``setup``.

    Args:
        batch_size: images in a batch, in training and in validation.
        num_workers: processes that prepare batches; none is fastest, for there is nothing to wait for.
    """

    train: Images
    val: Images

    def __init__(self, batch_size: int, num_workers: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader[Batch]:
        """The training images, shuffled by torch's global generator."""
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The validation images, always in the same order."""
        return self._loader(self.val, shuffle=False)

    def _loader(self, images: Images, shuffle: bool) -> DataLoader[Batch]:
        workers = self.num_workers
        return DataLoader(images, self.batch_size, shuffle=shuffle, num_workers=workers, collate_fn=as_it_is)
