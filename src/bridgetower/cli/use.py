"""The commands that use a model on a few inputs: matches, masked words, answers, explanations."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from bridgetower.cli.options import LOADED, Loading, Model
from bridgetower.cli.output import emit_lines, emit_result, emit_results, emit_rows, is_json
from bridgetower.extras import require
from bridgetower.files import one_line, require_parent

if TYPE_CHECKING:
    from bridgetower.inference import Choice
    from bridgetower.predictor import Options


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How inputs are computed.

    Attributes:
        batch_size: Inputs at once.
        truncate: Cut texts that are too long instead of refusing them.
        num_workers: Processes that decode images while others are computed; 0 decodes in this one.
    """

    batch_size: int = 32
    truncate: bool = False
    num_workers: int = 0

    def options(self) -> Options:
        """Returns the arguments of a predictor's method, with a bar on a terminal."""
        return {**vars(self), "progress": sys.stderr.isatty()}  # type: ignore[typeddict-item]


Batching = Annotated[BatchOptions, arg(name="")]
BATCHED = BatchOptions()


def match(
    model: Positional[Model],
    *,
    images: tuple[Path, ...],
    texts: tuple[str, ...],
    all_pairs: bool = False,
    batching: Batching = BATCHED,
    loading: Loading = LOADED,
    json: bool = False,
) -> None:
    """Score how well images and texts match.

    Gives one JSON line per pair, {"image", "text", "probability"}, or "score" if the checkpoint has no calibration; a
    table on a terminal.

    Example: bridgetower match MODEL --images dog.jpg cat.jpg --texts "a dog" "a cat" --all-pairs

    Args:
        model: What to load.
        images: Image files.
        texts: Texts; text n goes with image n, one with all images, and all with one image.
        all_pairs: Score every image with every text.
        batching: How inputs are computed.
        loading: How the model is loaded.
        json: Print JSON on a terminal too.
    """
    predictor = loading.load(model)
    names = [str(image) for image in images]
    scores = predictor.match(names, texts, all_pairs=all_pairs, **batching.options()).flatten()
    pairs = [(i, t) for i in names for t in texts] if all_pairs else repeated(names, texts)
    rows = (
        {"image": image, "text": text, predictor.reranking.shown: score}
        for (image, text), score in zip(pairs, scores.tolist(), strict=True)
    )
    emit_results(rows, json=json)


def fill_mask(
    model: Positional[Model],
    *,
    images: tuple[Path, ...],
    texts: tuple[str, ...],
    top: int = 5,
    batching: Batching = BATCHED,
    loading: Loading = LOADED,
    json: bool = False,
) -> None:
    """Fill masked words of texts about images.

    Gives one JSON line per mask, {"image", "text", "words": [{"word", "probability"}, …]}, likeliest word first; a
    table on a terminal.

    Example: bridgetower fill-mask MODEL --images cat.jpg --texts "a <mask> on a sofa"

    Args:
        model: What to load.
        images: Image files.
        texts: Texts with <mask> ([MASK] for a BERT model) where a word is missing; text n goes with image n.
        top: Candidates per mask.
        batching: How inputs are computed.
        loading: How the model is loaded.
        json: Print JSON on a terminal too.
    """
    predictor = loading.load(model)
    names = [str(image) for image in images]
    filled = predictor.fill_mask(names, texts, top=top, **batching.options())
    rows = (
        {"image": image, "text": text, "words": [vars(word) for word in words]}
        for (image, text), masks in zip(repeated(names, texts), filled, strict=True)
        for words in masks
    )
    emit_results(rows, json=json)


def explain(
    image: Positional[Path],
    text: Positional[str],
    *,
    out: Path,
    model: Model,
    loading: Loading = LOADED,
    truncate: bool = False,
    json: bool = False,
) -> None:
    """Draw the cross-attention of each word of a text over an image as heat maps, layer by layer.

    Gives one JSON line, {"image", "text", "probability", "words", "class_token_shares", "written"}, or "score" in place
    of the probability if the checkpoint has no calibration. The shares, a list per layer with a number per word, are
    what went to the class token; each map shows the rest and sums to 1.

    Example: bridgetower explain cat.jpg "a cat on a sofa" --out map.png --model MODEL

    Args:
        image: Image file.
        text: A text about it.
        out: Image file to draw into.
        model: What to load.
        loading: How the model is loaded.
        truncate: Cut a text that is too long instead of refusing it.
        json: Print JSON on a terminal too.
    """
    require("plot")
    require_parent(out)
    from bridgetower.attention import explain as attention_of
    from bridgetower.attention_drawing import draw_explanation
    from bridgetower.drawing import write_image

    found = attention_of(loading.load(model), str(image), text, truncate=truncate)
    write_image(out, draw_explanation(found))
    value = {
        "image": str(image),
        "text": text,
        **{name: value for name in ("probability", "score") if (value := getattr(found, name)) is not None},
        "words": found.words,
        "class_token_shares": found.prefix_shares.tolist(),
        "written": str(out),
    }
    emit_result(value, json=json)


def answer(
    model: Positional[Model],
    *,
    images: tuple[Path, ...],
    questions: tuple[str, ...],
    top: int = 5,
    batching: Batching = BATCHED,
    loading: Loading = LOADED,
    json: bool = False,
) -> None:
    """Answer questions about images, with a model fine-tuned on VQA.

    Gives one JSON line per question, {"image", "question", "answers": [{"label", "probability"}, …]}, likeliest answer
    first; a table on a terminal. Each probability is of that answer alone: they do not sum to one.

    Examples: bridgetower answer MODEL --images cat.jpg --questions "what colour is the cat?"
              bridgetower answer demo --images bridgetower-demo/images/scene-1.png --questions "is there a circle?"

    Args:
        model: What to load; an official .ckpt needs --answers.
        images: Image files.
        questions: Questions; question n is about image n, or all about one image.
        top: Answers per question.
        batching: How inputs are computed.
        loading: How the model is loaded.
        json: Print JSON on a terminal too.
    """
    predictor, names = loading.load(model, answers_questions=True), list(map(str, images))
    chosen = predictor.answer(names, questions, top=top, **batching.options())
    emit_choices({"image": names, "question": questions}, "answers", chosen, json=json)


def entail(
    model: Positional[Model],
    *,
    images: tuple[Path, ...],
    statements: tuple[str, ...],
    batching: Batching = BATCHED,
    loading: Loading = LOADED,
    json: bool = False,
) -> None:
    """Classify statements about images as entailment, neutral or contradiction, with a model fine-tuned on SNLI-VE.

    Gives one JSON line per statement, {"image", "statement", "judgements": [{"label", "probability"}, …]}, likeliest
    judgement first; a table on a terminal.

    Example: bridgetower entail MODEL --images cat.jpg --statements "an animal is asleep"

    Args:
        model: What to load.
        images: Image files.
        statements: Statements; statement n is about image n, or all about one image.
        batching: How inputs are computed.
        loading: How the model is loaded.
        json: Print JSON on a terminal too.
    """
    predictor, names = loading.load(model), list(map(str, images))
    chosen = predictor.entail(names, statements, **batching.options())
    emit_choices({"image": names, "statement": statements}, "judgements", chosen, json=json)


def reason(
    model: Positional[Model],
    *,
    images: tuple[Path, ...],
    images_2: tuple[Path, ...],
    statements: tuple[str, ...],
    batching: Batching = BATCHED,
    loading: Loading = LOADED,
    json: bool = False,
) -> None:
    """Classify statements about two images as true or false, with a model fine-tuned on NLVR2.

    Gives one JSON line per statement, {"image", "image_2", "statement", "judgements": [{"label", "probability"}, …]},
    likeliest judgement first; a table on a terminal.

    Example: bridgetower reason MODEL --images a.jpg --images-2 b.jpg --statements "both images show a dog"

    Args:
        model: What to load.
        images: Image files, the left ones.
        images_2: As many image files, the right ones.
        statements: Statements; statement n is about image n of both.
        batching: How inputs are computed.
        loading: How the model is loaded.
        json: Print JSON on a terminal too.
    """
    predictor, left, right = loading.load(model), list(map(str, images)), list(map(str, images_2))
    chosen = predictor.reason(left, right, statements, **batching.options())
    emit_choices({"image": left, "image_2": right, "statement": statements}, "judgements", chosen, json=json)


def repeated(*given: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns what goes together; a single one goes with all of the others."""
    count = max(map(len, given))
    return list(zip(*(list(each) * (count if len(each) == 1 else 1) for each in given), strict=True))


def emit_choices(
    given: Mapping[str, Sequence[str]], name: str, chosen: Sequence[Sequence[Choice]], *, json: bool
) -> None:
    """Prints what was chosen beside what was given, one row each."""
    rows = [dict(zip(given, values, strict=True)) for values in repeated(*given.values())]
    if is_json(json):
        emit_lines(
            row | {name: [vars(choice) for choice in choices]} for row, choices in zip(rows, chosen, strict=True)
        )
        return
    lines = ["\n".join(f"{one_line(one.label)}  {one.probability:.3f}" for one in choices) for choices in chosen]
    shown = [(*map(one_line, row.values()), likeliest) for row, likeliest in zip(rows, lines, strict=True)]
    emit_rows(None, (*given, name), shown, texts=range(len(given) + 1))
