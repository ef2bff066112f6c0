"""Small images and rows of prepared sets with them."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from bridgetower.data.batches.captions import CaptionImages
from bridgetower.data.config import DataConfig
from bridgetower.data.sets.prepared_set import DatasetInfo, PreparedSet
from bridgetower.data.sets.schema import CAPTIONS, Schema
from bridgetower_demo.toysets.collection import Collection, ImageFile, Record, write_collection


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A question with answers to choose from."""

    choice_id: str
    question: str
    answers: tuple[str, ...]
    label: str = ""


_TEXTS = ("question", "answers")
CHOICES = Schema(
    name="choices",
    entries="choices",
    entry=Choice,
    noun="choice",
    texts=_TEXTS,
    id="choice_id",
    label="label",
)


def png(shade, size=4):
    stream = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), shade, dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def record(number, **changes):
    images = (ImageFile(f"{number}.png", png(number)),)
    return Record(
        **{
            "image_id": f"id-{number}",
            "images": images,
            "entries": (f"shade {number}", "grey"),
            **changes,
        }
    )


def write_set(folder, splits, schema=CAPTIONS, **files):
    info = DatasetInfo(name=folder.name, split_rule="as given")
    write_collection(
        folder, Collection(info=info, schema=schema, splits=splits, files=files), progress=False
    )
    return folder


def records_of(folder, split):
    """Returns a split of a set with captions as records, to write a part or a change of it."""
    return [
        Record(
            image_id=row["id"],
            images=[
                ImageFile(f"{row['id']}-{place}", content)
                for place, content in enumerate(row["images"])
            ],
            entries=row["entries"],
        )
        for row in read_rows(folder, split)
    ]


def caption_images(folder, split, processor, **config):
    return CaptionImages(DataConfig(folders=(str(folder),), **config), split, processor)


def read_rows(folder, split, schema=None):
    """Returns what a split of a prepared set holds: `id`, `images` with their bytes and `entries` of each."""
    opened, found = PreparedSet(folder, (split,), schema), {}
    for example in opened.scan():
        key = tuple(example["images"]) or (-1 - len(found),)
        row = found.setdefault(
            key, {"id": example["id"], "images": example["images"], "entries": []}
        )
        row["entries"].append(example["entry"])
    return [
        {**row, "images": opened.images(row["images"]) if row["images"] else []}
        for row in found.values()
    ]
