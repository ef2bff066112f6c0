"""A page with samples of a prepared set; `templates/samples.html` is its form."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from bridgetower.data.prepared_set import PreparedSet
from bridgetower.data.schema import Schema
from bridgetower.files import write_text
from bridgetower.reports.pages import page_templates, small


def write_samples(
    folder: Path, path: Path, *, schema: Schema | None = None, num_samples: int = 8, seed: int = 0
) -> None:
    """Writes an HTML page with samples of every split, images and entries, in one file."""
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; expected at least 1")
    one = PreparedSet(folder, None, schema)
    samples: dict[str, list[object]] = {name: [] for name in one.splits}
    for number, name in enumerate(one.splits):  # some images, or texts without one, each with all its examples
        own = np.flatnonzero(one.split_of == number)
        groups = np.unique(one.groups[own])
        chosen = random.Random(f"{seed}/{name}").sample(range(len(groups)), min(num_samples, len(groups)))
        for group in groups[sorted(chosen)]:
            examples = one.examples(own[one.groups[own] == group].tolist())
            images = [small(content, (255, 255, 255)) for content in one.images(examples[0]["images"])]
            samples[name].append({**examples[0], "images": images, "entries": [row["entry"] for row in examples]})
    template = page_templates().get_template("samples.html")
    write_text(path, template.render(info=one.info, schema=one.schema, samples=samples))
