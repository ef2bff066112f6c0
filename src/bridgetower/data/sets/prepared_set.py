"""Prepared sets: folders with `dataset.json`, a table of images and one of examples; written and opened here."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Self

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
SPLITS = ("train", "validation", "test")  # the usual ones, in their order; a set may have others
# What a user chooses another split with, for errors.
SPLIT_OPTIONS = "evaluate has --split, train --data.train-splits and --data.validation-split"

logger = logging.getLogger(__name__)

_COMMIT_BYTES, _COMMIT_SECONDS = 2**26, 30.0  # of images, after which they are committed
_AHEAD = 64  # images that are read and checked ahead, for each thread
FEW = 30  # images of a split for evaluation; of 30, one is 3 % of the accuracy
_LISTED = 1000  # and in `dataset.json`, of each reason

# Types of columns by Arrow's names; Arrow itself is imported where it is used, as the help of commands has none.
_IMAGES = {"name": "string", "version": "string", "digest": "binary", "image": "large_binary"}
_EXAMPLES = {"split": "string", "group": "int32", "example": "large_binary"}


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    images: int
    examples: int  # such as captions or questions


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What a prepared set is, as `dataset.json` has it."""

    name: str
    kind: str = "captions"  # name of the schema of its examples
    split_rule: str  # how images were given to splits, in words
    protocol: str = ""  # what else was decided about the originals, in words
    sources: Mapping[str, str] = field(default_factory=dict)  # annotation files with their digests
    licences: Mapping[str, str] = field(default_factory=dict)  # of each part
    settings: Mapping[str, object] = field(default_factory=dict)  # all that decides the content
    splits: Mapping[str, SplitInfo] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)  # how much, by reason
    some_left_out: Mapping[str, Sequence[str]] = field(
        default_factory=dict
    )  # names of some of it, by reason
    versions: Mapping[str, int] = field(default_factory=dict)  # of the tables
    digest: str = ""  # of all images and examples

    def counts(self) -> dict[str, dict[str, int]]:
        """Counts images, and entries by the name of what they are, such as `questions`, of each split."""
        noun = schema_named(self.kind).entries
        return {
            name: {"images": split.images, noun: split.examples}
            for name, split in self.splits.items()
        }


class SetWriter:
    """Reads and checks images ahead in threads, and commits; what a killed attempt committed is not read again."""

    def __init__(
        self,
        out: Path,
        schema: Schema,
        config: WritingConfig,
        *,
        shares: Mapping[str, float] | None = None,
        seed: int = 0,
        by_content: bool = False,
        progress: bool = True,
    ) -> None:
        self.out, self.schema, self.config = Path(out), schema, config
        self._shares, self._seed, self._by_content, self._progress = (
            shares or {},
            seed,
            by_content,
            progress,
        )
        # Makes the content of further JSON files, such as a vocabulary of answers, once all splits are known.
        self.files: Callable[[], Mapping[str, Any]] = dict
        self.bad: list[str] = []  # what cannot be used
        self._left_out: dict[str, list[str]] = {}
        self._num_left_out: Counter[str] = Counter()
        self._seen: set[int] = set()
        self._places: dict[
            int, Future[bytes | str] | int | str
        ] = {}  # number of an image, or what is wrong with it
        self._contents: dict[bytes, int] = {}  # number of an image by its digest
        self._digests: list[bytes] = []
        self._rows: list[tuple[str, str, bytes, bytes]] = []  # images that are not committed
        self._examples: list[tuple[str, int, bytes]] = []  # likewise
        # Name, split, origin, images with their keys, and entries of examples whose images are read.
        self._waiting: deque[tuple[str, str, str, list[tuple[int, Image]], list[Any]]] = deque()
        self._groups: dict[str, set[int]] = {}  # images, or texts without one, of each split
        self._counts: Counter[str] = Counter()
        self._given: dict[
            bool, str
        ] = {}  # an example with a split that the source gave, and one without
        self._split_of: dict[int, str] = {}  # of each name of an image
        self._twice: list[str] = []  # images in two splits
        self._size, self._written = 0, time.monotonic()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(locked(self.out))
            (self.out / INFO_FILE).unlink(missing_ok=True)
            remove_leftovers(self.out)
            self._images = _own_table(self.out / "images.lance", _IMAGES, checked="image")
            for batch in self._images.scan(["name", "version", "digest"]):
                for name, version, digest in zip(
                    *(column.to_pylist() for column in batch.columns), strict=True
                ):
                    self._places[_key(name, version)] = self._add_digest(digest)
            self._table = _own_table(
                self.out / "examples.lance", _EXAMPLES, checked="example", replace=True
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
        """Adds what is said about an image, several, or none; what cannot be used is counted as bad."""
        name = name or (images[0].name if images else origin)
        names = [name, *(image.name for image in images)]
        if problem := next(filter(None, map(unfit_name, names)), None):
            self.refuse(f"{origin or name}: {problem}")
            return
        good = []
        for entry in entries:
            if problem := self.schema.problem_of(entry):
                self.refuse(f"{origin or name}: {problem}")
            else:
                good.append(entry)
        asked = []
        for image in images:
            version = (
                image.version
            )  # an attempt that is continued must not take an earlier image of the same name
            if not version and image.content is not None:
                version = hashlib.blake2b(image.content, digest_size=8).hexdigest()
            elif not version and not is_url(image.location):
                with suppress(OSError):
                    version = version_of(image.location)
            key = _key(image.name, version)
            asked.append((key, replace(image, version=version)))
            if key not in self._places:
                self._places[key] = self._pool.submit(_checked, image)
        self._waiting.append((name, split, origin or name, asked, good))
        if len(self._waiting) > _AHEAD * self.config.num_workers:
            self._settle()

    def refuse(self, message: str) -> None:
        self.bad.append(escaped(message))

    def is_new(self, key: str) -> bool:
        known = (number := _key(key, "")) in self._seen
        self._seen.add(number)
        return not known

    def leave_out(self, reason: str, name: str) -> None:
        """Notes what is not taken although it could be used."""
        self._num_left_out[reason] += 1
        if self._num_left_out[reason] <= _LISTED:
            self._left_out.setdefault(reason, []).append(escaped(name))

    def filled_captions(self, name: str, captions: Iterable[str]) -> list[str]:
        """Returns captions of an image without spaces at their ends; empty ones are noted as left out."""
        stripped = [caption.strip() for caption in captions]
        if not all(stripped):
            self.leave_out("empty caption", name)
        return list(filter(None, stripped))

    def training_entries(self) -> Iterator[Any]:
        for batch in self._table.scan(["split", "example"]):
            for split, example in zip(
                *(column.to_pylist() for column in batch.columns), strict=True
            ):
                if split == "train":
                    yield json.loads(example)["entry"]

    def finish(
        self, source: object, info: DatasetInfo, *, splits: Sequence[str] = ()
    ) -> DatasetInfo:
        while self._waiting:
            self._settle()
        self._commit()  # what can be used stays for the next attempt
        check_bad(source, self.bad, self.config.max_errors, has_good=bool(self._counts))
        if not self._counts or (empty := [name for name in splits if not self._counts[name]]):
            of = f" of {', '.join(empty)}" if self._counts else ""
            reason = f" ({shortened(self.bad[0])})" if self.bad else ""
            raise ValueError(
                f"{source} has no usable example{of}{reason}; check that it is the right source"
            )
        if len(self._given) > 1:
            raise ValueError(
                f"{source}: {self._given[True]} has a split and {self._given[False]} none; give all or none"
            )
        # A split of a share that chance left empty gets one image, so that a small set can be evaluated.
        for name in SPLITS if False in self._given else ():
            largest = max(self._groups, key=lambda one: len(self._groups[one]))
            is_wanted = (name == "train" or self._shares.get(name, 0) > 0) and not self._groups.get(
                name
            )
            if is_wanted and len(self._groups[largest]) > 1:
                moved = min(self._groups[largest])
                self._groups[largest].remove(moved)
                self._groups[name] = {moved}
                count = self._table.lance.count_rows(f"`group` = {moved}")
                self._counts.update({largest: -count, name: count})
                self._table.lance.update(where=f"`group` = {moved}", values={"split": name})
        if True in self._given and self._by_content:
            # An image in two splits would be trained on and evaluated; a copy of it under another name may be meant.
            if self._twice:
                raise ValueError(
                    f"{source}: {len(self._twice)} images, such as {self._twice[0]}; give each one split"
                )
            for split, other in combinations(self._groups, 2):
                if shared := {
                    group for group in self._groups[split] & self._groups[other] if group >= 0
                }:
                    name = self._images.take([min(shared)], ["name"])["name"][0]
                    message = (
                        "%s: %d images of %s, such as %s, are in %s too, by the same or other names"
                    )
                    logger.warning(message, source, len(shared), split, name, other)
        for name, value in self.files().items():
            write_json(self.out / name, value)
        bad = {"cannot be used": self.bad[:_LISTED]} if self.bad else {}
        order = sorted(
            self._counts, key=lambda one: (SPLITS.index(one) if one in SPLITS else len(SPLITS), one)
        )
        info = replace(
            info,
            kind=self.schema.name,
            splits={
                name: SplitInfo(
                    images=sum(one >= 0 for one in self._groups[name]), examples=self._counts[name]
                )
                for name in order
            },
            left_out={
                **info.left_out,
                **self._num_left_out,
                **{reason: len(self.bad) for reason in bad},
            },
            some_left_out={**info.some_left_out, **self._left_out, **bad},
            versions={"images": self._images.version, "examples": self._table.version},
            digest="".join(_content(self._images, self._table, sorted(order))[0]),
        )
        write_json(self.out / INFO_FILE, asdict(info))
        _warn_of_few(source, info)
        return info

    def _settle(self) -> None:
        """Takes the example that waits longest, once its images are read."""
        name, split, origin, images, entries = self._waiting.popleft()
        numbers, problem = [], ""
        for key, image in images:
            found = self._places[key]
            if isinstance(found, Future):
                content = found.result()
                if isinstance(content, str):
                    found = content
                    self.refuse(f"{origin}: {found}")
                else:
                    digest = hashlib.blake2b(content, digest_size=16).digest()
                    found = self._contents.get(digest, -1)
                    if found < 0:
                        self._rows.append((image.name, image.version, digest, content))
                        self._size += len(content)
                        found = self._add_digest(digest)
                self._places[key] = found
            if isinstance(found, str):
                problem = found
            else:
                numbers.append(found)
        self._advance(1)
        if problem or not entries:
            return
        self._given.setdefault(bool(split), origin)
        group = numbers[0] if numbers else -1 - sum(self._counts.values())
        split = split or split_of(
            self._digests[group] if numbers else name.encode(), self._shares, self._seed
        )
        for key, image in images:
            if self._by_content and (other := self._split_of.setdefault(key, split)) != split:
                self._twice.append(f"{image.name}, are in {other} and in {split}")
        for entry in entries:
            if isinstance(entry, str) and not self.is_new(
                f"{group} {split} {entry}"
            ):  # as the official code trains
                self.leave_out("repeated caption", name)
                continue
            plain = entry if isinstance(entry, str) else vars(entry)
            example = json.dumps(
                {"id": name, "images": numbers, "entry": plain}, ensure_ascii=False
            ).encode()
            self._examples.append((split, group, example))
            self._counts[split] += 1
            self._size += len(example)
        self._groups.setdefault(split, set()).add(group)
        if self._size > _COMMIT_BYTES or (
            self._rows and time.monotonic() - self._written > _COMMIT_SECONDS
        ):
            self._commit()

    def _add_digest(self, digest: bytes) -> int:
        self._digests.append(digest)
        if self._by_content:
            self._contents.setdefault(digest, len(self._digests) - 1)
        return len(self._digests) - 1

    def _commit(self) -> None:
        import pyarrow as pa

        for table, rows in ((self._images, self._rows), (self._table, self._examples)):
            if rows:
                schema = table.schema.remove(table.schema.get_field_index(CRC))
                columns = dict(zip(schema.names, map(list, zip(*rows, strict=True)), strict=True))
                table.append(pa.Table.from_pydict(columns, schema))
        self._rows, self._examples = [], []
        self._size, self._written = 0, time.monotonic()


def _warn_of_few(source: object, info: DatasetInfo) -> None:
    """Warns of splits that are too small for what they are for."""
    for name, split in info.splits.items():
        count, noun = (split.images, "images") if split.images else (split.examples, "examples")
        if name != "train" and count < FEW:
            logger.warning(
                "%s: %s has %d %s: metrics of so few hardly tell two models apart, and of more processes than that "
                "some have nothing to evaluate; give more data",
                source,
                name,
                count,
                noun if count > 1 else noun.removesuffix("s"),
            )


def _own_table(
    uri: Path, columns: Mapping[str, str], *, checked: str, replace: bool = False
) -> Table:
    """Opens the table that an earlier attempt left, or makes it; a user's table of that name is kept."""
    import pyarrow as pa

    table = Table(uri) if uri.exists() else None
    if table is not None and table.schema.names != [*columns, CRC]:
        raise ValueError(f"{uri} was not written by `bridgetower prepare`; choose another folder")
    if table is not None and not replace:
        table.recover()
        return table
    schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in columns.items()])
    return Table.create(uri, schema, checked=checked, replace=replace)


class PreparedSet:
    def __init__(
        self, folder: str | Path, splits: Sequence[str] | None = None, schema: Schema | None = None
    ) -> None:
        self.folder, self.info = str(folder).rstrip("/"), read_info(folder)
        self.schema = schema or schema_named(self.info.kind)
        if self.info.kind != self.schema.name:
            raise ValueError(
                f"{folder} is a set of kind {self.info.kind}; use a set of kind {self.schema.name}"
            )
        self.splits = tuple(self.info.splits if splits is None else splits)
        if missing := [name for name in self.splits if name not in self.info.splits]:
            there = ", ".join(self.info.splits)
            raise FileNotFoundError(
                f"{folder} has no split {missing[0]!r}; it has {there} ({SPLIT_OPTIONS})"
            )
        versions = self.info.versions
        self._images = Table(f"{self.folder}/images.lance", version=versions["images"])
        self.num_images = len(self._images)  # of all splits
        self._examples = Table(f"{self.folder}/examples.lance", version=versions["examples"])
        names = sorted(self.info.splits)
        digests, split, groups = _content(self._images, self._examples, names)
        for table, digest in zip((self._images, self._examples), digests, strict=True):
            if digest not in self.info.digest:
                raise OSError(f"{table.uri} is damaged; make or copy the set again")
        places = [self.splits.index(name) if name in self.splits else -1 for name in names]
        split = np.array([*places, -1], np.int8)[split]
        self.numbers = np.flatnonzero(split >= 0)  # of the examples of the chosen splits
        self.split_of = split[self.numbers]  # index of each example's split in `splits`
        self.groups = groups[
            self.numbers
        ]  # the first image of each one; negative where it has only text

    def examples(self, places: Sequence[int]) -> list[dict[str, Any]]:
        """Returns examples by their places among `numbers`: `id`, `images` and `entry` of each."""
        rows = self._examples.take(self.numbers[np.asarray(places, np.int64)].tolist(), ["example"])
        return [json.loads(row) for row in rows["example"].to_pylist()]

    def scan(self) -> Iterator[dict[str, Any]]:
        import pyarrow as pa

        start = 0
        for batch in self._examples.scan(["example"]):
            first, end = np.searchsorted(self.numbers, [start, start + len(batch)])
            kept = batch["example"].take(pa.array(self.numbers[first:end] - start))
            yield from map(json.loads, kept.to_pylist())
            start += len(batch)

    def images(self, numbers: Sequence[int]) -> list[bytes]:
        found: list[bytes] = self._images.take(numbers, ["image"])["image"].to_pylist()
        return found

    def image_names(self, numbers: Sequence[int]) -> list[str]:
        found: list[str] = self._images.take(numbers, ["name"])["name"].to_pylist()
        return found

    def damaged(self) -> list[str]:
        return [
            f"row {row} of {table.uri}"
            for table in (self._images, self._examples)
            for row in table.damaged()
        ]


def _content(
    images: Table, examples: Table, splits: Sequence[str]
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Returns a digest of each table, and the number of the split and the group of each example."""
    import pyarrow as pa
    import pyarrow.compute as pc

    parts = list(examples.scan(["split", "group"]))
    codes = [
        pc.fill_null(pc.index_in(part["split"], pa.array(splits)), -1).to_numpy() for part in parts
    ]
    split, group = (
        np.concatenate(codes).astype(np.int8),
        np.concatenate([part["group"].to_numpy() for part in parts]),
    )
    contents = (images.crcs(),), (examples.crcs(), split, group)
    digests = [
        hashlib.blake2b(b"".join(one.tobytes() for one in part), digest_size=16)
        for part in contents
    ]
    return [digest.hexdigest() for digest in digests], split, group


def read_info(folder: str | Path) -> DatasetInfo:
    path, content = read_part_of_set(
        folder, INFO_FILE, "the folder that `bridgetower prepare` wrote"
    )
    return from_plain(DatasetInfo, json_object(content, path), path)


def split_of(mark: bytes, shares: Mapping[str, float], seed: int) -> str:
    """A hash decides, so that no other image changes the split of one."""
    fraction = (
        int.from_bytes(hashlib.blake2b(b"%d %s" % (seed, mark), digest_size=8).digest(), "big")
        / 2**64
    )
    for name, share in shares.items():
        if fraction < share:
            return name
        fraction -= share
    return "train"


def _checked(image: Image) -> bytes | str:
    """Returns the bytes of an image, or what is wrong."""
    from bridgetower.processor import open_image  # which needs torch; the help of commands does not

    try:
        content = image.read()
        open_image(content)
    except FileNotFoundError:
        return f"{image.name!r}: there is no such file"
    except (ValueError, OSError) as error:
        return f"{image.name!r}: {error}"
    return content


def _key(name: str, version: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(
            f"{name}\0{version}".encode(errors="surrogateescape"), digest_size=8
        ).digest()
    )
