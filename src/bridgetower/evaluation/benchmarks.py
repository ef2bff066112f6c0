"""The benchmarks that a loaded model can be measured on, each from prepared sets to an outcome."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from bridgetower.data.captions import CaptionImages
from bridgetower.data.config import DataConfig
from bridgetower.data.kinds import LABELS, Kind
from bridgetower.data.pictures import Pictures
from bridgetower.data.sampling import Examples
from bridgetower.data.statements import Statements
from bridgetower.data.vqa import VqaQuestions
from bridgetower.evaluation.config import Benchmark, RetrievalConfig
from bridgetower.evaluation.figures import question_figures, question_scores, statement_figures
from bridgetower.evaluation.outcome import Outcome, nlvr2_submission, vqa_submission
from bridgetower.evaluation.predictions import Predictions, predict_classes
from bridgetower.evaluation.retrieval import evaluate_all_pairs, evaluate_retrieval
from bridgetower.evaluation.scoring import Means
from bridgetower.evaluation.single_tower import evaluate_cifar, evaluate_glue
from bridgetower.predictor import Predictor
from bridgetower.tasks.nlvr2 import Nlvr2Task
from bridgetower.tasks.snli_ve import SnliVeTask
from bridgetower.tasks.vqa import VqaTask

_Id = TypeVar("_Id", int, str)


def evaluate(
    predictor: Predictor,
    benchmark: Benchmark,
    folders: Sequence[str | Path],
    split: str,
    config: RetrievalConfig,
    *,
    work: Path | None = None,
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
        num_workers: Processes that decode; 0 decodes in this one.
        progress: Show bars.

    Raises:
        FileNotFoundError: A folder or its split is missing.
        ValueError: The model lacks the head, the set is of another kind, or a setting is not for this benchmark.
    """
    others = replace(config, protocol=RetrievalConfig.protocol, batch_size=RetrievalConfig.batch_size)
    if benchmark != "retrieval" and others != RetrievalConfig():
        raise ValueError(f"candidates, folds, captions and memory are for retrieval; leave them out for {benchmark}")
    data = DataConfig(folders=tuple(map(str, folders)), num_workers=num_workers)
    options = {"batch_size": config.batch_size, "num_workers": num_workers, "progress": progress}
    match benchmark:
        case "retrieval":
            means = Means(work=work, num_workers=num_workers, progress=progress)
            return _retrieval(predictor, CaptionImages(data, split, predictor.processor), config, means)
        case "vqav2":
            names, read = predictor.class_names("vqa"), "test" if split == "test-dev" else split
            answerable = config.protocol == "paper" and not read.startswith("test")
            questions = VqaQuestions(_pictures(predictor, data, read, "vqa"), names, answerable=answerable)
            return _questions(questions, _predicted(VqaTask(predictor.model), questions, options))
        case "snli-ve":
            statements = _statements(predictor, data, split, "snli-ve")
            return _judged(statements, "snli-ve", _predicted(SnliVeTask(predictor.model), statements, options))
        case "nlvr2":
            statements = _statements(predictor, data, split, "nlvr2")
            return _judged(statements, "nlvr2", _predicted(Nlvr2Task(predictor.model), statements, options))
        case "cifar10" | "cifar100":
            return evaluate_cifar(predictor, 10 if benchmark == "cifar10" else 100, _one(folders), split, options)
        case _:
            return evaluate_glue(predictor, benchmark, _one(folders), split, options)


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
    by_id = _by_id([entry["question_id"] for entry in entries], answers)
    rows = [
        {"question_id": number, "answer": answer, "probability": probability}
        for (number, answer), probability in zip(by_id.items(), predictions.probabilities.tolist(), strict=True)
    ]
    counts, submission = {"num_questions": len(entries)}, vqa_submission(by_id)
    if not all(entry["answers"] for entry in entries):
        return Outcome(figures={}, counts=counts, predictions=rows, submission=submission)
    scores = question_scores(questions, predictions)
    return Outcome(
        figures=question_figures(scores),
        counts=counts,
        details={"by_answer_type": scores.by_answer_type, "by_question_type": scores.by_question_type},
        predictions=rows,
        submission=submission,
    )


def _judged(statements: Statements, kind: Kind, predictions: Predictions) -> Outcome:
    entries, names = list(statements), LABELS[kind]
    labels = [names[number] for number in predictions.classes.tolist()]
    rows = [
        {"statement_id": entry["statement_id"], "label": label, "probability": probability}
        for entry, label, probability in zip(entries, labels, predictions.probabilities.tolist(), strict=True)
    ]
    known = any(entry["label"] for entry in entries)
    by_id = _by_id([entry["statement_id"] for entry in entries], labels)
    return Outcome(
        figures=statement_figures(statements, predictions) if known else {},
        counts={"num_statements": len(entries)},
        predictions=rows,
        submission=nlvr2_submission(by_id) if kind == "nlvr2" else None,
    )


def _by_id(ids: Sequence[_Id], chosen: Sequence[str]) -> dict[_Id, str]:
    by_id = dict(zip(ids, chosen, strict=True))
    if len(by_id) < len(ids):
        raise ValueError(f"{len(ids) - len(by_id)} ids of {len(ids)} come again; expected one example of each id")
    return by_id


def _statements(predictor: Predictor, data: DataConfig, split: str, kind: Kind) -> Statements:
    predictor.class_names("nlvr2" if kind == "nlvr2" else "snli_ve")
    return Statements(_pictures(predictor, data, split, kind))


def _pictures(predictor: Predictor, data: DataConfig, split: str, kind: Kind) -> Pictures:
    return Pictures(data, split, predictor.processor, kind=kind)


def _one(folders: Sequence[str | Path]) -> str | Path:
    if len(folders) != 1:
        raise ValueError(f"{len(folders)} data folders for a benchmark of one; give the folder of its files")
    return folders[0]


def _predicted(task: nn.Module, examples: Examples, options: dict[str, Any]) -> Predictions:
    return predict_classes(task, examples, **options)
