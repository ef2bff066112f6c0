"""The content of `results.json`: runs, metrics over seeds and cost of the models; importable without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, TypeVar, get_args

from bridgetower.data.sets.prepared_set import DatasetInfo
from bridgetower.files import write_json
from bridgetower.reports.numbers import Difference, Spread, paired_difference, spread

FORMAT = 1

Arm = Literal["bridgetower", "meter"]
ARMS: tuple[Arm, ...] = get_args(Arm)
PARTS = ("image tower", "text tower", "fusion encoder", "heads")


@dataclass(frozen=True, kw_only=True)
class DemoRun:
    """One trained model and what it was measured at.

    Attributes:
        steps: Of all its stages.
        test: Data set → metric → value on the test split: `RetrievalResult.metrics` and, for models that fill masked
            words, those of `evaluate_masked_words`.
    """

    arm: Arm
    seed: int
    steps: int
    test: dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """Size and cost of a model; parts are the keys of `PARTS`.

    Attributes:
        parameters, parameters_by_part: Numbers of weights; projections, token types and poolers belong to the fusion
            encoder.
        gflops_per_pair_by_part: 10⁹ floating-point operations (two per multiply-add, matrix products and convolutions
            only) of matching one image with one text.
        milliseconds_per_pair: Time of that forward pass, the sum of the parts' medians.
    """

    arm: Arm
    parameters: int
    parameters_by_part: dict[str, int]
    gflops_per_pair_by_part: dict[str, float]
    milliseconds_per_pair: float


@dataclass(frozen=True, kw_only=True)
class Grounding:
    """Shares of the examples of a topic that are answered right, in [0, 1].

    Attributes:
        number: Of examples.
        model: By the model.
        other_image: By the model, when it is shown the image, or the images, of another example.
        text_only: By the answer that the same words have most often in training.
        majority: By the commonest answer of training to anything.
    """

    number: int
    model: float
    other_image: float
    text_only: float
    majority: float


@dataclass(frozen=True, kw_only=True)
class DemoAnswers:
    """How a model answers questions about images that it has not seen after it has learnt from others.

    Attributes:
        steps: Of that training.
        topics: Topic → shares of its test questions that are answered right.
    """

    arm: Arm
    seed: int
    steps: int
    topics: dict[str, Grounding]


@dataclass(frozen=True, kw_only=True)
class DemoDataset:
    """A data set that the models were trained and tested on.

    Attributes:
        splits: Split → `images` and `captions` → number.
        sources: Where it comes from, with versions.
        licences: Licence of each part.
    """

    name: str
    splits: dict[str, dict[str, int]]
    split_rule: str
    sources: dict[str, str]
    licences: dict[str, str]

    @classmethod
    def of(cls, info: DatasetInfo) -> DemoDataset:
        """Summarises a prepared data set."""
        return cls(
            name=info.name,
            splits={
                name: {"images": part.images, "captions": part.examples}
                for name, part in info.splits.items()
            },
            split_rule=info.split_rule,
            sources=dict(info.sources),
            licences=dict(info.licences),
        )


@dataclass(frozen=True, kw_only=True)
class DemoResults:
    """Everything that the demo measured.

    Attributes:
        version: Of this form.
        command: What repeats it.
        settings: Of the runs: numbers, texts, lists and dictionaries of them.
        datasets: What was trained and tested on.
        tests: Images of each test.
        runs: One per arm and seed, all of equal length and measured alike.
        costs: One per arm.
        answers: One per arm and seed; none if no questions were asked.
        about: What the questions are about, in words.
        towers: Origin and licence of each pre-trained tower; none if models were trained from scratch.
        versions: Of Python and the libraries.
        processor: Name of the processor of all times.
        seconds_total: Time of the whole, preparation included.
    """

    version: int = FORMAT
    command: str
    settings: dict[str, Any]
    datasets: tuple[DemoDataset, ...]
    tests: dict[str, int]
    runs: tuple[DemoRun, ...]
    costs: tuple[ModelCost, ...]
    answers: tuple[DemoAnswers, ...] = ()
    about: str = "generated scenes"
    towers: tuple[str, ...] = ()
    versions: dict[str, str]
    processor: str
    seconds_total: float

    @property
    def arms(self) -> tuple[Arm, ...]:
        """Arms that were run, in a fixed order."""
        return tuple(arm for arm in ARMS if self.seeds(arm))

    def seeds(self, arm: Arm) -> list[int]:
        """Returns the seeds of an arm in order."""
        return [run.seed for run in self.arm_runs(arm)]

    def arm_runs(self, arm: Arm) -> list[DemoRun]:
        """Returns the runs of an arm in order of their seeds."""
        return sorted((run for run in self.runs if run.arm == arm), key=lambda run: run.seed)

    def summary(self) -> dict[str, dict[str, dict[str, Spread]]]:
        """Returns data set → metric → arm → spread over seeds."""
        return {
            dataset: {
                metric: {
                    arm: spread([run.test[dataset][metric] for run in self.arm_runs(arm)])
                    for arm in self.arms
                }
                for metric in metrics
            }
            for dataset, metrics in self.runs[0].test.items()
        }

    def headline(self) -> dict[str, Any]:
        """Returns the main figures of BridgeTower: the recall of its largest test, and its answers, beside chance."""
        test = max(self.tests, key=lambda name: self.tests[name])
        metrics = self.summary()[test]
        stage = "two_stage" if "two_stage_rsum" in metrics else "itc"
        recall, chance = (
            metrics[f"{name}_text_to_image_r5"]["bridgetower"]["mean"] for name in (stage, "chance")
        )
        found: dict[str, Any] = {
            "test": test,
            "recall_at_5": recall,
            "recall_at_5_by_chance": chance,
        }
        overall = [
            answers.topics["overall"] for answers in self.answers if answers.arm == "bridgetower"
        ]
        if overall:
            found |= {
                "answers_right": fmean(one.model for one in overall),
                "words_alone_right": overall[0].text_only,
            }
        return found

    def differences(self) -> dict[str, dict[str, Difference]]:
        """Returns data set → metric → bridgetower − meter over the seeds that both arms have."""
        ours, theirs = _by_common_seeds(self.runs)
        return {
            dataset: {
                metric: paired_difference(
                    *([run.test[dataset][metric] for run in runs] for runs in (ours, theirs))
                )
                for metric in metrics
            }
            for dataset, metrics in (ours[0].test.items() if ours else ())
        }

    def answer_differences(self) -> dict[str, Difference]:
        """Returns topic → share of right answers, bridgetower − meter over the seeds that both arms have."""
        ours, theirs = _by_common_seeds(self.answers)
        return {
            topic: paired_difference(
                *([one.topics[topic].model for one in answers] for answers in (ours, theirs))
            )
            for topic in (ours[0].topics if ours else ())
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, ready for JSON, with `summary` and `difference`, which follow from runs and answers."""
        answers = self.answer_differences()
        difference = {**self.differences(), **({"answers": answers} if answers else {})}
        return asdict(self) | {"summary": self.summary(), "difference": difference}

    def write(self, path: Path) -> None:
        """Writes `to_dict` as JSON, atomically."""
        write_json(path, self.to_dict())


_Measured = TypeVar("_Measured", DemoRun, DemoAnswers)


def _by_common_seeds(measured: Sequence[_Measured]) -> tuple[list[_Measured], list[_Measured]]:
    """What was measured of bridgetower and of meter, of the seeds that both have, in order."""
    ours, theirs = ({one.seed: one for one in measured if one.arm == arm} for arm in ARMS)
    seeds = sorted(ours.keys() & theirs.keys())
    return [ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]
