"""CIFAR and GLUE, which are read as their authors publish them: images or texts alone, with their classes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from bridgetower.data.batch import Batch, BatchKey
from bridgetower.data.config import GlueName
from bridgetower.data.prepared_set import SPLIT_OPTIONS
from bridgetower.files import sha256_of
from bridgetower.processor import Processor

_LOG = logging.getLogger(__name__)
_SHOWN = 3  # bad rows in a message


def existing_files(folder: str | Path, inner: str, names: Sequence[str], what: str) -> list[Path]:
    """Returns files of a folder, or of the folder called `inner` in it if there is one.

    Args:
        folder: As a user gives it.
        inner: Name of the folder that the authors publish.
        names: Of the files.
        what: What the user has to give, for the error.

    Raises:
        FileNotFoundError: One is missing.
    """
    home = Path(folder) / inner
    home = home if home.is_dir() else Path(folder)
    missing = [name for name in names if not (home / name).is_file()]
    if missing:
        raise FileNotFoundError(f"no {', '.join(missing)} in {home}; give the folder of {what}")
    return [home / name for name in names]


class FileDataset(Dataset[Batch]):
    """Examples that are in no prepared set, addressed by batch.

    Attributes:
        files: That are read.
    """

    files: Sequence[Path]

    @property
    def images(self) -> None:
        """There are no images of prepared sets."""

    def digests(self) -> dict[str, str]:
        """Returns the SHA-256 of every file, by path."""
        return {str(path): sha256_of(path) for path in self.files}


NumClasses = Literal[10, 100]
SIDE = 32
HELD_OUT = 10  # every tenth training image, the last ones, is for validation: the sets have no split for it


class _Files(NamedTuple):
    folder: str
    images: tuple[str, ...]  # those for testing last
    names: str
    label_bytes: int  # before each image; the last one is the class


_BATCHES = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")
_FILES: dict[NumClasses, _Files] = {
    10: _Files("cifar-10-batches-bin", _BATCHES, "batches.meta.txt", 1),
    100: _Files("cifar-100-binary", ("train.bin", "test.bin"), "fine_label_names.txt", 2),
}


class CifarImages(FileDataset):
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
        self.processor, self._label_bytes = processor, _FILES[num_classes].label_bytes
        self.files = _cifar_files(folder, num_classes)
        records = [self._records(path) for path in self.files]
        places = torch.tensor([(file, row) for file, images in enumerate(records) for row in range(len(images))])
        labels = torch.from_numpy(np.concatenate([images[:, self._label_bytes - 1] for images in records])).long()
        if int(labels.max()) >= num_classes:
            raise ValueError(f"CIFAR-{num_classes} has an image of class {int(labels.max())}; unpack the archive again")
        num_train = len(labels) - len(records[-1])
        border = num_train - num_train // HELD_OUT
        bounds = {"train": (0, border), "validation": (border, num_train), "test": (num_train, len(labels))}
        names = (splits,) if isinstance(splits, str) else splits
        unknown = [name for name in names if name not in bounds]
        if unknown:
            raise ValueError(
                f"CIFAR has no split {unknown[0]!r}; expected one of {', '.join(bounds)} ({SPLIT_OPTIONS})"
            )
        chosen = torch.cat([torch.arange(*bounds[name]) for name in names])
        self._places, self._labels = places[chosen], labels[chosen]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, key: BatchKey) -> Batch:
        """Builds the batch that `key` names."""
        chosen = list(key.examples)
        records = [self._records(self.files[file])[row] for file, row in self._places[chosen].tolist()]
        images = [record[self._label_bytes :].reshape(3, SIDE, SIDE).transpose(1, 2, 0) for record in records]
        return Batch(
            pixel_values=self.processor.images([np.ascontiguousarray(image) for image in images]),
            labels=self._labels[chosen],
            ids=tuple(self._names(self._places[chosen])),
            seed=key.seed,
        )

    def labels(self) -> Int[Tensor, " n"]:
        """Returns the class of every image, in order."""
        return self._labels

    def ids(self) -> list[str]:
        """Returns the name of every image, file and number, in order."""
        return self._names(self._places)

    def _names(self, places: Int[Tensor, "n 2"]) -> list[str]:
        return [f"{self.files[file].stem}-{row}" for file, row in places.tolist()]

    def _records(self, path: Path) -> np.ndarray:
        """Maps a file: the labels and the pixels of each image."""
        size = self._label_bytes + 3 * SIDE**2
        if path.stat().st_size % size or not path.stat().st_size:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, which are no images of {size}; unpack it again")
        return np.memmap(path, np.uint8, mode="r").reshape(-1, size)


def _cifar_files(folder: str | Path, num_classes: NumClasses) -> list[Path]:
    """Returns the files with images, those for testing last.

    Raises:
        FileNotFoundError: One is missing.
    """
    files = _FILES[num_classes]
    return existing_files(folder, files.folder, files.images, f"the binary version of CIFAR-{num_classes}")


def cifar_names(folder: str | Path, num_classes: NumClasses) -> tuple[str, ...]:
    """Returns the names of the classes.

    Raises:
        FileNotFoundError: Their file is missing.
    """
    files = _FILES[num_classes]
    (path,) = existing_files(folder, files.folder, [files.names], f"the binary version of CIFAR-{num_classes}")
    return tuple(path.read_text().split())


@dataclass(frozen=True, kw_only=True)
class GlueTask:
    """What a task's files hold.

    Attributes:
        folder: Name of its folder.
        texts: Columns of the one or two texts; names, or numbers where a file has no header.
        label: Column of the label.
        classes: Labels in the order of the classes; none where a number is predicted.
        no_header: Splits whose files have no header, with the numbers of the columns `texts` and `label`.
        files: By split.
        endings: Of the names of the files that GLUE's server takes, by split.
    """

    folder: str
    texts: tuple[str, ...] = ("sentence1", "sentence2")
    label: str = "label"
    classes: tuple[str, ...] = ("0", "1")
    no_header: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    files: Mapping[str, str] = field(
        default_factory=lambda: {"train": "train.tsv", "validation": "dev.tsv", "test": "test.tsv"}
    )
    endings: Mapping[str, str] = field(default_factory=lambda: {"test": ""})

    @property
    def submission(self) -> dict[str, str]:
        """Name of the file that GLUE's server takes, by split."""
        return {split: f"{self.folder}{ending}.tsv" for split, ending in self.endings.items()}


_ENTAILMENT = ("entailment", "not_entailment")

GLUE: Mapping[GlueName, GlueTask] = {
    "cola": GlueTask(folder="CoLA", texts=("sentence",), no_header={"train": (3, 1), "validation": (3, 1)}),
    "mrpc": GlueTask(folder="MRPC", texts=("#1 String", "#2 String"), label="Quality"),
    "sst-2": GlueTask(folder="SST-2", texts=("sentence",)),
    "qqp": GlueTask(folder="QQP", texts=("question1", "question2"), label="is_duplicate"),
    "sts-b": GlueTask(folder="STS-B", label="score", classes=()),
    "rte": GlueTask(folder="RTE", classes=_ENTAILMENT),
    "qnli": GlueTask(folder="QNLI", texts=("question", "sentence"), classes=_ENTAILMENT),
    "mnli": GlueTask(
        folder="MNLI",
        label="gold_label",
        classes=("entailment", "neutral", "contradiction"),
        files={
            "train": "train.tsv",
            "validation": "dev_matched.tsv",
            "validation-mismatched": "dev_mismatched.tsv",
            "test": "test_matched.tsv",
            "test-mismatched": "test_mismatched.tsv",
        },
        endings={"test": "-m", "test-mismatched": "-mm"},
    ),
}


@dataclass(frozen=True)
class GlueRow:
    """One or two texts and their label.

    Attributes:
        label: As the file has it; empty in a test split.
        index: Number of the row in its file, from 0, without the header.
    """

    texts: tuple[str, ...]
    label: str
    index: int


def _glue_file(folder: str | Path, name: GlueName, split: str) -> Path:
    """Returns the file of a split.

    Raises:
        FileNotFoundError: It is missing.
        ValueError: The task has no such split.
    """
    task = GLUE[name]
    if split not in task.files:
        raise ValueError(
            f"{task.folder} has no split {split!r}; expected one of {', '.join(task.files)} ({SPLIT_OPTIONS})"
        )
    return existing_files(folder, task.folder, [task.files[split]], f"GLUE's {task.folder}")[0]


def read_glue(folder: str | Path, name: GlueName, split: str, *, max_errors: int = 0) -> list[GlueRow]:
    """Reads a split.

    Args:
        folder: GLUE's folder, or that of the task.
        name: Of the task.
        split: `train`, `validation` (GLUE's dev) or `test`; of MNLI also `validation-mismatched`, `test-mismatched`.
        max_errors: Rows with too few columns or a wrong label that may be left out; some versions of QQP have a few.
            None of a test split may be, since the server takes only whole files.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: There is no such split, a column is missing, or more rows are bad.
    """
    path, task, has_labels = _glue_file(folder, name, split), GLUE[name], not split.startswith("test")
    lines = enumerate(_lines(path), start=1)
    if split in task.no_header:
        columns = task.no_header[split]
    else:
        _, header = next(lines, (0, []))
        columns = _columns(path, task, header, has_label=has_labels)
    rows: list[GlueRow] = []
    bad: list[str] = []
    for index, (number, cells) in enumerate(lines):
        if problem := _problem(cells, columns, task):
            bad.append(f"line {number}: {problem}")
        else:
            values = [cells[column].strip() for column in columns]
            texts = tuple(values[: len(task.texts)])
            rows.append(GlueRow(texts, values[-1] if has_labels else "", index))
    max_errors = max_errors if has_labels else 0
    if len(bad) > max_errors or not rows:
        shown = "; ".join(bad[:_SHOWN])
        raise ValueError(f"{path} has {len(rows)} good and {len(bad)} bad rows ({shown}); max_errors is {max_errors}")
    if bad:
        _LOG.warning("%s: %d bad rows are left out (%s)", path, len(bad), "; ".join(bad[:_SHOWN]))
    return rows


def _lines(path: Path) -> Iterator[list[str]]:
    # Quotes are letters here, and MRPC's files begin with a byte order mark.
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        try:
            for line in file:
                if line.strip("\r\n"):
                    yield line.rstrip("\r\n").split("\t")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error}); copy it again") from error


def _columns(path: Path, task: GlueTask, header: Sequence[str], *, has_label: bool) -> tuple[int, ...]:
    wanted = (*task.texts, task.label) if has_label else task.texts
    missing = [name for name in wanted if name not in header]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(header)}")
    return tuple(header.index(name) for name in wanted)


def _problem(cells: Sequence[str], columns: Sequence[int], task: GlueTask) -> str:
    if max(columns) >= len(cells):
        return f"{len(cells)} columns"
    if len(columns) == len(task.texts):
        return ""
    label = cells[columns[-1]].strip()
    if task.classes:
        return "" if label in task.classes else f"label {label!r}"
    return "" if label.replace(".", "", 1).isdigit() else f"score {label!r}"


class GlueTexts(FileDataset):
    """Texts or pairs of texts with their labels, addressed by batch.

    Attributes:
        rows: As the files have them.
        files: That were read.
    """

    def __init__(
        self,
        folder: str | Path,
        name: GlueName,
        splits: str | Sequence[str],
        processor: Processor,
        *,
        max_errors: int = 0,
    ) -> None:
        """Reads the files of one or several splits; see `read_glue`.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: There is no such split, a column is missing, or rows are bad.
        """
        names = (splits,) if isinstance(splits, str) else tuple(splits)
        self.task, self._processor = GLUE[name], processor
        self.files = [_glue_file(folder, name, split) for split in names]
        self.rows = [row for split in names for row in read_glue(folder, name, split, max_errors=max_errors)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: BatchKey) -> Batch:
        """Builds the batch that `key` names; it has labels where the rows have."""
        rows = [self.rows[example] for example in key.examples]
        text = self._processor.pad(self._processor.pair_ids([row.texts for row in rows]))
        return Batch(
            input_ids=text.input_ids,
            attention_mask=text.attention_mask,
            labels=self._labels([row.label for row in rows]) if all(row.label for row in rows) else None,
            ids=tuple(map(str, key.examples)),
            seed=key.seed,
        )

    @property
    def labelled(self) -> bool:
        """Whether every row has a label."""
        return all(row.label for row in self.rows)

    def labels(self) -> Tensor:
        """Returns the class of every row, or its number.

        Raises:
            ValueError: The rows have no labels.
        """
        if not self.labelled:
            raise ValueError(
                f"{', '.join(map(str, self.files))} has no labels; choose a split that has ({SPLIT_OPTIONS})"
            )
        return self._labels([row.label for row in self.rows])

    def _labels(self, labels: Sequence[str]) -> Tensor:
        if not self.task.classes:
            return torch.tensor([float(label) for label in labels])
        return torch.tensor([self.task.classes.index(label) for label in labels])
