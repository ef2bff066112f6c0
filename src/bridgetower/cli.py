"""The `bridgetower` command: verbs to functions; torch is imported only when a verb runs."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from bridgetower.cli_options import AS_USUAL, Loading, Model, Recipe
from bridgetower.cli_output import emit, emit_lines, emit_table, headline, with_options
from bridgetower.data.config import DataConfig, PairsConfig
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.training.config import RunConfig

app = tyro.extras.SubcommandApp()


@app.command(name="embed")
def _embed(
    model: Positional[Model],
    *,
    images: tuple[Path, ...] = (),
    texts: tuple[str, ...] = (),
    pairs: bool = False,
    out: Path | None = None,
    batch_size: int = 32,
    loading: Loading = AS_USUAL,
    truncate: bool = False,
) -> None:
    """Turn images, texts or pairs into vectors.

    Prints one JSON line per input: {"image" and/or "text", "embedding"}.

    Example: bridgetower embed MODEL --images a.jpg b.jpg --texts "two dogs"

    Args:
        model: What to load.
        images: Picture files.
        texts: Texts.
        pairs: Embed image n together with text n instead of each alone.
        out: Write the lines to this file instead of standard output.
        batch_size: Inputs at once.
        loading: How the model is loaded.
        truncate: Cut texts that are too long instead of refusing them.
    """
    predictor = loading.load(model)
    options: dict[str, Any] = {"batch_size": batch_size, "progress": sys.stderr.isatty()}
    rows: list[dict[str, Any]] = []
    names = [str(image) for image in images]
    if pairs:
        vectors = predictor.embed_pairs(names, texts, truncate=truncate, **options)
        rows = [
            {"image": image, "text": text, "embedding": vector}
            for image, text, vector in zip(names, texts, vectors.tolist(), strict=True)
        ]
    else:
        if not names and not texts:
            raise ValueError("nothing to embed; give --images FILE … or --texts TEXT …")
        if names:
            vectors = predictor.embed_images(names, **options).tolist()
            rows += [{"image": image, "embedding": vector} for image, vector in zip(names, vectors, strict=True)]
        if texts:
            vectors = predictor.embed_texts(texts, truncate=truncate, **options).tolist()
            rows += [{"text": text, "embedding": vector} for text, vector in zip(texts, vectors, strict=True)]
    emit_lines(rows, out)


@app.command(name="match")
def _match(
    model: Positional[Model],
    *,
    images: tuple[Path, ...],
    texts: tuple[str, ...],
    all_pairs: bool = False,
    batch_size: int = 32,
    loading: Loading = AS_USUAL,
    truncate: bool = False,
) -> None:
    """Say how well images and texts belong together.

    Prints one JSON line per pair: {"image", "text", "probability"}.

    Example: bridgetower match MODEL --images dog.jpg cat.jpg --texts "a dog" "a cat" --all-pairs

    Args:
        model: What to load.
        images: Picture files.
        texts: Texts; text n goes with image n.
        all_pairs: Score every image with every text.
        batch_size: Pairs at once.
        loading: How the model is loaded.
        truncate: Cut texts that are too long instead of refusing them.
    """
    predictor = loading.load(model)
    names = [str(image) for image in images]
    scores = predictor.match(
        names, texts, all_pairs=all_pairs, batch_size=batch_size, truncate=truncate, progress=sys.stderr.isatty()
    ).flatten()
    pairs = [(i, t) for i in names for t in texts] if all_pairs else list(zip(names, texts, strict=True))
    emit_lines(
        {"image": image, "text": text, "probability": score}
        for (image, text), score in zip(pairs, scores.tolist(), strict=True)
    )


@app.command(name="fill-mask")
def _fill_mask(
    model: Positional[Model],
    *,
    image: Path,
    text: str,
    top: int = 5,
    loading: Loading = AS_USUAL,
) -> None:
    """Fill masked words of a text about a picture.

    Prints one JSON line per mask: a list of {"word", "probability"}.

    Example: bridgetower fill-mask MODEL --image cat.jpg --text "a <mask> on a sofa"

    Args:
        model: What to load.
        image: Picture file.
        text: Text with <mask> ([MASK] for a BERT model) where a word is missing.
        top: Candidates per mask.
        loading: How the model is loaded.
    """
    predictor = loading.load(model)
    for candidates in predictor.fill_mask(str(image), text, top=top):
        emit([vars(candidate) for candidate in candidates])


@app.command(name="convert")
def _convert(
    source: Positional[str],
    destination: Positional[Path],
    *,
    to: Literal["bridgetower", "hf"],
    tokenizer: Path | None = None,
    image_size: int | None = None,
    revision: str | None = None,
) -> None:
    """Convert a checkpoint to a folder of this package or of transformers.

    Example: bridgetower convert official.ckpt my-model --to bridgetower --tokenizer roberta-base/

    Args:
        source: Hub id, folder, or official .ckpt.
        destination: New folder.
        to: bridgetower, or hf for transformers' from_pretrained.
        tokenizer: Folder or file with a tokenizer, for an official .ckpt.
        image_size: Resize the position embeddings to this many pixels.
        revision: Branch, tag or commit of a hub id.
    """
    from bridgetower.checkpoints import convert, read_checkpoint

    checkpoint = read_checkpoint(source, revision=revision, tokenizer=tokenizer)
    if image_size is not None:
        checkpoint = checkpoint.resized(image_size)
    convert(checkpoint, destination, to)
    emit({"written": str(destination), "format": to, "not_used": list(checkpoint.dropped)})


@app.command(name="prepare")
def _prepare(
    name: Positional[Literal["emoji", "flags", "pairs"]],
    source: Positional[Path | None] = None,
    *,
    out: Path,
    options: Annotated[PairsConfig, arg(name="")] = PairsConfig(),  # noqa: B008 - frozen
) -> None:
    """Make a data set: real emoji or flags from installed packages, or your own pictures with captions.

    Writes train, validation and test Parquet files and dataset.json, which says what was left out and why.

    Examples: bridgetower prepare emoji --out data/emoji
              bridgetower prepare pairs photos.csv --out data/photos

    Args:
        name: emoji and flags need `pip install 'bridgetower[demo]'`; pairs reads SOURCE.
        source: For pairs: CSV, TSV, JSON lines or Parquet with picture and caption columns, or a folder of pictures.
        out: Folder of the data set.
        options: For pairs; emoji and flags only take --seed.
    """
    from bridgetower.data.prepare import prepare, prepare_pairs

    progress = sys.stderr.isatty()
    if name == "pairs":
        if source is None:
            raise ValueError("prepare pairs needs a SOURCE: a CSV, TSV, JSON lines or Parquet file, or a folder")
        info = prepare_pairs(source, out, options, progress=progress)
    elif source is not None or options != PairsConfig(seed=options.seed):
        raise ValueError(f"prepare {name} takes no source and no option but --out and --seed")
    else:
        info = prepare(name, out, seed=options.seed, progress=progress)
    emit({"written": str(out), "splits": {split: part.images for split, part in info.splits.items()}})


@app.command(name="evaluate")
def _evaluate(
    model: Positional[Model],
    benchmark: Positional[Literal["retrieval"]],
    *,
    data: tuple[Path, ...],
    split: str = "test",
    protocol: Literal["honest", "paper"] = "honest",
    candidates: int = 128,
    max_captions: int | None = None,
    batch_size: int = 64,
    loading: Loading = AS_USUAL,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Measure a model on a prepared data set.

    Retrieval prints recall of the contrastive stage and after matching the candidates, with chance beside: a table on a
    terminal, JSON elsewhere.

    Example: bridgetower evaluate runs/nano retrieval --data data/flags --max-captions 1

    Args:
        model: What to load.
        benchmark: What to measure.
        data: Prepared data sets, ranked together.
        split: Which split.
        protocol: honest ranks each direction on its own candidates; paper on the maximum of both sides.
        candidates: Pairs per query that the second stage scores.
        max_captions: Captions per picture that are queries; default: all.
        batch_size: Items or pairs at once.
        loading: How the model is loaded.
        out: Also write the figures to this JSON file.
        json: Print JSON on a terminal too.
    """
    import torch

    from bridgetower.data.captions import CaptionImages
    from bridgetower.evaluation.retrieval import evaluate_retrieval
    from bridgetower.files import write_json

    predictor = replace(loading, precision="fp32").load(model)  # bf16: of the computation, scores stay in float32
    images = CaptionImages(DataConfig(folders=tuple(map(str, data))), split, predictor.processor)
    config = RetrievalConfig(candidates=candidates, protocol=protocol, max_captions=max_captions, batch_size=batch_size)
    with torch.autocast(predictor.device.type, dtype=torch.bfloat16, enabled=loading.precision == "bf16"):
        figures = evaluate_retrieval(predictor.model, images, config).figures()
    about = {"benchmark": benchmark, "model": predictor.source, "data": [str(folder) for folder in data]}
    report = about | {"split": split, "protocol": protocol, "candidates": candidates, **figures}
    if out is not None:
        write_json(out, report)
    if json or not sys.stdout.isatty():
        emit(report)
    else:
        title = f"{predictor.source}: {split} of {', '.join(map(str, data))}"
        emit_table(title, figures)


@app.command(name="train")
def _train(
    config: Annotated[Recipe, arg(name="")],  # type: ignore[valid-type]
    *,
    out: Path,
    resume: bool = False,
) -> None:
    """Train a recipe; every value can be changed by its option.

    Example: bridgetower train pretrain-nano --data.folders data/emoji data/flags --out runs/nano

    With several processes: torchrun --nproc-per-node 2 -m bridgetower train …

    Args:
        config: Recipe and changes to it.
        out: Folder of the run: run.json, best/, last/, metrics.jsonl, tensorboard/.
        resume: Continue the run in --out where it was stopped or killed.
    """
    from bridgetower.training.loop import Interrupted
    from bridgetower.training.run import train

    run: RunConfig = config
    try:
        figures = train(run, out, resume=resume)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM) from None
    if os.environ.get("RANK", "0") == "0":
        emit({"run": str(out), **figures})


@app.command(name="demo")
def _demo(
    *,
    out: Path = Path("bridgetower-demo"),
    minutes: float = 10.0,
    seeds: int = 1,
) -> None:
    """Pre-train small models on real pictures and compare them: the whole way, on two CPU cores.

    Prepares emoji and flags, trains a nano BridgeTower and the METER baseline at equal steps, evaluates both on
    held-out concepts and countries, writes report.html and results.json. Run again, it continues where it was cut off.

    Args:
        out: Folder for everything.
        minutes: About how long one seed takes on two cores; scales the number of training steps.
        seeds: Trainings of each model; more give a spread.
    """
    from bridgetower.demo import run_demo
    from bridgetower.training.loop import Interrupted
    from bridgetower.training.parallel import LostProcessError

    try:
        results = run_demo(out, minutes=minutes, seeds=seeds, progress=sys.stderr.isatty())
    except Interrupted as stopped:
        print(f"{stopped}; run the same command again to continue", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM) from None
    except LostProcessError as lost:
        print(f"bridgetower: {lost}", file=sys.stderr)
        raise SystemExit(1) from None
    emit({"report": str(out / "report.html"), "results": str(out / "results.json"), **headline(results.summary())})


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; user errors end with one line and exit code 2, Ctrl-C with one line and 130."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("bridgetower").setLevel(logging.INFO)
    try:
        try:
            app.cli(
                args=argv,
                prog="bridgetower",
                description="BridgeTower: embed, match and describe pictures; train and evaluate the model.",
                config=(tyro.conf.ConsolidateSubcommandArgs, tyro.conf.CascadeSubcommandArgs),
            )
        finally:
            sys.stdout.flush()  # a reader that left is noticed here, not at the end of the interpreter
    except KeyboardInterrupt:
        print("bridgetower: interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except BrokenPipeError:  # such as `| head`: what is left to print has no reader
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except (ValueError, OSError, FloatingPointError) as error:  # OSError: missing, not permitted, a full disk
        print(f"bridgetower: {with_options(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None
