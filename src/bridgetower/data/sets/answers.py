"""Answers of VQA: their normal form, their soft scores, and the vocabulary of a classifier."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from bridgetower.data.sources.fetch import read_part_of_set
from bridgetower.files import parse_json

# Questions whose first choice an answer of the vocabulary is (official ViLT and METER code).
MIN_COUNT = 9
ANSWERS_FILE = "answers.json"  # the vocabulary of a prepared set
ANNOTATORS = 10  # people who answered each question of VQA
# With fewer annotators no answer reaches score 1 by the rule for ten: its share of them is its score.
FEW_ANNOTATORS = 4

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# Official: re.UNICODE, which is 32, is passed where the number of replacements belongs.
_NUM_PERIODS = 32
_ARTICLES = frozenset({"a", "an", "the"})
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_WORDS)}

_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
# By each form without one of its apostrophes.
_CONTRACTIONS = {
    word[:index] + word[index + 1 :]: word
    for word in _CONTRACTED.split()
    for index, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # Official: the two are the wrong way round.


@lru_cache(maxsize=100_000)
def normalise_answer(answer: str) -> str:
    """Returns the form in which answers are compared (GT-Vision-Lab/VQA, `vqaEval.py`, quirks included)."""
    joined = _DIGIT_COMMA_DIGIT.search(answer) is not None
    text = answer
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if joined or beside_space else " ")
    text = _PERIOD.sub("", text, count=_NUM_PERIODS)
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def soft_targets(answers: Iterable[str], vocabulary: Container[str]) -> dict[str, float]:
    """Returns the score of each answer of the vocabulary, as the official code.

    With ten annotators it is the rounded mean over any nine of them. A single answer, as in Visual Genome, has score 1.
    """
    counts = Counter(map(normalise_answer, answers))
    total = counts.total()
    return {
        answer: count / total if total < FEW_ANNOTATORS else min(1.0, round(0.3 * count, 1))
        for answer, count in counts.items()
        if answer in vocabulary
    }


def answer_vocabulary(first_choices: Iterable[str]) -> Sequence[str]:
    """Returns the first choices of enough questions, in order of appearance, as released classifiers have them."""
    counts = Counter(map(normalise_answer, first_choices))
    return tuple(answer for answer, count in counts.items() if count >= MIN_COUNT)


def vocabulary_file(answers: Sequence[str]) -> dict[str, list[str]]:
    """Returns the content of `answers.json` by its name, or nothing without answers.

    Raises:
        ValueError: An answer is not in normal form or comes twice.
    """
    unfit = [answer for answer in answers if normalise_answer(answer) != answer]
    if unfit or len(set(answers)) != len(answers):
        raise ValueError(f"answers {unfit or 'that come twice'}; give each once, in normal form")
    return {ANSWERS_FILE: list(answers)} if answers else {}


def read_vocabulary(folder: str | Path) -> tuple[str, ...]:
    """Reads the answers of a prepared VQA set in the order of the classes."""
    path, content = read_part_of_set(
        folder, ANSWERS_FILE, "a VQA set with a training split that `bridgetower prepare` wrote"
    )
    answers = parse_json(content, path, "run `bridgetower prepare` again")
    is_list = isinstance(answers, list) and all(isinstance(answer, str) for answer in answers)
    if not is_list or not answers:
        raise ValueError(f"{path} is no list of answers; run `bridgetower prepare` again")
    return tuple(answers)
