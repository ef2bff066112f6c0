"""Generated images of coloured shapes, with captions, questions or statements whose truth is known."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from bridgetower.data.sets.answers import ANNOTATORS, vocabulary_file
from bridgetower.data.sets.prepared_set import DatasetInfo
from bridgetower.data.sets.schema import SCHEMAS, Question, Statement
from bridgetower.plain import check_choice, check_numbers
from bridgetower_demo.toysets.collection import Collection, ImageFile, Record, answer_type
from bridgetower_demo.toysets.scene_drawing import LEVELS, Level, LevelName, Scene, draw_lot, png
from bridgetower_demo.toysets.scene_texts import HIGHEST_COUNT, TOPICS, caption, scenes_for

SceneKind = Literal["captions", "vqa", "snli-ve", "nlvr2"]

_FIRST_ID = {"train": 1_000_000_000, "validation": 2_000_000_000, "test": 3_000_000_000}


@dataclass(frozen=True, kw_only=True)
class ScenesConfig:
    """A set of generated scenes.

    Attributes:
        kind: What the texts are: captions, questions (vqa), statements (snli-ve), or statements about two (nlvr2).
        level: How many shapes, kinds, colours and sizes there are.
        num_train: Training images; more of them leave the first ones as they are.
        num_validation: Validation images.
        num_test: Test images.
        side: Pixels of an image's side.
        seed: Of everything; another seed gives other images in all splits.
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


def collect(config: ScenesConfig) -> Collection:
    """Describes a set of scenes, which are drawn when the splits are read.

    An image depends on seed, kind, level, split and its number only: more training images leave the others, and the
    validation and test images, as they are.
    """
    counts = {
        "train": config.num_train,
        "validation": config.num_validation,
        "test": config.num_test,
    }
    return Collection(
        info=DatasetInfo(
            name=f"scenes-{config.kind}",
            split_rule="drawn anew for each split",
            protocol="generated; each answer to a text is drawn equally often, before the image",
            sources={},
            licences={"images": "none: generated"},
            settings={
                "seed": config.seed,
                "level": config.level,
                "side": config.side,
                **{f"num_{name}": n for name, n in counts.items()},
            },
        ),
        schema=SCHEMAS[config.kind],
        splits={split: _records(config, split, count) for split, count in counts.items()},
        files=vocabulary_file(_vocabulary(LEVELS[config.level])) if config.kind == "vqa" else {},
    )


def topic_of(statement_id: str) -> str:
    """Returns the topic of a statement of a set, about one scene or two."""
    last = statement_id.rpartition("-")[2]
    return tuple(TOPICS["nlvr2"])[int(last)] if last.isdigit() else last


def _records(config: ScenesConfig, split: str, count: int) -> Iterator[Record]:
    for number in range(count):
        generator = random.Random(f"{config.seed}/{config.kind}/{config.level}/{split}/{number}")
        yield _record(config, LEVELS[config.level], generator, split, number)


def _record(
    config: ScenesConfig, level: Level, generator: random.Random, split: str, number: int
) -> Record:
    entry: Any
    scenes: tuple[Scene, ...]
    if config.kind == "captions":
        scenes = (draw_lot(generator, level, generator.randint(*level.num_shapes)),)
        entry = caption(scenes[0], level)
    else:
        topics = TOPICS[config.kind]
        topic = tuple(topics)[number % len(topics)]  # topics take turns
        asked = topics[topic](generator, level)
        answer = generator.choice(asked.answers)
        scenes = scenes_for(asked, answer, generator, level, curtains=config.kind == "snli-ve")
        entry = _entry(config.kind, split, number, topic, asked.text, answer)
    name = f"{split}-{number}"
    files = (
        [f"{name}.png"]
        if len(scenes) == 1
        else [f"{name}-img{side}.png" for side in range(len(scenes))]
    )
    images = [
        ImageFile(file, png(scene, config.side)) for file, scene in zip(files, scenes, strict=True)
    ]
    return Record(image_id=name, images=images, entries=(entry,))


def _entry(
    kind: str, split: str, number: int, topic: str, text: str, answer: str
) -> Question | Statement:
    if kind == "vqa":
        return Question(
            question_id=_FIRST_ID[split] + number,
            question=text,
            question_type=topic,
            answer_type=answer_type(answer),
            answers=(answer,) * ANNOTATORS,
        )
    # NLVR2's identifiers: split, set of images, pair, sentence.
    last = f"0-{tuple(TOPICS[kind]).index(topic)}" if kind == "nlvr2" else topic
    return Statement(statement_id=f"{split}-{number}-{last}", text=text, label=answer)


def _vocabulary(level: Level) -> tuple[str, ...]:
    """Every answer that a question of the level may have."""
    numbers = map(str, range(HIGHEST_COUNT + 1))
    return ("no", "yes", *numbers, *level.colours, *level.kinds)
