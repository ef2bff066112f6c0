"""The commands that use a model: vectors, matches, masked words, answers, judgements, classes, explanations."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from bridgetower.cli.options import LOADED, FirstModel, Json, Loading, LoadOptions, Model
from bridgetower.cli.output import emit_result, emit_results
from bridgetower.extras import require
from bridgetower.inference.config import EmbedConfig, ScoreConfig, SourceConfig

if TYPE_CHECKING:
    from bridgetower.inference.items import Choice
    from bridgetower.inference.predictor import Options, Predictor

Images = Annotated[tuple[Path, ...], arg(help="Image files.")]
Texts = tuple[str, ...]
Source = Positional[str | None]


@dataclass(frozen=True, kw_only=True)
class UseOptions(LoadOptions):
    """How a model is loaded and used.

    Attributes:
        batch_size: Inputs at once.
        truncate: Cut texts that are too long instead of refusing them.
        num_workers: Processes that decode images while others are computed; 0 decodes here, for a GPU in threads.
        json: Print JSON on a terminal too.
    """

    batch_size: int = 32
    truncate: bool = False
    num_workers: int = 0
    json: bool = False

    @property
    def options(self) -> Options:
        """The arguments of a predictor's method, with a bar on a terminal."""
        chosen = {
            "batch_size": self.batch_size,
            "truncate": self.truncate,
            "num_workers": self.num_workers,
        }
        return {**chosen, "progress": sys.stderr.isatty()}  # type: ignore[typeddict-item]

    def load_for(
        self,
        model: str,
        texts: Sequence[str],
        *images: Sequence[Path],
        top: int | None = None,
        advice: str = "",
        **which: bool,
    ) -> Predictor:
        """Returns a model, loaded once it is known that images are there and go with texts."""
        from bridgetower.arguments import check_at_least_1
        from bridgetower.processor.processor import pair_lists

        check_at_least_1(top=top)
        for image in chain(*images):
            image.stat()
        pair_lists(images[0], texts, advice, images_2=images[1] if images[1:] else None)
        return self.load(model, **which)

    def emit(
        self,
        given: Mapping[str, Sequence[object]],
        name: str,
        found: Iterable[float | Sequence[Choice]],
    ) -> None:
        """Prints what was found beside what was given, of which a single one goes with all of the others."""
        count = max(map(len, given.values()))
        columns = [list(each) * (count if len(each) == 1 else 1) for each in given.values()]
        values = [one if isinstance(one, float) else list(map(vars, one)) for one in found]
        rows = zip(*columns, values, strict=True)
        emit_results((dict(zip((*given, name), row, strict=True)) for row in rows), json=self.json)


Using = Annotated[UseOptions, arg(name="")]
USED = UseOptions()


def embed(
    model: FirstModel,
    source: Source = None,
    *,
    images: tuple[Path, ...] = (),
    texts: Texts = (),
    out: str | None = None,
    options: Annotated[EmbedConfig, arg(name="")] = EmbedConfig(),  # noqa: B008 - frozen
    loading: Loading = LOADED,
    json: Json = False,
) -> None:
    """Embed images, texts or pairs as vectors: a few, or those of a folder, a table or tar shards of any size.

    Without --out it prints a JSON line per vector, {"image" or "id", "text", "embedding"}. With --out it writes them to
    a file, and prints {"out", "vectors", "cut", "bad", "problems", "report", "seconds"}; killed, it is continued by
    running it again. What cannot be used is left out and named.

    Examples: bridgetower embed MODEL --images a.jpg b.jpg --texts "two dogs"
              bridgetower embed MODEL photos --out vectors.parquet
              bridgetower embed MODEL "https://host/shard-{000..099}.tar" --out vectors.lance --max-errors 1000

    Args:
        source: Folder of images, table (CSV, TSV, JSON lines, Parquet, Arrow), tar shard, .txt file with a text per
            line, folder of shards or of Parquet or Arrow files; or the URL of one (https, s3, gs, hf, …).
        images: Image files, or folders of them.
        texts: Texts.
        out: Place of the vectors, which ends in .jsonl, .parquet, .npy or .lance.
    """
    if out is not None:
        require("search")
    from bridgetower.inference.vector_files import embed_source, given_examples, print_vectors

    if source is None and not images and not texts:
        raise ValueError("nothing to embed; give a SOURCE, --images FILE … or --texts TEXT …")
    if source is not None and (images or texts):
        raise ValueError(f"both {source} and --images or --texts are given; expected one of them")
    given = given_examples(images, texts, pairs=options.of == "pairs") if source is None else source
    if out is None:
        print_vectors(given, lambda: loading.load(model), options)
    else:
        report = embed_source(given, out, lambda: loading.load(model), options, progress=True)
        emit_result({"out": out, **asdict(report)}, json=json)


def score(
    model: FirstModel,
    source: Annotated[Positional[str], arg(metavar="SOURCE")],
    *,
    out: str,
    options: Annotated[ScoreConfig, arg(name="")] = ScoreConfig(),  # noqa: B008 - frozen
    loading: Loading = LOADED,
    json: Json = False,
) -> None:
    """Score every image with its texts, of a folder, a table or tar shards of any size, to filter or choose data.

    Writes a row per pair: id, text, file and row (from 0) of the source, cosine, and the probability of a match, or
    "score" if the checkpoint has no calibration. Prints {"out", "pairs", "cut", "bad", "problems", "report",
    "seconds"}. Killed, it is continued by running it again; what cannot be used is left out and named.

    Examples: bridgetower score MODEL photos/captions.csv --out scores.parquet
              bridgetower score MODEL "https://host/shard-{000..099}.tar" --out scores.parquet --max-errors 1000

    Args:
        source: Table (CSV, TSV, JSON lines, Parquet, Arrow), tar shard, folder of images with captions, of shards or of
            Parquet or Arrow files; or the URL of one (https, s3, gs, hf, …).
        out: File of the scores, which ends in .parquet.
    """
    require("search")
    from bridgetower.inference.vector_files import embed_source

    report = asdict(embed_source(source, out, lambda: loading.load(model), options, progress=True))
    emit_result({"out": out, "pairs": report.pop("vectors"), **report}, json=json)


def match(
    model: FirstModel, *, images: Images, texts: Texts, all_pairs: bool = False, using: Using = USED
) -> None:
    """Score how well images and texts match.

    Gives one JSON line per pair, {"image", "text", "probability"}, or "score" if the checkpoint has no calibration; a
    table on a terminal.

    Example: bridgetower match MODEL --images dog.jpg cat.jpg --texts "a dog" "a cat" --all-pairs

    Args:
        texts: Texts; text n goes with image n, one with all images, and all with one image.
        all_pairs: Score every image with every text.
    """
    advice = ", or --all-pairs to match every image with every text"
    predictor = using.load_for(model, texts[:1] if all_pairs else texts, images, advice=advice)
    names = list(map(str, images))
    scores = predictor.match(names, texts, all_pairs=all_pairs, **using.options).flatten().tolist()
    if all_pairs:
        names, texts = [name for name in names for _ in texts], texts * len(names)
    using.emit({"image": names, "text": texts}, predictor.reranking.shown, scores)


def fill_mask(
    model: FirstModel, *, images: Images, texts: Texts, top: int = 5, using: Using = USED
) -> None:
    """Fill masked words of texts about images.

    Gives one JSON line per mask, {"image", "text", "words": [{"word", "probability"}, …]}, likeliest word first; a
    table on a terminal.

    Example: bridgetower fill-mask MODEL --images cat.jpg --texts "a <mask> on a sofa"

    Args:
        texts: Texts with <mask> ([MASK] for a BERT model) where a word is missing; text n goes with image n.
        top: Candidates per mask.
    """
    names = list(map(str, images))
    filled = using.load_for(model, texts, images, top=top).fill_mask(
        names, texts, top=top, **using.options
    )
    found = [
        {
            "image": names[number % len(names)],
            "text": texts[number % len(texts)],
            "words": list(map(vars, words)),
        }
        for number, masks in enumerate(filled)
        for words in masks
    ]
    emit_results(found, json=using.json)


def explain(
    image: Positional[Path],
    text: Positional[str],
    *,
    out: Path,
    model: Model,
    method: Literal["attention", "gradcam"] = "attention",
    loading: Loading = LOADED,
    truncate: bool = False,
    json: Json = False,
) -> None:
    """Draw where each word of a text looks in an image, or what of it decides the match, as heat maps by layer.

    Gives one JSON line, {"image", "text", "method", "probability", "words", "class_token_shares", "written"}, or
    "score" in place of the probability if the checkpoint has no calibration. The shares, a list per layer with a number
    per word, are what went to the class token; each map shows the rest.

    Example: bridgetower explain cat.jpg "a cat on a sofa" --method gradcam --out map.png --model MODEL

    Args:
        image: Image file.
        text: A text about it.
        out: Image file to draw into.
        method: Draw the cross-attention, or its Grad-CAM, weighed by the gradient of the matching head.
        truncate: Cut a text that is too long instead of refusing it.
    """
    require("plot")
    from bridgetower.drawing import require_image_name, write_image
    from bridgetower.inference.attention import draw_explanation
    from bridgetower.inference.attention import explain as attention_of

    require_image_name(out)
    image.stat()

    found = attention_of(loading.load(model), str(image), text, method=method, truncate=truncate)
    write_image(out, draw_explanation(found))
    value = {
        "image": str(image),
        "text": text,
        "method": method,
        **{
            name: value
            for name in ("probability", "score")
            if (value := getattr(found, name)) is not None
        },
        "words": found.words,
        "class_token_shares": found.prefix_shares.tolist(),
        "written": str(out),
    }
    emit_result(value, json=json)


def answer(
    model: FirstModel, *, images: Images, questions: Texts, top: int = 5, using: Using = USED
) -> None:
    """Answer questions about images, with a model fine-tuned on VQA.

    Gives one JSON line per question, {"image", "question", "answers": [{"label", "probability"}, …]}, likeliest answer
    first; a table on a terminal. Each probability is of that answer alone: they do not sum to one.

    Examples: bridgetower answer MODEL --images cat.jpg --questions "what colour is the cat?"
              bridgetower answer demo --images bridgetower-demo/images/scene-1.png --questions "is there a circle?"

    Args:
        questions: Questions; question n is about image n, or all about one image.
        top: Answers per question.
    """
    predictor = using.load_for(model, questions, images, top=top, answers_questions=True)
    names = list(map(str, images))
    chosen = predictor.answer(names, questions, top=top, **using.options)
    using.emit({"image": names, "question": questions}, "answers", chosen)


def entail(model: FirstModel, *, images: Images, statements: Texts, using: Using = USED) -> None:
    """Classify statements about images as entailment, neutral or contradiction, with a model fine-tuned on SNLI-VE.

    Gives one JSON line per statement, {"image", "statement", "judgements": [{"label", "probability"}, …]}, likeliest
    judgement first; a table on a terminal.

    Example: bridgetower entail MODEL --images cat.jpg --statements "an animal is asleep"

    Args:
        statements: Statements; statement n is about image n, or all about one image.
    """
    names = list(map(str, images))
    chosen = using.load_for(model, statements, images).entail(names, statements, **using.options)
    using.emit({"image": names, "statement": statements}, "judgements", chosen)


def reason(
    model: FirstModel,
    *,
    images: tuple[Path, ...],
    images_2: tuple[Path, ...],
    statements: Texts,
    using: Using = USED,
) -> None:
    """Classify statements about two images as true or false, with a model fine-tuned on NLVR2.

    Gives one JSON line per statement, {"image", "image_2", "statement", "judgements": [{"label", "probability"}, …]},
    likeliest judgement first; a table on a terminal.

    Example: bridgetower reason MODEL --images a.jpg --images-2 b.jpg --statements "both images show a dog"

    Args:
        images: Image files, the left ones.
        images_2: As many image files, the right ones.
        statements: Statements; statement n is about image n of both.
    """
    left, right = list(map(str, images)), list(map(str, images_2))
    chosen = using.load_for(model, statements, images, images_2).reason(
        left, right, statements, **using.options
    )
    using.emit({"image": left, "image_2": right, "statement": statements}, "judgements", chosen)


def classify(
    model: FirstModel,
    source: Source = None,
    *,
    images: tuple[Path, ...] = (),
    texts: Texts = (),
    labels: Texts = (),
    templates: Texts = (),
    top: int | None = None,
    max_errors: int = 0,
    using: Using = USED,
) -> None:
    """Classify images by --labels (zero-shot); or images, texts or both with a model fine-tuned on your own table.

    With --labels the vector of an image is compared with that of each label. Without, a head that was trained on a
    table classifies; where several classes may hold, each probability is of that class alone.

    Gives one JSON line per input, {"image", "text", "classes": [{"label", "probability"}, …]}, likeliest class first; a
    table on a terminal; of a source without --labels {"id", "text", "classes"}, with the name of the row or its image.
    A model that was trained on numbers gives "number" in place of the classes.

    Examples: bridgetower classify MODEL photos --labels cat dog "a horse and its rider"
              bridgetower classify MODEL photos --labels cat dog --templates "a photo of a {}" "a drawing of a {}"
              bridgetower classify MODEL memes.csv
              bridgetower classify MODEL --images meme.png --texts "look how many people love you"

    Args:
        source: Folder of images, table, tar shard, or folder of such, here or at a URL. Without --labels a row may lack
            the image or the text.
        images: Image files, with --labels also folders of them; leave them out to classify texts alone.
        texts: Texts; text n goes with image n. Leave them out to classify images alone. Not with --labels.
        labels: Two or more classes.
        templates: Texts with {} where a label goes, whose vectors are averaged; default: "{}", "a photo of a {}", "a
            picture of a {}" and "an image of a {}".
        top: Classes per input; all if left out.
        max_errors: Images or rows that may be left out because they cannot be used; each is named.
    """
    if source is not None and (images or texts):
        raise ValueError(f"both {source} and --images or --texts are given; expected one of them")
    if source is None and not images and not texts:
        raise ValueError("nothing to classify; give a SOURCE, --images FILE … or --texts TEXT …")
    if labels and texts:
        raise ValueError("labels are compared with images alone; give images and no texts")
    if not labels and (templates or (max_errors and source is None)):
        raise ValueError(
            "no labels are given, which --templates and --max-errors without a SOURCE need; give --labels"
        )
    import numpy as np
    import torch

    from bridgetower.arguments import check_at_least_1
    from bridgetower.data.sets.custom import joined_text
    from bridgetower.data.sources.example import check_bad
    from bridgetower.data.sources.reader import read
    from bridgetower.inference.embed import embed_examples, example_name
    from bridgetower.inference.items import TEMPLATES, choices, label_choices, prompts_of
    from bridgetower.inference.vector_files import given_examples

    check_at_least_1(top=top)
    config = SourceConfig(
        batch_size=using.batch_size,
        num_workers=using.num_workers,
        truncate=using.truncate,
        max_errors=max_errors,
    )
    prompts = prompts_of(labels, templates or TEMPLATES) if labels else []
    examples = given_examples(images, (), pairs=False) if source is None else read(source)
    predictor = using.load_for(model, texts, images) if images and texts else using.load(model)
    is_number = not labels and predictor.model.config.heads.predicts_number("classification")
    name = "number" if is_number else "classes"
    if source is None and not labels:
        given = {
            key: values
            for key, values in (("image", [*map(str, images)]), ("text", texts))
            if values
        }
        inputs = given.get("image"), texts or None
        judged = predictor.estimate(*inputs, **using.options).tolist() if is_number else None
        using.emit(given, name, judged or predictor.classify(*inputs, top=top, **using.options))
        return
    if labels:
        vectors = predictor.embed_texts(
            prompts, batch_size=using.batch_size, truncate=using.truncate
        )
        found = embed_examples(predictor, examples, "images", config)
    else:
        predictor.model.head(
            "classification", recipe="classification; or give labels, which need none"
        )
        completed = (
            replace(one, texts=(joined_text(one),))
            if one.images or joined_text(one)
            else replace(one, problem=one.problem or "it has neither image nor text")
            for one in examples
        )
        found = embed_examples(predictor, completed, "classes", config)
    problems: list[str] = []
    for batch in found:
        problems += [
            f"{example_name(one.example)!r}: {one.problem}" for one in batch if one.problem
        ]
        if good := [one for one in batch if not one.problem]:
            names = [example_name(one.example) for one in good]
            outputs = torch.from_numpy(
                np.concatenate([*chain.from_iterable(one.vectors.values() for one in good)])
            )
            if labels:
                using.emit(
                    {"image": names},
                    name,
                    label_choices(predictor.model, outputs, vectors, labels, top),
                )
                continue
            chosen = (
                outputs[:, 0].tolist()
                if is_number
                else choices(outputs, predictor.class_names("classification"), top)
            )
            using.emit({"id": names, "text": [one.example.texts[0] for one in good]}, name, chosen)
    check_bad(source or "the input", problems, max_errors, "the classes of the others are printed")
