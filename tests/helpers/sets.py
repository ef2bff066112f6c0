"""Small prepared sets of captions, questions and statements, and their rows."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bridgetower.data.batches.captions import CaptionImages
from bridgetower.data.config import DataConfig, WritingConfig
from bridgetower.data.sets.prepared_set import DatasetInfo, PreparedSet, SetWriter
from bridgetower.data.sets.schema import CAPTIONS, SCHEMAS, Question, Schema, Statement
from bridgetower.data.sources.example import Image as SourceImage
from bridgetower.tasks.spec import ExampleSource
from bridgetower.tasks.table import TASKS


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A question with answers to choose from."""

    choice_id: str
    question: str
    answers: tuple[str, ...]
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Record:
    """Images, each with its name and its bytes, and what is said about them."""

    image_id: str
    images: Sequence[tuple[str, bytes]]
    entries: Sequence[Any]


CHOICES = Schema(
    name="choices",
    entries="choices",
    entry=Choice,
    noun="choice",
    texts=("question", "answers"),
    id="choice_id",
    label="label",
)


def png_of_shade(shade, size=4):
    stream = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), shade, dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def caption_record(number, **changes):
    record = Record(
        image_id=f"id-{number}",
        images=((f"{number}.png", png_of_shade(number)),),
        entries=(f"shade {number}", "grey"),
    )
    return replace(record, **changes)


def write_set(folder, splits, schema=CAPTIONS, **files):
    """Writes records by split as a prepared set, with further JSON files. Returns its folder."""
    info = DatasetInfo(name=folder.name, split_rule="as given")
    with SetWriter(folder, schema, WritingConfig(), progress=False) as writer:
        for split, records in splits.items():
            for record in records:
                images = [
                    SourceImage(name=f"{split}/{name}", location=name, content=content)
                    for name, content in record.images
                ]
                writer.add(images, record.entries, name=record.image_id, split=split)
        writer.files = lambda: files
        writer.finish(info.name, info)
    return folder


def records_of(folder, split):
    """Returns a split of a set with captions as records, to write a part or a change of it."""
    return [
        Record(
            image_id=row["id"],
            images=[
                (f"{row['id']}-{index}", content) for index, content in enumerate(row["images"])
            ],
            entries=row["entries"],
        )
        for row in read_rows(folder, split)
    ]


def caption_images(folder, split, processor, **config):
    return CaptionImages(DataConfig(folders=(str(folder),), **config), split, processor)


def read_rows(folder, split, schema=None):
    """Returns what a split of a prepared set holds: `id`, `images` with their bytes and `entries` of each."""
    opened = PreparedSet(folder, (split,), schema)
    rows = {}
    for example in opened.scan():
        key = tuple(example["images"]) or (-1 - len(rows),)
        row = rows.setdefault(
            key, {"id": example["id"], "images": example["images"], "entries": []}
        )
        row["entries"].append(example["entry"])
    return [
        {**row, "images": opened.images(row["images"]) if row["images"] else []}
        for row in rows.values()
    ]


COLOUR_NAMES = ("red", "green", "blue", "yellow", "white", "black", "purple", "orange")
ANSWERS = ("yes", "no", "2", *COLOUR_NAMES)
SPLIT_SIZES = {"train": 8, "validation": 5, "test": 3}
NUM_CLASSES = 4
ENTRY_KINDS = ("vqa", "snli-ve", "nlvr2")


def png_of_colour(colour):
    stream = io.BytesIO()
    Image.new("RGB", (24, 20), colour).save(stream, "PNG")
    return stream.getvalue()


def write_entry_set(folder, kind):
    """Writes a set of a kind, whose test split has neither answers nor labels. Returns its folder."""
    make = {"vqa": question_records, "snli-ve": statement_records, "nlvr2": pair_records}[kind]
    files = {"answers.json": list(ANSWERS)} if kind == "vqa" else {}
    rows = {split: make(split, count) for split, count in SPLIT_SIZES.items()}
    return write_set(folder, rows, SCHEMAS[kind], **files)


def entry_examples(
    folders, kind, processor, split="train", use="test", *, task=None, names=None, **config
):
    spec = TASKS[kind]
    paths = (folders,) if isinstance(folders, Path) else folders
    source = ExampleSource(
        data=DataConfig(folders=tuple(map(str, paths)), **config),
        splits=(split,) if isinstance(split, str) else split,
        processor=processor,
        task=task or spec.config(),
        names=names or (ANSWERS if kind == "vqa" else SCHEMAS[kind].labels),
        use=use,
    )
    return spec.examples(source)


def write_labelled_table(folder, *, multi_label):
    """Plain images and texts of four colours. Every third row has no image, every fifth no text."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(40):
        colour = COLOUR_NAMES[number % NUM_CLASSES]
        Image.new("RGB", (24, 20), colour).save(folder / f"{number}.png")
        row = {
            "id": f"r{number}",
            "img": "" if number % 3 == 2 else f"{number}.png",
            "text": "" if number % 5 == 4 and number % 3 != 2 else f"a {colour} thing",
            "label": [colour, *(["warm"] if colour in ("red", "yellow") else [])]
            if multi_label
            else colour,
            "split": ("train", "train", "train", "dev", "test")[number // 8],
        }
        if number == 39:
            row["label"] = None
        lines.append(json.dumps(row))
    table = folder / "things.jsonl"
    table.write_text("\n".join(lines))
    return table


def question_records(split, count):
    """Pictures with two questions each. Nobody gave an answer of the vocabulary to the second one of every third."""
    first = {"train": 1_000, "validation": 2_000, "test": 3_000}[split]
    return [
        Record(
            images=((f"{number}.jpg", png_of_colour(COLOUR_NAMES[number])),),
            image_id=f"{split}-{number}",
            entries=tuple(
                Question(
                    question_id=first + 10 * number + index,
                    question=("What colour is this?", "Is this picture plain?")[index],
                    question_type=("what colour is", "is this")[index],
                    answer_type=("other", "yes/no")[index],
                    answers=() if split == "test" else annotator_answers(number, index),
                )
                for index in range(2)
            ),
        )
        for number in range(count)
    ]


def annotator_answers(number, index):
    """What ten annotators said."""
    if index == 0:
        return (COLOUR_NAMES[number],) * 7 + (f"The {COLOUR_NAMES[number - 1]}.",) * 2 + ("dark",)
    return ("who knows",) * 10 if number % 3 == 2 else ("Yes!",) * 6 + ("no",) * 4


def statement_records(split, count):
    """Pictures with one or two statements each."""
    labels = ("entailment", "contradiction", "neutral")
    return [
        Record(
            images=((f"{number}.jpg", png_of_colour(COLOUR_NAMES[number])),),
            image_id=f"{number}",
            entries=tuple(
                Statement(
                    statement_id=f"{number}.jpg#{index}r",
                    text=f"it is {COLOUR_NAMES[number - index]}",
                    label="" if split == "test" else labels[(number + index) % 3],
                )
                for index in range(1 + number % 2)
            ),
        )
        for number in range(count)
    ]


def pair_records(split, count):
    """Pairs of pictures, two of a set and a sentence, with NLVR2's identifiers."""
    return [
        Record(
            images=[
                (f"{split}-{number}-img{side}.png", png_of_colour(COLOUR_NAMES[number - side]))
                for side in range(2)
            ],
            image_id=f"{split}-{number // 2}-{number % 2}",
            entries=(
                Statement(
                    statement_id=f"{split}-{number // 2}-{number % 2}-0",
                    text=f"one of them is {COLOUR_NAMES[number // 2 * 2]}",
                    label="" if split == "test" else ("True", "False")[number % 3 % 2],
                ),
            ),
        )
        for number in range(count)
    ]
