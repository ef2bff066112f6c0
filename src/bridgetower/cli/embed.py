"""The command that makes vectors of images, texts and pairs, a few or many."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from bridgetower.cli.options import LOADED, Loading, Model
from bridgetower.cli.output import emit_result
from bridgetower.search.config import EmbedConfig

SOURCE = arg(metavar="[SOURCE]")


def embed(
    model: Positional[Model],
    source: Annotated[Positional[str | None], SOURCE] = None,
    *,
    images: tuple[Path, ...] = (),
    texts: tuple[str, ...] = (),
    out: str | None = None,
    options: Annotated[EmbedConfig, arg(name="")] = EmbedConfig(),  # noqa: B008 - frozen
    loading: Loading = LOADED,
    json: bool = False,
) -> None:
    """Embed images, texts or pairs as vectors: a few, or those of a folder, a table or tar shards of any size.

    Without --out it prints a JSON line per vector, {"image" or "id", "text", "embedding"}. With --out it writes them to
    a file, and prints {"out", "vectors", "cut", "bad", "problems", "report", "seconds"}; killed, it is continued by
    running it again. What cannot be used is left out and named.

    Examples: bridgetower embed MODEL --images a.jpg b.jpg --texts "two dogs"
              bridgetower embed MODEL photos --out vectors.parquet
              bridgetower embed MODEL "https://host/shard-{000..099}.tar" --out vectors.lance --max-errors 1000

    Args:
        model: What to load.
        source: Folder of images, table (CSV, TSV, JSON lines, Parquet, Arrow), tar shard, .txt file with a text per
            line, folder of shards or of Parquet or Arrow files; or the URL of one (https, s3, gs, hf, …).
        images: Image files, or folders of them.
        texts: Texts.
        out: Place of the vectors, which ends in .jsonl, .parquet, .npy or .lance.
        options: How.
        loading: How the model is loaded.
        json: With --out: print JSON on a terminal too.
    """
    from bridgetower.search.embed import embed_source, given_examples, print_vectors

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
