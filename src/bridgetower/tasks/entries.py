"""Tasks on entries of prepared sets: VQAv2, SNLI-VE, NLVR2, and tables of labels or numbers."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from bridgetower.data.sets import schema as schemas
from bridgetower.data.sets.answers import FEW_ANNOTATORS, normalise_answer, read_vocabulary
from bridgetower.data.sets.custom import read_classes
from bridgetower.data.sets.schema import Schema, nlvr2_sentence
from bridgetower.evaluation.config import Outcome, Protocol, RetrievalConfig
from bridgetower.files import json_text
from bridgetower.model.config import HeadsConfig
from bridgetower.model.presets import BASE, LARGE, NANO
from bridgetower.objectives.config import NotAnOption, TaskConfig
from bridgetower.plain import check_choice, check_numbers
from bridgetower.tasks.pretraining import PRETRAIN_NANO
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
    from torch import Tensor

    from bridgetower.data.batches.examples import EntryDataset, LabelEncoder


@dataclass(frozen=True, kw_only=True)
class VqaConfig(TaskConfig):
    """Questions about images.

    Attributes:
        protocol: `standard` scores every question of the validation split. `paper` leaves out questions to which no
            annotator gave an answer of the vocabulary, as the official code does. Both leave them out of training.
    """

    metrics = ("vqa_score",)
    kind: NotAnOption = "vqa"
    protocol: Protocol = "standard"

    def __post_init__(self) -> None:
        check_numbers(self)
        check_choice("protocol", self.protocol, Protocol)


@dataclass(frozen=True, kw_only=True)
class SnliVeConfig(TaskConfig):
    """Tells whether an image contradicts a statement, leaves it open, or entails it."""

    metrics = ("accuracy",)
    kind: NotAnOption = "snli-ve"


@dataclass(frozen=True, kw_only=True)
class Nlvr2Config(TaskConfig):
    """Tells whether a statement about two images is true."""

    metrics = ("accuracy",)
    kind: NotAnOption = "nlvr2"


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig(TaskConfig):
    metrics = ("accuracy", "macro_f1", "auroc", "average_precision")
    kind: NotAnOption = "classification"


@dataclass(frozen=True, kw_only=True)
class ZeroShotConfig(TaskConfig):
    """Classes by the similarity of images to their names.

    Attributes:
        matching: Whether the matching head scores the classes, not the contrastive one.
        templates: Texts with {} for the class; none: the templates of `classify`.
    """

    metrics = ("accuracy",)
    kind: NotAnOption = "zero-shot"
    matching: bool = False
    templates: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CompositionConfig(TaskConfig):
    metrics = ("itc_accuracy",)
    kind: NotAnOption = "compositionality"


@dataclass(frozen=True, kw_only=True)
class RegressionConfig(TaskConfig):
    metrics = ("pearson_correlation", "spearman_correlation")
    kind: NotAnOption = "regression"


def question_examples(source: ExampleSource) -> EntryDataset:
    from bridgetower.data.batches.examples import AnswerEncoder, EntryDataset

    # `test-dev` of VQAv2 is part of `test`, and its server takes the answers to all of it.
    splits = tuple("test" if split == "test-dev" else split for split in source.splits)
    source = replace(source, splits=splits)
    answers = AnswerEncoder(source.names)
    has_answers = not any(split.startswith("test") for split in splits)
    is_paper = source.task.protocol == "paper" and has_answers
    return EntryDataset(
        source.images(schemas.VQA),
        answers,
        keep=answers.answerable if source.use == "train" or is_paper else None,
        labelled=source.use == "validate",
        unique=source.use == "test",
    )


def judge_questions(evaluation: Evaluation) -> Outcome:
    from bridgetower.evaluation.class_metrics import vqa_score, vqa_scores

    entries = list(evaluation.examples)
    predictions = evaluation.likeliest()
    answers = [answer for answer, _ in predictions]
    answered = [
        (answer, entry) for answer, entry in zip(answers, entries, strict=True) if entry["answers"]
    ]
    metrics, details = vqa_scores(*zip(*answered, strict=True)) if answered else ({}, {})
    submission = [
        {"question_id": entry["question_id"], "answer": answer}
        for answer, entry in zip(answers, entries, strict=True)
    ]

    def most_frequent_answer(entry: Entry) -> str:
        # In the form in which `vqa_score` compares it.
        targets = entry["answers"]
        if len(targets) < FEW_ANNOTATORS or len(set(targets)) > 1:
            targets = map(normalise_answer, targets)
        return Counter(targets).most_common(1)[0][0]

    return evaluation.outcome(
        [{"answer": answer, "probability": probability} for answer, probability in predictions],
        predictions,
        id_name="question_id",
        known_name="num_answered",
        expected=most_frequent_answer,
        score=lambda entry, answer: vqa_score(answer, entry["answers"]),
        groups=("answer_type", "question_type"),
        metrics=metrics,
        details=details,
        submission=("submission.json", json_text(submission)),
    )


def statement_examples(source: ExampleSource, schema: Schema) -> EntryDataset:
    from bridgetower.data.batches.examples import ClassEncoder, EntryDataset

    is_test = source.use == "test"
    return EntryDataset(
        source.images(schema), ClassEncoder(schema.labels), labelled=not is_test, unique=is_test
    )


def judge_statements(evaluation: Evaluation) -> Outcome:
    entries = list(evaluation.examples)
    predictions = evaluation.likeliest()
    labels = [label for label, _ in predictions]
    is_nlvr2 = evaluation.examples.schema is schemas.NLVR2

    # NLVR2's evaluation takes identifiers, which contain the sentence, and predictions without a header.
    ids = [entry["statement_id"] for entry in entries]
    unknown = [name for name in ids if is_nlvr2 and nlvr2_sentence(name) is None]
    notes = []
    if unknown:
        notes.append(
            f"no consistency and no submission: {len(unknown)} of {len(ids)} statements, such as {unknown[0]!r}, have "
            "no identifier of NLVR2, which contains the sentence; prepare the set from NLVR2's JSON files"
        )
    submission = io.StringIO()
    csv.writer(submission, lineterminator="\n").writerows(zip(ids, labels, strict=True))
    return evaluation.outcome(
        [{"label": label, "probability": probability} for label, probability in predictions],
        predictions,
        id_name="statement_id",
        expected=lambda entry: str(entry["label"]),
        score=lambda entry, label: float(label == entry["label"]),
        metrics=statement_metrics(entries, labels, is_nlvr2=is_nlvr2),
        submission=("submission.csv", submission.getvalue()) if is_nlvr2 and not unknown else None,
        notes=notes,
    )


def statement_metrics(
    entries: Sequence[Entry], labels: Sequence[str], *, is_nlvr2: bool
) -> dict[str, float]:
    """Returns `accuracy` of the labelled statements and, with NLVR2's identifiers, `consistency`."""
    hits = []
    hits_by_sentence: dict[str | None, bool] = {}
    for entry, label in zip(entries, labels, strict=True):
        if entry["label"]:
            is_hit = entry["label"] == label
            hits.append(is_hit)
            sentence = nlvr2_sentence(entry["statement_id"]) if is_nlvr2 else None
            hits_by_sentence[sentence] = hits_by_sentence.get(sentence, True) and is_hit
    if not hits:
        return {}
    metrics = {"accuracy": sum(hits) / len(hits)}
    if None not in hits_by_sentence:
        metrics["consistency"] = sum(hits_by_sentence.values()) / len(hits_by_sentence)
    return metrics


def labelled_examples(source: ExampleSource) -> EntryDataset:
    from bridgetower.data.batches.examples import ClassEncoder, EntryDataset, NumberEncoder
    from bridgetower.model.heads import HEADS

    heads = source.heads
    is_regression = source.task.kind == "regression"
    for folder in source.data.folders:
        classes = read_classes(folder)
        if is_regression and not classes.numbers:
            raise ValueError(
                f"{folder} has classes; regression takes sets of `bridgetower prepare regression`"
            )
        if is_regression:
            continue
        content = advice = ""
        if classes.numbers:
            content = "a number"
            advice = "choose the task regression"
        elif classes.multi_label != heads.multi_label:
            content = "several labels" if classes.multi_label else "one label"
            advice = f"set it to {classes.multi_label} for a new head"
        if content:
            raise ValueError(
                f"{folder} has {content} per row, but model.heads.multi_label is {heads.multi_label}; {advice}, or "
                "choose another set"
            )
    if is_regression and HEADS["classification"].outputs_of(heads) != "number":
        raise ValueError(
            f"the classification head has {heads.classification} classes; regression takes a model whose head "
            "has one output: model.heads.classification 1, without model.heads.multi_label"
        )
    encoder: LabelEncoder = NumberEncoder()
    if not is_regression:
        encoder = ClassEncoder(source.names, multi_label=heads.multi_label)
    is_test = source.use == "test"
    examples = EntryDataset(
        source.images(schemas.CLASSIFICATION), encoder, labelled=not is_test, unique=is_test
    )
    # Labels that the head lacks are an error here.
    for entry in filter(encoder.known, examples):
        examples.label(entry)
    return examples


def _known_labels(evaluation: Evaluation) -> tuple[list[int], Tensor | None]:
    """Returns the rows with a label, and their labels: numbers, or booleans by class."""
    import torch
    from torch.nn.functional import one_hot

    examples = evaluation.examples
    labels_by_row = {
        row: examples.label(entry)
        for row, entry in enumerate(examples)
        if examples.encode.known(entry)
    }
    if not labels_by_row:
        return [], None
    labels = torch.stack(list(labels_by_row.values()))
    if evaluation.names:
        if not evaluation.heads.multi_label:
            labels = one_hot(labels, len(evaluation.names))
        labels = labels.bool()
    return list(labels_by_row), labels


def judge_numbers(evaluation: Evaluation) -> Outcome:
    from bridgetower.evaluation.class_metrics import number_metrics

    numbers = evaluation.outputs[:, 0]
    rows, labels = _known_labels(evaluation)
    return evaluation.outcome(
        [{"number": number} for number in numbers.tolist()],
        id_name="id",
        metrics={} if labels is None else number_metrics(numbers[rows], labels),
    )


def judge_classes(evaluation: Evaluation) -> Outcome:
    from torch.nn.functional import one_hot

    from bridgetower.evaluation.class_metrics import classification_metrics

    names = evaluation.names
    probabilities = evaluation.outputs
    is_multi_label = evaluation.heads.multi_label
    if is_multi_label:
        predicted = probabilities > 0.5
        # An answer of several labels is as probable as its least certain one.
        certainty = probabilities.maximum(1 - probabilities).amin(dim=1)
    else:
        predicted = one_hot(probabilities.argmax(dim=1), len(names)).bool()
        certainty = probabilities.amax(dim=1)
    labels = [[names[index] for index in row.nonzero()[:, 0].tolist()] for row in predicted]

    # Metrics, and the recall of each class.
    rows, targets = _known_labels(evaluation)
    metrics: dict[str, float] = {}
    details: dict[str, dict[str, float]] = {}
    if targets is not None:
        metrics = classification_metrics(probabilities[rows], targets, multi_label=is_multi_label)
        hits = (predicted[rows] & targets).sum(dim=0).tolist()
        counts = targets.sum(dim=0).tolist()
        by_class = zip(names, hits, counts, strict=True)
        details["by_class"] = {name: hit / count for name, hit, count in by_class if count}

    def joined(labels: Iterable[str]) -> str:
        return ", ".join(sorted(labels)) or "none"

    return evaluation.outcome(
        [
            {"labels": row_labels, "probabilities": dict(zip(names, row, strict=True))}
            for row_labels, row in zip(labels, probabilities.tolist(), strict=True)
        ],
        list(zip(map(joined, labels), certainty.tolist(), strict=True)),
        id_name="id",
        expected=lambda entry: joined(entry["labels"]),
        score=lambda entry, answer: float(joined(entry["labels"]) == answer),
        metrics=metrics,
        details=details,
    )


def judge_zero_shot(evaluation: Evaluation) -> Outcome:
    from bridgetower.evaluation.zero_shot import ZeroShot
    from bridgetower.inference.items import TEMPLATES

    if (evaluation.examples.images.image_of < 0).any():
        raise ValueError("an example has no image; zero-shot classifies images")
    task = evaluation.task
    classifier = ZeroShot(
        evaluation.model,
        evaluation.processor,
        [name.replace("_", " ") for name in evaluation.names],
        task.templates or TEMPLATES,
        task.matching,
    )
    return judge_classes(replace(evaluation, module=lambda: classifier))


def judge_compositions(evaluation: Evaluation) -> Outcome:
    from bridgetower.evaluation.zero_shot import evaluate_compositions

    metrics, details, predictions = evaluate_compositions(
        evaluation.model,
        evaluation.examples.images,
        list(evaluation.examples.rows()),
        evaluation.settings,
        evaluation.options,
    )
    return evaluation.outcome(predictions, id_name="id", metrics=metrics, details=details)


def unavailable_ranking(evaluation: Evaluation, metric: str) -> str | None:
    from bridgetower.evaluation.class_metrics import ranked_classes

    if metric not in ("auroc", "average_precision"):
        return None
    _, labels = _known_labels(evaluation)
    if labels is None or ranked_classes(labels, multi_label=evaluation.heads.multi_label):
        return None
    return f"every class is that of all examples or of none in {' and '.join(evaluation.splits)}"


_HEADS = HeadsConfig(mlm=False, itm=False, vqa=3129, hidden_scale=2.0)

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
    evaluate_every="epoch",
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
    model=replace(
        BASE_AT_384, heads=HeadsConfig(mlm=False, itm=False, snli_ve=True, hidden_scale=2.0)
    ),
    image_size=384,
    optimizer=replace(PAPER_OPTIMIZER, lr=3e-6, warmup=0.06, head_multiplier=10),
    data=COLOUR_VIEWS,
    batch_size=64,
    micro_batch_size=32,
    max_epochs=5,
    precision="bf16",
    evaluate_every="epoch",
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
)

CLASSIFICATION_RECIPE = replace(
    SNLI_VE_BASE,
    recipe="classification",
    source="this project, after the paper's SNLI-VE: for sets of `bridgetower prepare classification`; give a "
    "pre-trained init",
    task=ClassificationConfig(),
    model=replace(BASE, heads=HeadsConfig(mlm=False, itm=False, classification=2)),
    image_size=None,
    optimizer=replace(PAPER_OPTIMIZER, lr=1e-5, warmup=0.06, head_multiplier=10),
    # Texts in images, such as in memes, are not mirrored.
    data=replace(COLOUR_VIEWS, flip=False),
)

REGRESSION_RECIPE = replace(
    CLASSIFICATION_RECIPE,
    recipe="regression",
    source="this project, as the recipe classification: for sets of `bridgetower prepare regression`; give a "
    "pre-trained init",
    task=RegressionConfig(),
    model=replace(BASE, heads=HeadsConfig(mlm=False, itm=False, classification=1)),
    select_by="pearson_correlation",
)

VQA_NANO = replace(
    PRETRAIN_NANO,
    recipe="vqa-nano",
    source="this project: rates of the questions about scenes, see docs/experiments.md; from random weights or an init",
    task=VqaConfig(),
    model=replace(NANO, heads=_HEADS),
    optimizer=replace(PRETRAIN_NANO.optimizer, lr=5e-4, clip_norm=1.0),
    evaluation=RetrievalConfig(),
    batch_size=64,
    max_steps=2_000,
    select_by="vqa_score",
)

VQA = TaskSpec(
    name="vqa",
    config=VqaConfig,
    schema=schemas.VQA,
    head="vqa",
    examples=question_examples,
    evaluate=judge_questions,
    class_names=lambda data, config: read_vocabulary(first_folder(data)),
    recipes=(VQA_NANO,),
    fine_tuning=(VQAV2_BASE, VQAV2_LARGE, VQAV2_BASE_NO_PRETRAINING, VQAV2_LARGE_NO_PRETRAINING),
    benchmarks={"vqav2": VqaConfig()},
)

SNLI_VE = TaskSpec(
    name="snli-ve",
    config=SnliVeConfig,
    schema=schemas.SNLI_VE,
    head="snli_ve",
    examples=partial(statement_examples, schema=schemas.SNLI_VE),
    evaluate=judge_statements,
    fine_tuning=(SNLI_VE_BASE,),
    benchmarks={"snli-ve": SnliVeConfig()},
)

NLVR2 = replace(
    SNLI_VE,
    name="nlvr2",
    config=Nlvr2Config,
    schema=schemas.NLVR2,
    head="nlvr2",
    examples=partial(statement_examples, schema=schemas.NLVR2),
    fine_tuning=(NLVR2_BASE,),
    benchmarks={"nlvr2": Nlvr2Config()},
)

CLASSIFICATION = TaskSpec(
    name="classification",
    config=ClassificationConfig,
    schema=schemas.CLASSIFICATION,
    head="classification",
    examples=labelled_examples,
    evaluate=judge_classes,
    class_names=lambda data, config: read_classes(first_folder(data)).names,
    multi_label=lambda data: read_classes(first_folder(data)).multi_label,
    unavailable=unavailable_ranking,
    fine_tuning=(CLASSIFICATION_RECIPE,),
    benchmarks={"classification": ClassificationConfig()},
)

ZERO_SHOT = replace(
    CLASSIFICATION,
    name="zero-shot",
    config=ZeroShotConfig,
    head=None,
    evaluate=judge_zero_shot,
    fine_tuning=(),
    benchmarks={"zero-shot": ZeroShotConfig(), "zero-shot-matching": ZeroShotConfig(matching=True)},
)

COMPOSITIONALITY = TaskSpec(
    name="compositionality",
    config=CompositionConfig,
    schema=schemas.COMPOSITIONALITY,
    examples=partial(statement_examples, schema=schemas.COMPOSITIONALITY),
    evaluate=judge_compositions,
    benchmarks={"compositionality": CompositionConfig()},
)

REGRESSION = replace(
    CLASSIFICATION,
    name="regression",
    config=RegressionConfig,
    evaluate=judge_numbers,
    fine_tuning=(REGRESSION_RECIPE,),
    benchmarks={"regression": RegressionConfig()},
)
