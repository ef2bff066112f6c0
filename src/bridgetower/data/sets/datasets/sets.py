"""The published sets.

COCO and Flickr30k in Karpathy's splits (2015), CC3M (Sharma et al. 2018) and SBU (Ordonez et al. 2011), of which only
links are published: their Arrow files are read here, and `prepare pairs` reads what img2dataset downloads. VQAv2 (Goyal
et al. 2017); Visual Genome (Krishna et al. 2017), its regions as captions, its questions for VQAv2. SNLI-VE, statements
about an image of Flickr30k (Xie et al. 2019), and NLVR2, about two photos (Suhr et al. 2019).
"""

import io
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from bridgetower.data.config import NOT_CONTENT, PrepareConfig
from bridgetower.data.sets import schema as schemas
from bridgetower.data.sets.answers import (
    ANNOTATORS,
    ANSWERS_FILE,
    answer_vocabulary,
    normalise_answer,
    read_vocabulary,
    vocabulary_file,
)
from bridgetower.data.sets.datasets.spec import (
    ArrowFiles,
    DatasetSpec,
    Originals,
    PublishedCount,
    published,
)
from bridgetower.data.sets.prepared_set import SetWriter
from bridgetower.data.sets.schema import Composition, Question, Statement
from bridgetower.data.sources.example import Image
from bridgetower.files import read_json

_KARPATHY = "Karpathy's splits"
_LINKS = "links, of which many are dead"
_CAPTIONS_PROTOCOL = "every caption of an image once, in its order, without spaces at its ends"

_KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "validation", "test": "test"}


def fill_karpathy(
    file: str, originals: Originals, writer: SetWriter, config: PrepareConfig
) -> None:
    for row in originals.items(originals.annotation(file, f"karpathy/{file}"), "images"):
        name = row["filename"]
        split = _KARPATHY_SPLITS.get(row["split"])
        if split is None:
            expected = ", ".join(_KARPATHY_SPLITS)
            writer.refuse(f"{name}: split {row['split']!r}, expected one of {expected}")
        elif originals.wants(split):
            image = originals.image(f"{row.get('filepath', 'flickr30k-images')}/{name}")
            captions = [sentence["raw"] for sentence in row["sentences"]]
            writer.add([image], writer.filled_captions(name, captions), name=name, split=split)


COCO = DatasetSpec(
    name="coco",
    schema=schemas.CAPTIONS,
    summary="COCO captions in Karpathy's splits.",
    layout="""
dataset_coco.json (or in karpathy/)
train2014/COCO_train2014_000000000009.jpg …
val2014/COCO_val2014_000000000042.jpg …
""",
    splits=("train", "validation", "test"),
    split_rule="Karpathy's splits; restval belongs to train",
    protocol=_CAPTIONS_PROTOCOL,
    licences={"captions": "CC-BY 4.0", "images": "terms of use of Flickr"},
    published=published(
        _KARPATHY,
        {"train": (113_287, 566_747), "validation": (5_000, 25_010), "test": (5_000, 25_010)},
    ),
    fill=partial(fill_karpathy, "dataset_coco.json"),
    arrow=ArrowFiles(
        layout="coco_caption_karpathy_{train,restval,val,test}",
        stems={
            "train": ("coco_caption_karpathy_train", "coco_caption_karpathy_restval"),
            "validation": ("coco_caption_karpathy_val",),
            "test": ("coco_caption_karpathy_test",),
        },
    ),
)


FLICKR30K = DatasetSpec(
    name="flickr30k",
    schema=schemas.CAPTIONS,
    summary="Flickr30k captions in Karpathy's splits.",
    layout="""
dataset_flickr30k.json (or in karpathy/)
flickr30k-images/1000092795.jpg …
""",
    splits=("train", "validation", "test"),
    split_rule=_KARPATHY,
    protocol=_CAPTIONS_PROTOCOL,
    licences={
        "captions and images": "for research and education, under the terms of use of Flickr"
    },
    published=published(
        _KARPATHY,
        {"train": (29_000, 145_000), "validation": (1_014, 5_070), "test": (1_000, 5_000)},
    ),
    fill=partial(fill_karpathy, "dataset_flickr30k.json"),
    arrow=ArrowFiles(
        layout="f30k_caption_karpathy_{train,val,test}",
        stems={
            "train": ("f30k_caption_karpathy_train",),
            "validation": ("f30k_caption_karpathy_val",),
            "test": ("f30k_caption_karpathy_test",),
        },
    ),
)

CC3M = DatasetSpec(
    name="cc3m",
    schema=schemas.CAPTIONS,
    published=published(_LINKS, {"train": (3_318_333, 3_318_333), "validation": (15_840, 15_840)}),
    split_rule="as published",
    arrow=ArrowFiles(
        layout="conceptual_caption_train_0 … 30, and by --splits validation conceptual_caption_val_0",
        stems={"train": tuple(f"conceptual_caption_train_{number}" for number in range(31))},
        more_stems={"validation": ("conceptual_caption_val_0",)},
    ),
)
SBU = DatasetSpec(
    name="sbu",
    schema=schemas.CAPTIONS,
    split_rule="all is train",
    published=published(_LINKS, {"train": (1_000_000, 1_000_000)}),
    arrow=ArrowFiles(
        layout="sbu_0 … 8", stems={"train": tuple(f"sbu_{number}" for number in range(9))}
    ),
)

_VQAV2_SUBSETS = {
    "train": "train2014",
    "validation": "val2014",
    "test": "test2015",
    "test-dev": "test-dev2015",
}
_ANNOTATED = ("train", "validation")


def fill_vqav2(originals: Originals, writer: SetWriter, config: PrepareConfig) -> None:
    # Annotations of the splits, and the answers for the vocabulary, which takes both splits.
    first_choices: list[str] = []
    annotations: dict[str, str] = {}  # as JSON, 650,000 with ten answers take 200 MB
    missing_split = ""
    for split in _ANNOTATED:
        file = f"v2_mscoco_{_VQAV2_SUBSETS[split]}_annotations.json"
        paths = (file, f"vqav2/{file}")
        is_wanted = originals.wants(split)
        if not is_wanted and not any((originals.folder / path).is_file() for path in paths):
            missing_split = missing_split or split
            continue
        for row in originals.items(originals.annotation(*paths), "annotations"):
            first_choices.append(row["multiple_choice_answer"])
            if is_wanted:
                annotation = {
                    "image_id": row["image_id"],
                    "question_type": row["question_type"],
                    "answer_type": row["answer_type"],
                    "answers": [answer["answer"] for answer in row["answers"]],
                }
                annotations[_question_key(split, row)] = json.dumps(annotation)

    # Questions with their annotations.
    for split in filter(originals.wants, _VQAV2_SUBSETS):
        file = f"v2_OpenEnded_mscoco_{_VQAV2_SUBSETS[split]}_questions.json"
        year = _VQAV2_SUBSETS[split].replace("test-dev", "test")
        for row in originals.items(originals.annotation(file, f"vqav2/{file}"), "questions"):
            key = _question_key(split, row)
            image_id = row["image_id"]
            is_new = writer.is_new(key)
            annotation = json.loads(annotations.pop(key, "{}")) if is_new else {}
            if not is_new:
                writer.refuse(f"{key} comes twice")
            elif split in _ANNOTATED and not annotation:
                writer.refuse(f"{key} has no annotation")
            elif annotation.pop("image_id", image_id) != image_id:
                writer.refuse(f"{key} has an annotation of another image")
            else:
                entry = Question(
                    question_id=row["question_id"],
                    question=row["question"],
                    answers=tuple(annotation.pop("answers", ())),
                    **annotation,
                )
                image = originals.image(f"{year}/COCO_{year}_{image_id:012d}.jpg")
                writer.add([image], [entry], name=str(image_id), split=split)
    for key in annotations:
        writer.refuse(f"annotation of {key} has no question")

    if missing_split:
        writer.leave_out(
            "answers.json, which takes the annotations of train and validation",
            f"no {missing_split}",
        )
    else:
        writer.files = partial(vocabulary_file, answer_vocabulary(first_choices))


def _question_key(split: str, row: Mapping[str, Any]) -> str:
    return f"question {row['question_id']} of {split}"


def _vqav2_stems(*splits: str) -> dict[str, list[str]]:
    names = {
        "validation": "val",
        "trainable-validation": "trainable_val",
        "rest-validation": "rest_val",
    }
    return {split: [f"vqav2_{names.get(split, split)}"] for split in splits}


_PAGE = "visualqa.org"
_FIXED = "official code, answers in normal form, questions with an answer of the vocabulary"
_RAW = "official code, answers as given, questions with an answer of the vocabulary"

VQAV2 = DatasetSpec(
    name="vqav2",
    schema=schemas.VQA,
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
    splits=tuple(_VQAV2_SUBSETS),
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
    fill=fill_vqav2,
    arrow=ArrowFiles(
        layout="vqav2_{train,val,test,test-dev}, those that end in _fix first",
        split_rule="as published; test-dev's questions are also among test's",
        stems=_vqav2_stems(*_VQAV2_SUBSETS),
        more_stems=_vqav2_stems("trainable-validation", "rest-validation"),
        # The official code reads files with answers in normal form.
        endings=("_fix.arrow", ".arrow"),
        annotators=ANNOTATORS,
    ),
)

KarpathySplit = Literal["restval", "val", "test"]

_VG_FOLDERS = ("images/VG_100K", "images/VG_100K_2", "VG_100K", "VG_100K_2")


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


def fill_vg(originals: Originals, writer: SetWriter, config: VgConfig) -> None:
    for image, row in _visual_genome_images(originals, writer, config, "region_descriptions.json"):
        phrases = []
        for region in row["regions"]:
            phrase = region["phrase"].strip()
            if phrase:
                phrases.append(phrase)
            else:
                writer.leave_out("empty description", str(region["region_id"]))
        writer.add([image], phrases, name=_visual_genome_id(row), split="train")


def _visual_genome_images(
    originals: Originals, writer: SetWriter, config: VgConfig, file: str
) -> Iterator[tuple[Image, Mapping[str, Any]]]:
    """Yields images with their rows of a file, without the images that COCO holds out."""
    held_out: set[str] = set()
    if config.leave_out:
        # Numbers of the images in COCO, and from those in Visual Genome.
        karpathy = config.karpathy or originals.annotation(
            "dataset_coco.json", "karpathy/dataset_coco.json"
        )
        image_data = originals.annotation("image_data.json", "annotations/image_data.json")
        if config.karpathy:
            originals.used.append(karpathy)
        split_of = {
            row["cocoid"]: row["split"]
            for row in originals.items(karpathy, "images")
            if row["split"] in config.leave_out
        }
        missing = sorted(set(config.leave_out) - set(split_of.values()))
        if missing:
            raise ValueError(
                f"{karpathy} has no image of split {', '.join(missing)}; check that it is the right file"
            )
        held_out = {
            str(row["image_id"])
            for row in originals.items(image_data)
            if row["coco_id"] in split_of
        }
    for row in originals.items(originals.annotation(file, f"annotations/{file}")):
        name = _visual_genome_id(row)
        if name in held_out:
            writer.leave_out(f"image in COCO's {' or '.join(config.leave_out)} split", name)
        else:
            yield originals.image(*(f"{folder}/{name}.jpg" for folder in _VG_FOLDERS)), row


def _visual_genome_id(row: Mapping[str, Any]) -> str:
    return str(row.get("id", row.get("image_id")))


VG = DatasetSpec(
    name="vg",
    schema=schemas.CAPTIONS,
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
    fill=fill_vg,
    arrow=ArrowFiles(layout="vg", stems={"train": ("vg",)}),
)


def fill_vgqa(originals: Originals, writer: SetWriter, config: VgqaConfig) -> None:
    vocabulary = read_vocabulary(config.answers)
    writer.files = partial(vocabulary_file, vocabulary)
    originals.used.append(config.answers / ANSWERS_FILE)
    usable_answers = frozenset(vocabulary)
    for image, row in _visual_genome_images(originals, writer, config, "question_answers.json"):
        answers: dict[str, set[str]] = defaultdict(set)  # by question
        for pair in row["qas"]:
            answers[pair["question"]] |= {normalise_answer(pair["answer"])} & usable_answers
        questions: dict[str, Question] = {}
        for pair in row["qas"]:
            text = pair["question"]
            number = pair["qa_id"]
            if normalise_answer(pair["answer"]) not in usable_answers:
                writer.leave_out("answer not in the vocabulary", str(number))
            elif len(answers[text]) > 1:
                writer.leave_out("question with several answers", str(number))
            elif text in questions:
                writer.leave_out("question that was asked before", str(number))
            else:
                questions[text] = Question(
                    question_id=number, question=text, answers=(pair["answer"],)
                )
        writer.add([image], questions.values(), name=_visual_genome_id(row), split="train")


def _vgqa_arrow(stem: str) -> ArrowFiles:
    return ArrowFiles(
        layout=f"{stem}_{{train,val}}",
        split_rule="as the files have them; validation holds the images of Karpathy's val and test splits of COCO, and "
        "in vgqa further ones",
        stems={"train": (f"{stem}_train",), "validation": (f"{stem}_val",)},
    )


VGQA = DatasetSpec(
    name="vgqa",
    schema=schemas.VQA,
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
    fill=fill_vgqa,
    arrow=_vgqa_arrow("vgqa"),
)
VGQA_COCO = DatasetSpec(name="vgqa-coco", schema=schemas.VQA, arrow=_vgqa_arrow("vgqa_coco"))

_SNLI_VE_FILES = {
    "train": "snli_ve_train.jsonl",
    "validation": "snli_ve_dev.jsonl",
    "test": "snli_ve_test.jsonl",
}


def fill_snli_ve(originals: Originals, writer: SetWriter, config: PrepareConfig) -> None:
    for split in filter(originals.wants, _SNLI_VE_FILES):
        file = _SNLI_VE_FILES[split]
        rows = originals.lines(originals.annotation(file, f"snli_ve/{file}"))
        for number, row in enumerate(rows, start=1):
            origin = f"{file}, line {number}"
            identifier = row.get("pairID") or f"{split}-{number}"
            label = row["gold_label"]
            if label not in schemas.SNLI_VE.labels:
                expected = ", ".join(schemas.SNLI_VE.labels)
                writer.refuse(f"{origin}: label {label!r}, expected one of {expected}")
            elif not writer.is_new(identifier):
                writer.refuse(f"{origin}: pair {identifier!r} comes twice")
            else:
                name = f"{row['Flickr30K_ID']}.jpg"
                image = originals.image(f"flickr30k-images/{name}")
                text = row["sentence2"].strip()
                statement = Statement(statement_id=identifier, text=text, label=label)
                writer.add([image], [statement], name=name, split=split, origin=origin)


SNLI_VE = DatasetSpec(
    name="snli-ve",
    schema=schemas.SNLI_VE,
    summary="SNLI-VE, statements about images of Flickr30k.",
    layout="""
snli_ve_train.jsonl, snli_ve_dev.jsonl, snli_ve_test.jsonl (or in snli_ve/)
flickr30k-images/1000092795.jpg …
""",
    splits=tuple(_SNLI_VE_FILES),
    split_rule="as published; dev is validation",
    protocol="the text is sentence2 alone, without spaces at its ends; the image stands for sentence1",
    licences={
        "statements": "CC-BY-SA 4.0",
        "images": "for research and education, under the terms of use of Flickr",
    },
    published=published(
        "SNLI-VE's page",
        {"train": (29_783, 529_527), "validation": (1_000, 17_858), "test": (1_000, 17_901)},
    ),
    fill=fill_snli_ve,
    arrow=ArrowFiles(
        layout="snli_{train,dev,test}",
        stems={"train": ("snli_train",), "validation": ("snli_dev",), "test": ("snli_test",)},
    ),
)

_NLVR2_FILES = {
    "train": "train.json",
    "validation": "dev.json",
    "test1": "test1.json",
    "test2": "test2.json",
    "balanced-validation": "balanced/balanced_dev.json",
    "balanced-test1": "balanced/balanced_test1.json",
    "unbalanced-validation": "unbalanced/unbalanced_dev.json",
    "unbalanced-test1": "unbalanced/unbalanced_test1.json",
}
_NLVR2_FOLDERS = ("nlvr2/data", "nlvr/nlvr2/data", "data")
_UNLABELLED = "test2"  # which was held back, and may come without labels
_USUAL = ("train", "validation", "test1")


def fill_nlvr2(originals: Originals, writer: SetWriter, config: PrepareConfig) -> None:
    for split in filter(originals.wants, _NLVR2_FILES):
        file = _NLVR2_FILES[split]
        path = originals.annotation(*(f"{folder}/{file}" for folder in _NLVR2_FOLDERS))
        for row in originals.lines(path):
            identifier = row["identifier"]
            label = row.get("label", "")
            if label not in schemas.NLVR2.labels and (label or split != _UNLABELLED):
                writer.refuse(
                    f"{identifier} of {file}: label {label!r}, expected the text True or False"
                )
            elif not writer.is_new(f"{identifier} of {split}"):
                writer.refuse(f"{identifier} of {file} comes twice")
            else:
                pair = identifier.rpartition("-")[0]
                subset = pair.partition("-")[0]
                if subset == "train":
                    folders = [f"images/train/{row['directory']}"]
                else:
                    folders = [subset, f"images/{subset}"]
                images = [
                    originals.image(*(f"{folder}/{pair}-img{side}.png" for folder in folders))
                    for side in (0, 1)
                ]
                text = row["sentence"].strip()
                statement = Statement(statement_id=identifier, text=text, label=label)
                writer.add(images, [statement], name=pair, split=split)


NLVR2 = DatasetSpec(
    name="nlvr2",
    schema=schemas.NLVR2,
    summary=(
        "NLVR2, statements about two images.\n\n"
        "By --splits also test2, balanced-validation, balanced-test1, unbalanced-validation and unbalanced-test1."
    ),
    layout="""
nlvr2/data/train.json, dev.json, test1.json (or in data/ or nlvr/nlvr2/data/)
images/train/0/train-10108-0-img0.png …
dev/dev-0-0-img0.png … (or in images/)
test1/test1-0-0-img0.png … (or in images/)
""",
    splits=_USUAL,
    more_splits=tuple(split for split in _NLVR2_FILES if split not in _USUAL),
    split_rule="as published; dev is validation",
    protocol="every statement, without spaces at its ends; a row is a pair of images with all statements about it",
    licences={"statements": "CC-BY 4.0", "images": "as on the pages that they are from"},
    published=published(
        "NLVR2's page",
        {
            "train": (None, 86_373),
            "validation": (None, 6_982),
            "test1": (None, 6_967),
            "test2": (None, 6_970),
        },
    ),
    fill=fill_nlvr2,
    arrow=ArrowFiles(
        layout="nlvr2_{train,dev,test1}, and by --splits nlvr2_{balanced,unbalanced}_{dev,test1}",
        stems={"train": ("nlvr2_train",), "validation": ("nlvr2_dev",), "test1": ("nlvr2_test1",)},
        more_stems={
            f"{group}-{split}": (f"nlvr2_{group}_{subset}",)
            for group in ("balanced", "unbalanced")
            for split, subset in (("validation", "dev"), ("test1", "test1"))
        },
    ),
)


def _composition(name: str, label: str, *captions: str) -> Composition:
    return Composition(
        example_id=name, captions=tuple(caption.strip() for caption in captions), label=label
    )


def fill_winoground(originals: Originals, writer: SetWriter, config: PrepareConfig) -> None:
    for row in originals.lines(originals.annotation("examples.jsonl")):
        name = str(row["id"])
        if not writer.is_new(name):
            writer.refuse(f"id {name!r} comes twice")
            continue
        images = [originals.image(f"images/{row[side]}.png") for side in ("image_0", "image_1")]
        entry = _composition(name, row["collapsed_tag"], row["caption_0"], row["caption_1"])
        writer.add(images, [entry], name=name, split="test")


WINOGROUND = DatasetSpec(
    name="winoground",
    schema=schemas.COMPOSITIONALITY,
    summary="Winoground: two images and two captions of the same words.",
    layout="examples.jsonl\nimages/ex_0_img_0.png …",
    splits=("test",),
    split_rule="all is test",
    protocol="every example; its category is collapsed_tag",
    licences={"images and captions": "for research, under the licence of facebook/winoground"},
    published=published("Thrush et al. 2022", {"test": (None, 400)}),
    fill=fill_winoground,
)

_CHANGES = (
    "add_att",
    "add_obj",
    "replace_att",
    "replace_obj",
    "replace_rel",
    "swap_att",
    "swap_obj",
)


def fill_sugarcrepe(originals: Originals, writer: SetWriter, config: PrepareConfig) -> None:
    for category in _CHANGES:
        file = f"{category}.json"
        rows = read_json(originals.annotation(file, f"data/{file}"))
        for number, row in rows.items():
            name = row["filename"]
            captions = row["caption"], row["negative_caption"]
            entry = _composition(f"{category}-{number}", category, *captions)
            writer.add([originals.image(f"val2017/{name}")], [entry], name=name, split="test")


SUGARCREPE = replace(
    WINOGROUND,
    name="sugarcrepe",
    summary="SugarCrepe: a caption of COCO and a fluent wrong one, by seven kinds of change.",
    layout="\n".join(
        [*(f"{name}.json (or in data/)" for name in _CHANGES), "val2017/000000085329.jpg …"]
    ),
    protocol="every example; its category is its file",
    published={},
    licences={"captions": "MIT", "images": "terms of use of Flickr"},
    fill=fill_sugarcrepe,
)


def fill_aro(originals: Originals, writer: SetWriter, config: PrepareConfig) -> None:
    from PIL.Image import DecompressionBombError

    from bridgetower.processor import open_image  # imports torch, which help of commands must not

    for split in filter(originals.wants, ARO.splits):
        path = originals.annotation(f"visual_genome_{split}.json")
        for number, row in enumerate(originals.items(path)):
            category = row["relation_name"] if split == "relation" else "_".join(row["attributes"])
            captions = row["true_caption"], row["false_caption"]
            entry = _composition(f"{split}-{number}", category, *captions)
            x, y, width, height = (row[f"bbox_{name}"] for name in "xywh")
            image = originals.image(f"images/{row['image_path']}")
            region = io.BytesIO()
            try:
                opened = open_image(image.read())
                opened.crop((x, y, x + width, y + height)).save(region, "PNG")
            except (OSError, ValueError, DecompressionBombError) as error:
                writer.refuse(f"{path.name}, item {number}: {error}")
                continue
            name = f"{image.name}#{x},{y},{width},{height}"
            region_image = replace(image, name=name, content=region.getvalue())
            writer.add([region_image], [entry], name=entry.example_id, split=split)


ARO = DatasetSpec(
    name="aro",
    schema=schemas.COMPOSITIONALITY,
    summary="ARO: captions of regions of Visual Genome in which two objects, or their attributes, change places.",
    layout="visual_genome_relation.json\nvisual_genome_attribution.json\nimages/2409595.jpg …",
    splits=("relation", "attribution"),
    split_rule="a split for each part that is a file",
    protocol="every example, its region of the image as PNG; its category is the relation, or both attributes",
    licences={"captions": "MIT", "images": "CC-BY 4.0"},
    fill=fill_aro,
)

DATASETS: Mapping[str, DatasetSpec] = {
    spec.name: spec
    for spec in (
        COCO,
        FLICKR30K,
        VG,
        CC3M,
        SBU,
        VQAV2,
        VGQA,
        VGQA_COCO,
        SNLI_VE,
        NLVR2,
        WINOGROUND,
        SUGARCREPE,
        ARO,
    )
}
"""All published sets, by name."""
