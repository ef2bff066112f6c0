"""Questions and statements about images: VQAv2, SNLI-VE, and NLVR2 with two images."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from bridgetower.data import schema as schemas
from bridgetower.data.answers import FEW_ANNOTATORS, normalise_answer, read_vocabulary
from bridgetower.data.schema import Schema, nlvr2_sentence
from bridgetower.evaluation.config import Protocol
from bridgetower.evaluation.outcome import Outcome
from bridgetower.files import json_text
from bridgetower.model.config import HeadsConfig
from bridgetower.model.plain import check_choice, check_numbers
from bridgetower.model.presets import BASE, LARGE
from bridgetower.objectives.config import NotAnOption, TaskConfig
from bridgetower.tasks.run_config import (
    BASE_AT_384,
    CLIP_VIEWS,
    COLOUR_VIEWS,
    PAPER_OPTIMIZER,
    QUESTION_VIEWS,
    RunConfig,
)
from bridgetower.tasks.spec import Entry, Evaluation, ExampleSource, TaskSpec, first_folder

if TYPE_CHECKING:
    from bridgetower.data.examples import EntryDataset


@dataclass(frozen=True, kw_only=True)
class VqaConfig(TaskConfig):
    """Questions about images.

    Attributes:
        protocol: `standard` scores every question of the validation split; `paper` leaves out those to which no
            annotator gave an answer of the vocabulary, as the official code does. Both train without them.
    """

    metrics = ("vqa_score",)

    kind: NotAnOption = "vqa"
    protocol: Protocol = "standard"

    def __post_init__(self) -> None:
        check_numbers(self)
        check_choice("protocol", self.protocol, Protocol)


@dataclass(frozen=True, kw_only=True)
class SnliVeConfig(TaskConfig):
    """Does an image contradict a statement, leave it open, or entail it?"""

    metrics = ("accuracy",)

    kind: NotAnOption = "snli-ve"


@dataclass(frozen=True, kw_only=True)
class Nlvr2Config(TaskConfig):
    """Is a statement about two images true?"""

    metrics = ("accuracy",)

    kind: NotAnOption = "nlvr2"


def _questions(source: ExampleSource) -> EntryDataset:
    """Opens questions; `test-dev` of VQAv2 is part of `test`, and its server takes the answers to all of it."""
    from bridgetower.data.examples import AnswerEncoder, EntryDataset

    source = replace(source, splits=tuple("test" if split == "test-dev" else split for split in source.splits))
    answers = AnswerEncoder(source.names)
    has_answers = not any(split.startswith("test") for split in source.splits)
    answerable = source.use == "train" or (source.task.protocol == "paper" and has_answers)
    return EntryDataset(
        source.images(schemas.VQA),
        answers,
        keep=answers.answerable if answerable else None,
        labelled=source.use == "validate",
        unique=source.use == "test",
    )


def _evaluate_questions(evaluation: Evaluation) -> Outcome:
    from bridgetower.evaluation.class_metrics import vqa_score

    entries = list(evaluation.examples)
    given = evaluation.likeliest()
    answers = [answer for answer, _ in given]
    answered = [(answer, entry) for answer, entry in zip(answers, entries, strict=True) if entry["answers"]]
    metrics, details = question_metrics(*zip(*answered, strict=True)) if answered else ({}, {})
    by_id = dict(zip([entry["question_id"] for entry in entries], answers, strict=True))
    return evaluation.outcome(
        [{"answer": answer, "probability": probability} for answer, probability in given],
        given,
        id_name="question_id",
        known_name="num_answered",
        expected=lambda entry: _expected(entry["answers"]),
        score=lambda entry, answer: vqa_score(answer, entry["answers"]),
        groups=("answer_type", "question_type"),
        metrics=metrics,
        details=details,
        submission=("submission.json", json_text([{"question_id": key, "answer": by_id[key]} for key in by_id])),
    )


def _expected(answers: Sequence[str]) -> str:
    """Returns the most frequent answer in the form in which `vqa_score` compares it."""
    raw = len(answers) >= FEW_ANNOTATORS and len(set(answers)) == 1
    return answers[0] if raw else Counter(map(normalise_answer, answers)).most_common(1)[0][0]


def question_metrics(
    answers: Sequence[str], questions: Sequence[Entry]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Returns `vqa_score` and that of each type of answer, and the scores by types."""
    from bridgetower.evaluation.class_metrics import vqa_scores

    overall, by_type = vqa_scores(answers, questions)
    named = {f"vqa_score_{name.replace('/', '_')}": score for name, score in by_type["by_answer_type"].items()}
    return {"vqa_score": overall, **named}, by_type


def _statements(source: ExampleSource, schema: Schema) -> EntryDataset:
    from bridgetower.data.examples import ClassEncoder, EntryDataset

    test = source.use == "test"
    return EntryDataset(source.images(schema), ClassEncoder(schema.labels), labelled=not test, unique=test)


def _evaluate_statements(evaluation: Evaluation) -> Outcome:
    entries, is_nlvr2 = list(evaluation.examples), evaluation.examples.schema is schemas.NLVR2
    given = evaluation.likeliest()
    labels = [label for label, _ in given]
    by_id = dict(zip([entry["statement_id"] for entry in entries], labels, strict=True))
    unknown = [name for name in by_id if is_nlvr2 and nlvr2_sentence(name) is None]
    notes = [
        f"no consistency and no submission: {len(unknown)} of {len(by_id)} statements, such as {name!r}, have no "
        "identifier of NLVR2, which contains the sentence; prepare the set from NLVR2's JSON files"
        for name in unknown[:1]
    ]
    return evaluation.outcome(
        [{"label": label, "probability": probability} for label, probability in given],
        given,
        id_name="statement_id",
        expected=lambda entry: str(entry["label"]),
        score=lambda entry, label: float(label == entry["label"]),
        metrics=statement_metrics(entries, labels, is_nlvr2=is_nlvr2),
        submission=nlvr2_submission(by_id) if is_nlvr2 and not unknown else None,
        notes=notes,
    )


def statement_metrics(entries: Sequence[Entry], labels: Sequence[str], *, is_nlvr2: bool) -> dict[str, float]:
    """Returns `accuracy` of the labelled statements and, with NLVR2's identifiers, `consistency`.

    That is the share of sentences about which the labels of all pairs of images are right.
    """
    known = [(entry, entry["label"] == label) for entry, label in zip(entries, labels, strict=True) if entry["label"]]
    sentences: dict[str | None, bool] = {}
    for entry, hit in known:
        sentence = nlvr2_sentence(entry["statement_id"]) if is_nlvr2 else None
        sentences[sentence] = sentences.get(sentence, True) and hit
    if not known:
        return {}
    metrics = {"accuracy": sum(hit for _, hit in known) / len(known)}
    return metrics if None in sentences else metrics | {"consistency": sum(sentences.values()) / len(sentences)}


def nlvr2_submission(labels: Mapping[str, str]) -> tuple[str, str]:
    """Returns the file that NLVR2's evaluation takes: CSV lines of identifier and prediction, without header."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(labels.items())
    return "submission.csv", stream.getvalue()


NUM_ANSWERS = 3129
_HEADS = HeadsConfig(mlm=False, itm=False, vqa=NUM_ANSWERS, hidden_scale=2.0)

VQAV2_BASE = RunConfig(
    recipe="vqav2-base",
    source="paper, appendix, and official script for VQAv2; give a pre-trained init. The paper trains on "
    "--data.train-splits train validation",
    task=VqaConfig(),
    model=replace(BASE, heads=_HEADS).override({"vision.image_size": 576}),
    image_size=576,
    optimizer=replace(PAPER_OPTIMIZER, lr=1e-5, warmup=0.06, weight_decay=0.05, head_multiplier=50),
    data=QUESTION_VIEWS,
    batch_size=512,
    micro_batch_size=16,
    max_epochs=10,
    precision="bf16",
    evaluate_every=2_000,
    select_by="vqa_score",
)

VQAV2_LARGE = replace(
    VQAV2_BASE,
    recipe="vqav2-large",
    model=replace(LARGE, heads=_HEADS).override({"vision.image_size": 574}),
    image_size=574,
    optimizer=replace(VQAV2_BASE.optimizer, lr=4e-6),
    micro_batch_size=4,
)

VQAV2_BASE_NO_PRETRAINING = replace(
    VQAV2_BASE,
    recipe="vqav2-base-no-pretraining",
    source="paper, appendix, and official script for VQAv2 without pre-training; give vision "
    "and text. The paper trains on --data.train-splits train validation",
    model=replace(VQAV2_BASE.model, heads=replace(_HEADS, hidden_scale=1.0)),
    optimizer=replace(PAPER_OPTIMIZER, lr=2e-5, head_multiplier=50),
    data=CLIP_VIEWS,
)

VQAV2_LARGE_NO_PRETRAINING = replace(
    VQAV2_BASE_NO_PRETRAINING,
    recipe="vqav2-large-no-pretraining",
    model=replace(VQAV2_LARGE.model, heads=replace(_HEADS, hidden_scale=1.0)),
    image_size=574,
    optimizer=replace(PAPER_OPTIMIZER, lr=1e-5, head_multiplier=50),
    micro_batch_size=4,
)

SNLI_VE_BASE = RunConfig(
    recipe="snli-ve",
    source="paper, appendix, and official script for SNLI-VE; give a pre-trained init",
    task=SnliVeConfig(),
    model=replace(BASE_AT_384, heads=HeadsConfig(mlm=False, itm=False, snli_ve=True, hidden_scale=2.0)),
    image_size=384,
    optimizer=replace(PAPER_OPTIMIZER, lr=3e-6, warmup=0.06, head_multiplier=10),
    data=COLOUR_VIEWS,
    batch_size=64,
    micro_batch_size=32,
    max_epochs=5,
    precision="bf16",
    evaluate_every=4_000,
    select_by="accuracy",
)

NLVR2_BASE = replace(
    SNLI_VE_BASE,
    recipe="nlvr2",
    source="paper, appendix, and official script for NLVR2; give a pre-trained init",
    task=Nlvr2Config(),
    model=replace(
        BASE_AT_384,
        fusion=replace(BASE_AT_384.fusion, num_token_types=3),
        heads=HeadsConfig(mlm=False, itm=False, nlvr2=True, hidden_scale=1.5),
    ),
    optimizer=replace(PAPER_OPTIMIZER, lr=5e-6, weight_decay=0.008, head_multiplier=10),
    micro_batch_size=16,
    max_epochs=10,
    evaluate_every=1_000,
)

VQA = TaskSpec(
    name="vqa",
    config=VqaConfig,
    schema=schemas.VQA,
    head="vqa",
    examples=_questions,
    evaluate=_evaluate_questions,
    class_names=lambda data, config: read_vocabulary(first_folder(data)),
    fine_tuning=(VQAV2_BASE, VQAV2_LARGE, VQAV2_BASE_NO_PRETRAINING, VQAV2_LARGE_NO_PRETRAINING),
    benchmarks={"vqav2": VqaConfig()},
)

SNLI_VE = TaskSpec(
    name="snli-ve",
    config=SnliVeConfig,
    schema=schemas.SNLI_VE,
    head="snli_ve",
    examples=partial(_statements, schema=schemas.SNLI_VE),
    evaluate=_evaluate_statements,
    fine_tuning=(SNLI_VE_BASE,),
    benchmarks={"snli-ve": SnliVeConfig()},
)

NLVR2 = replace(
    SNLI_VE,
    name="nlvr2",
    config=Nlvr2Config,
    schema=schemas.NLVR2,
    head="nlvr2",
    examples=partial(_statements, schema=schemas.NLVR2),
    fine_tuning=(NLVR2_BASE,),
    benchmarks={"nlvr2": Nlvr2Config()},
)
