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
from bridgetower.data.prepared_set import DatasetInfo, PreparedSet, read_info
from bridgetower.data.schema import Schema
from bridgetower.files import write_text
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
        published: Its published size; None for sets that are not published.
        words: Lengths of the texts.
        classes: Number of texts of each answer type or label; empty for captions.
    """

    images: int
    texts: int
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
    """Reads all texts of a prepared set and counts.

    Args:
        folder: Of the set.
        schema: Of the set; None: the one of `SCHEMAS` that `dataset.json` names.
        check: Whether to read all images too and compare them with their checksums.
        progress: Whether to show progress.

    Raises:
        FileNotFoundError: If there is no complete set.
        ValueError: If something is not as it was written.
    """
    info = read_info(folder)
    if check and (damaged := PreparedSet(folder, list(info.splits), schema).damaged()):
        raise ValueError(f"{damaged[0]} is damaged, {len(damaged)} rows in all; run `bridgetower prepare` again")
    splits = {name: _inspect_split(folder, name, schema, progress) for name in info.splits}
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
    templates = Environment(loader=PackageLoader("bridgetower.data"), autoescape=True, undefined=StrictUndefined)
    templates.filters["data_uri"] = _data_uri
    sets = {name: PreparedSet(folder, [name], schema) for name in info.splits}
    samples = {name: _samples(one, name, num_samples, seed) for name, one in sets.items()}
    schema = next(iter(sets.values())).schema
    page = templates.get_template("samples.html").render(info=info, schema=schema, samples=samples)
    write_text(path, page)


def _samples(one: PreparedSet, split: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Returns some images, or texts without one, each with all its examples."""
    groups = np.unique(one.groups)
    chosen = random.Random(f"{seed}/{split}").sample(range(len(groups)), min(count, len(groups)))
    found = []
    for group in sorted(chosen):
        examples = one.examples(np.flatnonzero(one.groups == groups[group]).tolist())
        images = one.images(examples[0]["images"])
        found.append({"id": examples[0]["id"], "images": images, "entries": [row["entry"] for row in examples]})
    return found


def _data_uri(content: bytes) -> str:
    """An image as a URI that carries it, small and as every browser shows it."""
    image = open_image(content)
    image.thumbnail((_SIDE, _SIDE))
    stream = io.BytesIO()
    image.save(stream, "WEBP")
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _inspect_split(folder: Path, name: str, schema: Schema | None, progress: bool) -> SplitReport:
    one = PreparedSet(folder, [name], schema)
    schema = one.schema
    words: Counter[int] = Counter()
    classes: Counter[str] = Counter()
    for example in counted(one.scan(), f"reading {name}", shown=progress, total=len(one.numbers)):
        entry = example["entry"]
        words.update(len(text.split()) for text in schema.texts_of(entry))
        if schema.label:
            label = entry[schema.label]
            classes.update(label if isinstance(label, list) and label else [label or "unknown"])
    images, texts = one.info.splits[name].images, len(one.numbers)
    known = DATASETS.get(one.info.name)
    is_published = known is not None and known.schema == schema
    return SplitReport(
        images=images,
        texts=texts,
        published=known.published_count(name, images, texts) if known and is_published else None,
        words=Lengths.of(words),
        classes=dict(classes.most_common()),
    )
