"""Reports on prepared sets: counts beside the published ones, lengths of texts, classes."""

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
    """Counts of a split."""

    images: int  # or pairs of images
    texts: int
    published: PublishedCount | None  # None for a set that is not published
    words: Mapping[str, float]  # words of a text: shortest, median, mean, p95 and longest
    classes: Mapping[str, int]  # texts of each answer type or label; empty for captions


def inspect_set(
    folder: Path, *, schema: Schema | None = None, check: bool = False, progress: bool = False
) -> tuple[DatasetInfo, dict[str, SplitReport]]:
    """Reads all texts of a prepared set and counts them by split.

    Args:
        folder: Folder of the set.
        schema: Schema of a set of a custom kind.
        check: Compare all rows with their checksums, images too.
        progress: Show a bar.

    Raises:
        ValueError: A row is damaged.
    """
    dataset = PreparedSet(folder, None, schema)
    schema = dataset.schema
    if check and (damaged := dataset.damaged()):
        raise ValueError(
            f"{damaged[0]} is damaged, {len(damaged)} rows in all; run `bridgetower prepare` again"
        )
    words = [Counter[int]() for _ in dataset.splits]
    classes = [Counter[str]() for _ in dataset.splits]
    examples = counted(dataset.scan(), "reading", enabled=progress, total=len(dataset.numbers))
    for split_index, example in zip(dataset.split_of.tolist(), examples, strict=True):
        entry = example["entry"]
        words[split_index].update(len(text.split()) for text in schema.texts_of(entry))
        if schema.label:
            label = entry[schema.label] or "unknown"
            classes[split_index].update(label if isinstance(label, list) else [label])

    spec = DATASETS.get(dataset.info.name)
    reports = {}
    for index, (name, split) in enumerate(dataset.info.splits.items()):
        published = None
        if spec and spec.schema == schema:
            published = spec.published_count(name, split.images, split.examples)
        reports[name] = SplitReport(
            images=split.images,
            texts=split.examples,
            published=published,
            words=word_lengths(words[index]),
            classes=dict(classes[index].most_common()),
        )
    return dataset.info, reports


def word_lengths(counts: Mapping[int, int]) -> dict[str, float]:
    """Returns statistics of lengths, from the number of texts of each length."""
    lengths = sorted(counts)
    weights = np.array([counts[length] for length in lengths])
    ranks = np.array([0.5, 0.95]) * weights.sum()
    median, p95 = (lengths[index] for index in np.searchsorted(weights.cumsum(), ranks))
    return {
        "shortest": lengths[0],
        "median": median,
        "mean": round(float(np.average(lengths, weights=weights)), 2),
        "p95": p95,
        "longest": lengths[-1],
    }
