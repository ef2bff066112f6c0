"""VQAv2: questions about images of COCO, with the answers of ten people each (Goyal et al. 2017)."""

import json
from collections.abc import Mapping
from typing import Any

from bridgetower.data.answers import ANNOTATORS, answer_vocabulary, vocabulary_file
from bridgetower.data.config import PrepareConfig
from bridgetower.data.datasets.spec import DatasetSpec, Originals, PublishedCount, asked
from bridgetower.data.prepared_set import SetWriter
from bridgetower.data.schema import VQA, Question

_SUBSETS = {"train": "train2014", "validation": "val2014", "test": "test2015", "test-dev": "test-dev2015"}
_ANNOTATED = ("train", "validation")


def _fill(originals: Originals, writer: SetWriter, config: PrepareConfig) -> None:
    first_choices: list[str] = []
    annotations: dict[str, str] = {}  # as JSON, of which 650,000 with ten answers take 200 MB
    missing = []
    for split in _ANNOTATED:
        find = originals.annotation if originals.wants(split) else originals.optional_annotation
        file = f"v2_mscoco_{_SUBSETS[split]}_annotations.json"
        path = find(file, f"vqav2/{file}")
        missing += [] if path else [split]
        for annotation in originals.items(path, "annotations") if path else ():
            first_choices.append(annotation["multiple_choice_answer"])
            if originals.wants(split):
                kept = {name: annotation[name] for name in ("image_id", "question_type", "answer_type")}
                answers = [answer["answer"] for answer in annotation["answers"]]
                annotations[_key(split, annotation)] = json.dumps({**kept, "answers": answers})
    for split in filter(originals.wants, _SUBSETS):
        file, year = (
            f"v2_OpenEnded_mscoco_{_SUBSETS[split]}_questions.json",
            _SUBSETS[split].replace("test-dev", "test"),
        )
        for question in originals.items(originals.annotation(file, f"vqav2/{file}"), "questions"):
            key, image_id = _key(split, question), question["image_id"]
            if not writer.is_new(key):
                writer.refuse(f"{key} comes twice")
                continue
            packed = annotations.pop(key, None)
            if split in _ANNOTATED and packed is None:
                writer.refuse(f"{key} has no annotation")
                continue
            annotation = json.loads(packed) if packed else {"image_id": image_id, "answers": ()}
            if annotation.pop("image_id") != image_id:
                writer.refuse(f"{key} has an annotation of another image")
                continue
            said = tuple(annotation.pop("answers"))
            entry = Question(
                question_id=question["question_id"], question=question["question"], answers=said, **annotation
            )
            image = originals.image(f"{year}/COCO_{year}_{image_id:012d}.jpg")
            writer.add([image], [entry], name=str(image_id), split=split)
    for key in annotations:
        writer.refuse(f"annotation of {key} has no question")
    if missing:
        writer.leave_out("answers.json, which takes the annotations of train and validation", f"no {missing[0]}")
    else:
        writer.files = vocabulary_file(answer_vocabulary(first_choices))


def _key(split: str, entry: Mapping[str, Any]) -> str:
    return f"question {entry['question_id']} of {split}"


def _stems(subset: str) -> tuple[tuple[str, str]]:
    """Those with answers in normal form, which the official code reads, come first."""
    return ((f"vqav2_{subset}_fix", f"vqav2_{subset}"),)


_PAGE = "visualqa.org"
_FIXED = "official code, answers in normal form, questions with an answer of the vocabulary"
_RAW = "official code, answers as given, questions with an answer of the vocabulary"

VQAV2 = DatasetSpec(
    name="vqav2",
    schema=VQA,
    summary="VQAv2, with the answers of every annotator and answers.json, the vocabulary.",
    layout="""
v2_OpenEnded_mscoco_train2014_questions.json (JSON files here or in vqav2/)
v2_OpenEnded_mscoco_val2014_questions.json
v2_OpenEnded_mscoco_test2015_questions.json
v2_OpenEnded_mscoco_test-dev2015_questions.json
v2_mscoco_train2014_annotations.json
v2_mscoco_val2014_annotations.json
train2014/COCO_train2014_000000000009.jpg …
val2014/COCO_val2014_000000000042.jpg …
test2015/COCO_test2015_000000000001.jpg …
""",
    splits=tuple(_SUBSETS),
    split_rule="as published: train2014, val2014, test2015, and test-dev2015, whose questions are also among test2015",
    protocol=(
        "every question with the answers as the annotators gave them; answers.json has the normalised first choices of "
        "at least 9 questions of train and val, in order of appearance"
    ),
    licences={"questions and answers": "CC-BY 4.0", "images": "terms of use of Flickr"},
    published={
        "train": [
            PublishedCount(images=82_783, texts=443_757, source=_PAGE),
            PublishedCount(images=82_774, texts=435_174, source=_FIXED),
            PublishedCount(images=82_774, texts=434_867, source=_RAW),
        ],
        "validation": [
            PublishedCount(images=40_504, texts=214_354, source=_PAGE),
            PublishedCount(images=40_503, texts=210_207, source=_FIXED),
            PublishedCount(images=40_503, texts=210_051, source=_RAW),
        ],
        "test": [PublishedCount(images=81_434, texts=447_793, source=_PAGE)],
        "test-dev": [PublishedCount(texts=107_394, source=_PAGE)],
    },
    fill=_fill,
    arrow=asked(
        layout="vqav2_{train,val,test,test-dev}, those that end in _fix first",
        split_rule="as published; test-dev's questions are also among test's",
        stems={
            "train": _stems("train"),
            "validation": _stems("val"),
            "test": _stems("test"),
            "test-dev": _stems("test-dev"),
        },
        more_stems={"trainable-validation": _stems("trainable_val"), "rest-validation": _stems("rest_val")},
        annotators=ANNOTATORS,
    ),
)
