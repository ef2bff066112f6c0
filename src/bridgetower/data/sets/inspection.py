"""What a prepared set holds: counts against the published ones, lengths of texts, classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bridgetower.data.sets.datasets import DATASETS
from bridgetower.data.sets.datasets.spec import PublishedCount
from bridgetower.data.sets.prepared_set import DatasetInfo, PreparedSet
from bridgetower.data.sets.schema import Schema
from bridgetower.progress import counted


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    images: int  # or pairs of images
    texts: int
    published: PublishedCount | None  # its published size; None for sets that are not published
    words: Mapping[
        str, float
    ]  # lengths of the texts in words: shortest, median, mean, p95 and longest
    classes: Mapping[str, int]  # texts of each answer type or label; none for captions


def inspect(
    folder: Path, *, schema: Schema | None = None, check: bool = False, progress: bool = False
) -> tuple[DatasetInfo, dict[str, SplitReport]]:
    """Reads all texts of a prepared set and counts; with `check` it compares all rows with their checksums."""
    one = PreparedSet(folder, None, schema)
    if check and (damaged := one.damaged()):
        raise ValueError(
            f"{damaged[0]} is damaged, {len(damaged)} rows in all; run `bridgetower prepare` again"
        )
    schema, words, classes = (
        one.schema,
        [Counter[int]() for _ in one.splits],
        [Counter[str]() for _ in one.splits],
    )
    examples = counted(one.scan(), "reading", enabled=progress, total=len(one.numbers))
    for split, example in zip(one.split_of.tolist(), examples, strict=True):
        words[split].update(len(text.split()) for text in schema.texts_of(example["entry"]))
        if schema.label:
            label = example["entry"][schema.label]
            classes[split].update(
                label if isinstance(label, list) and label else [label or "unknown"]
            )
    known = DATASETS.get(one.info.name)
    found = {}
    for number, (name, split) in enumerate(one.info.splits.items()):
        published = None
        if known is not None and known.schema == schema:
            published = known.published_count(name, split.images, split.examples)
        found[name] = SplitReport(
            images=split.images,
            texts=split.examples,
            published=published,
            words=word_lengths(words[number]),
            classes=dict(classes[number].most_common()),
        )
    return one.info, found


def word_lengths(counts: Mapping[int, int]) -> dict[str, float]:
    lengths = sorted(counts)
    weights = np.array([counts[length] for length in lengths])
    median, p95 = (
        lengths[place]
        for place in np.searchsorted(weights.cumsum(), np.array([0.5, 0.95]) * weights.sum())
    )
    mean = round(float(np.average(lengths, weights=weights)), 2)
    return {
        "shortest": lengths[0],
        "median": median,
        "mean": mean,
        "p95": p95,
        "longest": lengths[-1],
    }
