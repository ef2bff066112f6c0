"""What a run takes from its data before there is a model: texts for a tokenizer, names for classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bridgetower.data.kinds import Kind
from bridgetower.data.pictures import Pictures
from bridgetower.data.vocabulary import read_vocabulary
from bridgetower.processor import Processor
from bridgetower.tasks.config import Nlvr2Config, PretrainingConfig, RankingConfig, SnliVeConfig, VqaConfig
from bridgetower.training.config import RunConfig


def training_texts(config: RunConfig, processor: Processor) -> Iterator[str]:
    """Yields all texts that a run is trained on.

    Raises:
        FileNotFoundError: A folder or its split is missing.
        ValueError: No folder is given, or one holds another kind.
    """
    pictures = Pictures(config.data, config.data.train_splits, processor, kind=data_kind(config))
    return (_text(entry) for said in pictures.said() for entry in said)


def data_kind(config: RunConfig) -> Kind:
    """Returns the kind of prepared sets that a run is trained on."""
    match config.task:
        case PretrainingConfig() | RankingConfig():
            return "captions"
        case VqaConfig():
            return "vqa"
        case SnliVeConfig():
            return "snli-ve"
        case Nlvr2Config():
            return "nlvr2"


def class_labels(config: RunConfig) -> dict[str, tuple[str, ...]]:
    """Returns the names of the classes of a new head, by head, where they are not the same for all data.

    Raises:
        FileNotFoundError: The first folder of a run on questions holds no answers.
        ValueError: It holds another number of answers than the head has, or no folder is given.
    """
    if not isinstance(config.task, VqaConfig):
        return {}
    if not config.data.folders:
        raise ValueError("no data folder given; pass --data.folders DIR, made by `bridgetower prepare`")
    answers, expected = read_vocabulary(config.data.folders[0]), config.model.heads.vqa
    if len(answers) != expected:
        raise ValueError(
            f"{config.data.folders[0]} has {len(answers)} answers, but model.heads.vqa is {expected}; set it to "
            f"{len(answers)}, or choose another set"
        )
    return {"vqa": answers}


def _text(entry: Any) -> str:
    """The text of a caption, a question or a statement."""
    return entry if isinstance(entry, str) else entry.get("question") or entry["text"]
