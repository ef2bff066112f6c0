"""What a run takes from its data before there is a model: texts for a tokenizer, names for classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from bridgetower.data.answers import read_vocabulary
from bridgetower.data.cifar import cifar_names
from bridgetower.data.glue import GLUE, read_glue
from bridgetower.data.pictures import Pictures
from bridgetower.data.schema import CAPTIONS, NLVR2, SNLI_VE, VQA, Schema
from bridgetower.objectives.config import (
    CifarConfig,
    GlueConfig,
    Nlvr2Config,
    PretrainingConfig,
    RankingConfig,
    SnliVeConfig,
    VqaConfig,
)
from bridgetower.processor import Processor
from bridgetower.tasks.run_config import RunConfig


def training_texts(config: RunConfig, processor: Processor) -> Iterator[str]:
    """Yields all texts that a run is trained on.

    Raises:
        FileNotFoundError: A folder or its split is missing.
        ValueError: No folder is given, one holds another kind, or the task has no texts.
    """
    match config.task:
        case CifarConfig():
            raise ValueError("CIFAR has no texts to train a tokenizer on; give init, init_text or tokenizer")
        case GlueConfig(name=name, max_errors=max_errors):
            folder, splits = the_folder(config), config.data.train_splits
            rows = [row for split in splits for row in read_glue(folder, name, split, max_errors=max_errors)]
            return (text for row in rows for text in row.texts)
    pictures = Pictures(config.data, config.data.train_splits, processor, schema=SCHEMA_OF[config.task.kind])
    return (pictures.schema.text_of(entry) for said in pictures.said() for entry in said)


SCHEMA_OF: Mapping[str, Schema] = {
    PretrainingConfig.kind: CAPTIONS,
    RankingConfig.kind: CAPTIONS,
    VqaConfig.kind: VQA,
    SnliVeConfig.kind: SNLI_VE,
    Nlvr2Config.kind: NLVR2,
}
"""The schema of the prepared sets that a task is trained on; the others read the files of their authors."""


def the_folder(config: RunConfig) -> str:
    """Returns the folder of a run that reads a single one.

    Raises:
        ValueError: None is given, or several are.
    """
    if len(config.data.folders) != 1:
        raise ValueError(
            f"{len(config.data.folders)} data folders; {config.task.kind} reads one, pass --data.folders DIR"
        )
    return config.data.folders[0]


def class_labels(config: RunConfig) -> dict[str, tuple[str, ...]]:
    """Returns the names of the classes of a new head, by head, where they are not the same for all data.

    Raises:
        FileNotFoundError: The (first) folder does not hold them.
        ValueError: There is another number of them than the head has, or no folder is given.
    """
    match config.task:
        case VqaConfig():
            if not config.data.folders:
                raise ValueError("no data folder given; pass --data.folders DIR, made by `bridgetower prepare`")
            head, names = "vqa", read_vocabulary(config.data.folders[0])
        case CifarConfig(num_classes=num_classes):
            head, names = "image", cifar_names(the_folder(config), num_classes)
        case GlueConfig(name=name):
            head, names = "text", GLUE[name].classes
        case _:
            return {}
    expected, found = getattr(config.model.heads, head), len(names) or 1  # a number needs one output
    if found != expected:
        raise ValueError(
            f"{config.task.kind} has {found} answers or classes here, but model.heads.{head} is {expected}; set it to "
            f"{found}, or choose another set"
        )
    return {head: names} if names else {}
