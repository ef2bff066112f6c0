"""The benchmarks that a loaded model can be measured on, each from prepared sets to an outcome."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from torch import nn

from bridgetower.data.captions import CaptionImages
from bridgetower.data.config import DataConfig, GlueName
from bridgetower.data.pictures import Pictures
from bridgetower.data.sampling import Examples
from bridgetower.data.schema import NLVR2, SNLI_VE, VQA, Schema, nlvr2_sentence
from bridgetower.data.statements import Statements
from bridgetower.data.vqa import VqaQuestions
from bridgetower.evaluation.config import Benchmark, RetrievalConfig
from bridgetower.evaluation.figures import question_figures, question_scores, statement_figures
from bridgetower.evaluation.outcome import Outcome, nlvr2_submission, vqa_submission
from bridgetower.evaluation.predictions import Predictions, predict_classes
from bridgetower.evaluation.retrieval import evaluate_all_pairs, evaluate_retrieval
from bridgetower.evaluation.scoring import Means
from bridgetower.evaluation.single_tower import evaluate_cifar, evaluate_glue
from bridgetower.objectives.nlvr2 import Nlvr2Task
from bridgetower.objectives.snli_ve import SnliVeTask
from bridgetower.objectives.vqa import VqaTask
from bridgetower.predictor import Predictor


def evaluate(
    predictor: Predictor,
    benchmark: Benchmark,
    folders: Sequence[str | Path],
    split: str,
    config: RetrievalConfig,
    *,
    work: Path | None = None,
    max_errors: int = 0,
    num_workers: int = 0,
    progress: bool = False,
) -> Outcome:
    """Measures a model on a split of prepared sets; every process of a distributed run gets the same outcome.

    Args:
        predictor: The model with its preprocessing.
        benchmark: What to measure.
        folders: Prepared sets, judged together; of CIFAR and GLUE the one with the original files.
        split: Which split; `test-dev` of VQAv2 is `test`, since its server wants the answers to all of it.
        config: Protocol and batch size; the rest is for retrieval.
        work: Folder in which retrieval keeps what it has until it is finished, and continues after a kill.
        max_errors: Rows of a GLUE file with too few columns or a wrong label that may be left out; they are named.
        num_workers: Processes that decode; 0 decodes in this one.
        progress: Show bars.

    Raises:
        FileNotFoundError: A folder or its split is missing.
        ValueError: The model lacks the head, the set is of another kind, or a setting is not for this benchmark.
    """
    others = replace(config, protocol=RetrievalConfig.protocol, batch_size=RetrievalConfig.batch_size)
    if benchmark != "retrieval" and others != RetrievalConfig():
        raise ValueError(f"candidates, folds and captions are for retrieval; leave them out for {benchmark}")
    if max_errors and benchmark not in get_args(GlueName):
        raise ValueError(f"max_errors {max_errors} is for GLUE; leave it out for {benchmark}")
    data = DataConfig(folders=tuple(map(str, folders)), num_workers=num_workers)
    options = {"batch_size": config.batch_size, "num_workers": num_workers, "progress": progress}
    match benchmark:
        case "retrieval":
            means = Means(work=work, num_workers=num_workers, progress=progress)
            return _retrieval(predictor, CaptionImages(data, split, predictor.processor), config, means)
        case "vqav2":
            names, read = predictor.class_names("vqa"), "test" if split == "test-dev" else split
            answerable = config.protocol == "paper" and not read.startswith("test")
            questions = VqaQuestions(_pictures(predictor, data, read, VQA), names, answerable=answerable)
            _check_ids([entry["question_id"] for entry in questions])
            return _questions(questions, _predicted(VqaTask(predictor.model), questions, options))
        case "snli-ve":
            statements = _statements(predictor, data, split, SNLI_VE)
            return _judged(statements, SNLI_VE, _predicted(SnliVeTask(predictor.model), statements, options))
        case "nlvr2":
            statements = _statements(predictor, data, split, NLVR2)
            return _judged(statements, NLVR2, _predicted(Nlvr2Task(predictor.model), statements, options))
        case "cifar10" | "cifar100":
            return evaluate_cifar(predictor, 10 if benchmark == "cifar10" else 100, _one(folders), split, options)
        case _:
            return evaluate_glue(predictor, benchmark, _one(folders), split, options, max_errors=max_errors)


def _retrieval(predictor: Predictor, images: CaptionImages, config: RetrievalConfig, means: Means) -> Outcome:
    model = predictor.model
    if model.itc_head is None:
        figures = evaluate_all_pairs(model, images, config, means)
    else:
        figures = evaluate_retrieval(model, images, config, means).figures()
    texts, _ = images.texts(config.max_captions)
    return Outcome(figures=figures, counts={"num_images": len(images), "num_texts": len(texts)})


def _questions(questions: VqaQuestions, predictions: Predictions) -> Outcome:
    entries = list(questions)
    answers = [questions.answers[number] for number in predictions.classes.tolist()]
    by_id = dict(zip([entry["question_id"] for entry in entries], answers, strict=True))
    rows = [
        {"question_id": number, "answer": answer, "probability": probability}
        for (number, answer), probability in zip(by_id.items(), predictions.probabilities.tolist(), strict=True)
    ]
    num_answered = sum(bool(entry["answers"]) for entry in entries)
    counts, submission = _counts("num_questions", len(entries), "num_answered", num_answered), vqa_submission(by_id)
    if not num_answered:
        return Outcome(figures={}, counts=counts, predictions=rows, submission=submission)
    scores = question_scores(questions, predictions)
    return Outcome(
        figures=question_figures(scores),
        counts=counts,
        details={"by_answer_type": scores.by_answer_type, "by_question_type": scores.by_question_type},
        predictions=rows,
        submission=submission,
    )


def _judged(statements: Statements, schema: Schema, predictions: Predictions) -> Outcome:
    entries, names = list(statements), schema.labels
    labels = [names[number] for number in predictions.classes.tolist()]
    rows = [
        {"statement_id": entry["statement_id"], "label": label, "probability": probability}
        for entry, label, probability in zip(entries, labels, predictions.probabilities.tolist(), strict=True)
    ]
    num_labelled = sum(bool(entry["label"]) for entry in entries)
    by_id = dict(zip([entry["statement_id"] for entry in entries], labels, strict=True))
    unknown = [name for name in by_id if schema is NLVR2 and nlvr2_sentence(name) is None]
    return Outcome(
        figures=statement_figures(statements, predictions) if num_labelled else {},
        counts=_counts("num_statements", len(entries), "num_labelled", num_labelled),
        predictions=rows,
        submission=nlvr2_submission(by_id) if schema is NLVR2 and not unknown else None,
        notes=[_without_sentences(unknown, len(by_id))] if unknown else (),
    )


def _without_sentences(unknown: Sequence[str], total: int) -> str:
    return (
        f"no consistency and no submission: {len(unknown)} of {total} statements, such as {unknown[0]!r}, have no "
        "identifier of NLVR2, which tells the sentence; prepare the set from NLVR2's JSON files"
    )


def _counts(name: str, total: int, name_known: str, known: int) -> dict[str, int]:
    """Number of examples, and of those that the figures are of where these are others."""
    return {name: total} | ({name_known: known} if 0 < known < total else {})


def _check_ids(ids: Sequence[int | str]) -> None:
    if len(set(ids)) < len(ids):
        raise ValueError(f"{len(ids) - len(set(ids))} ids of {len(ids)} come again; expected one example of each id")


def _statements(predictor: Predictor, data: DataConfig, split: str, schema: Schema) -> Statements:
    predictor.class_names("nlvr2" if schema is NLVR2 else "snli_ve")
    statements = Statements(_pictures(predictor, data, split, schema))
    _check_ids([entry["statement_id"] for entry in statements])
    return statements


def _pictures(predictor: Predictor, data: DataConfig, split: str, schema: Schema) -> Pictures:
    return Pictures(data, split, predictor.processor, schema=schema)


def _one(folders: Sequence[str | Path]) -> str | Path:
    if len(folders) != 1:
        raise ValueError(f"{len(folders)} data folders for a benchmark of one; give the folder of its files")
    return folders[0]


def _predicted(task: nn.Module, examples: Examples, options: dict[str, Any]) -> Predictions:
    return predict_classes(task, examples, **options)
