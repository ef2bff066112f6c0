"""VQAv2: questions about images of COCO, with the answers of ten people each (Goyal et al. 2017)."""

import json
from collections.abc import Mapping
from typing import Any

from bridgetower.data.answers import ANNOTATORS, answer_vocabulary, vocabulary_file
from bridgetower.data.config import PrepareConfig
from bridgetower.data.datasets.arrow import ArrowFiles
from bridgetower.data.datasets.spec import DatasetSpec, Originals, PublishedCount
from bridgetower.data.prepared_set import SetWriter
from bridgetower.data.schema import VQA, Question

_SUBSETS = {"train": "train2014", "validation": "val2014", "test": "test2015", "test-dev": "test-dev2015"}
_ANNOTATED = ("train", "validation")


def _fill(originals: Originals, writer: SetWriter, config: PrepareConfig) -> None:
    first_choices: list[str] = []
    annotations: dict[str, str] = {}  # as JSON, of which 650,000 with ten answers take 200 MB
    missing = []
    for split in _ANNOTATED:
        file = f"v2_mscoco_{_SUBSETS[split]}_annotations.json"
        places = (file, f"vqav2/{file}")
        if not originals.wants(split) and not any((originals.folder / place).is_file() for place in places):
            missing.append(split)
            continue
        for annotation in originals.items(originals.annotation(*places), "annotations"):
            first_choices.append(annotation["multiple_choice_answer"])
            if originals.wants(split):
                kept = {name: annotation[name] for name in ("image_id", "question_type", "answer_type")}
                answers = [answer["answer"] for answer in annotation["answers"]]
                annotations[_key(split, annotation)] = json.dumps({**kept, "answers": answers})
    for split in filter(originals.wants, _SUBSETS):
        file = f"v2_OpenEnded_mscoco_{_SUBSETS[split]}_questions.json"
        year = _SUBSETS[split].replace("test-dev", "test")
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


def _stems(*splits: str) -> dict[str, list[tuple[str, str]]]:
    """Those with answers in normal form, which the official code reads, come first."""
    parts = {"validation": "val", "trainable-validation": "trainable_val", "rest-validation": "rest_val"}
    return {split: [(f"vqav2_{parts.get(split, split)}_fix", f"vqav2_{parts.get(split, split)}")] for split in splits}


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
            PublishedCount(82_783, 443_757, _PAGE),
            PublishedCount(82_774, 435_174, _FIXED),
            PublishedCount(82_774, 434_867, _RAW),
        ],
        "validation": [
            PublishedCount(40_504, 214_354, _PAGE),
            PublishedCount(40_503, 210_207, _FIXED),
            PublishedCount(40_503, 210_051, _RAW),
        ],
        "test": [PublishedCount(81_434, 447_793, _PAGE)],
        "test-dev": [PublishedCount(None, 107_394, _PAGE)],
    },
    fill=_fill,
    arrow=ArrowFiles(
        layout="vqav2_{train,val,test,test-dev}, those that end in _fix first",
        split_rule="as published; test-dev's questions are also among test's",
        stems=_stems(*_SUBSETS),
        more_stems=_stems("trainable-validation", "rest-validation"),
        annotators=ANNOTATORS,
    ),
)
