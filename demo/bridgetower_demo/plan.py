"""What a demo trains on, and how: on pre-trained towers, or from scratch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bridgetower_demo.recipes import RECIPES
from bridgetower_demo.results import ARMS, Arm
from bridgetower_demo.toysets.emoji import EmojiConfig
from bridgetower_demo.toysets.flags import FlagsConfig
from bridgetower_demo.toysets.packages import SplitConfig
from bridgetower_demo.toysets.scenes import ScenesConfig

MINUTES = 8.0  # at which the numbers of steps are those of the recipes
SCENES_PER_MINUTE = 7_500  # of the demo, for training; at least one batch of them
NUM_VALIDATION, NUM_TEST = 400, 1_000


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training of each arm.

    Attributes:
        name: Ends the names of its runs; empty for the model that other commands use.
        recipes: By arm.
    """

    name: str = ""
    recipes: Mapping[Arm, str]


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What the models learn to answer.

    Attributes:
        toyset: Set of the questions.
        about: What they are about, in words.
        prefix: Of the file names of their images.
        settings: Of the set, for so many minutes.
        recipes: By arm.
        init: Whether the models start from those of the last stage, or from random weights.
        steps: Of each arm and seed.
    """

    toyset: str
    about: str
    prefix: str
    settings: Callable[[float], Any]
    recipes: Mapping[Arm, str]
    init: bool
    steps: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A demo.

    Attributes:
        option: Of the command, that chooses it.
        datasets: Settings of each set of captions.
        repeats: How often an epoch has the pairs of each.
        tests: Set and split of each test.
        towers: Whether models start from pre-trained towers.
        stages: In order; each starts from the models of the one before.
        questions: What comes last.
    """

    option: str
    datasets: Mapping[str, SplitConfig]
    repeats: tuple[int, ...]
    tests: Mapping[str, tuple[str, str]]
    towers: bool
    stages: tuple[Stage, ...]
    questions: Questions


def scaled(steps: int, minutes: float) -> int:
    """Steps of a training of `steps` in a demo of so many minutes."""
    return max(2, round(steps * minutes / MINUTES))


def _scenes(minutes: float) -> ScenesConfig:
    """More minutes draw more scenes."""
    recipe = RECIPES["scenes-vqa-deep"]
    return ScenesConfig(
        num_train=max(recipe.batch_size, round(SCENES_PER_MINUTE * minutes)),
        num_validation=NUM_VALIDATION,
        num_test=NUM_TEST,
        side=recipe.model.vision.image_size,
    )


FROM_SCRATCH = Plan(
    option=" --from-scratch",
    datasets={"emoji": EmojiConfig(), "flags": FlagsConfig()},
    repeats=(1, 6),  # there are twenty times fewer pairs of flags than of emoji
    tests={"emoji": ("emoji", "test"), "flags": ("flags", "test")},
    towers=False,
    stages=(Stage(recipes={"bridgetower": "pretrain-nano", "meter": "pretrain-nano-meter"}),),
    questions=Questions(
        toyset="scenes",
        about="generated scenes",
        prefix="scene",
        settings=_scenes,
        recipes={"bridgetower": "scenes-vqa-deep", "meter": "scenes-vqa-deep-meter"},
        init=False,
        steps=1_200,
    ),
)

_FLAGS = FlagsConfig(styles=("twemoji", "openmoji", "noto"))

ON_TOWERS = Plan(
    option="",
    datasets={
        "emoji": EmojiConfig(styles=("twemoji", "openmoji"), unseen_style="noto", tones=False),
        "flags": _FLAGS,
    },
    repeats=(1, 3),
    tests={
        "flags": ("flags", "test"),
        "emoji": ("emoji", "test"),
        "unseen-style": ("emoji", "unseen-style"),
    },
    towers=True,
    stages=(
        Stage(
            name="contrastive", recipes={"bridgetower": "starter-itc", "meter": "starter-itc-meter"}
        ),
        Stage(recipes={"bridgetower": "starter-matching", "meter": "starter-matching-meter"}),
    ),
    questions=Questions(
        toyset="flag-questions",
        about="flags",
        prefix="question",
        settings=lambda minutes: _FLAGS,
        recipes=dict.fromkeys(ARMS, "starter-flag-questions"),
        init=True,
        steps=150,
    ),
)
