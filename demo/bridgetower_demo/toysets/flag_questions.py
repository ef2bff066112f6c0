"""Questions about flags, made by rules from their descriptions."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from bridgetower.data.sets.answers import ANNOTATORS, vocabulary_file
from bridgetower.data.sets.schema import VQA, Question
from bridgetower_demo.toysets.collection import Collection, Record, answer_type, split_rank
from bridgetower_demo.toysets.flags import FlagsConfig
from bridgetower_demo.toysets.flags import collect as collect_flags

TOPICS = ("colour of a band", "colour exists", "direction", "number", "thing exists")


class FlagQuestion(NamedTuple):
    """A question with its answer.

    Attributes:
        topic: What it is about, one of `TOPICS`.
        text: The words.
        answer: One or two words.
    """

    topic: str
    text: str
    answer: str


class Asked(NamedTuple):
    """A question to a flag.

    Attributes:
        record: The flag.
        question: What is asked of it.
    """

    record: Record
    question: FlagQuestion


_OPPOSITE = {"yes": "no", "no": "yes"}
_IDS_PER_SPLIT = 1_000_000
_COLOURS = {
    "red": ("red", "maroon", "vermilion", "scarlet", "crimson"),
    "blue": ("blue", "turquoise", "aquamarine", "cerulean", "azure"),
    "green": ("green",),
    "yellow": ("yellow", "gold", "golden"),
    "white": ("white",),
    "black": ("black",),
    "orange": ("orange", "saffron"),
}
_COLOUR_OF = {word: colour for colour, words in _COLOURS.items() for word in words}
_COLOUR = "|".join(_COLOUR_OF)
_THINGS = {
    "a star": r"stars?\b|constellation",
    "a crescent": r"crescent",
    "a cross": r"\bcross(es)?\b",
    "a sun": r"\bsun\b",
    "a triangle": r"\btriangles?\b",
    "a disk": r"\bdisk\b",
    "a coat of arms": r"coat of arms",
    "the flag of the United Kingdom": r"UK flag",
}
# These show colours and things that the text need not name.
_COMPOSITE = re.compile(
    r"coat of arms|\barms\b|emblem|shield|UK flag|flag of|seal|globe|scene|pattern|design|constellation|eagle|bird",
    re.I,
)

_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_BANDS = re.compile(
    rf"^({'|'.join(_NUMBERS)})(?: equal| unequal)? (horizontal|vertical) (?:bands|stripes)\b"
)
_BAND_COLOURS = re.compile(
    rf"^(?P<number>{'|'.join(_NUMBERS)})(?: equal)? (?P<direction>horizontal|vertical) (?:bands|stripes) of "
    rf"(?P<first>(?:[\w-]+ )*?(?:{_COLOUR})) \((?:top|left)[^)]*\),?"
    rf"(?P<middle>[^;]*?)\band (?P<last>(?:[\w-]+ ){{0,2}}?(?:{_COLOUR}))\b"
)
_PLACES = {"horizontal": ("top", "bottom"), "vertical": ("left", "right")}


def collect(config: FlagsConfig) -> Collection:
    """Describes questions about the flags of `flags.collect`, by their descriptions; countries keep their splits.

    In each split, a question with the answers yes and no keeps as many of either: of the commoner, those whose hash of
    seed and country is smallest. Questions are about the image only to those who cannot guess.

    Raises:
        FileNotFoundError: If a package of the `demo` extra is missing.
    """
    source = collect_flags(config)
    kept = {
        split: _balanced(_asked(records), config.seed) for split, records in source.splits.items()
    }
    info = replace(
        source.info,
        name="flag-questions",
        kind=VQA.name,
        protocol="questions made by rules from descriptions; yes and no equally often for each question of a split",
    )
    answers = {asked.question.answer for asked in kept["train"]}
    return Collection(
        info=info,
        schema=VQA,
        splits={
            split: _with_questions(asked, number)
            for number, (split, asked) in enumerate(kept.items())
        },
        files=vocabulary_file(sorted(answers)),
    )


def flag_questions(text: str) -> list[FlagQuestion]:
    """Questions that a flag's description answers.

    What a description does not name counts as missing only if the flag shows no coat of arms or the like, which may
    hold it unsaid.

    Args:
        text: The description of the flag's look, in clauses.
    """
    text = re.sub(r"\([^)]*(?:linear|flag|patron|known)[^)]*\)", "", text)
    return [*_about_bands(text), *_about_colours(text), *_about_things(text)]


def _about_bands(text: str) -> Iterator[FlagQuestion]:
    bands = _BANDS.match(text)
    if bands is None:
        return
    number, direction = bands.groups()
    yield FlagQuestion(
        "number", "how many bands does the flag have?", str(_NUMBERS.index(number) + 1)
    )
    yield FlagQuestion("direction", "are the bands horizontal or vertical?", direction)
    colours = _BAND_COLOURS.match(text)
    if colours:
        for place, name in zip(_PLACES[direction], ("first", "last"), strict=True):
            colour = _COLOUR_OF[colours.group(name).split()[-1].split("-")[-1]]
            yield FlagQuestion("colour of a band", f"what colour is the {place} band?", colour)


def _about_colours(text: str) -> Iterator[FlagQuestion]:
    for colour, words in _COLOURS.items():
        yield from _exists(
            "colour exists", f"is there {colour} in the flag?", rf"\b({'|'.join(words)})\b", text
        )


def _about_things(text: str) -> Iterator[FlagQuestion]:
    for thing, pattern in _THINGS.items():
        yield from _exists("thing exists", f"is there {thing} on the flag?", pattern, text)


def _exists(topic: str, question: str, pattern: str, text: str) -> Iterator[FlagQuestion]:
    if re.search(pattern, text):
        yield FlagQuestion(topic, question, "yes")
    elif not _COMPOSITE.search(text):
        yield FlagQuestion(topic, question, "no")


def _asked(records: Iterable[Record]) -> list[Asked]:
    return [
        Asked(record, question)
        for record in records
        for question in flag_questions(record.entries[0])
    ]


def _balanced(asked: Sequence[Asked], seed: int) -> list[Asked]:
    """Leaves out of each yes/no question the surplus of the commoner answer."""
    groups: Mapping[tuple[str, str], list[Asked]] = defaultdict(list)
    for one in asked:
        groups[one.question.text, one.question.answer].append(one)
    surplus = set()
    for (text, answer), group in groups.items():
        if answer in _OPPOSITE:
            number = len(groups.get((text, _OPPOSITE[answer]), []))
            ranked = sorted(group, key=lambda one: split_rank(seed, one.record.image_id))
            surplus |= {(text, one.record.image_id) for one in ranked[number:]}
    return [one for one in asked if (one.question.text, one.record.image_id) not in surplus]


def _with_questions(asked: Sequence[Asked], split_number: int) -> list[Record]:
    """Makes records of the flags that are asked anything; question ids are unique over all splits."""
    questions: Mapping[str, list[Question]] = defaultdict(list)
    for number, (record, question) in enumerate(asked):
        questions[record.image_id].append(
            Question(
                question_id=_IDS_PER_SPLIT * (split_number + 1) + number,
                question=question.text,
                question_type=question.topic,
                answer_type=answer_type(question.answer),
                answers=(question.answer,)
                * ANNOTATORS,  # all annotators have the answer of the rule
            )
        )
    records = {record.image_id: record for record, _ in asked}
    return [
        Record(image_id=name, images=record.images, entries=tuple(questions[name]))
        for name, record in records.items()
    ]
