"""The paper's uni-modal checks: CIFAR on the image tower alone, GLUE on the text tower alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from bridgetower.data.config import DataConfig, GlueName
from bridgetower.evaluation.outcome import Outcome
from bridgetower.model.config import HeadsConfig
from bridgetower.model.plain import AT_LEAST_0, check_choice, check_numbers
from bridgetower.model.presets import BASE
from bridgetower.objectives.config import NotAnOption, Reads, TaskConfig
from bridgetower.tasks.run_config import SINGLE_TOWER_OPTIMIZER, SINGLE_TOWER_SOURCE, RunConfig
from bridgetower.tasks.spec import Evaluation, ExampleSource, TaskSpec, one_folder

if TYPE_CHECKING:
    from bridgetower.data.single_tower import CifarImages, GlueTexts

NumClasses = Literal[10, 100]


@dataclass(frozen=True, kw_only=True)
class CifarConfig(TaskConfig):
    """Classes of images from the image tower alone: CIFAR-10 and CIFAR-100.

    Attributes:
        num_classes: 10, or 100.
    """

    reads: ClassVar[Reads] = "files"
    metrics = ("accuracy",)

    kind: NotAnOption = "cifar"
    num_classes: NumClasses = 10

    def __post_init__(self) -> None:
        check_choice("num_classes", self.num_classes, NumClasses)


GLUE_METRICS: Mapping[GlueName, tuple[str, ...]] = {
    "cola": ("matthews_correlation",),
    "mrpc": ("f1", "accuracy"),
    "sst-2": ("accuracy",),
    "qqp": ("f1", "accuracy"),
    "sts-b": ("pearson_correlation", "spearman_correlation"),
    "rte": ("accuracy",),
    "qnli": ("accuracy",),
    "mnli": ("accuracy",),
}
"""What GLUE reports of each task; the first selects the best checkpoint."""


@dataclass(frozen=True, kw_only=True)
class GlueConfig(TaskConfig):
    """A task of GLUE from the text tower alone.

    Attributes:
        name: Of the task.
        max_errors: Bad rows of a file that may be left out; they are named.
    """

    reads: ClassVar[Reads] = "files"

    kind: NotAnOption = "glue"
    name: GlueName = "cola"
    max_errors: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, max_errors=AT_LEAST_0)
        check_choice("name", self.name, GlueName)

    @property
    def metrics(self) -> tuple[str, ...]:
        return GLUE_METRICS[self.name]


def _cifar_names(data: DataConfig, config: CifarConfig) -> Sequence[str]:
    from bridgetower.data.single_tower import cifar_names

    return cifar_names(one_folder(data, config.kind), config.num_classes)


def _cifar_images(source: ExampleSource) -> CifarImages:
    from bridgetower.data.single_tower import CifarImages

    number, folder = source.task.num_classes, one_folder(source.data, source.task.kind)
    if len(source.names) != number:
        raise ValueError(f"the image head has {len(source.names)} classes; expected {number} for cifar{number}")
    return CifarImages(folder, source.splits, source.processor, number)


def _no_texts(data: DataConfig, config: CifarConfig) -> Iterator[str]:
    raise ValueError("CIFAR has no texts to train a tokenizer on; give init, text or tokenizer")


def _evaluate_cifar(evaluation: Evaluation) -> Outcome:
    from bridgetower.evaluation.class_metrics import accuracy

    images = evaluation.examples
    return Outcome(
        metrics={"accuracy": accuracy(evaluation.predictions.classes, images.labels())},
        counts={"num_images": len(images)},
        predictions=[
            {"id": name, "label": label, "probability": probability}
            for name, (label, probability) in zip(images.ids(), evaluation.likeliest(), strict=True)
        ],
    )


def _glue_names(data: DataConfig, config: GlueConfig) -> Sequence[str]:
    from bridgetower.data.single_tower import GLUE

    return GLUE[config.name].classes


def _glue_texts(source: ExampleSource) -> GlueTexts:
    from bridgetower.data.single_tower import GlueTexts

    task, folder = source.task, one_folder(source.data, source.task.kind)
    texts = GlueTexts(folder, task.name, source.splits, source.processor, max_errors=task.max_errors)
    if tuple(source.names) != texts.task.classes:
        names, needed = (", ".join(classes) or "a number" for classes in (source.names, texts.task.classes))
        raise ValueError(f"the text head predicts {names}; {task.name} needs {needed}")
    if source.use != "test":
        texts.labels()
    return texts


def _training_texts(data: DataConfig, config: GlueConfig) -> Iterator[str]:
    from bridgetower.data.single_tower import read_glue

    folder = one_folder(data, config.kind)
    for split in data.train_splits:
        for row in read_glue(folder, config.name, split, max_errors=config.max_errors):
            yield from row.texts


def _evaluate_glue(evaluation: Evaluation) -> Outcome:
    from bridgetower.evaluation import class_metrics

    texts, classes = evaluation.examples, evaluation.examples.task.classes
    predicted = evaluation.predictions.classes if classes else evaluation.outputs[:, 0]
    labels = [classes[number] if classes else f"{number:.3f}" for number in predicted.tolist()]
    metrics = GLUE_METRICS[evaluation.task.name] if texts.labelled else ()
    files = [texts.task.submission[split] for split in evaluation.splits if split.startswith("test")]
    lines = [f"{index}\t{label}\n" for index, label in enumerate(labels)]  # as GLUE's server takes them
    return Outcome(
        metrics={metric: getattr(class_metrics, metric)(predicted, texts.labels()) for metric in metrics},
        counts={"num_texts": len(texts)},
        predictions=[{"index": row.index, "label": label} for row, label in zip(texts.rows, labels, strict=True)],
        submission=(files[0], "index\tprediction\n" + "".join(lines)) if files else None,
    )


def _cifar_recipe(num_classes: NumClasses) -> RunConfig:
    heads = HeadsConfig(mlm=False, itm=False, image=num_classes)
    return RunConfig(
        recipe=f"cifar{num_classes}",
        source=SINGLE_TOWER_SOURCE.format(""),
        task=CifarConfig(num_classes=num_classes),
        model=replace(BASE, heads=heads).override({"vision.image_size": 224}),
        image_size=224,
        optimizer=SINGLE_TOWER_OPTIMIZER,
        data=DataConfig(profile="official-pretrain", num_workers=4),
        batch_size=128,
        max_epochs=10,
        precision="bf16",
        evaluate_every=500,
        select_by="accuracy",
    )


_NUM_OUTPUTS: Mapping[GlueName, int] = {"sts-b": 1, "mnli": 3}  # of the others two


def _glue_recipe(name: GlueName) -> RunConfig:
    task = GlueConfig(name=name)
    return RunConfig(
        recipe=f"glue-{name}",
        source=SINGLE_TOWER_SOURCE.format(" and the batch size"),
        task=task,
        model=replace(BASE, heads=HeadsConfig(mlm=False, itm=False, text=_NUM_OUTPUTS.get(name, 2))),
        optimizer=replace(SINGLE_TOWER_OPTIMIZER, lr=2e-5),
        data=DataConfig(max_length=128),
        batch_size=32,
        max_epochs=10,
        precision="bf16",
        evaluate_every=500,
        select_by=task.metrics[0],
    )


CIFAR = TaskSpec(
    name="cifar",
    config=CifarConfig,
    head="image",
    examples=_cifar_images,
    evaluate=_evaluate_cifar,
    class_names=_cifar_names,
    texts=_no_texts,
    fine_tuning=tuple(_cifar_recipe(number) for number in get_args(NumClasses)),
    benchmarks={f"cifar{number}": CifarConfig(num_classes=number) for number in get_args(NumClasses)},
)

GLUE = TaskSpec(
    name="glue",
    config=GlueConfig,
    head="text",
    examples=_glue_texts,
    evaluate=_evaluate_glue,
    class_names=_glue_names,
    texts=_training_texts,
    fine_tuning=tuple(_glue_recipe(name) for name in get_args(GlueName)),
    benchmarks={name: GlueConfig(name=name) for name in get_args(GlueName)},
)
