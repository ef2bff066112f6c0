"""The eight tasks of GLUE that the paper uses, from the TSV files that GLUE publishes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from bridgetower.data.batch import Batch
from bridgetower.data.config import GlueName
from bridgetower.data.files import digests_of, existing_files
from bridgetower.data.sampling import BatchKey
from bridgetower.processor import Processor

_LOG = logging.getLogger(__name__)
_SHOWN = 3


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
    """One or two texts and what is said of them.

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
        raise ValueError(f"{task.folder} has no split {split!r}; expected one of {', '.join(task.files)}")
    inner = Path(folder) / task.folder
    home = inner if inner.is_dir() else Path(folder)
    return existing_files(home, [task.files[split]], f"GLUE's {task.folder}")[0]


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


class GlueTexts(Dataset[Batch]):
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
    def pictures(self) -> None:
        """There are none."""

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
            raise ValueError(f"{', '.join(map(str, self.files))} has no labels; choose a split that has")
        return self._labels([row.label for row in self.rows])

    def digests(self) -> dict[str, str]:
        """Returns the digest of every file, by path."""
        return digests_of(self.files)

    def _labels(self, labels: Sequence[str]) -> Tensor:
        if not self.task.classes:
            return torch.tensor([float(label) for label in labels])
        return torch.tensor([self.task.classes.index(label) for label in labels])
