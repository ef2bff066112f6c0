"""How many scenes of which kind a set has; importable without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bridgetower.model.plain import check_choice, check_numbers

LevelName = Literal["easy", "medium", "hard"]
SceneKind = Literal["captions", "vqa", "snli-ve", "nlvr2"]


@dataclass(frozen=True, kw_only=True)
class ScenesConfig:
    """A set of generated scenes.

    Attributes:
        kind: What the texts are: captions, questions (vqa), statements (snli-ve), or statements about two (nlvr2).
        level: How many shapes, kinds, colours and sizes there are.
        num_train: Training pictures; more of them leave the first ones as they are.
        num_validation: Validation pictures.
        num_test: Test pictures.
        side: Pixels of a picture's side.
        seed: Of everything; another seed gives other pictures in all splits.
    """

    kind: SceneKind = "vqa"
    level: LevelName = "easy"
    num_train: int = 50_000
    num_validation: int = 1_000
    num_test: int = 2_000
    side: int = 120
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks choices and numbers."""
        check_numbers(self)
        check_choice("kind", self.kind, SceneKind)
        check_choice("level", self.level, LevelName)
        if min(self.num_train, self.num_validation, self.num_test) < 1 or self.side < 30:
            raise ValueError(
                f"num_train {self.num_train}, num_validation {self.num_validation}, num_test {self.num_test}, side "
                f"{self.side}; expected at least 1 each and 30 pixels"
            )
