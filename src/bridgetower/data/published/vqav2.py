"""VQAv2: questions about pictures of COCO, with the answers of ten people each (Goyal et al. 2017)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridgetower.data.answers import answer_vocabulary
from bridgetower.data.config import PrepareConfig
from bridgetower.data.kinds import Question
from bridgetower.data.listing import Listing
from bridgetower.data.lookup import Lookup
from bridgetower.data.published.originals import Originals, OriginalSet

_SUBSETS = {"train": "train2014", "validation": "val2014", "test": "test2015", "test-dev": "test-dev2015"}
_ANNOTATED = ("train", "validation")


def _list(originals: Originals, listing: Listing, config: PrepareConfig) -> None:
    first_choices: list[str] = []
    with Lookup() as annotations:
        missing = [split for split in _ANNOTATED if not _read(originals, split, annotations, first_choices)]
        for split in filter(originals.wants, _SUBSETS):
            _list_questions(originals, listing, split, annotations)
        for key in annotations.untaken():
            listing.bad(f"annotation of {key} has no question")
    if missing:
        listing.leave_out("answers.json, which takes the annotations of train and validation", f"no {missing[0]}")
    else:
        listing.vocabulary = answer_vocabulary(first_choices)


def _read(originals: Originals, split: str, annotations: Lookup, first_choices: list[str]) -> Path | None:
    """Reads the annotations of a split; those of a split that is not wanted may be missing."""
    wanted = originals.wants(split)
    find = originals.annotation if wanted else originals.optional_annotation
    path = find(*_places(f"v2_mscoco_{_SUBSETS[split]}_annotations.json"))
    for annotation in originals.items(path, "annotations.item") if path else ():
        first_choices.append(annotation["multiple_choice_answer"])
        if wanted:
            annotations[_key(split, annotation)] = _kept(annotation)
    return path


def _list_questions(originals: Originals, listing: Listing, split: str, annotations: Lookup) -> None:
    path = originals.annotation(*_places(f"v2_OpenEnded_mscoco_{_SUBSETS[split]}_questions.json"))
    for question in originals.items(path, "questions.item"):
        key = _key(split, question)
        if not listing.is_new(key):
            listing.bad(f"{key} comes twice")
            continue
        annotation = annotations.take(key) if split in _ANNOTATED else {"image_id": question["image_id"]}
        if annotation is None:
            listing.bad(f"{key} has no annotation")
        elif annotation.pop("image_id") != question["image_id"]:
            listing.bad(f"{key} has an annotation of another picture")
        else:
            _add(originals, listing, split, question, annotation)


def _add(
    originals: Originals, listing: Listing, split: str, question: Mapping[str, Any], annotation: Mapping[str, Any]
) -> None:
    year = _SUBSETS[split].replace("test-dev", "test")
    asked = Question(question_id=question["question_id"], question=question["question"], **annotation)
    picture = originals.picture(f"{year}/COCO_{year}_{question['image_id']:012d}.jpg")
    listing.add(str(question["image_id"]), [picture], [asked], split=split)


def _places(file: str) -> tuple[str, str]:
    return file, f"vqav2/{file}"


def _key(split: str, entry: Mapping[str, Any]) -> str:
    return f"question {entry['question_id']} of {split}"


def _kept(annotation: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: annotation[name] for name in ("image_id", "question_type", "answer_type")}
    return {**kept, "answers": [answer["answer"] for answer in annotation["answers"]]}


VQAV2 = OriginalSet(
    name="vqav2",
    kind="vqa",
    splits=tuple(_SUBSETS),
    split_rule="as published: train2014, val2014, test2015, and test-dev2015, whose questions are also among test2015",
    protocol=(
        "every question with the answers as the annotators gave them; answers.json has the normalised first choices of "
        "at least 9 questions of train and val, in order of appearance"
    ),
    licences={"questions and answers": "CC-BY 4.0", "pictures": "terms of use of Flickr"},
    list=_list,
)
