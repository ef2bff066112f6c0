"""What a prepared set holds: counts against the published ones, lengths of texts, classes."""

from __future__ import annotations

import base64
import io
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bridgetower.data.datasets import DATASETS
from bridgetower.data.datasets.spec import PublishedCount
from bridgetower.data.folder import DatasetInfo, read_info, read_split, split_files
from bridgetower.data.schema import Schema, schema_named
from bridgetower.files import sha256_of, write_text
from bridgetower.processor import open_image
from bridgetower.progress import counted

_SIDE = 320  # pixels, the longer side of a sample


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
        lengths = sorted(counts)
        ends = np.cumsum([counts[length] for length in lengths])
        median, p95 = (lengths[int(np.searchsorted(ends, share * ends[-1]))] for share in (0.5, 0.95))
        mean = round(sum(length * count for length, count in counts.items()) / int(ends[-1]), 2)
        return cls(shortest=lengths[0], median=median, mean=mean, p95=p95, longest=lengths[-1])


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """What a split holds.

    Attributes:
        images: Images, or pairs of images.
        texts: Captions, questions or statements.
        size: Bytes of its files.
        published: Its published size; None for sets that are not published.
        words: Lengths of the texts.
        classes: Number of texts of each answer type or label; empty for captions.
    """

    images: int
    texts: int
    size: int
    published: PublishedCount | None
    words: Lengths
    classes: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a set holds.

    Attributes:
        info: Content of `dataset.json`.
        splits: By name.
    """

    info: DatasetInfo
    splits: Mapping[str, SplitReport]


def inspect(folder: Path, *, schema: Schema | None = None, check: bool = False, progress: bool = False) -> Report:
    """Reads all texts of a prepared set and counts; one row group is in memory at a time.

    Args:
        folder: Of the set.
        schema: Of the set; None: the one of `SCHEMAS` that `dataset.json` names.
        check: Whether to compare every file with its digest too.
        progress: Whether to show progress.

    Raises:
        FileNotFoundError: If there is no complete set, or a file of it is missing.
        ValueError: If the counts or digests differ from those in `dataset.json`.
    """
    info = read_info(folder)
    if check:
        _check_files(folder, info, progress)
    schema = schema or schema_named(info.kind)
    splits = {name: _inspect_split(folder, name, info, schema, progress) for name in info.splits}
    return Report(info=info, splits=splits)


def write_samples(
    folder: Path, path: Path, *, schema: Schema | None = None, num_samples: int = 8, seed: int = 0
) -> None:
    """Writes an HTML page with samples of every split, images and entries, in one file.

    Args:
        folder: Of a prepared set.
        path: File to write, such as page.html.
        schema: Of the set; None: the one of `SCHEMAS` that `dataset.json` names.
        num_samples: Rows per split.
        seed: Of the choice.

    Raises:
        FileNotFoundError: If there is no complete set.
        ValueError: If there is not one sample.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; expected at least 1")
    info = read_info(folder)
    schema = schema or schema_named(info.kind)
    templates = Environment(loader=PackageLoader("bridgetower.data"), autoescape=True, undefined=StrictUndefined)
    templates.filters["data_uri"] = _data_uri
    samples = {name: _samples(folder, name, schema, num_samples, seed) for name in info.splits}
    page = templates.get_template("samples.html").render(info=info, schema=schema, samples=samples)
    write_text(path, page)


def _samples(folder: Path, split: str, schema: Schema, count: int, seed: int) -> list[dict[str, Any]]:
    rows = read_split(folder, split, schema=schema)
    numbers = random.Random(f"{seed}/{split}").sample(range(len(rows)), min(count, len(rows)))
    return [rows.row(number, schema.columns) for number in sorted(numbers)]


def _data_uri(content: bytes) -> str:
    """An image as a URI that carries it, small and as every browser shows it."""
    image = open_image(content)
    image.thumbnail((_SIDE, _SIDE))
    stream = io.BytesIO()
    image.save(stream, "WEBP")
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _check_files(folder: Path, info: DatasetInfo, progress: bool) -> None:
    digests = info.digests()
    for name in counted(list(digests), "checking files", shown=progress):
        if sha256_of(Path(folder) / name) != digests[name]:
            raise ValueError(f"{name} in {folder} is not as it was written; run `bridgetower prepare` again")


def _inspect_split(folder: Path, name: str, info: DatasetInfo, schema: Schema, progress: bool) -> SplitReport:
    rows = read_split(folder, name, schema=schema)
    words: Counter[int] = Counter()
    classes: Counter[str] = Counter()
    num_entries = 0
    for entries in counted(rows.stream(schema.entries), f"reading {name}", shown=progress, total=len(rows)):
        num_entries += len(entries)
        for entry in entries:
            words.update(len(text.split()) for text in schema.texts_of(entry))
            if schema.label:
                label = entry[schema.label]
                classes.update(label if isinstance(label, list) and label else [label or "unknown"])
    images, num_texts = len(rows), num_entries
    expected = info.splits[name]
    if (images, num_texts) != (expected.images, expected.texts):
        raise ValueError(
            f"{name} in {folder} has {images} images and {num_texts} texts, dataset.json says {expected.images} and "
            f"{expected.texts}; run `bridgetower prepare` again"
        )
    known = DATASETS.get(info.name)
    is_published = known is not None and known.schema == schema
    return SplitReport(
        images=images,
        texts=num_texts,
        size=sum(path.stat().st_size for path in split_files(folder, name)),
        published=known.published_count(name, images, num_texts) if known and is_published else None,
        words=Lengths.of(words),
        classes=dict(classes.most_common()),
    )
