"""What each task is told: loss weights, negatives, masking; importable without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from tyro.conf import Fixed, Suppress

from bridgetower.data.config import GlueName, MaskingConfig
from bridgetower.model.plain import check_choice, check_numbers

Negatives = Literal["random", "hard"]
NegativesFrom = Literal["rank", "world"]
MlmNormalization = Literal["step", "official"]
Protocol = Literal["honest", "paper"]
Figure = Literal[
    "rsum",
    "itc_rsum",
    "two_stage_rsum",
    "one_stage_rsum",
    "itm_accuracy",
    "mlm_accuracy",
    "vqa_score",
    "accuracy",
    "f1",
    "matthews_correlation",
    "pearson_correlation",
    "spearman_correlation",
]
"""Figures of an evaluation; `figures` of a task are those by which its best checkpoint can be chosen."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Objectives in force up to a share of the run.

    Attributes:
        until: Share of all steps at which the phase ends; the last phase ends at 1.
        mlm: Weight of the masked-word loss; 0 does not compute it.
        itm: Weight of the matching loss; 0 does not compute it.
        itc: Weight of the contrastive loss; 0 does not compute it.
        negatives: Of ITM, out of one micro-batch: `random` images, or `hard` ones drawn by contrastive similarity.
    """

    until: float = 1.0
    mlm: float = 1.0
    itm: float = 1.0
    itc: float = 0.0
    negatives: Negatives = "random"

    def __post_init__(self) -> None:
        """Checks the weights and the negatives."""
        check_numbers(self)
        if not 0 < self.until <= 1:
            raise ValueError(f"a phase ends at {self.until}; expected a share of the run in (0, 1]")
        if min(self.mlm, self.itm, self.itc) < 0 or max(self.mlm, self.itm, self.itc) == 0:
            raise ValueError(
                f"loss weights mlm {self.mlm}, itm {self.itm}, itc {self.itc}; expected >= 0, one positive"
            )
        check_choice("negatives", self.negatives, Negatives)
        if self.negatives == "hard" and not self.itm:
            raise ValueError(
                "negatives are hard but itm is 0, so that nothing draws them; set itm or leave them random"
            )


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig:
    """MLM, ITM and ITC on captions.

    Attributes:
        kind: Tells the task in a saved run; no option of the command.
        phases: Objectives over the run, in order.
        masking: Which words are hidden for MLM.
        mlm_normalization: `step`: MLM is the mean over all hidden words of an optimiser step, however it is divided
            among micro-batches and processes. `official`: the mean over the hidden words of a micro-batch; all
            micro-batches count alike, whether few or many words are hidden in them.
        negatives_from: Hard negatives of this rank's micro-batch or of those of all ranks (official
            `gather_global_negative`).
        gather_with_grads: Let contrastive gradients flow to the features of other ranks.
    """

    figures: ClassVar[tuple[Figure, ...]] = ("rsum", "itc_rsum", "two_stage_rsum", "itm_accuracy", "mlm_accuracy")

    kind: Annotated[Literal["pretraining"], Fixed, Suppress] = "pretraining"
    phases: tuple[Phase, ...] = (Phase(),)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    mlm_normalization: MlmNormalization = "step"
    negatives_from: NegativesFrom = "rank"
    gather_with_grads: bool = True

    def __post_init__(self) -> None:
        """Checks that the phases cover the run, and the choices."""
        check_numbers(self)
        ends = [phase.until for phase in self.phases]
        if not ends or ends != sorted(set(ends)) or ends[-1] != 1:
            raise ValueError(f"phases end at {ends}; expected increasing shares of which the last is 1")
        check_choice("mlm_normalization", self.mlm_normalization, MlmNormalization)
        check_choice("negatives_from", self.negatives_from, NegativesFrom)

    @property
    def contrasts(self) -> list[str]:
        """Names of what compares the pairs of a batch in some phase."""
        uses = {
            "ITC": any(phase.itc for phase in self.phases),
            "hard negatives": any(phase.negatives == "hard" for phase in self.phases),
        }
        return [name for name, used in uses.items() if used]

    def phase(self, progress: float) -> Phase:
        """Returns the phase in force when `progress` (0 to 1) of the run is done."""
        return next((phase for phase in self.phases if progress < phase.until), self.phases[-1])


@dataclass(frozen=True, kw_only=True)
class RankingConfig:
    """Choosing the true text of an image among false ones.

    Attributes:
        kind: Tells the task in a saved run; no option of the command.
        false_texts: Random texts of other images beside the true one.
        itm: Weight of the matching loss beside it; 0 does not compute it.
    """

    figures: ClassVar[tuple[Figure, ...]] = ("rsum", "one_stage_rsum")

    kind: Annotated[Literal["ranking"], Fixed, Suppress] = "ranking"
    false_texts: int = 15
    itm: float = 1.0

    def __post_init__(self) -> None:
        """Checks the number of texts and the weight."""
        check_numbers(self)
        if self.false_texts < 1 or self.itm < 0:
            raise ValueError(f"false_texts {self.false_texts} and itm {self.itm}; expected at least 1 and at least 0")


@dataclass(frozen=True, kw_only=True)
class VqaConfig:
    """Questions about pictures.

    Attributes:
        kind: Tells the task in a saved run; no option of the command.
        protocol: `honest` scores every question of the validation split; `paper` leaves out those to which no annotator
            gave an answer of the vocabulary, as the official code does. Both train without them.
    """

    figures: ClassVar[tuple[Figure, ...]] = ("vqa_score",)

    kind: Annotated[Literal["vqa"], Fixed, Suppress] = "vqa"
    protocol: Protocol = "honest"

    def __post_init__(self) -> None:
        """Checks the protocol."""
        check_numbers(self)
        check_choice("protocol", self.protocol, Protocol)


@dataclass(frozen=True, kw_only=True)
class SnliVeConfig:
    """Does a picture contradict a statement, leave it open, or entail it?

    Attributes:
        kind: Tells the task in a saved run; no option of the command.
    """

    figures: ClassVar[tuple[Figure, ...]] = ("accuracy",)

    kind: Annotated[Literal["snli-ve"], Fixed, Suppress] = "snli-ve"


@dataclass(frozen=True, kw_only=True)
class Nlvr2Config:
    """Is a statement about two pictures true?

    Attributes:
        kind: Tells the task in a saved run; no option of the command.
    """

    figures: ClassVar[tuple[Figure, ...]] = ("accuracy",)

    kind: Annotated[Literal["nlvr2"], Fixed, Suppress] = "nlvr2"


@dataclass(frozen=True, kw_only=True)
class CifarConfig:
    """Classes of pictures from the image tower alone: CIFAR-10 and CIFAR-100.

    Attributes:
        kind: Tells the task in a saved run; no option of the command.
        num_classes: 10, or 100.
    """

    figures: ClassVar[tuple[Figure, ...]] = ("accuracy",)

    kind: Annotated[Literal["cifar"], Fixed, Suppress] = "cifar"
    num_classes: Literal[10, 100] = 10

    def __post_init__(self) -> None:
        """Checks the number of classes."""
        check_numbers(self)
        if self.num_classes not in (10, 100):
            raise ValueError(f"num_classes is {self.num_classes}; expected 10 or 100")


@dataclass(frozen=True, kw_only=True)
class GlueConfig:
    """A task of GLUE from the text tower alone.

    Attributes:
        kind: Tells the task in a saved run; no option of the command.
        name: Of the task.
        max_errors: Bad rows of a file that may be left out; they are named.
    """

    kind: Annotated[Literal["glue"], Fixed, Suppress] = "glue"
    name: GlueName = "cola"
    max_errors: int = 0

    def __post_init__(self) -> None:
        """Checks the name and the number."""
        check_numbers(self)
        check_choice("name", self.name, GlueName)
        if self.max_errors < 0:
            raise ValueError(f"max_errors is {self.max_errors}; expected at least 0")

    @property
    def figures(self) -> tuple[Figure, ...]:
        """Figures of the evaluation by which the best checkpoint can be chosen: those that GLUE reports."""
        return GLUE_FIGURES[self.name]


GLUE_FIGURES: Mapping[GlueName, tuple[Figure, ...]] = {
    "cola": ("matthews_correlation",),
    "mrpc": ("f1", "accuracy"),
    "sst-2": ("accuracy",),
    "qqp": ("f1", "accuracy"),
    "sts-b": ("pearson_correlation", "spearman_correlation"),
    "rte": ("accuracy",),
    "qnli": ("accuracy",),
    "mnli": ("accuracy",),
}

TaskConfig = PretrainingConfig | RankingConfig | VqaConfig | SnliVeConfig | Nlvr2Config | CifarConfig | GlueConfig
"""What a run can learn, told apart by `kind`."""
