"""VQAv2 (Goyal et al. 2017); Visual Genome (Krishna et al. 2017), its regions as captions, its questions for VQAv2."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bridgetower.data.answers import (
    ANNOTATORS,
    ANSWERS_FILE,
    answer_vocabulary,
    normalise_answer,
    read_vocabulary,
    vocabulary_file,
)
from bridgetower.data.config import NOT_CONTENT, PrepareConfig
from bridgetower.data.datasets.arrow import ArrowFiles
from bridgetower.data.datasets.spec import DatasetSpec, Originals, PublishedCount, published
from bridgetower.data.example import Image
from bridgetower.data.prepared_set import SetWriter
from bridgetower.data.schema import CAPTIONS, VQA, Question

_SUBSETS = {"train": "train2014", "validation": "val2014", "test": "test2015", "test-dev": "test-dev2015"}
_ANNOTATED = ("train", "validation")


def _fill_vqav2(originals: Originals, writer: SetWriter, config: PrepareConfig) -> None:
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
    fill=_fill_vqav2,
    arrow=ArrowFiles(
        layout="vqav2_{train,val,test,test-dev}, those that end in _fix first",
        split_rule="as published; test-dev's questions are also among test's",
        stems=_stems(*_SUBSETS),
        more_stems=_stems("trainable-validation", "rest-validation"),
        annotators=ANNOTATORS,
    ),
)

KarpathySplit = Literal["restval", "val", "test"]

_FOLDERS = ("images/VG_100K", "images/VG_100K_2", "VG_100K", "VG_100K_2")


@dataclass(frozen=True, kw_only=True)
class VgConfig(PrepareConfig):
    """How Visual Genome's regions are prepared from their original files.

    Attributes:
        karpathy: File dataset_coco.json, if it is not in the source.
        leave_out: Splits of Karpathy whose images are left out, so that pre-training has no images that COCO is
            evaluated on. The paper kept all.
    """

    karpathy: Path | None = field(default=None, metadata=NOT_CONTENT)
    leave_out: tuple[KarpathySplit, ...] = ()


@dataclass(frozen=True, kw_only=True)
class VgqaConfig(VgConfig):
    """How VG-QA is prepared from its original files.

    Attributes:
        leave_out: Splits of Karpathy whose images are left out. Add restval if you evaluate on VQAv2's validation
            split, which has these images too.
        answers: Folder of VQAv2 as prepared, whose answers.json is the vocabulary.
    """

    leave_out: tuple[KarpathySplit, ...] = ("val", "test")
    answers: Path = field(metadata=NOT_CONTENT)


def _fill_vg(originals: Originals, writer: SetWriter, config: VgConfig) -> None:
    for image_id, file, image in _described(originals, writer, config, "region_descriptions.json"):
        phrases = [region["phrase"].strip() for region in image["regions"]]
        for region in (region for region, phrase in zip(image["regions"], phrases, strict=True) if not phrase):
            writer.leave_out("empty description", str(region["region_id"]))
        writer.add([file], list(filter(None, phrases)), name=image_id, split="train")


def _described(
    originals: Originals, writer: SetWriter, config: VgConfig, file: str
) -> Iterator[tuple[str, Image, Mapping[str, Any]]]:
    """Yields images with what a file says of them, but those that COCO holds out."""
    held_out: set[int] = set()
    if config.leave_out:
        splits = config.karpathy or originals.annotation("dataset_coco.json", "karpathy/dataset_coco.json")
        numbers = originals.annotation("image_data.json", "annotations/image_data.json")
        if config.karpathy:
            originals.used.append(config.karpathy)
        in_coco = {
            image["cocoid"]: image["split"]
            for image in originals.items(splits, "images")
            if image["split"] in config.leave_out
        }
        if missing := set(config.leave_out) - set(in_coco.values()):
            raise ValueError(
                f"{splits} has no image of split {', '.join(sorted(missing))}; check that it is the right file"
            )
        held_out = {image["image_id"] for image in originals.items(numbers) if image["coco_id"] in in_coco}
    for image in originals.items(originals.annotation(file, f"annotations/{file}")):
        image_id = image.get("id", image.get("image_id"))
        if image_id in held_out:
            writer.leave_out(f"image in COCO's {' or '.join(config.leave_out)} split", str(image_id))
        else:
            places = (f"{folder}/{image_id}.jpg" for folder in _FOLDERS)
            yield str(image_id), originals.image(*places), image


VG = DatasetSpec(
    name="vg",
    schema=CAPTIONS,
    summary="Visual Genome, the descriptions of regions as captions.",
    layout="""
region_descriptions.json (or in annotations/)
images/VG_100K/2.jpg … and images/VG_100K_2/1.jpg … (or without images/)
with --leave-out also: image_data.json (or in annotations/)
with --leave-out also: dataset_coco.json (or in karpathy/, or --karpathy FILE)
""",
    splits=("train",),
    split_rule="all is train",
    protocol="every description of a region is a caption of the whole image; boxes are not kept",
    licences={"descriptions and images": "CC-BY 4.0"},
    config=VgConfig,
    published=published("Visual Genome's page", {"train": (108_077, None)}),
    fill=_fill_vg,
    arrow=ArrowFiles(layout="vg", stems={"train": ("vg",)}),
)


def _fill_vgqa(originals: Originals, writer: SetWriter, config: VgqaConfig) -> None:
    vocabulary = read_vocabulary(config.answers)
    writer.files = vocabulary_file(vocabulary)
    originals.used.append(config.answers / ANSWERS_FILE)
    known = frozenset(vocabulary)
    for image_id, file, image in _described(originals, writer, config, "question_answers.json"):
        answers: dict[str, set[str]] = defaultdict(set)  # of the vocabulary, by question
        for pair in image["qas"]:
            answers[pair["question"]] |= {normalise_answer(pair["answer"])} & known
        questions: dict[str, Question] = {}  # those with exactly one answer, each once
        for pair in image["qas"]:
            text, answer, number = pair["question"], pair["answer"], pair["qa_id"]
            if normalise_answer(answer) not in known:
                writer.leave_out("answer not in the vocabulary", str(number))
            elif len(answers[text]) > 1:
                writer.leave_out("question with several answers", str(number))
            elif text in questions:
                writer.leave_out("question that was asked before", str(number))
            else:
                questions[text] = Question(question_id=number, question=text, answers=(answer,))
        writer.add([file], list(questions.values()), name=image_id, split="train")


def _arrow(stem: str) -> ArrowFiles:
    return ArrowFiles(
        layout=f"{stem}_{{train,val}}",
        split_rule="as the files have them; validation holds the images of Karpathy's val and test splits of COCO, and "
        "in vgqa further ones",
        stems={"train": (f"{stem}_train",), "validation": (f"{stem}_val",)},
    )


VGQA = DatasetSpec(
    name="vgqa",
    schema=VQA,
    summary="Questions of Visual Genome as further training data of VQAv2.",
    layout="""
question_answers.json and image_data.json (or in annotations/)
images/VG_100K/2.jpg … and images/VG_100K_2/1.jpg …
dataset_coco.json (or in karpathy/, or --karpathy FILE)
""",
    example="bridgetower prepare vgqa --source vg --answers data/vqav2 --karpathy dataset_coco.json --out data/vgqa",
    splits=("train",),
    split_rule="all is train but images of COCO that Karpathy's splits hold out",
    protocol=(
        "questions with exactly one distinct answer that VQAv2's vocabulary has, once per image; answers as they "
        "were given"
    ),
    licences={"questions, answers and images": "CC-BY 4.0"},
    config=VgqaConfig,
    fill=_fill_vgqa,
    arrow=_arrow("vgqa"),
)
VGQA_COCO = DatasetSpec(name="vgqa-coco", schema=VQA, arrow=_arrow("vgqa_coco"))
