"""The paper's uni-modal checks from outside the package: CIFAR on the image tower alone, GLUE on the text tower alone.

python examples/single_tower.py TASK SOURCE OUT [--max-errors N] prepares a set from the files of its authors: of CIFAR
the binary version, so that nothing is unpickled; of GLUE the TSV files. TASK is cifar10, cifar100, or cola, mrpc, sst2,
qqp, stsb, rte, qnli or mnli. Then, with the task's name in capitals:
bridgetower train rte --task-spec examples/single_tower.py:RTE --extensions examples/single_tower.py --init MODEL …
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PillowImage
from torch import Tensor, nn

from bridgetower import BridgeTower, Extensions, HeadSpec, RunConfig
from bridgetower.data.batches.batch import Batch
from bridgetower.data.batches.examples import ClassEncoder, EntryDataset
from bridgetower.data.config import DataConfig, PrepareConfig
from bridgetower.data.sets.custom import CLASSES_FILE, Classes
from bridgetower.data.sets.datasets import prepare_set
from bridgetower.data.sets.datasets.spec import DatasetSpec, Originals
from bridgetower.data.sets.prepared_set import SetWriter
from bridgetower.data.sets.schema import CLASSIFICATION as LABELLED
from bridgetower.data.sets.schema import LabelledEntry, Schema
from bridgetower.data.sources.example import Image
from bridgetower.evaluation.class_metrics import number_metrics
from bridgetower.evaluation.config import Outcome
from bridgetower.model.config import HeadsConfig, ModelConfig
from bridgetower.model.heads import LinearHead
from bridgetower.model.presets import BASE
from bridgetower.objectives.classification import ClassificationTask, task_of_head
from bridgetower.objectives.config import NotAnOption, TaskConfig
from bridgetower.tasks.entries import CLASSIFICATION, ClassificationConfig
from bridgetower.tasks.run_config import OptimizerConfig
from bridgetower.tasks.spec import Evaluation, ExampleSource, TaskSpec

# The paper gives learning rates (1e-5 or 2e-5) and, for GLUE, batch sizes (16 or 32). The rest is chosen here: for GLUE
# as RoBERTa was fine-tuned (Liu et al. 2019, appendix, table 10), for CIFAR alike.
OPTIMIZER = OptimizerConfig(
    lr=1e-5, weight_decay=0.1, warmup=0.06, head_multiplier=1, fusion_multiplier=1
)
SOURCE = "paper, appendix, for the learning rate{}; epochs, warm-up and decay are chosen here; give a pre-trained init"


class OneTowerTask(ClassificationTask):
    """A head on the features of one tower. Official `run_cifar.py` leaves it at its random start; here it learns."""

    def logits(self, batch: Batch) -> Tensor:
        """Returns logits [b, k] of images, where there are any, or of texts."""
        model = self.model
        if batch.num_images:
            features = model.encode_image(
                batch.pixel_values, outputs="cls", states=batch.image_states
            ).cls
        else:
            text, mask = batch.input_ids, batch.attention_mask
            assert text is not None
            features = model.encode_text(text, mask, outputs="cls", states=batch.text_states).cls
        return model.head(self.head)(features)


def build(model: BridgeTower, config: TaskConfig) -> OneTowerTask:
    """Makes the module that is trained: cross-entropy of a class, or squared error of a number."""
    usual = task_of_head(model, config.kind)
    if config.kind in GLUE and not GLUE[config.kind].classes:
        return OneTowerTask(
            model, config.kind, loss=number_loss, probabilities=lambda numbers: numbers
        )
    return OneTowerTask(model, config.kind, loss=usual.loss, probabilities=usual.probabilities)


def number_loss(predicted: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the squared error."""
    return nn.functional.mse_loss(predicted[:, 0], labels), {}


# CIFAR: prepared as a set of classification with images alone.
@dataclass(frozen=True, kw_only=True)
class CifarFiles:
    """What CIFAR's archive holds."""

    folder: str
    images: tuple[str, ...]  # those for testing last
    names: str
    label_bytes: int  # before each image; the last one is the class


CIFAR = {
    "cifar10": CifarFiles(
        folder="cifar-10-batches-bin",
        images=(*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"),
        names="batches.meta.txt",
        label_bytes=1,
    ),
    "cifar100": CifarFiles(
        folder="cifar-100-binary",
        images=("train.bin", "test.bin"),
        names="fine_label_names.txt",
        label_bytes=2,
    ),
}
SIDE = 32
HELD_OUT = 10  # every tenth training image, the last ones, is for validation: the sets have no split for it


def fill_cifar(
    files: CifarFiles, originals: Originals, writer: SetWriter, config: PrepareConfig
) -> None:
    """Reads the binary files."""
    paths = [
        originals.annotation(f"{files.folder}/{name}", name)
        for name in (*files.images, files.names)
    ]
    names, size = paths.pop().read_text().split(), files.label_bytes + 3 * SIDE**2
    for path in paths:
        if not path.stat().st_size or path.stat().st_size % size:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes, which are no images of {size}; unpack it again"
            )
    contents = [np.memmap(path, np.uint8, mode="r").reshape(-1, size) for path in paths]
    num_train = sum(map(len, contents[:-1]))
    places = [
        (path, row, content)
        for path, file in zip(paths, contents, strict=True)
        for row, content in enumerate(file)
    ]
    for number, (path, row, content) in enumerate(places):
        label, name = int(content[files.label_bytes - 1]), f"{path.stem}-{row}"
        if label >= len(names):
            raise ValueError(
                f"{path} has an image of class {label}, of {len(names)}; unpack the archive again"
            )
        split = "train" if number < num_train - num_train // HELD_OUT else "validation"
        split = split if number < num_train else "test"
        if originals.wants(split):
            stream, pixels = (
                io.BytesIO(),
                content[files.label_bytes :].reshape(3, SIDE, SIDE).transpose(1, 2, 0),
            )
            PillowImage.fromarray(np.ascontiguousarray(pixels)).save(stream, "PNG")
            image = Image(name=f"{name}.png", location=str(path), content=stream.getvalue())
            writer.add(
                [image],
                [LabelledEntry(example_id=name, labels=(names[label],))],
                name=name,
                split=split,
            )
    writer.files = lambda: {CLASSES_FILE: asdict(Classes(names=tuple(names), multi_label=False))}


def cifar(name: str) -> TaskSpec:
    """Returns the task of a set of CIFAR, which is evaluated as custom sets with classes are."""
    recipe = RunConfig(
        recipe=name,
        source=SOURCE.format(""),
        task=ClassificationConfig(kind=name),
        model=replace(BASE, heads=HeadsConfig(mlm=False, itm=False, custom=(name,))).override(
            {"vision.image_size": 224}
        ),
        image_size=224,
        optimizer=OPTIMIZER,
        data=DataConfig(profile="official-pretrain", num_workers=4),
        batch_size=128,
        max_epochs=10,
        precision="bf16",
        evaluate_every=500,
        select_by="accuracy",
    )
    benchmarks = {name: ClassificationConfig(kind=name)}
    return replace(
        CLASSIFICATION,
        name=name,
        head=name,
        build=build,
        fine_tuning=(recipe,),
        benchmarks=benchmarks,
    )


# GLUE: a schema of one or two texts without an image.
@dataclass(frozen=True, kw_only=True)
class GlueRow:
    """One or two texts, their label (empty in a test split), and the number of the row in its file."""

    index: int
    texts: tuple[str, ...]
    label: str = ""


TEXTS = Schema(
    name="glue",
    entries="texts",
    entry=GlueRow,
    noun="row",
    texts=("texts",),
    id="index",
    label="label",
    num_images=0,
)
SPLITS = {"train": "train.tsv", "validation": "dev.tsv", "test": "test.tsv"}
MNLI_SPLITS = {
    "train": "train.tsv",
    "validation": "dev_matched.tsv",
    "validation-mismatched": "dev_mismatched.tsv",
    "test": "test_matched.tsv",
    "test-mismatched": "test_mismatched.tsv",
}


@dataclass(frozen=True, kw_only=True)
class GlueTask:
    """What a task's files hold, and what GLUE reports of it, first what selects the best checkpoint."""

    folder: str
    metrics: tuple[str, ...] = ("accuracy",)
    texts: tuple[str, ...] = ("sentence1", "sentence2")  # columns of the texts
    label: str = "label"  # column of the label
    # labels in order of the classes; none where a number is predicted
    classes: tuple[str, ...] = (
        "0",
        "1",
    )
    columns: tuple[
        int, ...
    ] = ()  # numbers of the text's and the label's, where labelled files have no header
    splits: Mapping[str, str]

    def submission(self, split: str) -> str:
        """Returns the name of the file that GLUE's server takes."""
        ending = (
            {"test": "-m", "test-mismatched": "-mm"}[split] if self.splits is MNLI_SPLITS else ""
        )
        return f"{self.folder}{ending}.tsv"


_glue = partial(GlueTask, splits=SPLITS)
_ENTAILMENT = ("entailment", "not_entailment")
GLUE: Mapping[str, GlueTask] = {
    "cola": _glue(
        folder="CoLA", metrics=("matthews_correlation",), texts=("sentence",), columns=(3, 1)
    ),
    "mrpc": _glue(
        folder="MRPC", metrics=("f1", "accuracy"), texts=("#1 String", "#2 String"), label="Quality"
    ),
    "sst2": _glue(folder="SST-2", texts=("sentence",)),
    "qqp": _glue(
        folder="QQP",
        metrics=("f1", "accuracy"),
        texts=("question1", "question2"),
        label="is_duplicate",
    ),
    "stsb": _glue(
        folder="STS-B",
        metrics=("pearson_correlation", "spearman_correlation"),
        label="score",
        classes=(),
    ),
    "rte": _glue(folder="RTE", classes=_ENTAILMENT),
    "qnli": _glue(folder="QNLI", texts=("question", "sentence"), classes=_ENTAILMENT),
    "mnli": GlueTask(
        folder="MNLI",
        label="gold_label",
        classes=("entailment", "neutral", "contradiction"),
        splits=MNLI_SPLITS,
    ),
}


class TextHead(nn.Module):
    """RoBERTa's classification head on the text tower's CLS: Linear, tanh, Linear, with dropout before each."""

    def __init__(self, text_size: int, num_outputs: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(text_size, text_size)
        self.decoder = nn.Linear(text_size, num_outputs)

    def forward(self, cls: Tensor) -> Tensor:
        """Returns logits [b, k]."""
        hidden = torch.tanh(self.dense(self.dropout(cls)))
        logits: Tensor = self.decoder(self.dropout(hidden))
        return logits


def fill_glue(
    task: GlueTask, originals: Originals, writer: SetWriter, config: PrepareConfig
) -> None:
    """Reads the TSV files; some versions of QQP have bad rows, of which a test split may not leave out any."""
    for split in filter(originals.wants, task.splits):
        path, is_test = (
            originals.annotation(f"{task.folder}/{task.splits[split]}", task.splits[split]),
            "test" in split,
        )
        try:  # quotes are letters here, and MRPC's files begin with a byte order mark
            content = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error}); copy it again") from error
        lines = [line.rstrip("\r").split("\t") for line in content.split("\n") if line.strip("\r")]
        first, columns = 0, task.columns
        if is_test or not columns:
            wanted, header = (
                (*task.texts, *(() if is_test else (task.label,))),
                lines[0] if lines else [],
            )
            if missing := [column for column in wanted if column not in header]:
                raise ValueError(
                    f"{path} has no column {', '.join(missing)}; it has {', '.join(header)}"
                )
            first, columns = 1, tuple(map(header.index, wanted))
        for index, cells in enumerate(lines[first:]):
            values = [cells[column].strip() for column in columns if column < len(cells)]
            label = "" if is_test or not values else values[-1]
            is_right = (
                label in task.classes if task.classes else label.replace(".", "", 1).isdigit()
            )
            if len(values) == len(columns) and (is_test or is_right):
                row = GlueRow(index=index, texts=tuple(values[: len(task.texts)]), label=label)
                writer.add(
                    [],
                    [row],
                    name=f"{split}-{index}",
                    split=split,
                    origin=f"{path.name}, line {index + first + 1}",
                )
                continue
            what = f"label {label!r}" if len(values) == len(columns) else f"{len(cells)} columns"
            if is_test:
                raise ValueError(
                    f"{path}, line {index + first + 1}: {what}; the server takes only whole files"
                )
            writer.refuse(f"{path.name}, line {index + first + 1}: {what}")


@dataclass(frozen=True, kw_only=True)
class GlueConfig(TaskConfig):
    """A task of GLUE."""

    kind: NotAnOption = "cola"

    @property
    def metrics(self) -> tuple[str, ...]:
        """What GLUE reports."""
        return GLUE[self.kind].metrics


class ScoreEncoder:
    """Labels that are numbers."""

    def known(self, entry: Mapping[str, Any]) -> bool:
        """Says whether there is a label."""
        return bool(entry["label"])

    def tensor(self, entry: Mapping[str, Any]) -> Tensor:
        """Returns the number."""
        return torch.tensor(float(entry["label"]))


def glue_examples(source: ExampleSource) -> EntryDataset:
    """Opens a split."""
    encoder = ClassEncoder(source.names) if source.names else ScoreEncoder()
    return EntryDataset(
        source.images(TEXTS), encoder, labelled=source.use != "test", unique=source.use == "test"
    )


def measure_glue(evaluation: Evaluation) -> Outcome:
    """Gives GLUE's metrics where there are labels, and the file for its server of a test split."""
    task, (split,) = GLUE[evaluation.task.kind], evaluation.splits
    known = [entry["label"] for entry in evaluation.examples if entry["label"]]
    if task.classes:
        predicted = evaluation.predictions.classes
        given = [task.classes[number] for number in predicted.tolist()]
        found = (
            glue_metrics(predicted.tolist(), [task.classes.index(label) for label in known])
            if known
            else {}
        )
    else:
        predicted = evaluation.outputs[:, 0]
        given = [f"{number:.3f}" for number in predicted.tolist()]
        found = number_metrics(predicted, torch.tensor(list(map(float, known)))) if known else {}
    lines = [f"{index}\t{label}\n" for index, label in enumerate(given)]
    return evaluation.outcome(
        [{"label": label} for label in given],
        id_name="index",
        metrics={name: found[name] for name in task.metrics} if known else {},
        submission=None
        if known
        else (task.submission(split), "index\tprediction\n" + "".join(lines)),
    )


def glue_metrics(predicted: Sequence[int], labels: Sequence[int]) -> dict[str, float]:
    """Returns accuracy, and of two classes F1 of the second one and Matthews' correlation."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    metrics: dict[str, Callable[..., Any]] = {
        "accuracy": accuracy_score,
        "matthews_correlation": matthews_corrcoef,
    }
    if max(*predicted, *labels) < 2:
        metrics["f1"] = partial(f1_score, zero_division=0)
    return {name: float(metric(labels, predicted)) for name, metric in metrics.items()}


def glue(name: str) -> TaskSpec:
    """Returns a task of GLUE."""
    config, task = GlueConfig(kind=name), GLUE[name]
    recipe = RunConfig(
        recipe=name,
        source=SOURCE.format(" and the batch size"),
        task=config,
        model=replace(BASE, heads=HeadsConfig(mlm=False, itm=False, custom=(name,))),
        optimizer=replace(OPTIMIZER, lr=2e-5),
        data=DataConfig(max_length=128),
        batch_size=32,
        max_epochs=10,
        precision="bf16",
        evaluate_every=500,
        select_by=task.metrics[0],
    )
    return TaskSpec(
        name=name,
        config=GlueConfig,
        schema=TEXTS,
        head=name,
        class_names=lambda data, config: task.classes,
        build=build,
        examples=glue_examples,
        evaluate=measure_glue,
        fine_tuning=(recipe,),
        benchmarks={name: config},
    )


CIFAR10, CIFAR100 = map(cifar, CIFAR)
COLA, MRPC, SST2, QQP, STSB, RTE, QNLI, MNLI = map(glue, GLUE)


def heads() -> Iterator[tuple[str, HeadSpec]]:
    """Yields the head of each task."""
    for name, count in (("cifar10", 10), ("cifar100", 100)):

        def image_head(config: ModelConfig, count: int = count) -> nn.Module:
            return LinearHead(config.vision.hidden_size, count)

        yield name, HeadSpec(build=image_head, inputs="image_cls")
    for name, task in GLUE.items():

        def text_head(config: ModelConfig, count: int = len(task.classes) or 1) -> nn.Module:
            return TextHead(config.text.hidden_size, count, config.text.dropout)

        yield name, HeadSpec(build=text_head, inputs="text_cls")


EXTENSIONS = Extensions(heads=dict(heads()))

SETS = {
    name: DatasetSpec(
        name=name,
        schema=LABELLED,
        splits=("train", "validation", "test"),
        split_rule=f"as published; the last of {HELD_OUT} parts of the training images is validation",
        fill=partial(fill_cifar, files),
    )
    for name, files in CIFAR.items()
} | {
    name: DatasetSpec(
        name=name,
        schema=TEXTS,
        splits=tuple(task.splits),
        split_rule="as published; dev is validation",
        fill=partial(fill_glue, task),
    )
    for name, task in GLUE.items()
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepares a set."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=SETS)
    parser.add_argument("source", type=Path, help="folder with the files")
    parser.add_argument("out", type=Path, help="folder of the set")
    parser.add_argument(
        "--max-errors", type=int, default=0, help="bad rows that may be left out; they are named"
    )
    given = parser.parse_args(arguments)
    prepare_set(
        SETS[given.task], given.source, given.out, PrepareConfig(max_errors=given.max_errors)
    )


if __name__ == "__main__":
    main()
