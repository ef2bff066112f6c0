"""The spec of a task, which training, evaluation and the command line read. It imports no torch."""

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
    """A split of prepared sets, and the use of its examples."""

    data: DataConfig
    splits: tuple[str, ...]  # joined, of each folder
    processor: Processor
    task: Any
    names: Sequence[str] = ()  # of the classes of the task's head, in its order
    heads: HeadsConfig = field(default_factory=HeadsConfig)  # of the model
    # `train` may leave examples out, `validate` needs a label of each, `test` takes all, labelled or not.
    use: Use

    def images(self, schema: Schema) -> PreparedImages:
        from bridgetower.data.batches.examples import PreparedImages

        return PreparedImages(self.data, self.splits, self.processor, schema=schema)


@dataclass(frozen=True, kw_only=True)
class Evaluation(ExampleSource):
    """A model, examples and settings to measure it by. Predictions are cached, the same in all processes."""

    model: BridgeTower
    module: Callable[[], nn.Module]  # gives the model with its losses, of which `predict` is used
    examples: Any
    settings: RetrievalConfig  # all but protocol and batch size is for retrieval
    reranking: Reranking | None = None  # of the checkpoint; None fits it
    options: EvaluationOptions = DEFAULTS  # change nothing in the result

    @cached_property
    def predictions(self) -> Predictions:
        from bridgetower.evaluation.class_metrics import predict_classes

        return predict_classes(
            self.module(), self.examples, batch_size=self.settings.batch_size, options=self.options
        )

    @cached_property
    def outputs(self) -> Float[Tensor, "n k"]:
        """The outputs of the module for every example, in order."""
        from bridgetower.evaluation.class_metrics import predict_examples

        (outputs,) = predict_examples(
            self.module(),
            self.examples,
            lambda outputs: (outputs,),
            batch_size=self.settings.batch_size,
            options=self.options,
        )
        return outputs

    @cached_property
    def retrieval(self) -> RetrievalResult:
        """The rankings of a model with a contrastive head on images with captions."""
        from bridgetower.evaluation.retrieval import evaluate_retrieval

        return evaluate_retrieval(
            self.model,
            self.examples.images,
            self.settings,
            self.options,
            reranking=self.reranking,
        )

    def likeliest(self) -> list[tuple[str, float]]:
        """Returns the name and the probability of the likeliest class of every example."""
        predictions = self.predictions
        names = [self.names[index] for index in predictions.classes.tolist()]
        return list(zip(names, predictions.probabilities.tolist(), strict=True))

    def with_custom_metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Adds the metrics of the extensions, unless there are none as the answers are unknown."""
        custom = self.model.extensions.metrics if metrics else {}
        if clashes := custom.keys() & metrics.keys():
            raise ValueError(
                f"extensions.metrics has {', '.join(clashes)}, of the package; give it another name"
            )
        return {**metrics, **{name: float(metric(self)) for name, metric in custom.items()}}

    def outcome(
        self,
        rows: Sequence[Mapping[str, Any]],
        answers: Sequence[tuple[str, float]] = (),
        *,
        id_name: str,
        expected: Callable[[Entry], str] = str,
        score: Callable[[Entry, str], float] = lambda entry, answer: 0.0,
        groups: Sequence[str] = (),
        known_name: str = "num_labelled",
        **values: Any,
    ) -> Outcome:
        """Returns the outcome of predictions for entries of prepared sets.

        Args:
            rows: Predictions to write, one for each entry.
            answers: Answers in words with their probabilities, which can be judged.
            id_name: Name of the id in the predictions.
            expected: Gives the right answer of an entry.
            score: Gives the score of an answer, from 0 to 1.
            groups: Columns of the entries that name their kinds.
            known_name: Name of the number of entries with a label, if some have none.
            values: Further fields of the outcome.
        """
        examples = self.examples
        schema = examples.schema
        entries = list(examples)
        num_known = sum(map(examples.encode.known, entries))
        counts = {f"num_{schema.entries}": len(entries)}
        if 0 < num_known < len(entries):
            counts[known_name] = num_known

        def judgements() -> Iterator[Judgement]:
            for row, (answer, probability) in zip(examples.rows(), answers, strict=True):
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
            counts=counts,
            predictions=[
                {id_name: entry[schema.id], **row} for entry, row in zip(entries, rows, strict=True)
            ],
            judge=(lambda: list(judgements())) if answers else None,
            **values,
        )


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """A task with its config, recipes and benchmarks. Its functions import torch when they are called.

    Attributes:
        name: Also the `kind` of its config.
        schema: Fields of the entries in its prepared sets.
        head: The head whose classes have names, one of `HEADS` or a custom one; None if there is none.
        build: Makes the trained module, from a batch to `Losses`, for a model and the config. None: the module of the
            head, `objectives.classification.task_of_head`.
        examples: Opens the examples of a split: a set addressed by batch (`BatchDataset`), with `images`, the images of
            its prepared sets. To train on one set per batch, it has `set_numbers`, the set of each example.
        evaluate: Measures a model.
        validate: Gives the metrics of the validation split during training. None: as `evaluate`.
        class_names: Gives the names of the classes of a new head, by the data and the config. None: they are always the
            same, or there are none.
        multi_label: Tells by the data whether an example may have several classes.
        unavailable: Says why a metric of the config cannot be evaluated; None if it can.
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
        """Counts the examples of an epoch in the prepared sets. The task may leave some out."""
        from bridgetower.data.sets.prepared_set import PreparedSet

        first_folder(data)
        sets = [PreparedSet(folder, data.train_splits, self.schema) for folder in data.folders]
        sets += [PreparedSet(folder, ("train",), self.schema) for folder in data.train_only]
        repeats = data.repeats or (1,) * len(sets)
        total = 0
        for prepared, times in zip(sets, repeats, strict=True):
            if data.captions == "one":
                total += times * len(set(prepared.groups.tolist()))
            else:
                total += times * len(prepared.numbers)
        return total

    def metrics(self, evaluation: Evaluation) -> dict[str, float]:
        """Measures the validation split during training."""
        if self.validate is not None:
            metrics: Mapping[str, float] = self.validate(evaluation)
        else:
            metrics = self.evaluate(evaluation).metrics
        return evaluation.with_custom_metrics(metrics)


def first_folder(data: DataConfig) -> str:
    """Returns the prepared set that has the names of the classes."""
    if not data.folders:
        raise ValueError(
            "no data folder given; pass --data.folders DIR, made by `bridgetower prepare`"
        )
    return data.folders[0]
