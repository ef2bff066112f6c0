"""What a prepared set holds: counts against the published ones, lengths of texts, classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridgetower.data.info import DatasetInfo, read_info
from bridgetower.data.kinds import TEXT_COLUMN, Kind, text_of
from bridgetower.data.published.counts import Published, published_counts
from bridgetower.data.splits import read_split, split_files
from bridgetower.files import sha256_of
from bridgetower.progress import counted

_CLASS_FIELD: Mapping[Kind, str] = {"vqa": "answer_type", "snli-ve": "label", "nlvr2": "label"}


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths of texts in words.

    Attributes:
        shortest: The least.
        median: As many are shorter as are longer.
        mean: The average.
        p95: 95 in 100 are at most as long.
        longest: The most.
    """

    shortest: int
    median: int
    mean: float
    p95: int
    longest: int

    @classmethod
    def of(cls, counts: Mapping[int, int]) -> Lengths:
        """Sums up how many texts have each length."""
        total = sum(counts.values())
        mean = sum(length * count for length, count in counts.items()) / total
        median, p95 = (_quantile(counts, total, share) for share in (0.5, 0.95))
        return cls(shortest=min(counts), median=median, mean=round(mean, 2), p95=p95, longest=max(counts))


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """What a split holds.

    Attributes:
        images: Pictures, or pairs of pictures.
        texts: Captions, questions or statements.
        size: Bytes of its files.
        published: How large it is said to be; None for sets that are not published.
        words: Lengths of the texts.
        classes: Number of texts of each answer type or label; empty for captions.
    """

    images: int
    texts: int
    size: int
    published: Published | None
    words: Lengths
    classes: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a set holds.

    Attributes:
        info: What `dataset.json` says.
        splits: By name.
    """

    info: DatasetInfo
    splits: Mapping[str, SplitReport]


def inspect(folder: Path, *, check: bool = False, progress: bool = False) -> Report:
    """Reads all texts of a prepared set and counts; one row group is in memory at a time.

    Args:
        folder: Of the set.
        check: Whether to compare every file with its digest too.
        progress: Whether to show progress.

    Raises:
        FileNotFoundError: If there is no complete set, or a file of it is missing.
        ValueError: If files do not hold what `dataset.json` says.
    """
    info = read_info(folder)
    if check:
        _check_files(folder, info, progress)
    splits = {name: _inspect_split(folder, name, info, progress) for name in info.splits}
    return Report(info=info, splits=splits)


def _check_files(folder: Path, info: DatasetInfo, progress: bool) -> None:
    digests = info.digests()
    for name in counted(list(digests), "checking files", shown=progress):
        if sha256_of(Path(folder) / name) != digests[name]:
            raise ValueError(f"{name} in {folder} is not as it was written; run `bridgetower prepare` again")


def _inspect_split(folder: Path, name: str, info: DatasetInfo, progress: bool) -> SplitReport:
    rows = read_split(folder, name, kind=info.kind)
    words: Counter[int] = Counter()
    classes: Counter[str] = Counter()
    measure = _measure(info.kind, words, classes)
    for texts in counted(rows.stream(TEXT_COLUMN[info.kind]), f"reading {name}", shown=progress, total=len(rows)):
        measure(texts)
    images, num_texts = len(rows), words.total()
    expected = info.splits[name]
    if (images, num_texts) != (expected.images, expected.texts):
        raise ValueError(
            f"{name} in {folder} has {images} pictures and {num_texts} texts, dataset.json says {expected.images} and "
            f"{expected.texts}; run `bridgetower prepare` again"
        )
    return SplitReport(
        images=images,
        texts=num_texts,
        size=sum(path.stat().st_size for path in split_files(folder, name)),
        published=published_counts(info.name, info.kind, name, images, num_texts),
        words=Lengths.of(words),
        classes=dict(classes.most_common()),
    )


def _measure(kind: Kind, words: Counter[int], classes: Counter[str]) -> Callable[[Iterable[Any]], None]:
    def measure(texts: Iterable[Any]) -> None:
        for text in texts:
            words[len(text_of(text).split())] += 1
            if kind != "captions":
                classes[text[_CLASS_FIELD[kind]] or "unknown"] += 1

    return measure


def _quantile(counts: Mapping[int, int], total: int, share: float) -> int:
    passed = 0
    for length in sorted(counts):
        passed += counts[length]
        if passed >= share * total:
            return length
    raise AssertionError("counts add up to the total")
