"""Prepared sets: folders with `dataset.json`, a table of images and a table of examples."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from bridgetower.data.config import WritingConfig
from bridgetower.data.sets.schema import Schema, schema_named
from bridgetower.data.sets.store import CRC, Table
from bridgetower.data.sources.example import Image, check_bad
from bridgetower.data.sources.fetch import is_url, read_part_of_set, version_of
from bridgetower.files import (
    escaped,
    json_object,
    locked,
    remove_leftovers,
    shortened,
    unfit_name,
    write_json,
)
from bridgetower.plain import from_plain
from bridgetower.progress import counting

INFO_FILE = "dataset.json"
SPLITS = ("train", "validation", "test")  # usual splits in their order, a set may have others
SPLIT_OPTIONS = "evaluate has --split, train --data.train-splits and --data.validation-split"
"""Options that select another split, for error messages."""

MIN_EVALUATED = 30
"""Images of a split for evaluation: one of 30 is 3 % of the accuracy."""

logger = logging.getLogger(__name__)

_COMMIT_BYTES = 2**26
_COMMIT_SECONDS = 30.0
_AHEAD = 64  # images per thread that are read ahead
_MAX_LISTED = 1000  # names in `dataset.json`, for each reason

# Columns with Arrow's names of types. Arrow is imported late, so that the help of commands is fast.
_IMAGE_COLUMNS = {
    "name": "string",
    "version": "string",
    "digest": "binary",
    "image": "large_binary",
}
_EXAMPLE_COLUMNS = {"split": "string", "group": "int32", "example": "large_binary"}


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    images: int
    examples: int  # such as captions or questions


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """Description of a prepared set, saved as `dataset.json`."""

    name: str
    kind: str = "captions"  # name of the schema of its examples
    split_rule: str  # how images were given to splits, in words
    protocol: str = ""  # what else was decided about the originals, in words
    sources: Mapping[str, str] = field(default_factory=dict)  # annotation files with their digests
    licences: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)  # all that decides the content
    splits: Mapping[str, SplitInfo] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)  # counts by reason
    some_left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)  # names by reason
    versions: Mapping[str, int] = field(default_factory=dict)  # of the tables
    digest: str = ""  # of all images and examples

    def counts(self) -> dict[str, dict[str, int]]:
        """Counts the images and the entries of each split, under the name that the schema gives entries."""
        noun = schema_named(self.kind).entries
        return {
            name: {"images": split.images, noun: split.examples}
            for name, split in self.splits.items()
        }


class _Pending(NamedTuple):
    """Entries about images that are still being read."""

    name: str
    split: str
    origin: str
    images: list[Image]
    entries: list[Any]


class SetWriter:
    """Writes a prepared set, and continues after a killed attempt without reading its images again."""

    def __init__(
        self,
        out: Path,
        schema: Schema,
        config: WritingConfig,
        *,
        shares: Mapping[str, float] | None = None,
        folds: int = 0,
        seed: int = 0,
        by_content: bool = False,
        progress: bool = True,
    ) -> None:
        self.out = Path(out)
        self.schema = schema
        self.config = config
        # Returns the content of further JSON files by name, such as a vocabulary of answers. Called at the end.
        self.files: Callable[[], Mapping[str, Any]] = dict
        self.bad: list[str] = []  # messages about unusable items
        # Images without a split are drawn into these by their shares, and into the last one otherwise.
        self._shares = shares or {}
        self._rest = "train"
        self._training_splits = {"train"}
        if folds:
            names = fold_names(folds)
            self._shares = dict.fromkeys(names[:-1], 1 / folds)
            self._rest = names[-1]
            self._training_splits = set(names)
        self._seed = seed
        self._by_content = by_content  # equal images are one image, and may have one split only
        self._progress = progress

        self._left_out: defaultdict[str, list[str]] = defaultdict(list)  # names by reason
        self._seen_keys: set[int] = set()

        # Images: by key a row, None if it cannot be used, or the bytes that are being read; and the row by content.
        self._images: dict[int, Future[bytes] | int | None] = {}
        self._row_of_digest: dict[bytes, int] = {}
        self._digests: list[bytes] = []

        # Examples that wait for their images, and rows that wait for a commit.
        self._pending: deque[_Pending] = deque()
        self._image_rows: list[tuple[str, str, bytes, bytes]] = []
        self._example_rows: list[tuple[str, int, bytes]] = []
        self._uncommitted_bytes = 0
        self._last_commit = time.monotonic()

        # Splits: a group is the first image of an example, or negative for a text alone.
        self._groups: dict[str, set[int]] = {}
        self._num_entries: Counter[str] = Counter()
        self._origin_by_has_split: dict[bool, str] = {}  # an example with a split, and one without
        self._split_of_image: dict[int, str] = {}
        self._in_two_splits: list[str] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(locked(self.out))
            (self.out / INFO_FILE).unlink(missing_ok=True)
            remove_leftovers(self.out)
            self._image_table = _open_table(
                self.out / "images.lance", _IMAGE_COLUMNS, checked="image"
            )
            for batch in self._image_table.scan(["name", "version", "digest"]):
                for row in batch.to_pylist():
                    key = _hash(row["name"], row["version"])
                    self._images[key] = self._add_digest(row["digest"])
            self._example_table = _open_table(
                self.out / "examples.lance", _EXAMPLE_COLUMNS, checked="example", replace=True
            )
            self._pool = ThreadPoolExecutor(self.config.num_workers)
            stack.callback(self._pool.shutdown, cancel_futures=True)
            self._advance = stack.enter_context(
                counting("preparing", total=None, enabled=self._progress)
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def add(
        self,
        images: Sequence[Image],
        entries: Iterable[Any],
        *,
        name: str = "",
        split: str = "",
        origin: str = "",
    ) -> None:
        """Adds an example: its images, if it has any, and its entries. Unusable images and entries are counted as bad.

        Args:
            images: Images of the example; they are read in threads.
            entries: Captions, or objects of the type that the schema has.
            name: Name of the example; default: that of its first image, else its origin.
            split: Split that the source gives; empty draws one by a hash.
            origin: File and line for error messages; default: the name.
        """
        name = name or (images[0].name if images else origin)
        origin = origin or name
        for item_name in (name, *(image.name for image in images)):
            if problem := unfit_name(item_name):
                self.refuse(f"{origin}: {problem}")
                return
        usable_entries = []
        for entry in entries:
            if problem := self.schema.problem_of(entry):
                self.refuse(f"{origin}: {problem}")
            else:
                usable_entries.append(entry)
        images = [replace(image, version=_image_version(image)) for image in images]
        for image in images:
            key = _hash(image.name, image.version)
            if key not in self._images:
                self._images[key] = self._pool.submit(_read_image, image)
        self._pending.append(_Pending(name, split, origin, images, usable_entries))
        if len(self._pending) > _AHEAD * self.config.num_workers:
            self._write_oldest()

    def refuse(self, message: str) -> None:
        """Notes an item that cannot be used."""
        self.bad.append(escaped(message))

    def is_new(self, key: str) -> bool:
        """Returns whether this is the first call with a key."""
        number = _hash(key, "")
        is_new = number not in self._seen_keys
        self._seen_keys.add(number)
        return is_new

    def leave_out(self, reason: str, name: str) -> None:
        """Notes an item that is not taken although it could be used."""
        self._left_out[reason].append(escaped(name))

    def filled_captions(self, name: str, captions: Iterable[str]) -> list[str]:
        """Strips the captions of an image and leaves out the empty ones."""
        stripped = [caption.strip() for caption in captions]
        if not all(stripped):
            self.leave_out("empty caption", name)
        return list(filter(None, stripped))

    def training_entries(self) -> Iterator[Any]:
        """Yields the entries of the training split, or of all folds, as JSON holds them."""
        for batch in self._example_table.scan(["split", "example"]):
            for row in batch.to_pylist():
                if row["split"] in self._training_splits:
                    yield json.loads(row["example"])["entry"]

    def finish(
        self, source: object, info: DatasetInfo, *, splits: Sequence[str] = ()
    ) -> DatasetInfo:
        """Writes everything that is pending, then `dataset.json`, and returns its content.

        Args:
            source: Names the source in errors.
            info: Description, without counts, versions and digest.
            splits: Splits that must have examples.

        Raises:
            ValueError: Too much is bad, a split is empty, or the splits of the source contradict each other.
        """
        while self._pending:
            self._write_oldest()
        self._commit()  # before any error, so that the next attempt continues from here

        # Enough examples are usable, and their splits fit together.
        check_bad(source, self.bad, self.config.max_errors, has_good=bool(self._num_entries))
        empty = ", ".join(split for split in splits if not self._num_entries[split])
        if empty or not self._num_entries:
            of_splits = f" of {empty}" if self._num_entries else ""
            reason = f" ({shortened(self.bad[0])})" if self.bad else ""
            raise ValueError(
                f"{source} has no usable example{of_splits}{reason}; check that it is the right source"
            )

        self._settle_splits(source)

        # Files.
        for name, value in self.files().items():
            write_json(self.out / name, value)

        # Description.
        further_splits = sorted(self._num_entries.keys() - set(SPLITS))
        split_infos = {}
        for split in (*filter(self._num_entries.get, SPLITS), *further_splits):
            num_images = sum(group >= 0 for group in self._groups[split])
            split_infos[split] = SplitInfo(images=num_images, examples=self._num_entries[split])
        if self.bad:
            self._left_out["cannot be used"] = self.bad
        counts = dict(info.left_out)
        examples = dict(info.some_left_out)
        for reason, names in self._left_out.items():
            counts[reason] = len(names)
            examples[reason] = names[:_MAX_LISTED]
        content = _read_contents(self._image_table, self._example_table, sorted(split_infos))
        info = replace(
            info,
            kind=self.schema.name,
            splits=split_infos,
            left_out=counts,
            some_left_out=examples,
            versions={"images": self._image_table.version, "examples": self._example_table.version},
            digest="".join(content.digests),
        )
        write_json(self.out / INFO_FILE, asdict(info))
        _warn_of_small_splits(source, info)
        return info

    def _settle_splits(self, source: object) -> None:
        """Checks splits from the source, or fills what a hash left empty."""
        if len(self._origin_by_has_split) > 1:
            raise ValueError(
                f"{source}: {self._origin_by_has_split[True]} has a split and "
                f"{self._origin_by_has_split[False]} none; give all or none"
            )
        if True in self._origin_by_has_split and self._rest != "train":
            raise ValueError(
                f"{self._origin_by_has_split[True]} has a split, and folds are in place of splits; leave folds out"
            )
        if False in self._origin_by_has_split:
            self._fill_empty_splits()
        elif self._by_content:
            self._check_overlap(source)

    def _write_oldest(self) -> None:
        """Takes the oldest pending example, waits for its images, and adds its rows."""
        name, split, origin, images, entries = self._pending.popleft()
        rows = []
        for image in images:
            row = self._row_of(image, origin)
            if row is not None:
                rows.append(row)
        self._advance(1)
        if len(rows) < len(images) or not entries:
            return

        # Split.
        self._origin_by_has_split.setdefault(bool(split), origin)
        group = -1 - self._num_entries.total()
        mark = name.encode()
        if rows:
            group = rows[0]
            mark = self._digests[group]
        if not split:
            split = split_of(mark, self._shares, self._seed) or self._rest
        if self._by_content:
            for image in images:
                key = _hash(image.name, image.version)
                first_split = self._split_of_image.setdefault(key, split)
                if first_split != split:
                    self._in_two_splits.append(f"{image.name}, are in {first_split} and in {split}")
        self._groups.setdefault(split, set()).add(group)

        for entry in entries:
            self._add_entry(name, split, group, rows, entry)
        is_late = time.monotonic() - self._last_commit > _COMMIT_SECONDS
        if self._uncommitted_bytes > _COMMIT_BYTES or (self._image_rows and is_late):
            self._commit()

    def _add_entry(self, name: str, split: str, group: int, rows: list[int], entry: Any) -> None:
        """Adds an entry, unless it is a repeated caption of the same images. The official code trains on these once."""
        is_caption = isinstance(entry, str)
        if is_caption and not self.is_new(f"{group} {split} {entry}"):
            self.leave_out("repeated caption", name)
            return
        content = {"id": name, "images": rows, "entry": entry if is_caption else vars(entry)}
        example = json.dumps(content, ensure_ascii=False).encode()
        self._example_rows.append((split, group, example))
        self._num_entries[split] += 1
        self._uncommitted_bytes += len(example)

    def _row_of(self, image: Image, origin: str) -> int | None:
        """Returns the row of an image, once it is read, or None if it cannot be used."""
        key = _hash(image.name, image.version)
        row = self._images[key]
        if isinstance(row, Future):
            try:
                row = self._add_image(image, row.result())
            except ValueError as error:
                self.refuse(f"{origin}: {error}")
                row = None
            self._images[key] = row
        return row

    def _add_image(self, image: Image, content: bytes) -> int:
        digest = hashlib.blake2b(content, digest_size=16).digest()
        row = self._row_of_digest.get(digest)
        if row is None:
            row = self._add_digest(digest)
            self._image_rows.append((image.name, image.version, digest, content))
            self._uncommitted_bytes += len(content)
        return row

    def _add_digest(self, digest: bytes) -> int:
        row = len(self._digests)
        self._digests.append(digest)
        if self._by_content:
            self._row_of_digest.setdefault(digest, row)
        return row

    def _commit(self) -> None:
        import pyarrow as pa

        pending_rows: list[tuple[Table, list[Any]]] = [
            (self._image_table, self._image_rows),
            (self._example_table, self._example_rows),
        ]
        for table, rows in pending_rows:
            if rows:
                schema = table.schema.remove(table.schema.get_field_index(CRC))
                columns = [list(column) for column in zip(*rows, strict=True)]
                table.append(pa.table(dict(zip(schema.names, columns, strict=True)), schema))
                rows.clear()
        self._uncommitted_bytes = 0
        self._last_commit = time.monotonic()

    def _fill_empty_splits(self) -> None:
        """Moves a group into each split that the hash left empty, so that a small set can be evaluated."""
        for split in (self._rest, *reversed(list(self._shares))):
            is_needed = split == self._rest or self._shares[split] > 0
            largest = max(self._groups, key=lambda name: len(self._groups[name]))
            if not is_needed or self._groups.get(split) or len(self._groups[largest]) < 2:
                continue
            group = min(self._groups[largest])
            self._groups[largest].remove(group)
            self._groups[split] = {group}
            lance = self._example_table.lance
            num_entries = lance.count_rows(f"`group` = {group}")
            self._num_entries.update({largest: -num_entries, split: num_entries})
            lance.update(where=f"`group` = {group}", values={"split": split})

    def _check_overlap(self, source: object) -> None:
        """Refuses an image in two splits, and warns of equal images, which may be meant."""
        if self._in_two_splits:
            count = len(self._in_two_splits)
            raise ValueError(
                f"{source}: {count} images, such as {self._in_two_splits[0]}; give each one split"
            )
        for split, other in combinations(self._groups, 2):
            shared = {row for row in self._groups[split] & self._groups[other] if row >= 0}
            if shared:
                logger.warning(
                    "%s: %d images of %s, such as %s, are in %s too, by the same or other names",
                    source,
                    len(shared),
                    split,
                    self._image_table.take([min(shared)], ["name"])["name"][0],
                    other,
                )


def _warn_of_small_splits(source: object, info: DatasetInfo) -> None:
    for name, split in info.splits.items():
        count = split.images or split.examples
        # The results of folds are joined.
        if name != "train" and not name.startswith("fold-") and count < MIN_EVALUATED:
            logger.warning(
                "%s: %s is small (%d): metrics of so few hardly tell two models apart, and of more processes than that "
                "some have nothing to evaluate; give more data",
                source,
                name,
                count,
            )


def _open_table(
    path: Path, columns: Mapping[str, str], *, checked: str, replace: bool = False
) -> Table:
    """Opens the table of an earlier attempt, or creates it. A user's table of that name is not touched."""
    import pyarrow as pa

    if path.exists():
        table = Table(path)
        if table.schema.names != [*columns, CRC]:
            raise ValueError(
                f"{path} was not written by `bridgetower prepare`; choose another folder"
            )
        if not replace:
            table.recover()
            return table
    schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in columns.items()])
    return Table.create(path, schema, checked=checked, replace=replace)


class PreparedSet:
    """Examples of splits of a prepared set.

    Args:
        folder: Folder or URL of the set.
        splits: Names of splits; default: all.
        schema: Schema of the examples; default: the one that `dataset.json` names.

    Raises:
        FileNotFoundError: The set or a split does not exist.
        ValueError: The set has another schema.
        OSError: A table does not have the content that was written.
    """

    def __init__(
        self, folder: str | Path, splits: Sequence[str] | None = None, schema: Schema | None = None
    ) -> None:
        self.folder = str(folder).rstrip("/")
        self.info = read_info(folder)
        self.schema = schema or schema_named(self.info.kind)
        if self.info.kind != self.schema.name:
            raise ValueError(
                f"{folder} is a set of kind {self.info.kind}; use a set of kind {self.schema.name}"
            )
        self.splits = tuple(self.info.splits if splits is None else splits)
        for split in self.splits:
            if split not in self.info.splits:
                raise FileNotFoundError(
                    f"{folder} has no split {split!r}; it has {', '.join(self.info.splits)} "
                    f"({SPLIT_OPTIONS})"
                )

        # Tables, compared with the digest that was written.
        versions = self.info.versions
        self._images = Table(f"{self.folder}/images.lance", version=versions["images"])
        self._examples = Table(f"{self.folder}/examples.lance", version=versions["examples"])
        self.num_images = len(self._images)  # of all splits
        names = sorted(self.info.splits)
        content = _read_contents(self._images, self._examples, names)
        for table, digest in zip((self._images, self._examples), content.digests, strict=True):
            if digest not in self.info.digest:
                raise OSError(f"{table.uri} is damaged; make or copy the set again")

        # Rows of the selected splits, each with the index of its split in `splits`.
        indices = [self.splits.index(name) if name in self.splits else -1 for name in names]
        split_of_row = np.array([*indices, -1], np.int8)[content.split_index]
        self.numbers = np.flatnonzero(split_of_row >= 0)
        self.split_of = split_of_row[self.numbers]
        # The first image of each example, negative for a text alone.
        self.groups = content.groups[self.numbers]

    def examples(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Returns examples by their indices in `numbers`, each with `id`, `images` and `entry`."""
        rows = self.numbers[np.asarray(indices, np.int64)].tolist()
        table = self._examples.take(rows, ["example"])
        return [json.loads(example) for example in table["example"].to_pylist()]

    def scan(self) -> Iterator[dict[str, Any]]:
        """Yields all examples in the order of `numbers`."""
        import pyarrow as pa

        start = 0
        for batch in self._examples.scan(["example"]):
            first, end = np.searchsorted(self.numbers, [start, start + len(batch)])
            examples = batch["example"].take(pa.array(self.numbers[first:end] - start))
            yield from map(json.loads, examples.to_pylist())
            start += len(batch)

    def images(self, rows: Sequence[int]) -> list[bytes]:
        contents: list[bytes] = self._images.take(rows, ["image"])["image"].to_pylist()
        return contents

    def image_names(self, rows: Sequence[int]) -> list[str]:
        names: list[str] = self._images.take(rows, ["name"])["name"].to_pylist()
        return names

    def image_titles(self, rows: Sequence[int]) -> list[str]:
        """Returns the names of images with the folder, for errors."""
        return [f"{name} of {self.folder}" for name in self.image_names(rows)]

    def damaged(self) -> list[str]:
        """Names the rows whose content is not as it was written."""
        return [
            f"row {row} of {table.uri}"
            for table in (self._images, self._examples)
            for row in table.damaged()
        ]


class _Content(NamedTuple):
    digests: list[str]  # of the images, and of the examples
    split_index: np.ndarray  # of each example, -1 for another split
    groups: np.ndarray  # of each example


def _read_contents(images: Table, examples: Table, splits: Sequence[str]) -> _Content:
    """Reads the checksums of both tables, and the columns of the examples that place them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = pa.Table.from_batches(examples.scan(["split", "group"]))
    split_index = pc.fill_null(pc.index_in(columns["split"], pa.array(splits)), -1)
    split_index = split_index.to_numpy().astype(np.int8)
    groups = columns["group"].to_numpy()
    digests = []
    for arrays in ([images.crcs()], [examples.crcs(), split_index, groups]):
        content = b"".join(array.tobytes() for array in arrays)
        digests.append(hashlib.blake2b(content, digest_size=16).hexdigest())
    return _Content(digests, split_index, groups)


def read_info(folder: str | Path) -> DatasetInfo:
    path, content = read_part_of_set(
        folder, INFO_FILE, "the folder that `bridgetower prepare` wrote"
    )
    return from_plain(DatasetInfo, json_object(content, path), path)


def split_of(mark: bytes, shares: Mapping[str, float], seed: int) -> str:
    """Returns a split by a hash of the mark, so that no other image changes the split of an image.

    The text is empty if the hash is beyond all shares.
    """
    digest = hashlib.blake2b(b"%d %s" % (seed, mark), digest_size=8).digest()
    fraction = int.from_bytes(digest, "big") / 2**64
    for name, share in shares.items():
        if fraction < share:
            return name
        fraction -= share
    return ""


def fold_names(folds: int) -> list[str]:
    """Returns the names of the splits of a cross-validation."""
    return [f"fold-{number}" for number in range(1, folds + 1)]


def _image_version(image: Image) -> str:
    """Returns what tells an image from an older image of the same name, which an earlier attempt may have written."""
    if image.version:
        return image.version
    if image.content is not None:
        return hashlib.blake2b(image.content, digest_size=8).hexdigest()
    try:
        return "" if is_url(image.location) else version_of(image.location)
    except OSError:
        return ""


def _read_image(image: Image) -> bytes:
    """Returns the bytes of an image that can be decoded, or raises a ValueError that says what is wrong with it."""
    from bridgetower.processor import open_image  # imports torch, which help of commands must not

    try:
        content = image.read()
        open_image(content)
    except FileNotFoundError as error:
        raise ValueError(f"{image.name!r}: there is no such file") from error
    except (ValueError, OSError) as error:
        raise ValueError(f"{image.name!r}: {error}") from error
    return content


def _hash(name: str, version: str) -> int:
    content = f"{name}\0{version}".encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())
