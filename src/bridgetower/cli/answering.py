"""Verbs that use a downstream head: answer, entail, reason."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from bridgetower.cli.defaults import answering_or_demo
from bridgetower.cli.options import PLAIN_RUN, Model, ModelOrDemo, Running
from bridgetower.cli.output import emit_lines
from bridgetower.files import one_line

if TYPE_CHECKING:
    from bridgetower.answering import Choice, Options


def answer(
    model: ModelOrDemo = None,
    *,
    images: tuple[Path, ...],
    questions: tuple[str, ...],
    top: int = 5,
    batch_size: int = 32,
    loading: Running = PLAIN_RUN,
    truncate: bool = False,
    json: bool = False,
) -> None:
    """Answer questions about images, with a model fine-tuned on VQA.

    Gives one JSON line per question, {"image", "question", "answers": [{"label", "probability"}, …]}, likeliest answer
    first; a table on a terminal. Each probability is of that answer alone: they do not sum to one.

    Examples: bridgetower answer MODEL --images cat.jpg --questions "what colour is the cat?"
              bridgetower answer --images bridgetower-demo/pictures/scene-1.png --questions "is there a circle?"

    Args:
        model: What to load; an official .ckpt needs --answers. Default: what the demo trained to answer questions.
        images: Picture files.
        questions: Questions; question n is about image n.
        top: Answers per question.
        batch_size: Questions at once.
        loading: How the model is loaded.
        truncate: Cut questions that are too long instead of refusing them.
        json: Print JSON on a terminal too.
    """
    found = answering_or_demo(model, "bridgetower answer MODEL --images FILE --questions TEXT")
    predictor, names = loading.load(found), list(map(str, images))
    chosen = predictor.answer(names, questions, top=top, **_options(batch_size, truncate))
    _emit({"image": names, "question": questions}, "answers", chosen, json=json)


def entail(
    model: Positional[Model],
    *,
    images: tuple[Path, ...],
    statements: tuple[str, ...],
    batch_size: int = 32,
    loading: Running = PLAIN_RUN,
    truncate: bool = False,
    json: bool = False,
) -> None:
    """Classify statements about images as entailment, neutral or contradiction, with a model fine-tuned on SNLI-VE.

    Gives one JSON line per statement, {"image", "statement", "judgements": [{"label", "probability"}, …]}, likeliest
    judgement first; a table on a terminal.

    Example: bridgetower entail MODEL --images cat.jpg --statements "an animal is asleep"

    Args:
        model: What to load.
        images: Picture files.
        statements: Statements; statement n is about image n.
        batch_size: Statements at once.
        loading: How the model is loaded.
        truncate: Cut statements that are too long instead of refusing them.
        json: Print JSON on a terminal too.
    """
    predictor, names = loading.load(model), list(map(str, images))
    chosen = predictor.entail(names, statements, **_options(batch_size, truncate))
    _emit({"image": names, "statement": statements}, "judgements", chosen, json=json)


def reason(
    model: Positional[Model],
    *,
    images: tuple[Path, ...],
    images_2: tuple[Path, ...],
    statements: tuple[str, ...],
    batch_size: int = 32,
    loading: Running = PLAIN_RUN,
    truncate: bool = False,
    json: bool = False,
) -> None:
    """Classify statements about two images as true or false, with a model fine-tuned on NLVR2.

    Gives one JSON line per statement, {"image", "image_2", "statement", "judgements": [{"label", "probability"}, …]},
    likeliest judgement first; a table on a terminal.

    Example: bridgetower reason MODEL --images a.jpg --images-2 b.jpg --statements "both pictures show a dog"

    Args:
        model: What to load.
        images: Picture files, the left ones.
        images_2: As many picture files, the right ones.
        statements: Statements; statement n is about image n of both.
        batch_size: Statements at once.
        loading: How the model is loaded.
        truncate: Cut statements that are too long instead of refusing them.
        json: Print JSON on a terminal too.
    """
    predictor, left, right = loading.load(model), list(map(str, images)), list(map(str, images_2))
    chosen = predictor.reason(left, right, statements, **_options(batch_size, truncate))
    _emit({"image": left, "image_2": right, "statement": statements}, "judgements", chosen, json=json)


def _options(batch_size: int, truncate: bool) -> Options:
    return {"batch_size": batch_size, "truncate": truncate, "progress": sys.stderr.isatty()}


def _emit(given: Mapping[str, Sequence[str]], name: str, chosen: Sequence[Sequence[Choice]], *, json: bool) -> None:
    """Prints what was chosen beside what was given, one row each."""
    rows = [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)]
    if json or not sys.stdout.isatty():
        emit_lines(
            row | {name: [vars(choice) for choice in choices]} for row, choices in zip(rows, chosen, strict=True)
        )
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*given, name)
    for row, choices in zip(rows, chosen, strict=True):
        chosen_lines = "\n".join(f"{one_line(choice.label)}  {choice.probability:.3f}" for choice in choices)
        table.add_row(*(Text(one_line(value)) for value in row.values()), Text(chosen_lines))
    Console().print(table)
