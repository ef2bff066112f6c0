"""CIFAR and GLUE, which are read as their authors publish them: images or texts alone, with their classes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from bridgetower.data.batch import Batch, BatchKey
from bridgetower.data.config import GlueName
from bridgetower.data.folder import SPLIT_OPTIONS
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
        images = [record[-3 * SIDE**2 :].reshape(3, SIDE, SIDE).transpose(1, 2, 0) for record in records]
        return Batch(
            pixel_values=self.processor.images([np.ascontiguousarray(image) for image in images]),
            labels=self._labels[list(key.examples)],
            ids=tuple(f"{self.files[file].stem}-{row}" for file, row in chosen),
            seed=key.seed,
        )

    def labels(self) -> Int[Tensor, " n"]:
        """Returns the class of every image, in order."""
        return self._labels

    def ids(self) -> list[str]:
        """Returns the name of every image, file and number, in order."""
        return [f"{self.files[file].stem}-{row}" for file, row in self._rows.tolist()]

    def _split(self, name: str) -> Int[Tensor, "n 2"]:
        """(file, row) of every image of a split."""
        places = [(file, row) for file, path in enumerate(self.files) for row in range(len(self._records(path)))]
        num_train = sum(file < len(self.files) - 1 for file, _ in places)
        border = num_train - num_train // HELD_OUT
        bounds = {"train": (0, border), "validation": (border, num_train), "test": (num_train, len(places))}
        if name not in bounds:
            raise ValueError(f"CIFAR has no split {name!r}; expected one of {', '.join(bounds)} ({SPLIT_OPTIONS})")
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
        folder, files.folder, [*files.train, files.test], f"the binary version of CIFAR-{num_classes}"
    )


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
        submission: Name of the file that GLUE's server takes, by split.
    """

    folder: str
    texts: tuple[str, ...]
    label: str
    classes: tuple[str, ...]
    no_header: Mapping[str, tuple[int, ...]]
    files: Mapping[str, str]
    submission: Mapping[str, str]


def _task(
    folder: str,
    texts: tuple[str, ...],
    label: str,
    classes: tuple[str, ...],
    *,
    no_header: Mapping[str, tuple[int, ...]] | None = None,
) -> GlueTask:
    return GlueTask(
        folder=folder,
        texts=texts,
        label=label,
        classes=classes,
        no_header=no_header or {},
        files={"train": "train.tsv", "validation": "dev.tsv", "test": "test.tsv"},
        submission={"test": f"{folder}.tsv"},
    )


_BINARY = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")

GLUE: Mapping[GlueName, GlueTask] = {
    "cola": _task("CoLA", ("sentence",), "label", _BINARY, no_header={"train": (3, 1), "validation": (3, 1)}),
    "mrpc": _task("MRPC", ("#1 String", "#2 String"), "Quality", _BINARY),
    "sst-2": _task("SST-2", ("sentence",), "label", _BINARY),
    "qqp": _task("QQP", ("question1", "question2"), "is_duplicate", _BINARY),
    "sts-b": _task("STS-B", ("sentence1", "sentence2"), "score", ()),
    "rte": _task("RTE", ("sentence1", "sentence2"), "label", _ENTAILMENT),
    "qnli": _task("QNLI", ("question", "sentence"), "label", _ENTAILMENT),
    "mnli": GlueTask(
        folder="MNLI",
        texts=("sentence1", "sentence2"),
        label="gold_label",
        classes=("entailment", "neutral", "contradiction"),
        no_header={},
        files={
            "train": "train.tsv",
            "validation": "dev_matched.tsv",
            "validation-mismatched": "dev_mismatched.tsv",
            "test": "test_matched.tsv",
            "test-mismatched": "test_mismatched.tsv",
        },
        submission={"test": "MNLI-m.tsv", "test-mismatched": "MNLI-mm.tsv"},
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


def glue_file(folder: str | Path, name: GlueName, split: str) -> Path:
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
            None of a test split may be, since the server wants every row.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: There is no such split, a column is missing, or more rows are bad.
    """
    path, task = glue_file(folder, name, split), GLUE[name]
    lines = enumerate(_lines(path), start=1)
    if split in task.no_header:
        columns = task.no_header[split]
    else:
        _, header = next(lines, (0, []))
        columns = _columns(path, task, header, has_label=not split.startswith("test"))
    rows: list[GlueRow] = []
    bad: list[str] = []
    for index, (number, cells) in enumerate(lines):
        problem = _problem(cells, columns, task)
        if problem:
            bad.append(f"line {number}: {problem}")
        else:
            values = [cells[column].strip() for column in columns]
            count = len(task.texts)
            rows.append(GlueRow(tuple(values[:count]), values[count] if len(values) > count else "", index))
    max_errors = 0 if split.startswith("test") else max_errors
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
        self.files = [glue_file(folder, name, split) for split in names]
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
