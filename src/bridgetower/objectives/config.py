"""Settings of objectives: loss weights, negatives, masking. It imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from bridgetower.data.config import MaskingConfig
from bridgetower.plain import AT_LEAST_0, AT_LEAST_1, NO_OPTION, check_choice, check_numbers

Negatives = Literal["random", "uniform", "hard"]
NegativesFrom = Literal["rank", "world"]
MlmNormalization = Literal["step", "official"]
Reads = Literal["captions", "entries"]
NotAnOption = Annotated[str, NO_OPTION]


@dataclass(frozen=True, kw_only=True)
class TaskConfig(ABC):
    """Settings of the task of a run, whose name is `kind`."""

    reads: ClassVar[Reads] = "entries"  # of prepared sets: captions, or other entries
    kind: NotAnOption = ""

    @property
    @abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """Metrics of an evaluation by which the best checkpoint can be chosen, the usual one first."""

    @property
    def contrasts(self) -> list[str]:
        """Names of the objectives that compare the pairs of a batch. `ITC` allows `contrast_over="step"`."""
        return []

    @property
    def needs_masking(self) -> bool:
        """Whether batches also have captions with masked words."""
        return False

    def contrasts_pairs(self, progress: float) -> bool:
        """Whether ITC is computed at `progress` of the run. The module then has `features` and `contrast`."""
        return False

    def counts_labels(self, progress: float) -> bool:
        """Whether a loss is a mean over the labels of the step. Batches then have `num_labels` and a weight."""
        return False


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Objectives in force up to a share of the run.

    Attributes:
        until: Share of all steps at which the phase ends; the last phase ends at 1.
        mlm: Weight of the masked-word loss; 0 does not compute it.
        itm: Weight of the matching loss; 0 does not compute it.
        itc: Weight of the contrastive loss; 0 does not compute it.
        objectives: Weights of further objectives by name, of the package or of `Extensions.objectives`.
        negatives: Negatives of ITM in a micro-batch. `random`: another image for half of the texts, as in the official
            pre-training. `uniform`: every pair matches, and every text has another image too, and every image another
            text. `hard`: likewise, drawn by contrastive similarity, as in the official code with ITC.
    """

    until: float = 1.0
    mlm: float = 1.0
    itm: float = 1.0
    itc: float = 0.0
    objectives: dict[str, float] = field(default_factory=dict, hash=False)
    negatives: Negatives = "random"

    def __post_init__(self) -> None:
        check_numbers(self)
        if not 0 < self.until <= 1:
            raise ValueError(f"a phase ends at {self.until}; expected a share of the run in (0, 1]")
        weights = {"mlm": self.mlm, "itm": self.itm, "itc": self.itc}
        if weights.keys() & self.objectives.keys():
            raise ValueError(
                f"objectives are {self.objectives}; mlm, itm and itc have weights of their own"
            )
        weights |= self.objectives
        if not all(0 <= weight < float("inf") for weight in weights.values()) or not self.weights:
            listed = ", ".join(f"{name} {weight}" for name, weight in weights.items())
            raise ValueError(f"loss weights {listed}; expected >= 0, one positive")
        check_choice("negatives", self.negatives, Negatives)
        if self.negatives != "random" and not self.itm:
            raise ValueError(
                f"negatives are {self.negatives} but itm is 0, so that nothing draws them; set itm or leave them random"
            )

    @property
    def weights(self) -> dict[str, float]:
        """Returns the weights of the objectives that are computed."""
        weights = {"mlm": self.mlm, "itm": self.itm, "itc": self.itc, **self.objectives}
        return {name: weight for name, weight in weights.items() if weight}


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig(TaskConfig):
    """MLM, ITM and ITC on captions.

    Attributes:
        phases: Objectives over the run, in order.
        masking: Which words are hidden for MLM.
        mlm_normalization: `step`: MLM is the mean over all hidden words of an optimiser step, however it is divided
            among micro-batches and processes. `official`: the mean over those of a micro-batch; all count alike.
        negatives_from: Hard negatives of this rank's micro-batch or of those of all ranks (official
            `gather_global_negative`).
        gather_with_grads: Let contrastive gradients flow to the features of other ranks.
    """

    reads: ClassVar[Reads] = "captions"
    metrics = (
        "rsum",
        "itc_rsum",
        "matching_rsum",
        "two_stage_rsum",
        "itm_accuracy",
        "mlm_accuracy",
    )
    kind: NotAnOption = "pretraining"
    phases: tuple[Phase, ...] = (Phase(),)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    mlm_normalization: MlmNormalization = "step"
    negatives_from: NegativesFrom = "rank"
    gather_with_grads: bool = True

    def __post_init__(self) -> None:
        check_numbers(self)
        ends = [phase.until for phase in self.phases]
        if not ends or ends != sorted(set(ends)) or ends[-1] != 1:
            raise ValueError(
                f"phases end at {ends}; expected increasing shares of which the last is 1"
            )
        check_choice("mlm_normalization", self.mlm_normalization, MlmNormalization)
        check_choice("negatives_from", self.negatives_from, NegativesFrom)
        if self.negatives_from != "rank" and all(
            phase.negatives != "hard" for phase in self.phases
        ):
            raise ValueError(
                f"negatives_from is {self.negatives_from!r}, but no phase has hard negatives; leave it out, or set them"
            )

    @property
    def contrasts(self) -> list[str]:
        names = []
        if any(phase.itc for phase in self.phases):
            names.append("ITC")
        if any(phase.negatives == "hard" for phase in self.phases):
            names.append("hard negatives")
        return names

    @property
    def needs_masking(self) -> bool:
        return any(phase.mlm or phase.objectives for phase in self.phases)

    def contrasts_pairs(self, progress: float) -> bool:
        return self.phase(progress).itc > 0

    def counts_labels(self, progress: float) -> bool:
        return self.mlm_normalization == "step" and self.phase(progress).mlm > 0

    def phase(self, progress: float) -> Phase:
        return next((phase for phase in self.phases if progress < phase.until), self.phases[-1])


@dataclass(frozen=True, kw_only=True)
class RankingConfig(TaskConfig):
    """Choosing the true text of an image among false ones.

    Attributes:
        false_texts: Random texts of other images beside the true one.
        itm: Weight of the matching loss beside it; 0 does not compute it.
    """

    reads: ClassVar[Reads] = "captions"
    metrics = ("rsum", "one_stage_rsum")
    kind: NotAnOption = "ranking"
    false_texts: int = 15
    itm: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(self, false_texts=AT_LEAST_1, itm=AT_LEAST_0)
