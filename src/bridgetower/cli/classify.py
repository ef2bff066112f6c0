"""The command that classifies: by labels that are given, or by a head that was trained on a table of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional

from bridgetower.cli.embed import SOURCE
from bridgetower.cli.options import LOADED, Loading, Model
from bridgetower.cli.output import emit_lines
from bridgetower.cli.use import BATCHED, Batching, BatchOptions, emit_choices, repeated

if TYPE_CHECKING:
    from bridgetower.predictor import Predictor


def classify(
    model: Positional[Model],
    source: Annotated[Positional[str | None], SOURCE] = None,
    *,
    images: tuple[Path, ...] = (),
    texts: tuple[str, ...] = (),
    labels: tuple[str, ...] = (),
    templates: tuple[str, ...] = (),
    top: int | None = None,
    max_errors: int = 0,
    batching: Batching = BATCHED,
    loading: Loading = LOADED,
    json: bool = False,
) -> None:
    """Classify images by --labels (zero-shot); or images, texts or both with a model fine-tuned on your own table.

    With --labels the vector of an image is compared with that of each label. Without, a head that was trained on a
    table classifies; where several classes may hold, each probability is of that class alone.

    Gives one JSON line per input, {"image", "text", "classes": [{"label", "probability"}, …]}, likeliest class first; a
    table on a terminal. A model that was trained on numbers gives {"image", "text", "number"}.

    Examples: bridgetower classify MODEL photos --labels cat dog "a horse and its rider"
              bridgetower classify MODEL photos --labels cat dog --templates "a photo of a {}" "a drawing of a {}"
              bridgetower classify MODEL --images meme.png --texts "look how many people love you"

    Args:
        model: What to load.
        source: With --labels: folder of images, table, tar shard, or folder of such, here or at a URL.
        images: Image files, with --labels also folders of them; leave them out to classify texts alone.
        texts: Texts; text n goes with image n. Leave them out to classify images alone. Not with --labels.
        labels: Two or more classes.
        templates: Texts with {} where a label goes, whose vectors are averaged; default: "{}" and three that name a
            photo, a picture and an image.
        top: Classes per input; all if left out.
        max_errors: With --labels: images that may be left out because they cannot be used; each is named.
        batching: How inputs are computed.
        loading: How the model is loaded.
        json: Print JSON on a terminal too.
    """
    if source is not None and (images or texts):
        raise ValueError(f"both {source} and --images or --texts are given; expected one of them")
    if source is None and not images and not texts:
        raise ValueError("nothing to classify; give a SOURCE or --images FILE … with --labels, or --texts TEXT …")
    if labels and texts:
        raise ValueError("labels are compared with images alone; give images and no texts")
    if not labels and (source is not None or templates or max_errors):
        raise ValueError("no labels are given, which a source, --templates and --max-errors need; give --labels A B …")
    from bridgetower.inference import check_top

    check_top(top)
    predictor = loading.load(model)
    if not labels:
        _by_head(predictor, [str(image) for image in images], list(texts), top, batching, json)
        return
    import numpy as np
    import torch

    from bridgetower.data.reader import read
    from bridgetower.search.config import SourceConfig
    from bridgetower.search.embed import check_bad, embedded, given_examples, name_of
    from bridgetower.zero_shot import TEMPLATES, label_choices, prompts_of

    prompts = predictor.embed_texts(
        prompts_of(labels, templates or TEMPLATES), batch_size=batching.batch_size, truncate=batching.truncate
    )
    examples = given_examples(images, (), pairs=False) if source is None else read(source)
    config = SourceConfig(batch_size=batching.batch_size, num_workers=batching.num_workers)
    problems: list[str] = []
    for batch in embedded(predictor, examples, "images", config):
        problems += [f"{name_of(one.example)!r}: {one.problem}" for one in batch if one.problem]
        if good := [one for one in batch if not one.problem]:
            vectors = torch.from_numpy(np.array([one.image_vector for one in good]))
            chosen = label_choices(predictor.model, vectors, prompts, labels, top)
            emit_choices({"image": [name_of(one.example) for one in good]}, "classes", chosen, json=json)
    check_bad(source or "the input", problems, len(problems), max_errors, "the classes of the others are printed")


def _by_head(
    predictor: Predictor, images: list[str], texts: list[str], top: int | None, batching: BatchOptions, json: bool
) -> None:
    given = {name: values for name, values in (("image", images), ("text", texts)) if values}
    inputs = images or None, texts or None
    if predictor.model.config.heads.predicts_number("classification"):
        numbers = predictor.estimate(*inputs, **batching.options()).tolist()
        rows = zip(repeated(*given.values()), numbers, strict=True)
        emit_lines(dict(zip((*given, "number"), (*inputs, number), strict=True)) for inputs, number in rows)
        return
    emit_choices(given, "classes", predictor.classify(*inputs, top=top, **batching.options()), json=json)
