"""VG-QA: questions of Visual Genome as further training data of VQAv2."""

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

from bridgetower.data.answers import normalise_answer
from bridgetower.data.config import VgqaConfig
from bridgetower.data.kinds import Question
from bridgetower.data.listing import Listing
from bridgetower.data.published.originals import Originals, OriginalSet
from bridgetower.data.published.visual_genome import annotation_of, leave_out, picture_of, pictures_in_coco
from bridgetower.data.vocabulary import ANSWERS_FILE, read_vocabulary


def _list(originals: Originals, listing: Listing, config: VgqaConfig) -> None:
    listing.vocabulary = read_vocabulary(config.answers)
    originals.used.append(config.answers / ANSWERS_FILE)
    known = frozenset(listing.vocabulary)
    held_out = pictures_in_coco(originals, config)
    for picture in originals.items(annotation_of(originals, "question_answers.json"), "item"):
        image_id = picture.get("id", picture.get("image_id"))
        if image_id in held_out:
            leave_out(listing, image_id, config)
        else:
            questions = list(_usable(picture["qas"], known, listing))
            listing.add(str(image_id), [picture_of(originals, image_id)], questions, split="train")


def _usable(pairs: Iterable[Mapping[str, Any]], known: Container[str], listing: Listing) -> Iterator[Question]:
    """Yields the questions with exactly one answer of the vocabulary, each once."""
    answers: dict[str, set[str]] = defaultdict(set)
    good = []
    for pair in pairs:
        answer = normalise_answer(pair["answer"])
        if answer in known:
            answers[pair["question"]].add(answer)
            good.append(pair)
        else:
            listing.leave_out("answer not in the vocabulary", str(pair["qa_id"]))
    asked: set[str] = set()
    for pair in good:
        question = pair["question"]
        if len(answers[question]) > 1:
            listing.leave_out("question with several answers", str(pair["qa_id"]))
        elif question in asked:
            listing.leave_out("question that was asked before", str(pair["qa_id"]))
        else:
            asked.add(question)
            yield Question(question_id=pair["qa_id"], question=question, answers=(pair["answer"],))


VGQA = OriginalSet(
    name="vgqa",
    kind="vqa",
    splits=("train",),
    split_rule="all is train but pictures of COCO that Karpathy's splits hold out",
    protocol=(
        "questions with exactly one distinct answer that VQAv2's vocabulary has, once per picture; answers as they "
        "were given"
    ),
    licences={"questions, answers and pictures": "CC-BY 4.0"},
    config=VgqaConfig,
    list=_list,
)
