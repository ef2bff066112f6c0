"""CIFAR and GLUE, which are read as their authors publish them: images or texts alone, with their classes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bridgetower.data.batch import Batch, BatchKey
from bridgetower.data.config import GlueName
from bridgetower.data.prepared_set import SPLIT_OPTIONS
from bridgetower.files import sha256_of
from bridgetower.processor import Processor

_LOG = logging.getLogger(__name__)
_SHOWN = 3  # bad rows in a message

NumClasses = Literal[10, 100]
_HELD_OUT = 10  # every tenth training image, the last ones, is for validation: the sets have no split for it


class FileDataset(Dataset[Batch]):
    """Examples that are in no prepared set, addressed by batch."""

    files: Sequence[Path]
    images = None  # of prepared sets

    def digests(self) -> dict[str, str]:
        """Returns the SHA-256 of every file, by path."""
        return {str(path): sha256_of(path) for path in self.files}


def _existing_files(folder: str | Path, inner: str, names: Sequence[str], what: str) -> list[Path]:
    """Returns files of a folder, or of the folder called `inner` in it if there is one."""
    home = Path(folder) / inner
    home = home if home.is_dir() else Path(folder)
    if missing := [name for name in names if not (home / name).is_file()]:
        raise FileNotFoundError(f"no {', '.join(missing)} in {home}; give the folder of {what}")
    return [home / name for name in names]


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
    """Images with their classes; the first nine tenths of those for training are `train`, the rest `validation`."""

    def __init__(
        self, folder: str | Path, splits: str | Sequence[str], processor: Processor, num_classes: NumClasses
    ) -> None:
        self.processor, layout = processor, _FILES[num_classes]
        what = f"the binary version of CIFAR-{num_classes}"
        self.files = _existing_files(folder, layout.folder, layout.images, what)
        size = layout.label_bytes + 3 * 32**2
        for path in self.files:
            if path.stat().st_size % size or not path.stat().st_size:
                raise ValueError(
                    f"{path} has {path.stat().st_size} bytes, which are no images of {size}; unpack it again"
                )
        records = [np.memmap(path, np.uint8, mode="r").reshape(-1, size) for path in self.files]
        labels = torch.from_numpy(np.concatenate([images[:, layout.label_bytes - 1] for images in records])).long()
        if int(labels.max()) >= num_classes:
            raise ValueError(f"CIFAR-{num_classes} has an image of class {int(labels.max())}; unpack the archive again")
        num_train = len(labels) - len(records[-1])
        border = num_train - num_train // _HELD_OUT
        bounds = {"train": (0, border), "validation": (border, num_train), "test": (num_train, len(labels))}
        names = (splits,) if isinstance(splits, str) else splits
        if unknown := [name for name in names if name not in bounds]:
            raise ValueError(
                f"CIFAR has no split {unknown[0]!r}; expected one of {', '.join(bounds)} ({SPLIT_OPTIONS})"
            )
        chosen = torch.cat([torch.arange(*bounds[name]) for name in names])
        places = [(file, row) for file, images in enumerate(records) for row in range(len(images))]
        self._places, self._labels = [places[number] for number in chosen.tolist()], labels[chosen]
        self._pixels = [images[:, layout.label_bytes :].reshape(-1, 3, 32, 32) for images in records]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, key: BatchKey) -> Batch:
        places = [self._places[example] for example in key.examples]
        images = [np.ascontiguousarray(self._pixels[file][row].transpose(1, 2, 0)) for file, row in places]
        return Batch(
            pixel_values=self.processor.images(images),
            labels=self._labels[list(key.examples)],
            ids=tuple(f"{self.files[file].stem}-{row}" for file, row in places),
            seed=key.seed,
        )

    def labels(self) -> Tensor:
        """Returns the class of every image, in order."""
        return self._labels

    def ids(self) -> list[str]:
        """Returns the name of every image, file and number, in order."""
        return [f"{self.files[file].stem}-{row}" for file, row in self._places]


def cifar_names(folder: str | Path, num_classes: NumClasses) -> tuple[str, ...]:
    """Returns the names of the classes."""
    layout = _FILES[num_classes]
    (path,) = _existing_files(folder, layout.folder, [layout.names], f"the binary version of CIFAR-{num_classes}")
    return tuple(path.read_text().split())


@dataclass(frozen=True, kw_only=True)
class GlueTask:
    """What a task's files hold."""

    folder: str  # of its files, as GLUE calls it
    texts: tuple[str, ...] = ("sentence1", "sentence2")  # columns of the texts
    label: str = "label"  # column of the label
    classes: tuple[str, ...] = ("0", "1")  # labels in order of the classes; none where a number is predicted
    columns: tuple[int, ...] = ()  # numbers of the text's and the label's, where labelled files have no header
    files: Mapping[str, str] = field(
        default_factory=lambda: {"train": "train.tsv", "validation": "dev.tsv", "test": "test.tsv"}
    )

    @property
    def submission(self) -> dict[str, str]:
        """Name of the file that GLUE's server takes, by split."""
        endings = {"test": "-m", "test-mismatched": "-mm"} if "test-mismatched" in self.files else {"test": ""}
        return {split: f"{self.folder}{ending}.tsv" for split, ending in endings.items()}


_ENTAILMENT = ("entailment", "not_entailment")

GLUE: Mapping[GlueName, GlueTask] = {
    "cola": GlueTask(folder="CoLA", texts=("sentence",), columns=(3, 1)),
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
    ),
}


@dataclass(frozen=True)
class GlueRow:
    """One or two texts, their label (empty in a test split), and the number of the row in its file."""

    texts: tuple[str, ...]
    label: str
    index: int


def _glue_file(folder: str | Path, name: GlueName, split: str) -> Path:
    task = GLUE[name]
    if split not in task.files:
        raise ValueError(
            f"{task.folder} has no split {split!r}; expected one of {', '.join(task.files)} ({SPLIT_OPTIONS})"
        )
    return _existing_files(folder, task.folder, [task.files[split]], f"GLUE's {task.folder}")[0]


def read_glue(folder: str | Path, name: GlueName, split: str, *, max_errors: int = 0) -> list[GlueRow]:
    """Reads a split; some versions of QQP have rows that must be left out.

    None of a test split may be, since the server takes only whole files.
    """
    path, task, has_labels = _glue_file(folder, name, split), GLUE[name], not split.startswith("test")
    try:  # quotes are letters here, and MRPC's files begin with a byte order mark
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); copy it again") from error
    lines = [line.rstrip("\r").split("\t") for line in content.split("\n") if line.strip("\r")]
    if task.columns and has_labels:
        first, columns = 0, task.columns
    else:
        wanted, header = (*task.texts, *([task.label] if has_labels else [])), lines[0] if lines else []
        if missing := [column for column in wanted if column not in header]:
            raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(header)}")
        first, columns = 1, tuple(map(header.index, wanted))
    rows, bad = list[GlueRow](), list[str]()
    for index, cells in enumerate(lines[first:]):
        values = [cells[column].strip() for column in columns if column < len(cells)]
        label = values[-1] if values and has_labels else ""
        right = label in task.classes if task.classes else label.replace(".", "", 1).isdigit()
        if len(values) < len(columns):
            bad.append(f"line {index + first + 1}: {len(cells)} columns")
        elif has_labels and not right:
            bad.append(f"line {index + first + 1}: {'label' if task.classes else 'score'} {label!r}")
        else:
            rows.append(GlueRow(tuple(values[: len(task.texts)]), label, index))
    allowed, shown = max_errors if has_labels else 0, "; ".join(bad[:_SHOWN])
    if len(bad) > allowed or not rows:
        raise ValueError(f"{path} has {len(rows)} good and {len(bad)} bad rows ({shown}); max_errors is {allowed}")
    if bad:
        _LOG.warning("%s: %d bad rows are left out (%s)", path, len(bad), shown)
    return rows


class GlueTexts(FileDataset):
    """Texts or pairs of texts with their labels, of one or several splits."""

    def __init__(
        self,
        folder: str | Path,
        name: GlueName,
        splits: str | Sequence[str],
        processor: Processor,
        *,
        max_errors: int = 0,
    ) -> None:
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
            labels=self._labels(rows) if all(row.label for row in rows) else None,
            ids=tuple(map(str, key.examples)),
            seed=key.seed,
        )

    @property
    def labelled(self) -> bool:
        """Whether every row has a label."""
        return all(row.label for row in self.rows)

    def labels(self) -> Tensor:
        """Returns the class of every row, or its number."""
        if not self.labelled:
            raise ValueError(
                f"{', '.join(map(str, self.files))} has no labels; choose a split that has ({SPLIT_OPTIONS})"
            )
        return self._labels(self.rows)

    def _labels(self, rows: Sequence[GlueRow]) -> Tensor:
        if not self.task.classes:
            return torch.tensor([float(row.label) for row in rows])
        return torch.tensor([self.task.classes.index(row.label) for row in rows])
