"""What a task is: one value that training, evaluation and the command line read; importable without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from bridgetower.data.config import DataConfig
from bridgetower.evaluation.config import (
    DEFAULTS,
    EvaluationOptions,
    Judgement,
    Outcome,
    RetrievalConfig,
)
from bridgetower.model.config import HeadsConfig
from bridgetower.objectives.config import TaskConfig
from bridgetower.tasks.run_config import RunConfig

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn

    from bridgetower.checkpoints import Reranking
    from bridgetower.data.batches.examples import PreparedImages
    from bridgetower.data.sets.schema import Schema
    from bridgetower.evaluation.class_metrics import Predictions
    from bridgetower.evaluation.retrieval import RetrievalResult
    from bridgetower.model.bridgetower import BridgeTower
    from bridgetower.processor import Processor

Use = Literal["train", "validate", "test"]
Entry = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ExampleSource:
    """Where examples come from, and what for."""

    data: DataConfig
    splits: tuple[str, ...]  # of the folders; joined
    processor: Processor
    task: Any
    names: Sequence[str] = ()  # of the classes of the task's head, in its order
    heads: HeadsConfig = field(default_factory=HeadsConfig)  # of the model
    use: Use  # `train` may leave examples out; `validate` needs a label of each; `test` takes all, labelled or not

    def images(self, schema: Schema) -> PreparedImages:
        from bridgetower.data.batches.examples import PreparedImages

        return PreparedImages(self.data, self.splits, self.processor, schema=schema)


@dataclass(frozen=True, kw_only=True)
class Evaluation(ExampleSource):
    """What is measured, and how; what is predicted is computed once, when it is first read, in all processes alike."""

    model: BridgeTower
    module: Callable[[], nn.Module]  # gives the model with its losses, of which `predict` is used
    examples: Any
    settings: RetrievalConfig  # protocol and batch size; the rest is for retrieval
    reranking: Reranking | None = None  # of the checkpoint; None fits it
    options: EvaluationOptions = DEFAULTS  # how it runs, which changes nothing in the result

    @cached_property
    def predictions(self) -> Predictions:
        from bridgetower.evaluation.class_metrics import predict_classes

        return predict_classes(
            self.module(), self.examples, batch_size=self.settings.batch_size, options=self.options
        )

    @cached_property
    def outputs(self) -> Float[Tensor, "n k"]:
        """All that is predicted for every example, in order."""
        from bridgetower.evaluation.class_metrics import predict

        size = self.settings.batch_size
        return predict(
            self.module(), self.examples, lambda out: (out,), batch_size=size, options=self.options
        )[0]

    @cached_property
    def retrieval(self) -> RetrievalResult:
        """The rankings of a model with a contrastive head on images with captions."""
        from bridgetower.evaluation.retrieval import evaluate_retrieval

        images, settings = self.examples.images, self.settings
        return evaluate_retrieval(
            self.model, images, settings, self.options, reranking=self.reranking
        )

    def likeliest(self) -> list[tuple[str, float]]:
        classes, probabilities = (values.tolist() for values in self.predictions)
        return [
            (self.names[number], value)
            for number, value in zip(classes, probabilities, strict=True)
        ]

    def with_custom_metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Returns metrics with those of the extensions, or none where the answers are not known."""
        own = {
            name: float(metric(self))
            for name, metric in self.model.extensions.metrics.items()
            if metrics
        }
        if taken := own.keys() & metrics.keys():
            raise ValueError(
                f"extensions.metrics has {', '.join(taken)}, of the package; give it another name"
            )
        return {**metrics, **own}

    def outcome(
        self,
        rows: Sequence[Mapping[str, Any]],
        given: Sequence[tuple[str, float]] = (),
        *,
        id_name: str,
        expected: Callable[[Entry], str] = str,
        score: Callable[[Entry, str], float] = lambda entry, answer: 0.0,
        groups: Sequence[str] = (),
        known_name: str = "num_labelled",
        **others: Any,
    ) -> Outcome:
        """Returns what predictions for entries of prepared sets leave; answers in words can be judged."""
        examples, schema = self.examples, self.examples.schema
        entries = list(examples)
        known, total = sum(map(examples.encode.known, entries)), len(entries)

        def judged() -> Iterator[Judgement]:
            for row, (answer, probability) in zip(examples.rows(), given, strict=True):
                entry = row["entry"]
                if examples.encode.known(entry):
                    points = score(entry, answer)
                    yield Judgement(
                        id=str(entry[schema.id]),
                        images=tuple(row["images"]),
                        text=" ".join(schema.texts_of(entry)),
                        target=expected(entry),
                        prediction=answer,
                        score=points,
                        error=(1 - points) * probability,
                        probability=probability,
                        groups={name: entry[name] for name in groups if entry[name]},
                    )

        return Outcome(
            counts={f"num_{schema.entries}": total}
            | ({known_name: known} if 0 < known < total else {}),
            predictions=[
                {id_name: entry[schema.id], **row} for entry, row in zip(entries, rows, strict=True)
            ],
            judge=(lambda: list(judged())) if given else None,
            **others,
        )


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """Everything about a task. What needs torch is in functions that import it when they are called.

    Attributes:
        name: Also the `kind` of its config.
        schema: What the rows of its prepared sets hold.
        head: The head whose classes have names, one of `HEADS` or a custom one; None if there is none.
        build: Makes the module that is trained, batch in and `Losses` out, of a model and the config; None: that of the
            head, `objectives.classification.task_of_head`.
        examples: Opens the examples of a split: a set addressed by batch (`BatchDataset`), with `images`, the images of
            its prepared sets. To train on one set per batch, it has `set_numbers`, the set of each example.
        validate: Metrics of the validation split during training; None: those of `evaluate`.
        class_names: Names of the classes of a new head, of the data and the config; None where they are always the same
            or there are none.
        multi_label: Whether several of them may hold at once, by the data.
        unavailable: Why a metric of the config cannot be evaluated; None if it can.
        recipes: Runs that can start from random weights.
        fine_tuning: Recipes that make sense only with an `init`.
        benchmarks: Names under which `bridgetower evaluate` measures the task, each with its config.
    """

    name: str
    config: type[TaskConfig]
    schema: Schema
    head: str | None = None
    build: Callable[[BridgeTower, Any], nn.Module] | None = None
    examples: Callable[[ExampleSource], Any]
    evaluate: Callable[[Evaluation], Outcome]
    validate: Callable[[Evaluation], dict[str, float]] | None = None
    class_names: Callable[[DataConfig, Any], Sequence[str]] | None = None
    multi_label: Callable[[DataConfig], bool] = lambda data: False
    unavailable: Callable[[Evaluation, str], str | None] = lambda evaluation, metric: None
    recipes: tuple[RunConfig, ...] = ()
    fine_tuning: tuple[RunConfig, ...] = ()
    benchmarks: Mapping[str, TaskConfig] = field(default_factory=dict)

    def recipe(self, name: str) -> RunConfig | None:
        return next(
            (recipe for recipe in (*self.recipes, *self.fine_tuning) if recipe.recipe == name), None
        )

    def module(self, model: BridgeTower, config: TaskConfig) -> nn.Module:
        if self.build is not None:
            return self.build(model, config)
        from bridgetower.objectives.classification import task_of_head

        assert self.head is not None  # a task without a head builds its module
        return task_of_head(model, self.head)

    def training_texts(self, config: RunConfig, processor: Processor) -> Iterator[str]:
        from bridgetower.data.batches.examples import PreparedImages

        images = PreparedImages(
            config.data, config.data.train_splits, processor, schema=self.schema
        )
        return (text for row in images.scan() for text in self.schema.texts_of(row["entry"]))

    def count_examples(self, data: DataConfig) -> int:
        """Counts the examples of an epoch by the prepared sets; the task may leave some of them out."""
        from bridgetower.data.sets.prepared_set import PreparedSet

        first_folder(data)
        sets = [PreparedSet(folder, data.train_splits, self.schema) for folder in data.folders]
        sets += [PreparedSet(folder, ("train",), self.schema) for folder in data.train_only]
        counts = [
            len(set(one.groups.tolist())) if data.captions == "one" else len(one.numbers)
            for one in sets
        ]
        repeats = data.repeats or (1,) * len(sets)
        return sum(count * times for count, times in zip(counts, repeats, strict=True))

    def metrics(self, evaluation: Evaluation) -> dict[str, float]:
        measured = (
            self.evaluate(evaluation).metrics
            if self.validate is None
            else self.validate(evaluation)
        )
        return evaluation.with_custom_metrics(measured)


def first_folder(data: DataConfig) -> str:
    """Returns the prepared set that has the names of the classes."""
    if not data.folders:
        raise ValueError(
            "no data folder given; pass --data.folders DIR, made by `bridgetower prepare`"
        )
    return data.folders[0]
