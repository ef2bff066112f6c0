"""A toy set as its modules describe it, and how it becomes a prepared set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from bridgetower.data.config import WritingConfig
from bridgetower.data.sets.custom import finished_set
from bridgetower.data.sets.prepared_set import SPLITS, DatasetInfo, SetWriter
from bridgetower.data.sets.schema import CAPTIONS, Schema
from bridgetower.data.sources.example import Image
from bridgetower.progress import counted

T = TypeVar("T")


def answer_type(answer: str) -> str:
    """Returns the type of an answer as VQAv2 names it."""
    return "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "other"


class ImageFile(NamedTuple):
    """An image file: its name, extension included, and its bytes."""

    name: str
    content: bytes


@dataclass(frozen=True, kw_only=True)
class Record:
    """One image or several with what is said about them.

    Attributes:
        image_id: Unique within the split.
        images: In order.
        entries: One or more.
        extra: What only the demo reads.
    """

    image_id: str
    images: Sequence[ImageFile]
    entries: Sequence[Any]
    extra: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Collection:
    """A set about to be written: what it is, its records by split, and the content of further JSON files."""

    info: DatasetInfo
    schema: Schema = CAPTIONS
    splits: Mapping[str, Iterable[Record]]
    files: Mapping[str, Any] = field(default_factory=dict)


def write_collection(out: Path, collection: Collection, *, progress: bool = True) -> DatasetInfo:
    """Writes a set to a folder; a complete one with the same settings is left as it is."""
    info = replace(
        collection.info, settings={"set": collection.info.name, **collection.info.settings}
    )
    if finished := finished_set(out, info.settings, 0):
        return finished
    with SetWriter(out, collection.schema, WritingConfig(), progress=False) as writer:
        for split, records in collection.splits.items():
            for record in counted(records, f"writing {split}", enabled=progress):
                images = [
                    Image(name=f"{split}/{one.name}", location=one.name, content=one.content)
                    for one in record.images
                ]
                writer.add(images, record.entries, name=record.image_id, split=split)
        writer.files = lambda: collection.files
        return writer.finish(info.name, info)


def assign_splits(
    keys: Iterable[str], *, seed: int, num_test: int, num_validation: int
) -> dict[str, str]:
    """Gives each key a split: smallest hash of (seed, key) to test, the next to validation, the rest to train."""
    ranked = sorted(set(keys), key=lambda key: (split_rank(seed, key), key))
    if min(num_test, num_validation) < 0 or num_test + num_validation >= len(ranked):
        raise ValueError(
            f"{num_test} for test and {num_validation} for validation of {len(ranked)} leave nothing for train or are "
            "negative; give smaller numbers >= 0"
        )
    sizes = {
        "test": num_test,
        "validation": num_validation,
        "train": len(ranked) - num_test - num_validation,
    }
    return dict(
        zip(ranked, (name for name, size in sizes.items() for _ in range(size)), strict=True)
    )


def split_rank(seed: int, key: str) -> bytes:
    """Returns what `assign_splits` ranks keys by."""
    return hashlib.sha256(f"{seed}\0{key}".encode()).digest()


def by_split(items: Iterable[tuple[str, T]]) -> dict[str, list[T]]:
    """Groups items, each given with the name of its split."""
    groups: dict[str, list[T]] = {}
    for split, item in items:
        groups.setdefault(split, []).append(item)
    order = sorted(
        groups, key=lambda name: (SPLITS.index(name) if name in SPLITS else len(SPLITS), name)
    )
    return {split: groups[split] for split in order}
