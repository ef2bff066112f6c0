"""A prepared set on disk: `dataset.json`, the splits, their Parquet files and the rows in them."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from bridgetower.data.parquet import ParquetRows, read_schema
from bridgetower.data.schema import CAPTIONS, SCHEMAS, Schema
from bridgetower.data.shards import open_rows, shown_place
from bridgetower.files import read_json, write_json
from bridgetower.model.plain import from_plain

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")

SPLITS = ("train", "validation", "test")
"""The usual ones, in their order; a set may have others."""

SPLIT_OPTIONS = "evaluate has --split, train --data.train-splits and --data.validation-split"
"""What a user chooses another split with, for errors."""

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})")


def parquet_path(folder: Path, split: str) -> Path:
    """Path of the Parquet file of a `split` that has a single one."""
    check_split_names([split])
    return Path(folder) / f"{split}.parquet"


def shard_paths(folder: Path, split: str, count: int) -> list[Path]:
    """Paths of the Parquet files of a split that has `count` of them, such as train-00000-of-00002.parquet."""
    if count == 1:
        return [parquet_path(folder, split)]
    check_split_names([split])
    return [Path(folder) / f"{split}-{number:05d}-of-{count:05d}.parquet" for number in range(count)]


def parquet_files(folder: Path) -> list[Path]:
    """All Parquet files of a folder by name, without temporary ones."""
    return sorted(path for path in Path(folder).glob("*.parquet") if not path.name.startswith("."))


def split_of_file(path: Path) -> str:
    """The split that a Parquet file is of, by its name."""
    shard = _SHARD.fullmatch(path.stem)
    return shard["split"] if shard else path.stem


def split_files(folder: Path, split: str) -> list[Path]:
    """The Parquet files of a split, in their order.

    Raises:
        FileNotFoundError: If the folder, the split or one of its files is missing.
        ValueError: If the split's name is none, or its files are of two preparations.
    """
    check_split_names([split])
    present = parquet_files(_existing_folder(folder))
    files = [path for path in present if split_of_file(path) == split]
    place = shown_place(folder)
    if not files:
        there = ordered_splits({split_of_file(path) for path in present})
        if not there:
            raise FileNotFoundError(f"no split in {place}: it is not a set that `bridgetower prepare` wrote")
        raise FileNotFoundError(f"no split {split!r} in {place}; there: {', '.join(there)} ({SPLIT_OPTIONS})")
    shard = _SHARD.fullmatch(files[0].stem)
    expected = shard_paths(folder, split, int(shard["count"])) if shard else [files[0]]
    missing = [path.name for path in expected if path not in files]
    if missing:
        raise FileNotFoundError(f"no {', '.join(missing)} in {folder}; run `bridgetower prepare` again")
    if files != expected:
        raise ValueError(
            f"{folder} has {len(files)} files of split {split!r}, but {files[0].name} is one of {len(expected)}; "
            "prepare it again in an empty folder"
        )
    return files


def read_split(folder: Path, split: str, *, schema: Schema = CAPTIONS) -> ParquetRows:
    """Opens one split; an image is {"bytes", "path"}, left for `bridgetower.processor` to decode.

    The files are read where they lie: neither loaded into memory nor copied to the cache of `datasets`, which would
    keep as many bytes again.

    Args:
        folder: A dataset folder.
        split: Such as "train", "validation" or "test".
        schema: What the rows must hold.

    Raises:
        FileNotFoundError: If the folder, the split or one of its files is missing.
        ValueError: If the split's name is none, the set is of another kind, a column is missing, or a file is no
            Parquet.
    """
    files = split_files(Path(folder), split)
    if (Path(folder) / INFO_FILE).is_file() and (kind := read_info(folder).kind) != schema.name:
        raise ValueError(f"{shown_place(folder)} is a set of kind {kind}; use a set of kind {schema.name}")
    for path in files:
        names = read_schema(path).names
        missing = [name for name in schema.columns if name not in names]
        if missing:
            raise ValueError(
                f"{path} has no column {', '.join(missing)}; it has {', '.join(names)}: use a set of kind {schema.name}"
            )
        _check_entries(path, read_schema(path), schema)
    return open_rows(files)


def _check_entries(path: Path, content: pa.Schema, schema: Schema) -> None:
    """Checks that the rows of a file are of a schema and not of another one with the same columns.

    Raises:
        ValueError: They have entries with other fields, or the columns of another schema besides.
    """
    kind = content.field(schema.entries).type.value_type
    found = {kind.field(number).name for number in range(kind.num_fields)}
    expected = {item.name for item in fields(schema.entry)} if is_dataclass(schema.entry) else set()
    if found != expected:
        shown = ", ".join(sorted(found)) or str(kind)
        raise ValueError(
            f"{path} has {schema.entries} of {shown}; a set of kind {schema.name} has "
            f"{', '.join(sorted(expected)) or 'texts'}: prepare it again, or use another set"
        )
    wider = [each.name for each in SCHEMAS.values() if set(schema.columns) < set(each.columns) <= set(content.names)]
    if wider:
        raise ValueError(f"{path} is of a set of kind {wider[0]}; use a set of kind {schema.name}")


def _existing_folder(folder: Path) -> Path:
    """Returns `folder` as a path.

    Raises:
        FileNotFoundError: If there is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no dataset folder {folder}; give the folder that `bridgetower prepare` wrote")
    return folder


def check_split_names(names: Iterable[str]) -> None:
    """Checks that files can be named after splits.

    Raises:
        ValueError: If a name is not made of lower-case letters, digits and dashes, or is that of a shard.
    """
    unfit = [name for name in names if not _NAME.fullmatch(name) or _SHARD.fullmatch(name)]
    if unfit:
        raise ValueError(
            f"unknown split {', '.join(map(repr, unfit))}; a split is named in lower-case letters, digits and dashes, "
            f"such as {', '.join(SPLITS)}"
        )


def assign_splits(keys: Iterable[str], *, seed: int, num_test: int, num_validation: int) -> dict[str, str]:
    """Gives each key a split: smallest hash of (seed, key) to test, the next to validation, the rest to train.

    A hash instead of a shuffle: the result does not depend on the order of the keys or on a library's version, and a
    new key moves at most one other over each border.

    Raises:
        ValueError: If test and validation leave nothing for train.
    """
    ranked = sorted(set(keys), key=lambda key: (split_rank(seed, key), key))
    sizes = split_sizes(len(ranked), num_test=num_test, num_validation=num_validation)
    names = (name for name, size in sizes.items() for _ in range(size))
    return dict(zip(ranked, names, strict=True))


def split_rank(seed: int, key: str) -> bytes:
    """What `assign_splits` ranks keys by."""
    return hashlib.sha256(f"{seed}\0{key}".encode()).digest()


def split_sizes(total: int, *, num_test: int, num_validation: int) -> dict[str, int]:
    """Number of keys of each split, in the order in which `assign_splits` fills them.

    Raises:
        ValueError: If test and validation leave nothing for train.
    """
    if min(num_test, num_validation) < 0 or num_test + num_validation >= total:
        raise ValueError(
            f"{num_test} for test and {num_validation} for validation of {total} leave nothing for train or are "
            "negative; give smaller numbers >= 0"
        )
    return {"test": num_test, "validation": num_validation, "train": total - num_test - num_validation}


def ordered_splits(names: Iterable[str]) -> list[str]:
    """Sorts names: the usual splits first, in their order, then the others by name."""
    return sorted(names, key=lambda name: (SPLITS.index(name) if name in SPLITS else len(SPLITS), name))


def by_split(items: Iterable[tuple[str, T]]) -> dict[str, list[T]]:
    """Groups items, each given with the name of its split; a split without any is not there."""
    groups: dict[str, list[T]] = {}
    for split, item in items:
        groups.setdefault(split, []).append(item)
    return {split: groups[split] for split in ordered_splits(groups)}


INFO_FILE = "dataset.json"
FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """What one split's files hold.

    Attributes:
        images: Number of images (in nlvr2 of image pairs), which is the number of rows.
        texts: Number of captions, questions or statements of all images together.
        files: Hexadecimal SHA-256 of each file, by name.
    """

    images: int
    texts: int
    files: Mapping[str, str]

    @classmethod
    def of_shards(cls, shards: Iterable[SplitInfo]) -> SplitInfo:
        """Adds up what the files of one split hold."""
        shards = tuple(shards)
        return cls(
            images=sum(shard.images for shard in shards),
            texts=sum(shard.texts for shard in shards),
            files={name: digest for shard in shards for name, digest in shard.files.items()},
        )


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What an image set is.

    Attributes:
        format: Version of the on-disk form.
        name: What the set is called.
        kind: Name of the schema of its rows.
        seed: Seed of the split.
        split_rule: How images were given to splits, in words.
        protocol: What else was decided about the originals, in words.
        sources: Where the data comes from, each with its version or digest.
        licences: Licence of each part.
        settings: Everything else that decides the content.
        splits: Counts and digests of each split's files; none before the files are written.
        left_out: Names of what was left out, by reason; of very many the first.
        num_left_out: How many there are, of reasons that do not name all.
    """

    format: int = FORMAT
    name: str
    kind: str = "captions"
    seed: int
    split_rule: str
    protocol: str = ""
    sources: Mapping[str, str]
    licences: Mapping[str, str]
    settings: Mapping[str, object]
    splits: Mapping[str, SplitInfo] = field(default_factory=dict)
    left_out: Mapping[str, Sequence[str]]
    num_left_out: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks the version and the names of the splits."""
        if self.format != FORMAT:
            raise ValueError(
                f"dataset {self.name!r} has format {self.format}, this version reads {FORMAT}; prepare it again"
            )
        check_split_names(self.splits)

    def digests(self) -> dict[str, str]:
        """Digest of every file, by name."""
        return {name: digest for split in self.splits.values() for name, digest in split.files.items()}

    def left_out_counts(self) -> dict[str, int]:
        """Number of things that were left out, by reason."""
        return {reason: self.num_left_out.get(reason, len(names)) for reason, names in self.left_out.items()}


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
    if content.get("format", FORMAT) != FORMAT:
        raise ValueError(f"{path} has format {content['format']}, this version reads {FORMAT}; prepare it again")
    return from_plain(DatasetInfo, content, str(path))


def split_digests(folder: Path, split: str) -> Mapping[str, str]:
    """Digest of each file of a split as `dataset.json` has it, which changes where the split is prepared anew.

    Raises:
        FileNotFoundError: If the folder or its `dataset.json` is missing.
        ValueError: If `dataset.json` is damaged or does not name the split.
    """
    info = read_info(folder)
    if split not in info.splits:
        raise ValueError(f"{INFO_FILE} in {folder} has no split {split!r}; run `bridgetower prepare` again")
    return info.splits[split].files
