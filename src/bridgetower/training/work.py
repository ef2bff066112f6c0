"""What a run of each kind of task trains, on which examples, and how it is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from torch import nn

from bridgetower.checkpoints import Checkpoint
from bridgetower.data.captions import CaptionImages, CaptionPairs
from bridgetower.data.cifar import CifarImages
from bridgetower.data.config import DataConfig
from bridgetower.data.glue_texts import GlueTexts
from bridgetower.data.pictures import Pictures
from bridgetower.data.ranking import RankingPairs
from bridgetower.data.sampling import Examples
from bridgetower.data.statements import Statements
from bridgetower.data.vqa import VqaQuestions
from bridgetower.evaluation.class_metrics import accuracy
from bridgetower.evaluation.figures import glue_figures, question_figures, question_scores, statement_figures
from bridgetower.evaluation.masked_words import evaluate_masked_words
from bridgetower.evaluation.predictions import Predictions, predict_classes
from bridgetower.evaluation.retrieval import evaluate_all_pairs, evaluate_matching, evaluate_retrieval
from bridgetower.evaluation.single_tower import predict_texts
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.objectives.config import (
    CifarConfig,
    GlueConfig,
    Nlvr2Config,
    PretrainingConfig,
    RankingConfig,
    SnliVeConfig,
    VqaConfig,
)
from bridgetower.objectives.nlvr2 import Nlvr2Task
from bridgetower.objectives.pretraining import PretrainingTask
from bridgetower.objectives.ranking import RankingTask
from bridgetower.objectives.single_tower import ImageTask, TextTask
from bridgetower.objectives.snli_ve import SnliVeTask
from bridgetower.objectives.vqa import VqaTask
from bridgetower.processor import Processor
from bridgetower.tasks.run_config import RunConfig
from bridgetower.training.parts import Work
from bridgetower.training.texts import SCHEMA_OF, the_folder

_Set = TypeVar("_Set", bound=Pictures)

# The heads that the figures of pre-training and of retrieval come from.
_HEADS_OF = {
    "rsum": ("itc",),
    "itc_rsum": ("itc",),
    "two_stage_rsum": ("itc", "itm"),
    "itm_accuracy": ("itm",),
    "mlm_accuracy": ("mlm",),
}


def plan(config: RunConfig, checkpoint: Checkpoint, model: BridgeTower) -> Work:
    """Builds task, examples and evaluation of a run.

    Args:
        config: Of the run.
        checkpoint: What the run started from; its preprocessing and names of classes are used.
        model: Is trained.

    Raises:
        FileNotFoundError: A data folder or a split is missing.
        ValueError: The data, the model or the figure to select by does not fit the task.
    """
    processor = checkpoint.processor
    assert processor is not None  # starting_checkpoint refused it
    match config.task:
        case PretrainingConfig():
            return _pretraining(config, config.task, model, processor)
        case RankingConfig():
            return _ranking(config, config.task, model, processor)
        case VqaConfig():
            return _vqa(config, config.task, model, processor, checkpoint.class_names("vqa"))
        case SnliVeConfig():
            return _statements(config, SnliVeTask(model), processor)
        case Nlvr2Config():
            return _statements(config, Nlvr2Task(model), processor)
        case CifarConfig():
            return _cifar(config, config.task, model, processor)
        case GlueConfig():
            return _glue(config, config.task, model, processor)


def _pretraining(config: RunConfig, task: PretrainingConfig, model: BridgeTower, processor: Processor) -> Work:
    _check_selection(config, model)
    train, held_out = _caption_images(config, processor)

    def evaluate() -> dict[str, float]:
        figures: dict[str, float] = {}
        if model.mlm_head:
            num_workers = config.data.num_workers
            figures = evaluate_masked_words(model, held_out, task.masking, num_workers=num_workers)
        if model.itc_head:
            figures |= evaluate_retrieval(model, held_out, config.evaluation).figures()
        elif model.itm_head:
            figures["itm_accuracy"] = evaluate_matching(model, held_out, config.evaluation)
        return figures

    return Work(
        task=PretrainingTask(model, task),
        examples=CaptionPairs(train, task.masking),
        pictures=(train, held_out),
        digests=train.digests() | held_out.digests(),
        evaluate=evaluate,
    )


def _ranking(config: RunConfig, task: RankingConfig, model: BridgeTower, processor: Processor) -> Work:
    train, held_out = _caption_images(config, processor)
    return Work(
        task=RankingTask(model, task),
        examples=RankingPairs(train, task.false_texts),
        pictures=(train, held_out),
        digests=train.digests() | held_out.digests(),
        evaluate=lambda: evaluate_all_pairs(model, held_out, config.evaluation),
    )


def _vqa(config: RunConfig, task: VqaConfig, model: BridgeTower, processor: Processor, answers: Sequence[str]) -> Work:
    train, held_out = _pictures(config, processor)
    questions = VqaQuestions(held_out, answers, answerable=task.protocol == "paper", answered=True)
    trained = VqaTask(model)
    return Work(
        task=trained,
        examples=VqaQuestions(train, answers, answerable=True),
        pictures=(train, held_out),
        digests=train.digests() | held_out.digests(),
        evaluate=lambda: question_figures(question_scores(questions, _predicted(config, trained, questions))),
    )


def _statements(config: RunConfig, task: SnliVeTask | Nlvr2Task, processor: Processor) -> Work:
    train, held_out = _pictures(config, processor)
    statements = Statements(held_out, labelled=True)
    return Work(
        task=task,
        examples=Statements(train, labelled=True),
        pictures=(train, held_out),
        digests=train.digests() | held_out.digests(),
        evaluate=lambda: statement_figures(statements, _predicted(config, task, statements)),
    )


def _cifar(config: RunConfig, task: CifarConfig, model: BridgeTower, processor: Processor) -> Work:
    data, folder = config.data, the_folder(config)
    train = CifarImages(folder, data.train_splits, processor, task.num_classes)
    held_out = CifarImages(folder, data.validation_split, processor, task.num_classes)
    trained = ImageTask(model)

    def evaluate() -> dict[str, float]:
        return {"accuracy": accuracy(_predicted(config, trained, held_out).classes, held_out.labels())}

    return Work(task=trained, examples=train, digests=train.digests() | held_out.digests(), evaluate=evaluate)


def _glue(config: RunConfig, task: GlueConfig, model: BridgeTower, processor: Processor) -> Work:
    data, folder, name = config.data, the_folder(config), task.name
    train = GlueTexts(folder, name, data.train_splits, processor, max_errors=task.max_errors)
    held_out = GlueTexts(folder, name, data.validation_split, processor, max_errors=task.max_errors)
    trained, labels = TextTask(model), held_out.labels()

    def evaluate() -> dict[str, float]:
        return glue_figures(name, predict_texts(trained, held_out, **_options(config)), labels)

    return Work(task=trained, examples=train, digests=train.digests() | held_out.digests(), evaluate=evaluate)


def _predicted(config: RunConfig, task: nn.Module, examples: Examples) -> Predictions:
    return predict_classes(task, examples, **_options(config))


def _options(config: RunConfig) -> dict[str, Any]:
    """How examples are predicted."""
    return {"batch_size": config.evaluation.batch_size, "num_workers": config.data.num_workers}


def _caption_images(config: RunConfig, processor: Processor) -> tuple[CaptionImages, CaptionImages]:
    return _both(config, partial(CaptionImages, processor=processor))


def _pictures(config: RunConfig, processor: Processor) -> tuple[Pictures, Pictures]:
    return _both(config, partial(Pictures, processor=processor, schema=SCHEMA_OF[config.task.kind]))


def _both(config: RunConfig, read: Callable[[DataConfig, str | Sequence[str]], _Set]) -> tuple[_Set, _Set]:
    """Reads the pictures to train on, and those to evaluate on, which are neither repeated nor varied."""
    data = config.data
    return read(data, data.train_splits), read(data.as_evaluated(), data.validation_split)


def _check_selection(config: RunConfig, model: BridgeTower) -> None:
    """Raises before training starts if the evaluation cannot give the figure that selects the best checkpoint."""
    missing = [head for head in _HEADS_OF[config.select_by] if getattr(model, f"{head}_head") is None]
    if missing:
        possible = [
            figure
            for figure, heads in _HEADS_OF.items()
            if all(getattr(model, f"{head}_head") is not None for head in heads)
        ]
        raise ValueError(
            f"select_by is {config.select_by!r}, but the model has no {' and no '.join(missing)} head; "
            f"use one of {', '.join(possible)}"
        )
