"""Conceptual Captions 3M (Sharma et al. 2018)."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bridgetower.data.config import PrepareConfig
from bridgetower.data.datasets.arrow import captioned, numbered
from bridgetower.data.datasets.links import (
    DOWNLOADS,
    SOURCE,
    Link,
    add_link,
    keep_downloads,
    keep_files,
    leave_out_untaken,
)
from bridgetower.data.datasets.spec import DatasetSpec, Originals, PublishedCount
from bridgetower.data.manifest import Lookup, Manifest
from bridgetower.data.schema import CAPTIONS

_FILES = {"train": "Train_GCC-training.tsv", "validation": "Validation_GCC-1.1.0-Validation.tsv"}
_FOLDERS = {"train": "train_image", "validation": "val_image"}


def _fill(originals: Originals, manifest: Manifest, config: PrepareConfig) -> None:
    with Lookup() as found:
        keep_downloads(originals, manifest, found)
        for split in filter(originals.wants, _FILES):
            path = originals.annotation(_FILES[split], f"utils/{_FILES[split]}")
            # Official `write_conceptual_caption.py`: images are named after the line.
            keep_files(originals, manifest, found, _FOLDERS[split], partial(_line_key, split))
            for link in _links(originals, manifest, path):
                image = found.take(f"link {link.url}") or found.take(f"{split} line {link.number}")
                add_link(manifest, link, image, split)
        leave_out_untaken(manifest, found)


def _line_key(split: str, name: str) -> str | None:
    stem = name.partition(".")[0]
    return f"{split} line {int(stem)}" if stem.isdecimal() else None


def _links(originals: Originals, manifest: Manifest, path: Path) -> Iterator[Link]:
    for number, line in enumerate(originals.text_lines(path)):
        caption, tab, url = line.rpartition("\t")
        if tab and url.strip():
            yield Link(number, url.strip(), caption.strip())
        else:
            manifest.bad(f"{path.name}, line {number + 1}: no tab between caption and link")


CC3M = DatasetSpec(
    name="cc3m",
    schema=CAPTIONS,
    summary="Conceptual Captions 3M, as much of it as you have; by --splits also validation.",
    layout=f"""
Train_GCC-training.tsv (or in utils/), and for validation Validation_GCC-1.1.0-Validation.tsv
{DOWNLOADS}
or images named after the lines of the list, from 0: train_image/0.jpg …, val_image/0.jpg …
""",
    splits=("train",),
    more_splits=("validation",),
    split_rule="as published",
    protocol="captions of the annotation file, in its order; pictures by their links, or by the numbers of their lines",
    licences={"captions": "free to use, with the attribution that its page asks for", "pictures": "each its own"},
    published={
        "train": [PublishedCount(images=3_318_333, texts=3_318_333, source=SOURCE)],
        "validation": [PublishedCount(images=15_840, texts=15_840, source=SOURCE)],
    },
    fill=_fill,
    arrow=captioned(
        layout="conceptual_caption_train_0 … 30, and by --splits validation conceptual_caption_val_0",
        split_rule="as published",
        stems={"train": numbered("conceptual_caption_train", 31)},
        more_stems={"validation": numbered("conceptual_caption_val", 1)},
    ),
)
