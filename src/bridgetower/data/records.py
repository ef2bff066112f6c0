"""The on-disk form of a captioned picture set: a Parquet file per split, and a `dataset.json` that says what it is."""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bridgetower.data.parquet import ParquetRows
from bridgetower.files import read_json, replacing, write_json

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")

SPLITS = ("train", "validation", "test")
CORE_COLUMNS = ("image", "image_id", "captions")
INFO_FILE = "dataset.json"
FORMAT = 1

_MARK = b"bridgetower"  # schema metadata key: tells our own Parquet files from a user's


@dataclass(frozen=True, kw_only=True)
class Record:
    """One picture with its captions.

    Attributes:
        image: The picture file's own bytes, not re-encoded.
        file_name: Name under which the picture is stored, its extension included.
        image_id: Unique within the dataset.
        captions: One or more texts, stripped and not empty; the first is the main one.
        extra: Values of the further columns.
    """

    image: bytes = field(repr=False)
    file_name: str
    image_id: str
    captions: tuple[str, ...]
    extra: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks that there is an id, a picture and a caption, and that captions are stripped."""
        if not self.image_id:
            raise ValueError(f"record of {self.file_name!r} has an empty image_id; give it a unique name")
        if not self.image:
            raise ValueError(f"picture of record {self.image_id!r} has 0 bytes; give the picture file's content")
        if not self.captions or any(not caption or caption != caption.strip() for caption in self.captions):
            raise ValueError(
                f"captions of record {self.image_id!r} are {self.captions!r}; give at least one, stripped and not empty"
            )


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """What one split's file holds.

    Attributes:
        images: Number of pictures, which is the number of rows.
        captions: Number of captions of all pictures together.
        sha256: Hexadecimal digest of the file.
    """

    images: int
    captions: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What a picture set is: the content of `dataset.json`.

    Attributes:
        format: Version of the on-disk form.
        name: What the set is called.
        seed: Seed of the split.
        split_rule: How pictures were given to splits, in words.
        sources: Where the data comes from, each with its version or digest.
        licences: Licence of each part.
        settings: Everything else that decides the content.
        splits: Counts and digest of each split's file; none before the files are written.
        left_out: Names of what was left out, by reason.
    """

    format: int = FORMAT
    name: str
    seed: int
    split_rule: str
    sources: Mapping[str, str]
    licences: Mapping[str, str]
    settings: Mapping[str, object]
    splits: Mapping[str, SplitInfo] = field(default_factory=dict)
    left_out: Mapping[str, Sequence[str]]

    def __post_init__(self) -> None:
        """Checks the version and the names of the splits."""
        if self.format != FORMAT:
            raise ValueError(
                f"dataset {self.name!r} has format {self.format}, this version reads {FORMAT}; prepare it again"
            )
        _check_split_names(self.splits)


@dataclass(frozen=True, kw_only=True)
class Collection:
    """A picture set about to be written.

    Attributes:
        info: What it is, without the splits' files.
        splits: Records of each split.
        columns: `datasets` feature of each further column.
    """

    info: DatasetInfo
    splits: Mapping[str, Iterable[Record]]
    columns: Mapping[str, Any] = field(default_factory=dict)


def parquet_path(folder: Path, split: str) -> Path:
    """Path of the Parquet file of `split` in a dataset folder."""
    _check_split_names([split])
    return Path(folder) / f"{split}.parquet"


def write_split(
    path: Path,
    records: Iterable[Record],
    *,
    columns: Mapping[str, Any] | None = None,
    row_group_bytes: int = 2**20,
) -> SplitInfo:
    """Writes `records` to one Parquet file, atomically, holding one row group in memory at a time.

    Args:
        path: The file to write; replaced if it exists.
        records: The rows, read once.
        columns: `datasets` feature of each further column; the records' `extra` must have exactly these.
        row_group_bytes: Picture bytes after which a row group is closed; all of a group are read to get one of them.

    Returns:
        Counts and digest of the file.

    Raises:
        ValueError: If there is no record, an image_id comes twice, or a record's further columns differ from `columns`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(columns or {})
    seen: set[str] = set()
    num_captions = 0
    with replacing(Path(path)) as temporary:
        # A dictionary and statistics of pictures cost much to read and tell nothing.
        options = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
        with pq.ParquetWriter(temporary, schema, **options) as writer:
            for group in _grouped(records, row_group_bytes):
                for record in group:
                    _check_record(record, seen, columns or {})
                    num_captions += len(record.captions)
                writer.write_table(pa.Table.from_pylist([_row(record) for record in group], schema=schema))
        if not seen:
            raise ValueError(f"no record to write to {path}; a split needs at least one picture, or no file at all")
        digest = sha256_of(temporary)
    return SplitInfo(images=len(seen), captions=num_captions, sha256=digest)


def write_info(folder: Path, info: DatasetInfo) -> None:
    """Writes `dataset.json`; call it last, since its presence marks the dataset as complete."""
    write_json(Path(folder) / INFO_FILE, dataclasses.asdict(info))


def read_info(folder: Path) -> DatasetInfo:
    """Reads `dataset.json`.

    Raises:
        FileNotFoundError: If the folder or the file is missing.
        ValueError: If the file is not what `write_info` writes.
    """
    path = _existing_folder(folder) / INFO_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"no {INFO_FILE} in {folder}: it is no complete dataset; run `bridgetower prepare` again"
        )
    content = read_json(path)
    try:
        splits = {name: SplitInfo(**split) for name, split in content.pop("splits").items()}
        return DatasetInfo(**content, splits=splits)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a dataset description ({error}); run `bridgetower prepare` again") from error


def split_digest(folder: Path, split: str) -> str:
    """Digest of a split's file as `dataset.json` has it, which tells whether the split was prepared anew.

    Raises:
        FileNotFoundError: If the folder or its `dataset.json` is missing.
        ValueError: If `dataset.json` is damaged or does not name the split.
    """
    info = read_info(folder)
    if split not in info.splits:
        raise ValueError(f"{INFO_FILE} in {folder} has no split {split!r}; run `bridgetower prepare` again")
    return info.splits[split].sha256


def read_split(folder: Path, split: str, *, columns: Sequence[str] = CORE_COLUMNS) -> ParquetRows:
    """Opens one split; a picture is {"bytes", "path"}, left for `bridgetower.processor` to decode.

    The file is read where it lies: neither loaded into memory nor copied to the cache of `datasets`, which would keep
    as many bytes again.

    Args:
        folder: A dataset folder.
        split: "train", "validation" or "test".
        columns: Columns that must be there.

    Raises:
        FileNotFoundError: If the folder or the split is missing.
        ValueError: If the split's name is unknown, a column is missing, or the file is no Parquet.
    """
    path = parquet_path(_existing_folder(folder), split)
    if not path.is_file():
        there = [name for name in SPLITS if parquet_path(folder, name).is_file()]
        raise FileNotFoundError(f"no split {split!r} in {folder}; there: {', '.join(there) or 'none'}")
    names = _read_schema(path).names
    missing = [name for name in columns if name not in names]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(names)}")
    return ParquetRows(path)


def is_own_parquet(path: Path) -> bool:
    """Whether `path` was written by `write_split` and may be replaced."""
    return _MARK in (_read_schema(Path(path)).metadata or {})


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def assign_splits(keys: Iterable[str], *, seed: int, num_test: int, num_validation: int) -> dict[str, str]:
    """Gives each key a split: smallest hash of (seed, key) to test, the next to validation, the rest to train.

    A hash instead of a shuffle: the result does not depend on the order of the keys or on a library's version, and a
    new key moves at most one other over each border.

    Raises:
        ValueError: If test and validation leave nothing for train.
    """
    ranked = sorted(set(keys), key=lambda key: (hashlib.sha256(f"{seed}\0{key}".encode()).digest(), key))
    if min(num_test, num_validation) < 0 or num_test + num_validation >= len(ranked):
        raise ValueError(
            f"{num_test} for test and {num_validation} for validation of {len(ranked)} leave nothing for train or are "
            "negative; give smaller numbers >= 0"
        )
    bounds = {"test": num_test, "validation": num_test + num_validation, "train": len(ranked)}
    return {key: next(name for name, end in bounds.items() if rank < end) for rank, key in enumerate(ranked)}


def by_split(items: Iterable[tuple[str, T]]) -> dict[str, list[T]]:
    """Groups items, each given with the name of its split; a split without any is not there."""
    groups: dict[str, list[T]] = {split: [] for split in SPLITS}
    for split, item in items:
        groups[split].append(item)
    return {split: members for split, members in groups.items() if members}


def _schema(columns: Mapping[str, Any]) -> "pa.Schema":
    import datasets

    clash = [name for name in CORE_COLUMNS if name in columns]
    if clash:
        raise ValueError(f"further column {', '.join(clash)} has the name of a core column; rename it")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "image_id": datasets.Value("string"),
            "captions": datasets.List(datasets.Value("string")),
            **columns,
        }
    )
    schema = features.arrow_schema
    return schema.with_metadata({**schema.metadata, _MARK: str(FORMAT).encode()})


def _row(record: Record) -> dict[str, object]:
    image = {"bytes": record.image, "path": record.file_name}
    return {"image": image, "image_id": record.image_id, "captions": list(record.captions), **record.extra}


def _check_record(record: Record, seen: set[str], columns: Mapping[str, Any]) -> None:
    if record.image_id in seen:
        raise ValueError(f"image_id {record.image_id!r} comes twice; ids must be unique")
    if record.extra.keys() != columns.keys():
        raise ValueError(f"record {record.image_id!r} has columns {sorted(record.extra)}, expected {sorted(columns)}")
    seen.add(record.image_id)


def _grouped(records: Iterable[Record], group_bytes: int) -> Iterator[list[Record]]:
    group: list[Record] = []
    size = 0
    for record in records:
        group.append(record)
        size += len(record.image)
        if size >= group_bytes:
            yield group
            group, size = [], 0
    if group:
        yield group


def _read_schema(path: Path) -> "pa.Schema":
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file; run `bridgetower prepare` again") from error


def _existing_folder(folder: Path) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no dataset folder {folder}; give the folder that `bridgetower prepare` wrote")
    return folder


def _check_split_names(names: Iterable[str]) -> None:
    unknown = [name for name in names if name not in SPLITS]
    if unknown:
        raise ValueError(f"unknown split {', '.join(map(repr, unknown))}; splits are {', '.join(SPLITS)}")
