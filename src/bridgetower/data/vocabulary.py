"""The file with the answers that a classifier of a VQA set chooses from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bridgetower.data.answers import normalise_answer
from bridgetower.files import parse_json, write_json

ANSWERS_FILE = "answers.json"


def write_vocabulary(folder: Path, answers: Sequence[str]) -> None:
    """Writes the answers of a set, in the order of the classes.

    Raises:
        ValueError: An answer is not in normal form, or comes twice.
    """
    unfit = [answer for answer in answers if normalise_answer(answer) != answer]
    if unfit or len(set(answers)) != len(answers):
        raise ValueError(f"answers {unfit or 'that come twice'}; give each once, in normal form")
    write_json(Path(folder) / ANSWERS_FILE, list(answers))


def read_vocabulary(folder: str | Path) -> tuple[str, ...]:
    """Reads the answers of a set.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a list of words.
    """
    path = Path(folder) / ANSWERS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no {ANSWERS_FILE} in {folder}; give a VQA set that `bridgetower prepare` wrote")
    answers = parse_json(path.read_bytes(), path, "run `bridgetower prepare` again")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{path} is no list of answers; run `bridgetower prepare` again")
    return tuple(answers)
