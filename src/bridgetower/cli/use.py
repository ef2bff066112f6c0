"""The commands that use a model: vectors, matches, masked words, answers, judgements, classes, explanations."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from tyro.conf import Positional, arg

from bridgetower.cli.options import LOADED, FirstModel, Json, Loading, LoadOptions, Model
from bridgetower.cli.output import emit_result
from bridgetower.cli.rows import RowOutput, row_output
from bridgetower.extras import require
from bridgetower.inference.config import EmbedConfig, ScoreConfig, SourceConfig

if TYPE_CHECKING:
    from torch import Tensor

    from bridgetower.data.sources.example import Example
    from bridgetower.inference.embed import Embedded
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
        out: File for the results in place of printing them, which ends in .csv, .jsonl or .parquet.
        json: Print JSON on a terminal too.
    """

    batch_size: int = 32
    truncate: bool = False
    num_workers: int = 0
    out: Path | None = None
    json: bool = False

    @property
    def options(self) -> Options:
        """The arguments of a predictor's method, with a bar on a terminal."""
        return {
            "batch_size": self.batch_size,
            "truncate": self.truncate,
            "num_workers": self.num_workers,
            "progress": sys.stderr.isatty(),
        }

    def load_for(
        self,
        model: str,
        texts: Sequence[str],
        images: Sequence[Path],
        images_2: Sequence[Path] | None = None,
        *,
        top: int | None = None,
        advice: str = "",
        answers_questions: bool = False,
    ) -> Predictor:
        """Checks that images are there and go with the texts, and then loads a model, which takes seconds."""
        from bridgetower.arguments import check_at_least_1
        from bridgetower.processor.processor import pair_lists

        check_at_least_1(top=top)
        for image in (*images, *(images_2 or ())):
            image.stat()
        pair_lists(images, texts, advice, images_2=images_2)
        return self.load(model, answers_questions=answers_questions)

    def rows(self) -> AbstractContextManager[RowOutput]:
        """Opens the output of the command's results."""
        return row_output(self.out, json=self.json)


Using = Annotated[UseOptions, arg(name="")]
USED = UseOptions()


def embed_command(
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
    a file, and prints {"out", "vectors", "cut", "bad", "problems", "report", "seconds"}. After a kill, the same command
    continues. Unusable items are skipped and listed.

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
    inputs: Any = source
    if source is None:
        inputs = given_examples(images, texts, pairs=options.of == "pairs")
    if out is None:
        print_vectors(inputs, lambda: loading.load(model), options)
        return
    report = embed_source(inputs, out, lambda: loading.load(model), options, progress=True)
    emit_result({"out": out, **asdict(report)}, json=json)


def score_command(
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
    "seconds"}. After a kill, the same command continues. Unusable items are skipped and listed.

    Examples: bridgetower score MODEL photos/captions.csv --out scores.parquet
              bridgetower score MODEL "https://host/shard-{000..099}.tar" --out scores.parquet --max-errors 1000

    Args:
        source: Table (CSV, TSV, JSON lines, Parquet, Arrow), tar shard, folder of images with captions, of shards or of
            Parquet or Arrow files; or the URL of one (https, s3, gs, hf, …).
        out: File of the scores, which ends in .csv, .jsonl or .parquet.
    """
    require("search")
    from bridgetower.inference.vector_files import embed_source

    report = asdict(embed_source(source, out, lambda: loading.load(model), options, progress=True))
    emit_result({"out": out, "pairs": report.pop("vectors"), **report}, json=json)


def match_command(
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
    with using.rows() as rows:
        advice = ", or --all-pairs to match every image with every text"
        # With all pairs there may be any number of texts.
        paired_texts = texts[:1] if all_pairs else texts
        predictor = using.load_for(model, paired_texts, images, advice=advice)
        scores = predictor.match(images, texts, all_pairs=all_pairs, **using.options)
        inputs: dict[str, Sequence[object]] = {"image": images, "text": texts}
        if all_pairs:
            pairs = list(product(images, texts))
            inputs["image"] = [image for image, _ in pairs]
            inputs["text"] = [text for _, text in pairs]
        rows.add_results(inputs, predictor.reranking.measure, scores.flatten().tolist())


def fill_mask_command(
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
    with using.rows() as rows:
        predictor = using.load_for(model, texts, images, top=top)
        filled = predictor.fill_mask(images, texts, top=top, **using.options)
        filled_images = []
        filled_texts = []
        candidates = []
        for number, masks in enumerate(filled):
            # One image may go with all texts, or one text with all images.
            filled_images += [images[number % len(images)]] * len(masks)
            filled_texts += [texts[number % len(texts)]] * len(masks)
            candidates += masks
        rows.add_results({"image": filled_images, "text": filled_texts}, "words", candidates)


def explain_command(
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

    predictor = loading.load(model)
    explanation = attention_of(predictor, image, text, method=method, truncate=truncate)
    write_image(out, draw_explanation(explanation))
    result: dict[str, object] = {"image": str(image), "text": text, "method": method}
    if explanation.probability is not None:
        result["probability"] = explanation.probability
    if explanation.score is not None:
        result["score"] = explanation.score
    result["words"] = explanation.words
    result["class_token_shares"] = explanation.prefix_shares.tolist()
    result["written"] = str(out)
    emit_result(result, json=json)


def answer_command(
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
    with using.rows() as rows:
        predictor = using.load_for(model, questions, images, top=top, answers_questions=True)
        answers = predictor.answer(images, questions, top=top, **using.options)
        rows.add_results({"image": images, "question": questions}, "answers", answers)


def entail_command(
    model: FirstModel, *, images: Images, statements: Texts, using: Using = USED
) -> None:
    """Classify statements about images as entailment, neutral or contradiction, with a model fine-tuned on SNLI-VE.

    Gives one JSON line per statement, {"image", "statement", "judgements": [{"label", "probability"}, …]}, likeliest
    judgement first; a table on a terminal.

    Example: bridgetower entail MODEL --images cat.jpg --statements "an animal is asleep"

    Args:
        statements: Statements; statement n is about image n, or all about one image.
    """
    with using.rows() as rows:
        predictor = using.load_for(model, statements, images)
        judgements = predictor.entail(images, statements, **using.options)
        rows.add_results({"image": images, "statement": statements}, "judgements", judgements)


def reason_command(
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
    with using.rows() as rows:
        predictor = using.load_for(model, statements, images, images_2)
        judgements = predictor.reason(images, images_2, statements, **using.options)
        inputs = {"image": images, "image_2": images_2, "statement": statements}
        rows.add_results(inputs, "judgements", judgements)


def predict_command(
    model: FirstModel,
    head: Annotated[Positional[str], arg(metavar="HEAD")],
    *,
    images: tuple[Path, ...] = (),
    texts: Texts = (),
    images_2: tuple[Path, ...] = (),
    top: int | None = None,
    using: Using = USED,
) -> None:
    """Predict classes or a number by a head of the model, such as a custom one.

    Gives one JSON line per input, {"image", "image_2", "text", "classes": [{"label", "probability"}, …]}, likeliest
    class first, or "number" in place of the classes; a table on a terminal.

    Example: bridgetower predict RUN claim --extensions FILE.py:NAME --images a.jpg --texts "a bright square"

    Args:
        head: Name of the head.
        images: Image files; leave them out for texts alone.
        texts: Texts; text n goes with image n. Leave them out for images alone.
        images_2: As many second image files, for a head that reads two.
        top: Classes per input; all if left out.
    """
    from bridgetower.arguments import check_at_least_1

    with using.rows() as rows:
        check_at_least_1(top=top)
        columns = {"image": images, "image_2": images_2, "text": texts}
        inputs = {name: values for name, values in columns.items() if values}
        if not inputs:
            raise ValueError("nothing to predict; give --images FILE … or --texts TEXT …")
        for image in (*images, *images_2):
            image.stat()
        predictor = using.load(model)
        results = predictor.predict(
            head, images or None, texts or None, images_2 or None, top=top, **using.options
        )
        if predictor.class_names(head):
            rows.add_results(inputs, "classes", results)
        else:
            rows.add_results(inputs, "number", results.tolist())


def classify_command(
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
    """Classify images by --labels (zero-shot), or images, texts or both with a model fine-tuned on your own table.

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
    from bridgetower.arguments import check_at_least_1

    check_at_least_1(top=top)
    if source is None and not labels:
        _classify_inputs(model, images, texts, top, using)
        return
    config = SourceConfig(
        batch_size=using.batch_size,
        num_workers=using.num_workers,
        truncate=using.truncate,
        max_errors=max_errors,
    )
    if labels:
        _classify_by_labels(model, source, images, labels, templates, top, config, using)
    else:
        _classify_rows(model, cast(str, source), top, config, using)


def _classify_inputs(
    model: str, images: tuple[Path, ...], texts: Texts, top: int | None, using: UseOptions
) -> None:
    """Prints what the classification head gives of images, texts or both."""
    with using.rows() as rows:
        predictor = using.load_for(model, texts, images) if images and texts else using.load(model)
        columns = {"image": images, "text": texts}
        inputs = {name: values for name, values in columns.items() if values}
        if predictor.model.head_outputs("classification") == "number":
            numbers = predictor.estimate(images or None, texts or None, **using.options)
            rows.add_results(inputs, "number", numbers.tolist())
            return
        classes = predictor.classify(images or None, texts or None, top=top, **using.options)
        rows.add_results(inputs, "classes", classes)


def _classify_by_labels(
    model: str,
    source: str | None,
    images: tuple[Path, ...],
    labels: Texts,
    templates: Texts,
    top: int | None,
    config: SourceConfig,
    using: UseOptions,
) -> None:
    """Prints the labels of each image, by the cosine of its vector with theirs."""
    from bridgetower.data.sources.example import check_bad
    from bridgetower.data.sources.reader import read
    from bridgetower.inference.embed import embed_examples
    from bridgetower.inference.items import TEMPLATES, label_choices, prompts_of
    from bridgetower.inference.vector_files import given_examples

    with using.rows() as rows:
        prompts = prompts_of(labels, templates or TEMPLATES)
        examples = given_examples(images, (), pairs=False) if source is None else read(source)
        predictor = using.load(model)
        label_vectors = predictor.embed_texts(
            prompts, batch_size=using.batch_size, truncate=using.truncate
        )
        batches = embed_examples(predictor, examples, "images", config)
        problems: list[str] = []
        for names, _, outputs in _usable(batches, problems):
            classes = label_choices(predictor.model, outputs, label_vectors, labels, top)
            rows.add_results({"image": names}, "classes", classes)
    others = f"the classes of the others are {rows.destination}"
    check_bad(source or "the input", problems, config.max_errors, others)


def _classify_rows(
    model: str, source: str, top: int | None, config: SourceConfig, using: UseOptions
) -> None:
    """Prints what the classification head gives of each row of a source."""
    from bridgetower.data.sets.custom import joined_text
    from bridgetower.data.sources.example import check_bad
    from bridgetower.data.sources.reader import read
    from bridgetower.inference.embed import embed_examples
    from bridgetower.inference.items import choices

    with using.rows() as rows:
        examples = read(source)
        predictor = using.load(model)
        predictor.model.head(
            "classification", recipe="classification; or give labels, which need none"
        )
        is_number = predictor.model.head_outputs("classification") == "number"

        def with_text(example: Example) -> Example:
            text = joined_text(example)
            if example.images or text:
                return replace(example, texts=(text,))
            return replace(example, problem=example.problem or "it has neither image nor text")

        batches = embed_examples(predictor, map(with_text, examples), "classes", config)
        problems: list[str] = []
        for names, texts, outputs in _usable(batches, problems):
            inputs = {"id": names, "text": texts}
            if is_number:
                rows.add_results(inputs, "number", outputs[:, 0].tolist())
            else:
                classes = choices(outputs, predictor.class_names("classification"), top)
                rows.add_results(inputs, "classes", classes)
    others = f"the classes of the others are {rows.destination}"
    check_bad(source, problems, config.max_errors, others)


def _usable(
    batches: Iterable[Sequence[Embedded]], problems: list[str]
) -> Iterator[tuple[list[str], list[str], Tensor]]:
    """Yields names, first texts and outputs of the good examples of each batch; notes the problems of the others."""
    import numpy as np
    import torch

    from bridgetower.inference.embed import example_name

    for batch in batches:
        good = []
        for result in batch:
            if result.problem:
                problems.append(f"{example_name(result.example)!r}: {result.problem}")
            else:
                good.append(result)
        if good:
            names = [example_name(result.example) for result in good]
            texts = [next(iter(result.example.texts), "") for result in good]
            vectors = chain.from_iterable(result.vectors.values() for result in good)
            yield names, texts, torch.from_numpy(np.concatenate([*vectors]))
