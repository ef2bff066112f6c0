"""Questions about generated scenes: what the pre-trained models learn of them, and what they answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from bridgetower.analysis.answer_examples import AnswerExample, answer_examples
from bridgetower.analysis.results import Arm, DemoAnswers
from bridgetower.data.schema import VQA
from bridgetower.data.splits import read_split
from bridgetower.demo.folder import answering_model, trained_model
from bridgetower.demo.toysets import prepare_toyset
from bridgetower.demo.toysets.scenes import ScenesConfig
from bridgetower.evaluation.grounding import Judged, judge
from bridgetower.predictor import load
from bridgetower.tasks.run_config import RunConfig
from bridgetower.training.recipes import RECIPES

SCENES_PER_MINUTE = 2_500  # of the demo, for training; at least one batch of them
NUM_VALIDATION, NUM_TEST = 400, 1_000
EXAMPLES = 2  # of either kind per topic


def scenes_folder(out: Path) -> Path:
    """Folder of the questions."""
    return out / "data" / "scenes"


def prepare_questions(out: Path, minutes: float, *, progress: bool) -> None:
    """Draws the scenes and asks about them; more minutes draw more."""
    recipe = RECIPES["scenes-vqa"]
    config = ScenesConfig(
        num_train=max(recipe.batch_size, round(SCENES_PER_MINUTE * minutes)),
        num_validation=NUM_VALIDATION,
        num_test=NUM_TEST,
        side=recipe.model.vision.image_size,
    )
    prepare_toyset("scenes", scenes_folder(out), config, progress=progress)


def answering_config(out: Path, arm: Arm, seed: int, steps: int) -> RunConfig:
    """Returns the run in which a pre-trained model learns to answer: the recipe with so many steps."""
    recipe = RECIPES["scenes-vqa"]
    every = max(1, steps // 3)
    return replace(
        recipe,
        init=str(trained_model(out, arm, seed)),
        data=replace(recipe.data, folders=(str(scenes_folder(out)),)),
        seed=seed,
        max_steps=steps,
        evaluate_every=every,
        checkpoint_every=every,
    )


def judged_answers(out: Path, arm: Arm, seed: int) -> Judged:
    """Answers the test questions with the last checkpoint."""
    predictor = load(answering_model(out, arm, seed), device="cpu")
    return judge(predictor, "vqa", scenes_folder(out))


def answer_figures(judged: Mapping[tuple[Arm, int], Judged], steps: int) -> tuple[DemoAnswers, ...]:
    """Returns what is reported of the answers of each arm and seed."""
    return tuple(
        DemoAnswers(arm=arm, seed=seed, steps=steps, topics=dict(one.groundings)) for (arm, seed), one in judged.items()
    )


def scene_examples(out: Path, judged: Judged) -> list[AnswerExample]:
    """Returns questions of the test split with their pictures and answers."""
    rows = read_split(scenes_folder(out), "test", schema=VQA)
    pictures = [image["bytes"] for image in rows.stream("image")]
    return answer_examples(judged, pictures, count=EXAMPLES)
