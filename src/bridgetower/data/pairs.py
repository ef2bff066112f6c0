"""A user's own pictures with captions, brought together by picture, checked, and put into splits."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from bridgetower.data.config import PairsConfig
from bridgetower.data.info import DatasetInfo
from bridgetower.data.records import Collection, Record
from bridgetower.data.sources import Picture, Row
from bridgetower.data.splits import assign_splits, by_split
from bridgetower.processor import open_image

_MAX_NAMED = 10  # bad rows spelt out in an error
_FEWEST_SPLIT = 3  # pictures: one each for train, validation and test
_CHUNK_PER_WORKER = 8  # pictures in flight


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """What a source says, before any picture is opened.

    Attributes:
        source: The file or folder.
        pictures: Pictures by name.
        captions: Captions by picture name; no captions if all were empty.
        splits: Split by picture name; empty if the source does not say.
        bad: Rows that cannot be used, with the reason.
    """

    source: Path
    pictures: Mapping[str, Picture] = field(repr=False)
    captions: Mapping[str, tuple[str, ...]] = field(repr=False)
    splits: Mapping[str, str] = field(repr=False)
    bad: tuple[str, ...]

    @property
    def name(self) -> str:
        """What to call the dataset."""
        return self.source.resolve().stem

    @property
    def sources(self) -> dict[str, str]:
        """The source's name with a digest of its content."""
        return {self.source.resolve().name: self.digest}

    @property
    def digest(self) -> str:
        """Changes when a picture, a caption or a split does."""
        digest = hashlib.sha256(repr(self.bad).encode())
        for name, picture in self.pictures.items():
            digest.update(repr((name, picture.stamp, self.captions[name], self.splits.get(name))).encode())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class PairRecords:
    """Records of some pictures, read from the source at each pass, so that few are in memory.

    Attributes:
        pairs: What the source says.
        names: Names of the pictures.
    """

    pairs: Pairs
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Record]:
        for name in self.names:
            picture, captions = self.pairs.pictures[name], self.pairs.captions[name]
            yield Record(image=picture.read(), file_name=picture.file_name, image_id=name, captions=captions)


def group_rows(source: Path, rows: Iterable[Row]) -> Pairs:
    """Brings the rows about each picture together.

    Raises:
        ValueError: If a picture is in two splits, or some rows have a split and others none.
    """
    pictures: dict[str, Picture] = {}
    captions: dict[str, tuple[str, ...]] = {}
    splits: dict[str, str] = {}
    bad: list[str] = []
    for row in rows:
        name = row.picture.name
        if name not in pictures and row.picture.stamp is None:
            bad.append(f"{row.place}: no file {name!r}")
            continue
        pictures.setdefault(name, row.picture)
        stripped = [caption.strip() for caption in row.captions]
        if not all(stripped) or not stripped:
            bad.append(f"{row.place}: empty caption of {name!r}")
        captions[name] = (*captions.get(name, ()), *filter(None, stripped))
        if row.split is not None and splits.setdefault(name, row.split) != row.split:
            raise ValueError(
                f"{source}, {row.place}: {name!r} is in {row.split} and in {splits[name]}; give it one split"
            )
    if splits and len(splits) < len(pictures):
        name = next(name for name in pictures if name not in splits)
        raise ValueError(f"{source} gives {len(splits)} pictures a split but not {name!r}; give each a split, or none")
    return Pairs(source=source, pictures=pictures, captions=captions, splits=splits, bad=tuple(bad))


def find_broken(
    pairs: Pairs, *, num_workers: int, progress: Callable[[Sequence[str]], Iterable[str]] = iter
) -> dict[str, str]:
    """Decodes every picture that has a caption and returns what is wrong with those that cannot be, by name.

    Args:
        pairs: What the source says.
        num_workers: Threads that decode.
        progress: Wraps the names while they are worked through.
    """
    names = iter(progress([name for name in pairs.pictures if pairs.captions[name]]))
    broken: dict[str, str] = {}
    with ThreadPoolExecutor(num_workers) as pool:
        while chunk := list(islice(names, _CHUNK_PER_WORKER * num_workers)):
            problems = pool.map(_problem_of, [pairs.pictures[name] for name in chunk])
            broken |= {name: problem for name, problem in zip(chunk, problems, strict=True) if problem}
    return broken


def collect(pairs: Pairs, broken: Mapping[str, str], config: PairsConfig) -> Collection:
    """Puts the good pictures into splits.

    Args:
        pairs: What the source says.
        broken: What is wrong with pictures that cannot be decoded, by name.
        config: How to split, and how much may be bad.

    Raises:
        ValueError: If more than `max_bad` are bad (the first are named), none is good, or fractions are given although
            the source has splits.
    """
    bad = [*pairs.bad, *(f"{name!r}: {problem}" for name, problem in broken.items())]
    _check_bad(pairs.source, bad, config.max_bad)
    good = [name for name in pairs.pictures if pairs.captions[name] and name not in broken]
    if not good:
        raise ValueError(f"{pairs.source} has no usable picture with a caption; check that it is the right source")
    split_of = pairs.splits or _seeded_splits(good, config)
    if pairs.splits and (config.test_fraction, config.validation_fraction) != (None, None):
        raise ValueError(f"{pairs.source} has a split column, so fractions would be ignored; leave out one of them")
    members = by_split((split_of[name], name) for name in good)
    return Collection(
        info=DatasetInfo(
            name=pairs.name,
            seed=config.seed,
            split_rule="as the source's split column says" if pairs.splits else _seeded_rule(len(good), config),
            sources=pairs.sources,
            licences={},
            settings=config.settings,
            left_out={"cannot be used": bad} if bad else {},
        ),
        splits={split: PairRecords(pairs=pairs, names=names) for split, names in members.items()},
    )


def _check_bad(source: Path, bad: Sequence[str], max_bad: int) -> None:
    if len(bad) <= max_bad:
        return
    more = f" and {len(bad) - _MAX_NAMED} more" if len(bad) > _MAX_NAMED else ""
    named = " | ".join(bad[:_MAX_NAMED])
    raise ValueError(f"{source} has {len(bad)} bad rows or pictures, allowed are {max_bad} (max_bad): {named}{more}")


def _seeded_rule(num_pictures: int, config: PairsConfig) -> str:
    rule = "pictures ranked by hash of seed and name"
    if num_pictures < _FEWEST_SPLIT and any(config.fractions):
        return f"{rule}; {num_pictures} are too few for test and validation, which need {_FEWEST_SPLIT}"
    return rule


def _seeded_splits(names: Sequence[str], config: PairsConfig) -> dict[str, str]:
    # A fraction that is not zero gives at least one picture, so that training has something to be judged on.
    fewest = 0 if len(names) < _FEWEST_SPLIT else 1
    num_test, num_validation = (
        max(round(fraction * len(names)), fewest if fraction > 0 else 0) for fraction in config.fractions
    )
    return assign_splits(names, seed=config.seed, num_test=num_test, num_validation=num_validation)


def _problem_of(picture: Picture) -> str | None:
    try:
        open_image(picture.read())
    except (ValueError, OSError) as error:
        return str(error)
    return None
