"""Sets of scenes: captions, questions, statements, or statements about two."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping

from bridgetower.data.answers import ANNOTATORS, answer_type
from bridgetower.data.info import DatasetInfo
from bridgetower.data.kinds import Kind, Question, Statement
from bridgetower.data.records import Collection, PairRecord, PictureRecord, QuestionRecord, Record, StatementRecord
from bridgetower.data.scenes import pair_statements, questions, statements
from bridgetower.data.scenes.asked import scene_for, scenes_for
from bridgetower.data.scenes.captions import caption
from bridgetower.data.scenes.config import ScenesConfig
from bridgetower.data.scenes.drawing import png
from bridgetower.data.scenes.scene import LEVELS, Level, draw_lot

Maker = Callable[[ScenesConfig, Level, random.Random, str, int], PictureRecord]

_FIRST_ID = {"train": 1_000_000_000, "validation": 2_000_000_000, "test": 3_000_000_000}


def collect(config: ScenesConfig) -> Collection:
    """Describes a set of scenes, which are drawn when the splits are read.

    A picture depends on seed, kind, level, split and its number only: more training pictures leave the others, and the
    validation and test pictures, as they are.
    """
    counts = {"train": config.num_train, "validation": config.num_validation, "test": config.num_test}
    return Collection(
        info=DatasetInfo(
            name=f"scenes-{config.kind}",
            kind=config.kind,
            seed=config.seed,
            split_rule="drawn anew for each split",
            protocol="generated; each answer to a text is drawn equally often, before the picture",
            sources={},
            licences={"pictures": "none: generated"},
            settings={"level": config.level, "side": config.side, **{f"num_{name}": n for name, n in counts.items()}},
            left_out={},
        ),
        splits={split: _records(config, split, count) for split, count in counts.items()},
        vocabulary=_vocabulary(LEVELS[config.level]) if config.kind == "vqa" else (),
    )


def topic_of(statement_id: str) -> str:
    """Returns the topic of a statement of a set, about one scene or two."""
    last = statement_id.rpartition("-")[2]
    return tuple(pair_statements.TOPICS)[int(last)] if last.isdigit() else last


def _records(config: ScenesConfig, split: str, count: int) -> Iterator[PictureRecord]:
    make, level = _MAKERS[config.kind], LEVELS[config.level]
    for number in range(count):
        generator = random.Random(f"{config.seed}/{config.kind}/{config.level}/{split}/{number}")
        yield make(config, level, generator, split, number)


def _captioned(config: ScenesConfig, level: Level, generator: random.Random, split: str, number: int) -> Record:
    scene = draw_lot(generator, level, generator.randint(*level.num_shapes))
    name = f"{split}-{number}"
    return Record(
        image=png(scene, config.side), file_name=f"{name}.png", image_id=name, captions=(caption(scene, level),)
    )


def _questioned(
    config: ScenesConfig, level: Level, generator: random.Random, split: str, number: int
) -> QuestionRecord:
    topic = _topic(questions.TOPICS, number)
    asked = questions.TOPICS[topic](generator, level)
    answer = generator.choice(asked.answers)
    scene = scene_for(asked, answer, generator, level, curtains=False)
    question = Question(
        question_id=_FIRST_ID[split] + number,
        question=asked.text,
        question_type=topic,
        answer_type=answer_type(answer),
        answers=(answer,) * ANNOTATORS,  # they all say the same
    )
    name = f"{split}-{number}"
    return QuestionRecord(image=png(scene, config.side), file_name=f"{name}.png", image_id=name, questions=(question,))


def _stated(config: ScenesConfig, level: Level, generator: random.Random, split: str, number: int) -> StatementRecord:
    topic = _topic(statements.TOPICS, number)
    asked = statements.TOPICS[topic](generator, level)
    label = generator.choice(asked.answers)
    scene = scene_for(asked, label, generator, level, curtains=True)
    name = f"{split}-{number}"
    return StatementRecord(
        image=png(scene, config.side),
        file_name=f"{name}.png",
        image_id=name,
        statements=(Statement(statement_id=f"{name}-{topic}", text=asked.text, label=label),),
    )


def _paired(config: ScenesConfig, level: Level, generator: random.Random, split: str, number: int) -> PairRecord:
    topic = _topic(pair_statements.TOPICS, number)
    asked = pair_statements.TOPICS[topic](generator, level)
    label = generator.choice(asked.answers)
    left, right = scenes_for(asked, label, generator, level)
    name = f"{split}-{number}"
    return PairRecord(
        image=png(left, config.side),
        file_name=f"{name}-img0.png",
        image_2=png(right, config.side),
        file_name_2=f"{name}-img1.png",
        image_id=name,
        # As NLVR2 has them: split, set of pictures, pair, sentence.
        statements=(Statement(statement_id=f"{split}-{number}-0-{_PAIR_TOPIC[topic]}", text=asked.text, label=label),),
    )


def _topic(topics: Mapping[str, object], number: int) -> str:
    """Topics take turns."""
    return tuple(topics)[number % len(topics)]


def _vocabulary(level: Level) -> tuple[str, ...]:
    """Every answer that a question of the level may have."""
    numbers = map(str, range(questions.HIGHEST_COUNT + 1))
    return ("no", "yes", *numbers, *level.colours, *level.kinds)


_PAIR_TOPIC = {topic: number for number, topic in enumerate(pair_statements.TOPICS)}
_MAKERS: Mapping[Kind, Maker] = {
    "captions": _captioned,
    "vqa": _questioned,
    "snli-ve": _stated,
    "nlvr2": _paired,
}
