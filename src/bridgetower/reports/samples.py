"""A page with samples of a prepared set."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from bridgetower.arguments import check_at_least_1
from bridgetower.data.sets.prepared_set import PreparedSet
from bridgetower.data.sets.schema import Schema
from bridgetower.files import write_text
from bridgetower.reports.pages import page_templates, thumbnail

_WHITE = (255, 255, 255)


def write_samples(
    folder: Path, path: Path, *, schema: Schema | None = None, num_samples: int = 8, seed: int = 0
) -> None:
    """Writes an HTML page with samples of every split, images and entries, in one file."""
    check_at_least_1(num_samples=num_samples)
    dataset = PreparedSet(folder, None, schema)
    samples: dict[str, list[object]] = {}
    for split_index, split in enumerate(dataset.splits):
        # A sample is an image, or a text without one, with all its examples.
        rows = np.flatnonzero(dataset.split_of == split_index)
        groups = np.unique(dataset.groups[rows])
        generator = random.Random(f"{seed}/{split}")
        num_sampled = min(num_samples, len(groups))
        sampled = generator.sample(range(len(groups)), num_sampled)
        samples[split] = []
        for group in groups[sorted(sampled)]:
            rows_of_group = rows[dataset.groups[rows] == group]
            examples = dataset.examples(rows_of_group.tolist())
            contents = dataset.images(examples[0]["images"])
            images = [thumbnail(content, _WHITE) for content in contents]
            entries = [example["entry"] for example in examples]
            samples[split].append({**examples[0], "images": images, "entries": entries})
    template = page_templates().get_template("samples.html")
    page = template.render(info=dataset.info, schema=dataset.schema, samples=samples)
    write_text(path, page)
