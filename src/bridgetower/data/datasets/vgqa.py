"""VG-QA: questions of Visual Genome as further training data of VQAv2."""

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

from bridgetower.data.answers import ANSWERS_FILE, normalise_answer, read_vocabulary
from bridgetower.data.config import VgqaConfig
from bridgetower.data.datasets.arrow import ArrowFiles, asked
from bridgetower.data.datasets.spec import DatasetSpec, Originals
from bridgetower.data.datasets.vg import annotation_of, image_of, images_in_coco, leave_out
from bridgetower.data.manifest import Manifest
from bridgetower.data.schema import VQA, Question


def _fill(originals: Originals, manifest: Manifest, config: VgqaConfig) -> None:
    manifest.vocabulary = read_vocabulary(config.answers)
    originals.used.append(config.answers / ANSWERS_FILE)
    known = frozenset(manifest.vocabulary)
    held_out = images_in_coco(originals, config)
    for image in originals.items(annotation_of(originals, "question_answers.json"), "item"):
        image_id = image.get("id", image.get("image_id"))
        if image_id in held_out:
            leave_out(manifest, image_id, config)
        else:
            questions = list(_usable(image["qas"], known, manifest))
            manifest.add(str(image_id), [image_of(originals, image_id)], questions, split="train")


def _usable(pairs: Iterable[Mapping[str, Any]], known: Container[str], manifest: Manifest) -> Iterator[Question]:
    """Yields the questions with exactly one answer of the vocabulary, each once."""
    answers: dict[str, set[str]] = defaultdict(set)
    good = []
    for pair in pairs:
        answer = normalise_answer(pair["answer"])
        if answer in known:
            answers[pair["question"]].add(answer)
            good.append(pair)
        else:
            manifest.leave_out("answer not in the vocabulary", str(pair["qa_id"]))
    seen: set[str] = set()
    for pair in good:
        question = pair["question"]
        if len(answers[question]) > 1:
            manifest.leave_out("question with several answers", str(pair["qa_id"]))
        elif question in seen:
            manifest.leave_out("question that was asked before", str(pair["qa_id"]))
        else:
            seen.add(question)
            yield Question(question_id=pair["qa_id"], question=question, answers=(pair["answer"],))


def _arrow(stem: str) -> ArrowFiles:
    return asked(
        layout=f"{stem}_{{train,val}}",
        split_rule="as the files have them; validation holds the pictures of Karpathy's val and test splits of COCO",
        stems={"train": (f"{stem}_train",), "validation": (f"{stem}_val",)},
        annotators=1,
    )


VGQA = DatasetSpec(
    name="vgqa",
    schema=VQA,
    summary="Questions of Visual Genome as further training data of VQAv2.",
    layout="""
question_answers.json and image_data.json (or in annotations/)
images/VG_100K/2.jpg … and images/VG_100K_2/1.jpg …
dataset_coco.json (or in karpathy/, or where --karpathy says)
""",
    example="bridgetower prepare vgqa --source vg --answers data/vqav2 --karpathy dataset_coco.json --out data/vgqa",
    splits=("train",),
    split_rule="all is train but pictures of COCO that Karpathy's splits hold out",
    protocol=(
        "questions with exactly one distinct answer that VQAv2's vocabulary has, once per picture; answers as they "
        "were given"
    ),
    licences={"questions, answers and pictures": "CC-BY 4.0"},
    config=VgqaConfig,
    fill=_fill,
    arrow=_arrow("vgqa"),
)
VGQA_COCO = DatasetSpec(name="vgqa-coco", schema=VQA, arrow=_arrow("vgqa_coco"))
