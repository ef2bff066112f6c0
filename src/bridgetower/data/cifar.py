"""CIFAR-10 and CIFAR-100 from the binary files that their authors publish; nothing is unpickled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from bridgetower.data.batch import Batch
from bridgetower.data.files import digests_of, existing_files
from bridgetower.data.sampling import BatchKey
from bridgetower.processor import Processor

NumClasses = Literal[10, 100]
SIDE = 32
HELD_OUT = 10  # every tenth training image, the last ones, is for validation: the sets have no split for it


@dataclass(frozen=True)
class _Files:
    folder: str
    train: tuple[str, ...]
    test: str
    names: str
    label_bytes: int  # before each image; the last one is the class


_FILES: dict[NumClasses, _Files] = {
    10: _Files(
        "cifar-10-batches-bin",
        tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
        "test_batch.bin",
        "batches.meta.txt",
        1,
    ),
    100: _Files("cifar-100-binary", ("train.bin",), "test.bin", "fine_label_names.txt", 2),
}


class CifarImages(Dataset[Batch]):
    """Images with their classes, addressed by batch; the files are mapped, not read."""

    def __init__(
        self, folder: str | Path, splits: str | Sequence[str], processor: Processor, num_classes: NumClasses
    ) -> None:
        """Opens the files.

        Args:
            folder: The unpacked archive (cifar-10-binary.tar.gz, cifar-100-binary.tar.gz), or the folder it lies in.
            splits: `train` (the first nine tenths of the training images), `validation` (the rest) and `test`.
            processor: Resizes and normalises.
            num_classes: 10, or 100.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: There is no such split, or a file is damaged.
        """
        self.processor, self.num_classes = processor, num_classes
        self.files = cifar_files(folder, num_classes)
        names = (splits,) if isinstance(splits, str) else tuple(splits)
        self._rows = torch.cat([self._split(name) for name in names])
        self._labels = self._classes()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: BatchKey) -> Batch:
        """Builds the batch that `key` names."""
        chosen = self._rows[list(key.examples)].tolist()
        records = [self._records(self.files[file])[row] for file, row in chosen]
        pictures = [record[-3 * SIDE**2 :].reshape(3, SIDE, SIDE).transpose(1, 2, 0) for record in records]
        return Batch(
            pixel_values=self.processor.images([np.ascontiguousarray(picture) for picture in pictures]),
            labels=self._labels[list(key.examples)],
            ids=tuple(f"{self.files[file].stem}-{row}" for file, row in chosen),
            seed=key.seed,
        )

    @property
    def pictures(self) -> None:
        """They are in no prepared set."""

    def labels(self) -> Int[Tensor, " n"]:
        """Returns the class of every image, in order."""
        return self._labels

    def ids(self) -> list[str]:
        """Returns the name of every image, file and number, in order."""
        return [f"{self.files[file].stem}-{row}" for file, row in self._rows.tolist()]

    def digests(self) -> dict[str, str]:
        """Returns the digest of every file, by path."""
        return digests_of(self.files)

    def _split(self, name: str) -> Int[Tensor, "n 2"]:
        """(file, row) of every image of a split."""
        places = [(file, row) for file, path in enumerate(self.files) for row in range(len(self._records(path)))]
        num_train = sum(file < len(self.files) - 1 for file, _ in places)
        border = num_train - num_train // HELD_OUT
        bounds = {"train": (0, border), "validation": (border, num_train), "test": (num_train, len(places))}
        if name not in bounds:
            raise ValueError(f"CIFAR has no split {name!r}; expected one of {', '.join(bounds)}")
        return torch.tensor(places[slice(*bounds[name])]).reshape(-1, 2)

    def _records(self, path: Path) -> np.ndarray:
        size = _FILES[self.num_classes].label_bytes + 3 * SIDE**2
        if path.stat().st_size % size or not path.stat().st_size:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, which are no images of {size}; unpack it again")
        return np.memmap(path, np.uint8, mode="r").reshape(-1, size)

    def _classes(self) -> Int[Tensor, " n"]:
        column = _FILES[self.num_classes].label_bytes - 1
        by_file = [torch.from_numpy(self._records(path)[:, column].astype(np.int64)) for path in self.files]
        starts = torch.tensor([0, *(len(part) for part in by_file[:-1])]).cumsum(0)
        classes = torch.cat(by_file)[starts[self._rows[:, 0]] + self._rows[:, 1]]
        if int(classes.max()) >= self.num_classes:
            raise ValueError(
                f"CIFAR-{self.num_classes} has an image of class {int(classes.max())}; unpack the archive again"
            )
        return classes


def cifar_files(folder: str | Path, num_classes: NumClasses) -> list[Path]:
    """Returns the files with images, those for testing last.

    Raises:
        FileNotFoundError: One is missing.
    """
    files = _FILES[num_classes]
    return existing_files(
        _home(folder, files), [*files.train, files.test], f"the binary version of CIFAR-{num_classes}"
    )


def cifar_names(folder: str | Path, num_classes: NumClasses) -> tuple[str, ...]:
    """Returns the names of the classes.

    Raises:
        FileNotFoundError: Their file is missing.
    """
    files = _FILES[num_classes]
    (path,) = existing_files(_home(folder, files), [files.names], f"the binary version of CIFAR-{num_classes}")
    return tuple(path.read_text().split())


def _home(folder: str | Path, files: _Files) -> Path:
    inner = Path(folder) / files.folder
    return inner if inner.is_dir() else Path(folder)
