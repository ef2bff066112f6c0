"""Visual question answering: a score for every answer of the vocabulary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bridgetower.data.answers import FEW_ANNOTATORS, normalise_answer, read_vocabulary
from bridgetower.data.config import DataConfig
from bridgetower.data.schema import VQA as SCHEMA
from bridgetower.evaluation.config import Protocol
from bridgetower.evaluation.outcome import Outcome, counts
from bridgetower.evaluation.vqa_score import VqaScores, vqa_score, vqa_scores
from bridgetower.files import json_text
from bridgetower.model.config import HeadsConfig
from bridgetower.model.plain import check_choice, check_numbers
from bridgetower.model.presets import BASE, LARGE
from bridgetower.objectives.config import NotAnOption, TaskConfig
from bridgetower.tasks.recipes import CLIP_VIEWS, PAPER_OPTIMIZER, QUESTION_VIEWS
from bridgetower.tasks.run_config import RunConfig
from bridgetower.tasks.spec import Evaluation, ExampleSource, TaskSpec

if TYPE_CHECKING:
    from bridgetower.data.examples import EntryDataset
    from bridgetower.evaluation.predictions import Predictions


@dataclass(frozen=True, kw_only=True)
class VqaConfig(TaskConfig):
    """Questions about images.

    Attributes:
        kind: Name of the task in a saved run; no option of the command.
        protocol: `standard` scores every question of the validation split; `paper` leaves out those to which no
            annotator gave an answer of the vocabulary, as the official code does. Both train without them.
    """

    metrics = ("vqa_score",)

    kind: NotAnOption = "vqa"
    protocol: Protocol = "standard"

    def __post_init__(self) -> None:
        check_numbers(self)
        check_choice("protocol", self.protocol, Protocol)


def _class_names(data: DataConfig, config: VqaConfig) -> Sequence[str]:
    if not data.folders:
        raise ValueError("no data folder given; pass --data.folders DIR, made by `bridgetower prepare`")
    return read_vocabulary(data.folders[0])


def _examples(source: ExampleSource) -> EntryDataset:
    """Opens questions; `test-dev` of VQAv2 is part of `test`, and its server takes the answers to all of it."""
    from bridgetower.data.examples import AnswerEncoder, EntryDataset

    source = replace(source, splits=tuple("test" if split == "test-dev" else split for split in source.splits))
    answers = AnswerEncoder(source.names)
    has_answers = not any(split.startswith("test") for split in source.splits)
    answerable = source.use == "train" or (source.task.protocol == "paper" and has_answers)
    return EntryDataset(
        source.images(SCHEMA),
        answers,
        keep=answers.answerable if answerable else None,
        labelled=source.use == "validate",
        unique=source.use == "test",
    )


def _evaluate(evaluation: Evaluation) -> Outcome:
    questions, predictions = evaluation.examples, evaluation.predictions()
    entries = list(questions)
    answers = [evaluation.names[number] for number in predictions.classes.tolist()]
    by_id = dict(zip([entry["question_id"] for entry in entries], answers, strict=True))
    rows = [
        {"question_id": entry["question_id"], "answer": answer, "probability": probability}
        for entry, answer, probability in zip(entries, answers, predictions.probabilities.tolist(), strict=True)
    ]
    num_answered = sum(bool(entry["answers"]) for entry in entries)
    scores = question_scores(questions, predictions, evaluation.names) if num_answered else None
    return Outcome(
        metrics={} if scores is None else vqa_metrics(scores),
        counts=counts("num_questions", len(entries), "num_answered", num_answered),
        details={}
        if scores is None
        else {"by_answer_type": scores.by_answer_type, "by_question_type": scores.by_question_type},
        predictions=rows,
        submission=("submission.json", json_text([{"question_id": key, "answer": by_id[key]} for key in by_id])),
        judge=lambda: evaluation.judged(
            list(zip(answers, predictions.probabilities.tolist(), strict=True)),
            expected=lambda entry: _expected(entry["answers"]),
            score=lambda entry, answer: vqa_score(answer, entry["answers"]),
            groups=("answer_type", "question_type"),
        ),
    )


def _expected(answers: Sequence[str]) -> str:
    """Returns the most frequent answer in the form in which `vqa_score` compares it."""
    raw = len(answers) >= FEW_ANNOTATORS and len(set(answers)) == 1
    return answers[0] if raw else Counter(map(normalise_answer, answers)).most_common(1)[0][0]


def question_scores(questions: EntryDataset, predictions: Predictions, names: Sequence[str]) -> VqaScores:
    """Returns VQA's official scores of the questions that have answers of annotators."""
    answered = {number: entry for number, entry in enumerate(questions) if entry["answers"]}
    given = [names[number] for number in predictions.classes[list(answered)].tolist()]
    return vqa_scores(given, list(answered.values()))


def vqa_metrics(scores: VqaScores) -> dict[str, float]:
    """Returns `vqa_score` and that of each type of answer."""
    by_type = {f"vqa_score_{name.replace('/', '_')}": score for name, score in scores.by_answer_type.items()}
    return {"vqa_score": scores.overall, **by_type}


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

VQA = TaskSpec(
    name="vqa",
    config=VqaConfig,
    schema=SCHEMA,
    head="vqa",
    examples=_examples,
    evaluate=_evaluate,
    class_names=_class_names,
    fine_tuning=(VQAV2_BASE, VQAV2_LARGE, VQAV2_BASE_NO_PRETRAINING, VQAV2_LARGE_NO_PRETRAINING),
    benchmarks={"vqav2": VqaConfig()},
)
