"""Small prepared sets of questions and of statements about plain pictures, with every odd case of the originals."""

import io
import json
from pathlib import Path

from PIL import Image

from bridgetower.data.config import DataConfig
from bridgetower.data.sets.schema import SCHEMAS, Question, Statement
from bridgetower.tasks.spec import ExampleSource
from bridgetower.tasks.table import TASKS
from bridgetower_demo.toysets.collection import ImageFile, Record
from rows import write_set as write_records

COLOURS = ("red", "green", "blue", "yellow", "white", "black", "purple", "orange")
ANSWERS = ("yes", "no", "2", *COLOURS)
NUM_PICTURES = {"train": 8, "validation": 5, "test": 3}
NUM_CLASSES = 4
KINDS = ("vqa", "snli-ve", "nlvr2")


def png(colour):
    stream = io.BytesIO()
    Image.new("RGB", (24, 20), colour).save(stream, "PNG")
    return stream.getvalue()


def write_set(folder, kind):
    """Writes a set of a kind, whose test split has neither answers nor labels; returns its folder."""
    make = {"vqa": questioned, "snli-ve": stated, "nlvr2": paired}[kind]
    files = {"answers.json": list(ANSWERS)} if kind == "vqa" else {}
    rows = {split: make(split, count) for split, count in NUM_PICTURES.items()}
    return write_records(folder, rows, SCHEMAS[kind], **files)


def examples(
    folders, kind, processor, split="train", use="test", *, task=None, names=None, **config
):
    spec, given = TASKS[kind], (folders,) if isinstance(folders, Path) else folders
    source = ExampleSource(
        data=DataConfig(folders=tuple(map(str, given)), **config),
        splits=(split,) if isinstance(split, str) else split,
        processor=processor,
        task=task or spec.config(),
        names=names or (ANSWERS if kind == "vqa" else SCHEMAS[kind].labels),
        use=use,
    )
    return spec.examples(source)


def write_table(folder, *, several):
    """Plain images and texts of four colours; every third row has no image, every fifth no text."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(40):
        colour = COLOURS[number % NUM_CLASSES]
        Image.new("RGB", (24, 20), colour).save(folder / f"{number}.png")
        row = {
            "id": f"r{number}",
            "img": "" if number % 3 == 2 else f"{number}.png",
            "text": "" if number % 5 == 4 and number % 3 != 2 else f"a {colour} thing",
            "label": [colour, *(["warm"] if colour in ("red", "yellow") else [])]
            if several
            else colour,
            "split": ("train", "train", "train", "dev", "test")[number // 8],
        }
        if number == 39:
            row["label"] = None
        lines.append(json.dumps(row))
    table = folder / "things.jsonl"
    table.write_text("\n".join(lines))
    return table


def questioned(split, count):
    """Pictures with two questions each; nobody gave an answer of the vocabulary to the second one of every third."""
    first = {"train": 1_000, "validation": 2_000, "test": 3_000}[split]
    return [
        Record(
            images=(ImageFile(f"{number}.jpg", png(COLOURS[number])),),
            image_id=f"{split}-{number}",
            entries=tuple(
                Question(
                    question_id=first + 10 * number + place,
                    question=("What colour is this?", "Is this picture plain?")[place],
                    question_type=("what colour is", "is this")[place],
                    answer_type=("other", "yes/no")[place],
                    answers=() if split == "test" else annotators(number, place),
                )
                for place in range(2)
            ),
        )
        for number in range(count)
    ]


def annotators(number, place):
    """What ten annotators said."""
    if place == 0:
        return (COLOURS[number],) * 7 + (f"The {COLOURS[number - 1]}.",) * 2 + ("dark",)
    return ("who knows",) * 10 if number % 3 == 2 else ("Yes!",) * 6 + ("no",) * 4


def stated(split, count):
    """Pictures with one or two statements each."""
    labels = ("entailment", "contradiction", "neutral")
    return [
        Record(
            images=(ImageFile(f"{number}.jpg", png(COLOURS[number])),),
            image_id=f"{number}",
            entries=tuple(
                Statement(
                    statement_id=f"{number}.jpg#{place}r",
                    text=f"it is {COLOURS[number - place]}",
                    label="" if split == "test" else labels[(number + place) % 3],
                )
                for place in range(1 + number % 2)
            ),
        )
        for number in range(count)
    ]


def paired(split, count):
    """Pairs of pictures, two of a set and a sentence, with NLVR2's identifiers."""
    return [
        Record(
            images=[
                ImageFile(f"{split}-{number}-img{side}.png", png(COLOURS[number - side]))
                for side in range(2)
            ],
            image_id=f"{split}-{number // 2}-{number % 2}",
            entries=(
                Statement(
                    statement_id=f"{split}-{number // 2}-{number % 2}-0",
                    text=f"one of them is {COLOURS[number // 2 * 2]}",
                    label="" if split == "test" else ("True", "False")[number % 3 % 2],
                ),
            ),
        )
        for number in range(count)
    ]
