"""The commands of search: index, search, duplicates, mcp."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from bridgetower.cli.options import LOADED, Json, Loading, Model, resolve_demo
from bridgetower.cli.output import emit, emit_next_command, emit_result, emit_results, is_json
from bridgetower.extras import require
from bridgetower.search.config import Against, IndexConfig

if TYPE_CHECKING:
    from bridgetower.search.indexed import Hit


def index_command(
    sources: Annotated[Positional[list[str]], arg(metavar="SOURCE [SOURCE ...]")],
    *,
    out: str,
    model: Model,
    options: Annotated[IndexConfig, arg(name="")] = IndexConfig(),  # noqa: B008 - frozen
    loading: Loading = LOADED,
    json: Json = False,
) -> None:
    """Embed images of folders, tables or tar shards, or moments of videos, into an index for `bridgetower search`.

    Reads JPEG, PNG, WebP, GIF, BMP, TIFF and AVIF. HEIC needs the extra `heic`, videos need `video`. Each caption gets
    a vector of its own, and one together with its image. Run again, the command embeds new and changed images and
    removes deleted ones. After a kill, run it again too.

    Examples: bridgetower index photos --out photos.lance --model MODEL
              bridgetower index photos/captions.csv --out photos.lance --model MODEL
              bridgetower index talk.mp4 lectures --out talks.lance --model MODEL

    Args:
        sources: Folders of images, perhaps with a NAME.txt of captions beside NAME.jpg, tables (CSV, TSV, JSON lines,
            Parquet, Arrow), tar shards, folders of shards or of Parquet or Arrow files; videos, perhaps with subtitles
            NAME.vtt or NAME.srt beside NAME.mp4. Each may also be a URL.
        out: Folder of the index, its name ending in .lance; or the URI of one in an object store, such as
            s3://bucket/photos.lance.
    """
    require("search")
    from bridgetower.search.build import build_index

    report = build_index(sources, out, lambda: loading.load(model), options, progress=True)
    emit_result({"index": out, **asdict(report)}, json=json, next_command=("search", out, "TEXT"))


@dataclass(frozen=True, kw_only=True)
class QueryOptions:
    """Which images are found, and how they are ranked.

    Attributes:
        top: Hits to show.
        rerank: How many of the nearest images are matched with the text; 0 keeps the order by vectors. Default: 64, or
            0 if matching did not rank better when the model was validated, and 0 for words of videos.
        where: Condition in SQL on path, size (bytes), mtime, width, height, captions, and start and end (of moments).
        against: What the query is compared with: the images, their captions, or both together (pairs); the words of
            captions and transcripts; or words and vectors (hybrid). Default: images. A text alone is also compared with
            what is said in videos; hits by transcript and hits by image then alternate. If the model cannot compare a
            text or an image alone with pairs, a text is compared with captions and an image with images, and a warning
            says so.
        exact: Compare the query with every vector, even if the index was made with --ann.
        batch_size: Images matched at once.
        truncate: Cut a text that is too long instead of refusing it.
    """

    top: int = 10
    rerank: int | None = None
    where: str | None = None
    against: Against | None = None
    exact: bool = False
    batch_size: int = 32
    truncate: bool = False


def search_command(
    index: Annotated[Positional[str], arg(metavar="INDEX.lance")],
    text: Positional[str | None] = None,
    *,
    image: Path | None = None,
    query: Annotated[QueryOptions, arg(name="")] = QueryOptions(),
    model: Model | None = None,
    root: Path | None = None,
    sheet: Path | None = None,
    loading: Loading = LOADED,
    json: Json = False,
) -> None:
    """Search an index by a text, by an image, or by both.

    The images whose vectors are nearest are matched with the text, and the best match comes first. On a terminal it
    prints a table, elsewhere a JSON line for each hit: {"rank", "digest", "path", "size", "file", "against", "cosine",
    "rank_score", "width", "height", "captions"}. A query of text alone adds "weak". A match adds "probability", or
    "score" if the model has no calibration. A moment of a video adds "start", "end", "transcript" and "link".

    Examples: bridgetower search photos.lance "two dogs in the snow" --sheet hits.png
              bridgetower search photos.lance --image dog.jpg --where "width > 800"

    Args:
        index: What `bridgetower index` made, its name ending in .lance, or the word demo.
        text: Description of the images to find.
        image: Find images similar to this one; with a text, both count equally in finding candidates.
        model: Model to load; default: the model that the index was made with.
        root: Folder of the images, if it is elsewhere now.
        sheet: Also draw the hits into this image file.
    """
    require("search")
    if sheet is not None:
        require("plot")
        from bridgetower.drawing import require_image_name, write_image
        from bridgetower.search.sheet import contact_sheet

        require_image_name(sheet)
    from bridgetower.search.searcher import check_query

    # Search.
    check_query(text, image, top=query.top, rerank=query.rerank, against=query.against)
    searcher = loading.open_index(index, root, model)
    hits = searcher.search(text, image, **vars(query))
    if sheet is not None:
        drawing = contact_sheet(hits, searcher.index.content, text=text, image=image)
        write_image(sheet, drawing)

    # Print the hits.
    if is_json(json):
        for rank, hit in enumerate(hits, start=1):
            emit({"rank": rank, **_values(hit)})
    elif hits:
        rows = [{"": rank, **_cells(hit)} for rank, hit in enumerate(hits, start=1)]
        emit_results(rows, json=False)
        emit_next_command("serve", "--index", searcher.index.uri)
    if not hits:
        reason = "has a caption"
        if query.where:
            reason = "meets the condition"
        elif query.against == "words":
            reason = "has these words"
        print(f"No image {reason}.", file=sys.stderr)
    elif all(hit.weak for hit in hits):
        print(
            "All hits are weak: unrelated texts find images that are just as near.",
            file=sys.stderr,
        )


def mcp_command(
    index: Annotated[Positional[str], arg(metavar="INDEX.lance")],
    *,
    model: Model | None = None,
    answer_model: Model | None = None,
    root: Path | None = None,
    loading: Loading = LOADED,
) -> None:
    """Let agents search an index: a Model Context Protocol server over stdin and stdout.

    Enter this command in the configuration of the agent. The server's tools are search_images, find_moments and, with a
    model that answers questions, ask.

    Example: claude mcp add photos -- bridgetower mcp photos.lance

    Args:
        index: What `bridgetower index` made, its name ending in .lance, or the word demo.
        model: Model to load; default: the model that the index was made with.
        answer_model: Model that answers questions about images that were found; default: none.
        root: Folder of the images, if it is elsewhere now.
    """
    require("search")
    require("mcp")
    from bridgetower.integrations.mcp import mcp_server

    searcher = loading.open_index(index, root, model)
    answering = None
    if answer_model is not None:
        answering = loading.load(answer_model, answers_questions=True)
    mcp_server(searcher, answering).run()


def duplicates_command(
    index: Annotated[Positional[str], arg(metavar="INDEX.lance")],
    *,
    threshold: float = 0.95,
    root: Path | None = None,
    sheet: Path | None = None,
    json: Json = False,
) -> None:
    """Find near-duplicates in an index: groups of images whose vectors are almost the same.

    Prints a JSON line for each group, {"group", "images": [{"path", "file", "width", "height", "cosine", …}, …]}, the
    largest group first. The first image of a group has the most pixels, and each cosine compares an image with it.
    On a terminal it prints a table.

    Example: bridgetower duplicates photos.lance --threshold 0.98 --sheet duplicates.png

    Args:
        index: What `bridgetower index` made, its name ending in .lance, or the word demo.
        threshold: Images with at least this cosine are linked, and linked images form a group. A good value
            depends on the model.
        root: Folder of the images, if it is elsewhere now.
        sheet: Also draw the first 50 groups into this image file, a row with up to five images each.
    """
    require("search")
    if sheet is not None:
        require("plot")
        from bridgetower.drawing import require_image_name, write_image
        from bridgetower.search.sheet import COLUMNS, contact_sheet

        require_image_name(sheet)
    from bridgetower.search.duplicates import near_duplicates
    from bridgetower.search.index import Index

    opened = Index(resolve_demo(index, "index"), root=root)
    groups = near_duplicates(opened, threshold, progress=True)

    # Draw a row of images for each group.
    if sheet is not None:
        tiles: list[Hit | None] = []
        for group in groups[:50]:
            row = group[:COLUMNS]
            empty = [None] * (COLUMNS - len(row))
            tiles += [*row, *empty]
        title = f"groups of near-duplicates: {len(groups)}"
        drawing = contact_sheet(tiles, opened.content, title=(title, "a row each"))
        write_image(sheet, drawing)

    # Print the groups.
    rows = []
    for number, group in enumerate(groups, start=1):
        if is_json(json):
            images: list[object] = list(map(_values, group))
        else:
            images = [f"{hit.path} {hit.width}x{hit.height} {hit.cosine:.3f}" for hit in group]
        rows.append({"group": number, "images": images})
    emit_results(rows, json=json)
    if not groups:
        print("No images are that similar; see a lower --threshold.", file=sys.stderr)


def _values(hit: Hit) -> dict[str, object]:
    """Returns the values of a hit, with its file in place of its location."""
    values = {name: value for name, value in asdict(hit).items() if value is not None}
    del values["location"]
    values["file"] = str(hit.file)
    if hit.is_moment:
        # Its path is that of the video, "#t=" and the seconds. Its captions are what is said.
        address = hit.file if isinstance(hit.file, str) else hit.file.resolve().as_uri()
        _, _, seconds = hit.path.rpartition("#")
        values["transcript"] = " ".join(hit.captions)
        values["link"] = f"{address}#{seconds}"
    return values


def _cells(hit: Hit) -> dict[str, str]:
    from bridgetower.checkpoints import match_text

    match = match_text(hit.probability, hit.score)
    caption = hit.captions[0] if hit.captions else ""
    further = f" (and {len(hit.captions) - 1} more)" if len(hit.captions) > 1 else ""
    start = timedelta(seconds=int(hit.start or 0))
    end = timedelta(seconds=int(hit.end or 0))
    return {
        "image": hit.path.rpartition("#")[0] if hit.is_moment else hit.path,
        "time": f"{start} to {end}" if hit.is_moment else "",
        "match": match,
        "against": hit.against if hit.is_moment else "",
        "cosine": f"{hit.cosine:.3f}{' weak' if hit.weak else ''}",
        "rank score": f"{hit.rank_score:.3f}" if match else "",
        "pixels": "" if hit.is_moment else f"{hit.width}x{hit.height}",
        "captions": caption + further,
    }
