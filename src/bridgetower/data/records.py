"""Rows of a prepared set, one picture (or picture pair) each, and how they are written to Parquet."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bridgetower.data.info import FORMAT, DatasetInfo, SplitInfo
from bridgetower.data.kinds import (
    LABELS,
    TEXT_COLUMN,
    Kind,
    Question,
    Statement,
    core_columns,
    core_features,
    problem_of,
)
from bridgetower.data.splits import read_schema
from bridgetower.files import replacing, sha256_of

if TYPE_CHECKING:
    import pyarrow as pa

_MARK = b"bridgetower"  # schema metadata key: tells our own Parquet files from a user's


@dataclass(frozen=True, kw_only=True)
class PictureRecord(ABC):
    """One picture; what is said about it is up to the kind.

    Attributes:
        image: The picture file's own bytes, not re-encoded.
        file_name: Name under which the picture is stored, its extension included.
        image_id: Unique within the dataset.
        extra: Values of the further columns.
    """

    kind: ClassVar[Kind]

    image: bytes = field(repr=False)
    file_name: str
    image_id: str
    extra: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks that there is an id, a picture and a text, and that every text can be used."""
        if not self.image_id:
            raise ValueError(f"record of {self.file_name!r} has an empty image_id; give it a unique name")
        if not self.image:
            raise ValueError(f"picture of record {self.image_id!r} has 0 bytes; give the picture file's content")
        if not self.texts:
            raise ValueError(f"{TEXT_COLUMN[self.kind]} of record {self.image_id!r} are missing; give at least one")
        for problem in filter(None, map(problem_of, self.texts)):
            raise ValueError(f"{TEXT_COLUMN[self.kind]} of record {self.image_id!r}: {problem}; leave it out")

    @property
    @abstractmethod
    def texts(self) -> Sequence[str | Question | Statement]:
        """What is said about the picture."""

    @property
    def size(self) -> int:
        """Bytes of the picture."""
        return len(self.image)

    def row(self) -> dict[str, object]:
        """Values of the columns."""
        texts = [text if isinstance(text, str) else vars(text) for text in self.texts]
        image = {"bytes": self.image, "path": self.file_name}
        return {"image": image, "image_id": self.image_id, TEXT_COLUMN[self.kind]: texts, **self.extra}


@dataclass(frozen=True, kw_only=True)
class Record(PictureRecord):
    """One picture with its captions.

    Attributes:
        captions: One or more texts, stripped and not empty; the first is the main one.
    """

    kind: ClassVar[Kind] = "captions"

    captions: tuple[str, ...]

    @property
    def texts(self) -> Sequence[str]:
        """The captions."""
        return self.captions


@dataclass(frozen=True, kw_only=True)
class QuestionRecord(PictureRecord):
    """One picture with the questions about it.

    Attributes:
        questions: One or more.
    """

    kind: ClassVar[Kind] = "vqa"

    questions: tuple[Question, ...]

    @property
    def texts(self) -> Sequence[Question]:
        """The questions."""
        return self.questions


@dataclass(frozen=True, kw_only=True)
class StatementRecord(PictureRecord):
    """One picture with statements that follow from it, contradict it, or neither.

    Attributes:
        statements: One or more.
    """

    kind: ClassVar[Kind] = "snli-ve"

    statements: tuple[Statement, ...]

    def __post_init__(self) -> None:
        """Checks also the labels."""
        super().__post_init__()
        for statement in self.statements:
            if statement.label not in ("", *LABELS[self.kind]):
                raise ValueError(
                    f"label of statement {statement.statement_id!r} is {statement.label!r}; expected one of "
                    f"{', '.join(LABELS[self.kind])}, or none"
                )

    @property
    def texts(self) -> Sequence[Statement]:
        """The statements."""
        return self.statements


@dataclass(frozen=True, kw_only=True)
class PairRecord(StatementRecord):
    """Two pictures with statements that are true or false of them.

    Attributes:
        image_2: The second picture file's own bytes.
        file_name_2: Name under which it is stored.
    """

    kind: ClassVar[Kind] = "nlvr2"

    image_2: bytes = field(repr=False)
    file_name_2: str

    def __post_init__(self) -> None:
        """Checks also the second picture."""
        super().__post_init__()
        if not self.image_2:
            raise ValueError(f"second picture of record {self.image_id!r} has 0 bytes; give the file's content")

    @property
    def size(self) -> int:
        """Bytes of both pictures."""
        return len(self.image) + len(self.image_2)

    def row(self) -> dict[str, object]:
        """Values of the columns."""
        return {**super().row(), "image_2": {"bytes": self.image_2, "path": self.file_name_2}}


@dataclass(frozen=True, kw_only=True)
class Collection:
    """A picture set about to be written.

    Attributes:
        info: What it is, without the splits' files.
        splits: Records of each split.
        columns: `datasets` feature of each further column.
        vocabulary: For questions, the answers to choose from.
    """

    info: DatasetInfo
    splits: Mapping[str, Iterable[PictureRecord]]
    columns: Mapping[str, Any] = field(default_factory=dict)
    vocabulary: Sequence[str] = ()


def write_split(
    path: Path,
    records: Iterable[PictureRecord],
    *,
    kind: Kind = "captions",
    columns: Mapping[str, Any] | None = None,
    row_group_bytes: int = 2**20,
    before: Callable[[SplitInfo], None] | None = None,
    may_be_empty: bool = False,
) -> SplitInfo:
    """Writes `records` to one Parquet file, atomically, holding one row group in memory at a time.

    Args:
        path: The file to write; replaced if it exists.
        records: The rows, read once.
        kind: What the rows hold.
        columns: `datasets` feature of each further column; the records' `extra` must have exactly these.
        row_group_bytes: Picture bytes after which a row group is closed; all of a group are read to get one of them.
        before: Told what the file holds before it gets its name.
        may_be_empty: Whether no record is no error.

    Returns:
        Counts and digest of the file.

    Raises:
        ValueError: If there is no record, an image_id comes twice, or a record is of another kind or has other columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, further = Path(path), columns or {}
    schema = _schema(kind, further)
    seen: set[str] = set()
    num_texts = 0
    with replacing(path) as temporary:
        # A dictionary and statistics of pictures cost much to read and tell nothing.
        options = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
        with pq.ParquetWriter(temporary, schema, **options) as writer:
            for group in _grouped(records, row_group_bytes):
                for record in group:
                    _check_record(record, seen, kind, further)
                    num_texts += len(record.texts)
                writer.write_table(pa.Table.from_pylist([record.row() for record in group], schema=schema))
        if not seen and not may_be_empty:
            raise ValueError(f"no record to write to {path}; a split needs at least one picture, or no file at all")
        info = SplitInfo(images=len(seen), texts=num_texts, files={path.name: sha256_of(temporary)})
        if before:
            before(info)
    return info


def is_own_parquet(path: Path) -> bool:
    """Whether `path` was written by `write_split` and may be replaced."""
    try:
        return _MARK in (read_schema(Path(path)).metadata or {})
    except ValueError:  # no Parquet file, whatever its name says
        return False


def _schema(kind: Kind, columns: Mapping[str, Any]) -> "pa.Schema":
    import datasets

    clash = [name for name in core_columns(kind) if name in columns]
    if clash:
        raise ValueError(f"further column {', '.join(clash)} has the name of a core column; rename it")
    schema = datasets.Features({**core_features(kind), **columns}).arrow_schema
    return schema.with_metadata({**schema.metadata, _MARK: str(FORMAT).encode()})


def _check_record(record: PictureRecord, seen: set[str], kind: Kind, columns: Mapping[str, Any]) -> None:
    if record.kind != kind:
        raise ValueError(f"record {record.image_id!r} is of kind {record.kind}, expected {kind}")
    if record.image_id in seen:
        raise ValueError(f"image_id {record.image_id!r} comes twice; ids must be unique")
    if record.extra.keys() != columns.keys():
        raise ValueError(f"record {record.image_id!r} has columns {sorted(record.extra)}, expected {sorted(columns)}")
    seen.add(record.image_id)


def _grouped(records: Iterable[PictureRecord], group_bytes: int) -> Iterator[list[PictureRecord]]:
    group: list[PictureRecord] = []
    size = 0
    for record in records:
        group.append(record)
        size += record.size
        if size >= group_bytes:
            yield group
            group, size = [], 0
    if group:
        yield group
