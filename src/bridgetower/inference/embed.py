"""Vectors of examples: in order, here or on a Ray cluster; those of a source in a file or a table, in any format.

Vectors of a source are committed to a Lance table as they come, so that killed runs go on, and exported in the end.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image as PilImage
from torch import Tensor

from bridgetower.data.sources.columns import Columns
from bridgetower.data.sources.example import (
    IMAGE_SUFFIXES,
    MAX_SHOWN_PROBLEMS,
    Example,
    Image,
    check_bad,
)
from bridgetower.data.sources.fetch import is_url, list_files, suffix_of, version_of
from bridgetower.data.sources.reader import FileGroup, file_groups, read, read_group
from bridgetower.distributed import available_cores
from bridgetower.extras import require
from bridgetower.files import escaped, json_text, locked, remove_leftovers, replacing, unfit_name
from bridgetower.inference.config import Content, EmbedConfig, Quantize, ScoreConfig, SourceConfig
from bridgetower.inference.items import Item, Kind, Tokens
from bridgetower.inference.predictor import Predictor, load
from bridgetower.processor import Processor
from bridgetower.processor.loading import load_items
from bridgetower.progress import counting

if TYPE_CHECKING:
    import pyarrow as pa

    from bridgetower.data.sets.store import Table

Model = Predictor | str | Path | Callable[[], Predictor]
"""A loaded model, what to load, or what returns one."""

Of = Content | Literal["all", "classes", "scores"] | None
"""None: images, or texts where there is no image; "all": images, their texts and both together; "classes": what the
classification head gives of an image and a text, one of which may be missing; "scores": those of each pair."""

Config = EmbedConfig | ScoreConfig

T = TypeVar("T")

SUFFIXES = (".jsonl", ".parquet", ".npy", ".lance")  # of the places that vectors can be written to
MIN_FOR_WORKERS = 500  # images from which on processes decode: starting these takes about as long as decoding so many

_LOCAL = "local"  # instead of an address: a cluster of this machine, which ends with the run
_COMMITTED = 2**16  # examples, after which they are committed
# of the time so far: commits get rarer, so that what Lance notes of each stays little
_SHARE = 0.01
_EXPORTED = 4096  # rows at once
_DTYPES: dict[Quantize | None, str] = {
    None: "float32",
    "float16": "float16",
    "int8": "int8",
    "binary": "uint8",
}
_DECIDING = (
    *(
        "image_column",
        "caption_column",
        "id_column",
        "captions_from",
        "every",
        "max_moments",
        "transcribe",
    ),
    *("transcribe_model", "truncate", "of"),
)
_OF_RUN = (
    "part",
    "number",
    "is_last",
    "is_image",
    "origin",
    "problem",
    "may_pass",
)  # columns that the result lacks
_OF_BYTES = re.compile(r"^the image of \d+ bytes")
_STAYING = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Embedded:
    """An example with its vectors, or with the reason why it has none."""

    example: Example  # without the bytes of its image
    digest: str = ""  # SHA-256 of the image file, or of the texts where there is none
    size: int = 0  # of the image file, in bytes
    width: int = 0  # of the upright image, in pixels; 0 without one
    height: int = 0
    frame: bytes | None = field(
        default=None, repr=False
    )  # the image file if it was made of a frame of a video
    ids: list[Tokens] = field(default_factory=list)  # of the texts
    num_cut: int = 0  # texts that were too long
    vectors: dict[str, list[np.ndarray]] = field(
        default_factory=dict
    )  # of "images", "texts" and "pairs"
    problem: str = ""
    may_pass: bool = False  # the problem may be gone when the image is read again, as of a network
    # it is of a local file whose version is not part of that of its source
    may_be_mended: bool = False


@dataclass(frozen=True, kw_only=True)
class EmbedReport:
    """What came of embedding a source."""

    vectors: int  # that were written
    cut: int  # texts that were cut in this run, as they were too long for the model
    bad: int  # items that could not be used
    problems: tuple[str, ...]  # the first of them, each with the reason
    report: str | None  # file that names all of them; None if there are none
    seconds: float  # that it took, without loading the model


def embed_source(
    source: str | Path | Sequence[Example],
    out: str | Path,
    model: Model,
    config: Config | None = None,
    *,
    progress: bool = False,
) -> EmbedReport:
    """Writes the vectors of a source, or scores of its pairs, in memory for a few seconds of work.

    A run that was killed is continued by the next one with the same arguments: what it embedded is in the table OUT,
    or `.OUT.lance` beside another output. Items that cannot be used are left out and named in `OUT.errors.jsonl`.

    Args:
        source: As for `bridgetower.data.sources.reader.read`, or examples.
        out: File or table, which ends in `.jsonl`, `.parquet`, `.npy` or `.lance`; of scores `.parquet`.
        model: A loaded model, what to load, or what returns one; nothing is loaded for a source that is wrong.
        config: How. From 500 items on, processes decode images unless `num_workers` is 0: a script needs
            `if __name__ == "__main__":` then, because they import it again.
        progress: Show a bar, or log a line each 20 seconds where standard error is no terminal.

    Raises:
        FileNotFoundError: There is no source, or a package is missing.
        FileExistsError: Another process writes there, or there is another Lance table.
        ValueError: The source cannot be read, the model has no contrastive head, there is an unfinished run of another
            source, model or settings, or more than `max_errors` items cannot be used; what was embedded is kept then.
    """
    config, out = config or EmbedConfig(), str(out)
    if problem := unfit_name(out):
        raise ValueError(problem)
    what, suffixes = ("scores", (".parquet",)) if config.of == "scores" else ("vectors", SUFFIXES)
    if (suffix := Path(out).suffix) not in suffixes:
        raise ValueError(f"{out!r} has no suffix of {what}; expected one of {', '.join(suffixes)}")
    require("search")
    check_ray(config, model)
    parts: list[FileGroup | Sequence[Example]] = (
        [*file_groups(source)] if isinstance(source, str | Path) else [source]
    )
    predictor, started = loaded(model), time.perf_counter()
    versions = hashlib.sha256()
    for part in parts:
        versions.update(
            (part.version if isinstance(part, FileGroup) else repr(part)).encode(
                errors="surrogateescape"
            )
        )
    plan = {
        "model": predictor.source,
        "fingerprint": predictor.fingerprint,
        "source": versions.hexdigest(),
        "quantize": config.quantize,
        **{name: getattr(config, name) for name in _DECIDING},
    }
    parent, _, name = (
        out.rpartition("/") if is_url(out) else (str(Path(out).parent), "", Path(out).name)
    )
    uri = out if suffix == ".lance" else f"{parent}/.{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.lance"
    report, num_cut = Path(f"{name if is_url(out) else out}.errors.jsonl"), 0
    with write_lock(uri):
        for place in (
            []
            if is_url(out)
            else [Path(out), report, Path(uri), Path(out).with_suffix(".ids.jsonl")]
        ):
            remove_leftovers(place.parent, place.name)
        table = _opened(uri, plan, predictor, config)
        if is_finished := "part" not in table.schema.names:
            found = map(
                json.loads,
                report.read_text(encoding="utf-8").splitlines() if report.is_file() else [],
            )
            places, bad = np.arange(len(table)), list(found)
        else:
            num_cut = _fill(
                table, parts, predictor if config.ray is None else model, config, progress
            )
            order = np.lexsort((table.column("number"), table.column("part")))  # of the source
            is_good = (table.column("problem").astype(object) == "")[order]
            places, bad = (
                order[is_good],
                table.take(order[~is_good].tolist(), ["id", "origin", "problem"]).to_pylist(),
            )
            report.unlink(missing_ok=True)
            if bad:
                with replacing(report) as temporary, temporary.open("w", encoding="utf-8") as file:
                    file.writelines(json_text(row) + "\n" for row in bad)
        problems = [f"{row['id']!r}: {row['problem']}" for row in bad]
        if not len(places):
            table.drop()
            check_bad(
                _named(source),
                problems,
                config.max_errors,
                f"{out} would have no {what}",
                has_good=False,
            )
            reasons = " | ".join(problems[:MAX_SHOWN_PROBLEMS]) or "it names nothing"
            raise ValueError(
                f"{out} would have no {what}: nothing of {_named(source)} could be used: {reasons}"
            )
        kept = f"the {len(places)} {what} of the others are kept, and the same command with a larger N writes them"
        check_bad(_named(source), problems, config.max_errors, kept)
        if not is_finished and suffix == ".lance":
            with table.writing():
                table.lance.delete("problem != ''")
                table.lance.drop_columns(list(_OF_RUN))
            table.compact()
        elif not is_finished:
            of_vectors: Callable[[pa.Table], pa.Table] = methodcaller(
                "select", ["id", "text", "vector"]
            )
            shaped = partial(_scores, predictor, parts) if config.of == "scores" else of_vectors
            _export(table, Path(out), places, shaped)
            table.drop()
    return EmbedReport(
        vectors=len(places),
        cut=num_cut,
        bad=len(problems),
        problems=tuple(problems[:MAX_SHOWN_PROBLEMS]),
        report=str(report) if problems else None,
        seconds=time.perf_counter() - started,
    )


def _named(source: object) -> str:
    return str(source) if isinstance(source, str | Path) else "the input"


def _opened(uri: str, plan: dict[str, Any], predictor: Predictor, config: Config) -> Table:
    """Opens the table of a run that is to go on, or of one that is through, or makes a new one."""
    import pyarrow as pa

    from bridgetower.data.sets.store import Table

    if config.of == "scores":
        heads = predictor.model.itm_head, predictor.model.itc_head
        width = len([head for head in heads if head is not None]) or predictor.model.head("itm")
    elif config.of == "pairs":
        width = predictor.embed_pairs(PilImage.new("RGB", (8, 8)), "").shape[1]
    else:
        width = predictor.embed_texts("").shape[1]
    kinds = [pa.int32(), pa.int64(), pa.bool_(), pa.bool_(), pa.string(), pa.string(), pa.bool_()]
    dtype = pa.from_numpy_dtype(np.dtype(_DTYPES[config.quantize]))
    vector = pa.list_(dtype, -(-width // 8) if config.quantize == "binary" else width)
    columns = dict(zip(_OF_RUN, kinds, strict=True)) | {
        "id": pa.string(),
        "text": pa.string(),
        "vector": vector,
    }
    schema = pa.schema(list(columns.items()), metadata={"bridgetower": json.dumps(plan)})
    try:
        table = Table(uri)
    except FileNotFoundError:
        return Table.create(uri, schema, checked="vector")
    table.recover()
    there = json.loads((table.schema.metadata or {}).get(b"bridgetower", b"{}"))
    if there == plan:
        return table
    is_unfinished = "part" in table.schema.names
    if is_unfinished and not len(table):
        return Table.create(uri, schema, checked="vector", replace=True)
    if is_unfinished:
        raise ValueError(
            f"{uri} has rows of an unfinished run with another source, model or settings; finish it with the same "
            "command, or remove that folder"
        )
    if {**there, "source": ""} != {**plan, "source": ""}:
        raise FileExistsError(f"{uri} exists; choose another name or remove it")
    return Table.create(uri, schema, checked="vector", replace=True)


def _fill(
    table: Table,
    parts: Sequence[FileGroup | Sequence[Example]],
    model: Model,
    config: Config,
    progress: bool,
) -> int:
    """Embeds what is not in the table, and what failed for a reason that may have passed; returns how many were cut."""
    if table.column("may_pass").any():
        with table.writing():
            table.lance.delete("may_pass")
    part, number, is_last = (table.column(name) for name in ("part", "number", "is_last"))
    order = np.argsort(part, kind="stable")
    starts = np.searchsorted(part, np.arange(len(parts) + 1), sorter=order)
    tasks, done = list[Callable[[], Iterable[Example]]](), 0
    for place, files in enumerate(parts):
        rows = order[starts[place] : starts[place + 1]]
        known = np.unique(number[rows])
        done += len(known)
        if not (is_last[rows].any() and len(known) == known[-1] + 1):
            tasks.append(partial(_missing, place, files, frozenset(known.tolist()), config.columns))
    total = sum(len(part.files) if isinstance(part, FileGroup) else len(part) for part in parts)
    counted = all(not isinstance(part, FileGroup) or part.kind == "images" for part in parts)
    add = partial(_add, table, config.quantize)
    return embed_tasks(
        tasks,
        config.of,
        model,
        config,
        add,
        done=done,
        total=total if counted else None,
        progress=progress,
    )


def _missing(
    part: int, files: FileGroup | Sequence[Example], known: Set[int], columns: Columns
) -> Iterator[Example]:
    """Yields the examples of a part that are not in the table, with what the table has of a run as their fields."""
    found = read_group(files, columns) if isinstance(files, FileGroup) else files
    for number, example, is_last in numbered(found):
        if number not in known:
            yield replace(example, fields={"part": part, "number": number, "is_last": is_last})


def _add(table: Table, quantize: Quantize | None, found: Sequence[Embedded]) -> None:
    import pyarrow as pa

    if not found:
        return
    kind = table.schema.field("vector").type
    rows, vectors = list[Mapping[str, Any]](), list[np.ndarray]()
    for one in found:
        about = {"id": name_of(one.example), "origin": one.example.origin, "problem": one.problem}
        about = {name: escaped(text) for name, text in about.items()}
        more = {"is_image": bool(one.example.images), "may_pass": one.may_pass or one.may_be_mended}
        own = _vectors_of(one)
        rows += [
            {**one.example.fields, **about, **more, "text": text}
            for text in [text for text, _ in own] or [None]
        ]
        if own:
            vectors += [*quantized(np.stack([vector for _, vector in own]), quantize)]
        else:
            vectors.append(np.zeros(kind.list_size, _DTYPES[quantize]))
    if (
        not is_url(table.uri) and not Path(table.uri, "_versions").is_dir()
    ):  # Lance would write a damaged one
        raise FileNotFoundError(
            f"{table.uri} was removed while it was written; run the same command again"
        )
    names = [*_OF_RUN, "id", "text"]
    written = pa.Table.from_pylist(rows, pa.schema([table.schema.field(name) for name in names]))
    flat = pa.array(np.stack(vectors).ravel(), kind.value_type)
    table.append(
        written.append_column("vector", pa.FixedSizeListArray.from_arrays(flat, kind.list_size))
    )


def _export(
    table: Table, out: Path, places: np.ndarray, shaped: Callable[[pa.Table], pa.Table]
) -> None:
    """Writes rows of the table to a file, whole or not at all; a Parquet file has them as they are shaped."""
    import pyarrow.parquet as pq

    schema, suffix, writer = table.schema, out.suffix, None
    with ExitStack() as stack:
        temporary = stack.enter_context(replacing(out))
        if suffix != ".parquet":
            file = stack.enter_context(temporary.open("wb"))
        if suffix == ".npy":
            lines = stack.enter_context(
                stack.enter_context(replacing(out.with_suffix(".ids.jsonl"))).open("wb")
            )
            kind = schema.field("vector").type
            dtype, shape = (
                np.dtype(kind.value_type.to_pandas_dtype()),
                (len(places), kind.list_size),
            )
            np.lib.format.write_array_header_1_0(
                file, {"descr": dtype.str, "fortran_order": False, "shape": shape}
            )
        for start in range(0, len(places), _EXPORTED):
            columns = ["id", "text", "vector", "is_image", "part", "number"]
            some = table.take(places[start : start + _EXPORTED].tolist(), columns)
            if suffix == ".parquet":
                written = shaped(some).replace_schema_metadata(schema.metadata)
                writer = writer or stack.enter_context(pq.ParquetWriter(temporary, written.schema))
                writer.write_table(written)
            elif suffix == ".jsonl":
                for row in some.to_pylist():
                    file.write(
                        _json_line(row["id"], row["text"], row["is_image"], row["vector"]).encode()
                    )
            else:
                file.write(
                    np.ascontiguousarray(some["vector"].combine_chunks().flatten().to_numpy()).data
                )
                lines.writelines(
                    (json_text(row) + "\n").encode()
                    for row in some.select(["id", "text"]).to_pylist()
                )


def _scores(
    predictor: Predictor, parts: Sequence[FileGroup | Sequence[Example]], rows: pa.Table
) -> pa.Table:
    """Returns scores, as far as the model has the heads, with the file of the source and its row that each is of."""
    import pyarrow as pa

    scores = torch.from_numpy(
        np.stack(rows["vector"].to_numpy())
    ).double()  # where large log-odds do not tie
    found: dict[str, Any] = {"id": rows["id"], "text": rows["text"], "file": [], "row": []}
    for number, part in zip(
        rows["number"].to_pylist(), map(parts.__getitem__, rows["part"].to_pylist()), strict=True
    ):
        files = part.files if isinstance(part, FileGroup) else ()
        found["file"].append(files[min(number, len(files) - 1)].name if files else "")
        found["row"].append(number if len(files) <= 1 else 0)
    if predictor.model.itm_head is not None:
        found[predictor.reranking.shown] = predictor.reranking.match(scores[:, 0]).numpy()
    if predictor.model.itc_head is not None:
        found["cosine"] = scores[:, -1].numpy()
    return pa.table(found)


def print_vectors(
    source: str | Path | Sequence[Example], model: Model, config: EmbedConfig
) -> None:
    """Prints the vectors of a source as JSON lines, batch by batch."""
    if config.ray is not None:
        raise ValueError(
            "on Ray vectors are written to a file or table, not printed; give its place as out"
        )
    examples = read(source, config.columns) if isinstance(source, str | Path) else source
    problems = list[str]()

    def write(found: Sequence[Embedded]) -> None:
        for one in found:
            problems.extend([f"{name_of(one.example)!r}: {one.problem}"] if one.problem else [])
            for text, vector in _vectors_of(one):
                values = quantized(vector[None], config.quantize)[0].tolist()
                sys.stdout.write(
                    _json_line(name_of(one.example), text, bool(one.example.images), values)
                )

    config = replace(config, num_workers=config.num_workers or 0, commit_seconds=0)
    embed_tasks([lambda: examples], config.of, model, config, write)
    check_bad(_named(source), problems, config.max_errors, "the vectors of the others are printed")


def given_examples(images: Sequence[Path], texts: Sequence[str], *, pairs: bool) -> list[Example]:
    """Returns images, or folders of them, and texts that are given one by one as examples; paths name images."""
    if pairs and len(images) != len(texts):
        raise ValueError(
            f"{len(images)} images and {len(texts)} texts; expected one text per image"
        )
    places = list[tuple[str, str]]()
    for given in images:
        if given.is_dir() and not pairs:
            files = [
                one for one in list_files(str(given)) if suffix_of(one.location) in IMAGE_SUFFIXES
            ]
            places += [(one.location, one.version) for one in files]
        else:
            places.append((str(given), version_of(str(given)) if given.is_file() else ""))
    of_images: list[tuple[str, ...]] = [(text,) for text in texts] if pairs else [()] * len(places)
    shown = [
        Example(
            id=place,
            images=(Image(name=place, location=place, version=version),),
            texts=own,
            origin=place,
        )
        for (place, version), own in zip(places, of_images, strict=True)
    ]
    return (
        shown
        if pairs
        else [*shown, *(Example(id="", texts=(text,), origin=repr(text)) for text in texts)]
    )


def _vectors_of(one: Embedded) -> list[tuple[str | None, np.ndarray]]:
    """Returns the vectors of an example with the text of each: of the image, or of each text or pair."""
    return [
        pair
        for kind, vectors in one.vectors.items()
        for pair in zip((None,) if kind == "images" else one.example.texts, vectors, strict=True)
    ]


def _json_line(name: str, text: str | None, is_image: bool, values: Sequence[float]) -> str:
    named = {"image" if is_image else "id": name} if name else {}
    return (
        json_text({**named, **({} if text is None else {"text": text}), "embedding": values}) + "\n"
    )


def embed_tasks(
    tasks: Iterable[Callable[[], Iterable[Example]]],
    of: Of,
    model: Model,
    config: SourceConfig,
    write: Callable[[Sequence[Embedded]], None],
    *,
    done: int = 0,
    total: int | None = None,
    progress: bool = False,
) -> int:
    """Embeds what tasks return, here in order or on Ray, and writes it every few seconds; returns how many were cut."""
    waiting, num_cut, started = list[Embedded](), 0, time.monotonic()
    last = started
    if config.ray is None:
        batches = embedded(loaded(model), chain.from_iterable(task() for task in tasks), of, config)
    else:
        batches = _embedded_on_ray(tasks, of, model, config)
    with counting("embedding", total=total, enabled=progress) as advance:
        advance(done)
        try:
            for found in batches:
                waiting += found
                num_cut += sum(one.num_cut for one in found)
                advance(len(found))
                now = time.monotonic()
                wait = (
                    max(config.commit_seconds, _SHARE * (now - started))
                    if config.commit_seconds
                    else 0.0
                )
                if len(waiting) >= _COMMITTED or now - last >= wait:
                    ready, waiting, last = waiting, [], now
                    write(ready)
        finally:
            write(waiting)
    if num_cut:
        logger.warning("%d texts were longer than the model takes and were cut", num_cut)
    return num_cut


def embedded(
    predictor: Predictor, examples: Iterable[Example], of: Of, config: SourceConfig
) -> Iterator[list[Embedded]]:
    """Embeds, classifies or scores examples in order, batch by batch, each with its problem if it has one."""
    if of not in ("pairs", "classes", "scores"):
        predictor.model.head("itc")
    kind: Kind = "classify" if of == "classes" else "score" if of == "scores" else "embedding"
    blank = predictor.processor.blank_image().pixels if of == "classes" else None
    left, num_workers, size = iter(examples), config.num_workers, config.batch_size
    if num_workers is None:
        first = list(islice(left, MIN_FOR_WORKERS)) if config.ray is None else []
        num_workers = available_cores() if len(first) >= MIN_FOR_WORKERS else 0
        left = chain(first, left)
    get = partial(decode, predictor.processor, of, config.truncate)
    for found, pixels in load_items(
        get, iter(lambda: list(islice(left, size)), []), num_workers=num_workers
    ):
        shown = iter(pixels)
        images = [next(shown) if one.width else blank for one in found]
        for part in ("images", "texts", "pairs"):
            items = list[tuple[list[np.ndarray], Item]]()
            for one, image in zip(found, images, strict=True):
                if part in one.vectors:
                    given = [None] if part == "images" else one.ids
                    image = None if part == "texts" else image
                    items += [
                        (one.vectors[part], Item(kind=kind, image=image, ids=ids)) for ids in given
                    ]
            for start in range(0, len(items), size):
                some = items[start : start + size]
                for (vectors, _), vector in zip(
                    some, predictor.compute([item for _, item in some]), strict=True
                ):
                    vectors.append(vector.numpy())  # type: ignore[union-attr]  # no words
        yield found


def decode(
    processor: Processor, of: Of, truncate: bool, batch: Sequence[Example]
) -> tuple[list[Embedded], UInt8[Tensor, "n 3 h w"]]:
    """Returns examples with room for the vectors that are wanted, and in one block the pixels of their images."""
    found, pixels = list[Embedded](), list[Tensor]()
    for example in batch:
        kinds: tuple[str, ...] = (of or ("images" if example.images else "texts"),)
        if of in ("classes", "scores"):
            kinds = ("pairs",)
        elif of == "all":
            kinds = ("images", "texts", "pairs") if example.texts else ("images",)
        without = replace(
            example, images=tuple(replace(image, content=None) for image in example.images)
        )
        one = Embedded(example=without, problem=example.problem)
        found.append(one)
        if not one.problem and kinds != ("texts",) and (example.images or of != "classes"):
            if len(example.images) != 1:
                count = f"it has {len(example.images)} images; expected one: name its column as image_column"
                one.problem = count if example.images else "it has no image"
                continue
            image = example.images[0]
            try:
                content = image.read()
                resized = processor.prepare(content)
            except (ValueError, OSError) as error:
                one.problem = _OF_BYTES.sub("it", str(error))
                if isinstance(error, FileNotFoundError) and error.filename:
                    one.problem = f"no image file at {image.location}"
                elif one.problem.startswith(image.location) and image.is_file:
                    one.problem = f"it{one.problem.removeprefix(image.location)}"
                one.may_pass = isinstance(error, OSError) and not isinstance(error, _STAYING)
                one.may_be_mended = (
                    image.is_file and not image.version and not is_url(image.location)
                )
                continue
            pixels.append(resized.pixels)
            one.digest, one.size = hashlib.sha256(content).hexdigest(), len(content)
            one.frame, one.width, one.height = (
                content if image.moment else None,
                resized.width,
                resized.height,
            )
        if not one.problem and kinds != ("images",):
            one.problem = "" if example.texts else "it has no text"
            try:
                for text in example.texts:
                    try:
                        (ids,) = processor.token_ids([text])
                    except ValueError:
                        (ids,) = processor.token_ids([text], truncate=truncate)
                        one.num_cut += 1
                    one.ids.append(tuple(ids))
                one.digest = (
                    one.digest or hashlib.sha256("\n".join(example.texts).encode()).hexdigest()
                )
            except ValueError as error:
                one.problem, one.num_cut = f"caption {error}", 0
        if not one.problem:
            one.vectors = {kind: [] for kind in kinds}
    return found, torch.stack(pixels) if pixels else torch.empty(0, dtype=torch.uint8)


def _embedded_on_ray(
    tasks: Iterable[Callable[[], Iterable[Example]]], of: Of, model: Model, config: SourceConfig
) -> Iterator[list[Embedded]]:
    """Yields what comes of tasks, which models take one after the other; what a worker had that died is done again."""
    import ray
    from ray.util import ActorPool

    with _cluster(config):
        resources, cores = ray.cluster_resources(), 1 + (config.num_workers or 0)
        gpus = int(resources.get("GPU", 0))
        room, unit = gpus or int(resources["CPU"]) // cores, "GPU" if gpus else "core"
        count = config.ray_workers or room
        if count > room:
            raise ValueError(
                f"ray_workers is {count}, but the cluster has {room} {unit}s, one for each worker"
            )
        actor: Any = ray.remote(
            max_restarts=-1, max_task_retries=-1, num_cpus=cores, num_gpus=int(gpus > 0)
        )(_Worker)
        workers, pool = list[Any](), ActorPool([])
        for task in tasks:
            if len(workers) < count:
                workers.append(actor.remote(model, of, config))
                pool.push(workers[-1])
            elif not pool.has_free():
                yield pool.get_next_unordered()
            pool.submit(lambda worker, task: worker.done.remote(task), task)
        logger.info("workers on Ray: %d, with a %s each", len(workers), unit)
        while pool.has_next():
            yield pool.get_next_unordered()
        for worker in workers:
            ray.kill(worker)


class _Worker:
    def __init__(self, model: Model, of: Of, config: SourceConfig) -> None:
        self._embedded = partial(embedded, loaded(model), of=of, config=config)

    def done(self, task: Callable[[], Iterable[Example]]) -> list[Embedded]:
        return [*chain.from_iterable(self._embedded(examples=task()))]


def _cluster(config: SourceConfig) -> AbstractContextManager[Any]:
    """Connects to a cluster, or starts one; in a process that is connected already, that one is used and stays."""
    import ray

    if ray.is_initialized():
        return nullcontext()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    cores = max(available_cores(), config.ray_workers or 1)
    options: dict[str, Any] = (
        {"include_dashboard": False, "num_cpus": cores} if config.ray == _LOCAL else {}
    )
    try:
        return ray.init(
            address=config.ray, log_to_driver=False, logging_level=logging.WARNING, **options
        )
    except ConnectionError as error:
        raise OSError(
            f"no Ray cluster at {config.ray} ({error}); start one, or give {_LOCAL}"
        ) from error


def numbered(items: Iterable[T]) -> Iterator[tuple[int, T, bool]]:
    """Yields items with their numbers, and whether each is the last."""
    left = iter(items)
    number, item = 0, next(left, None)
    while item is not None:
        following = next(left, None)
        yield number, item, following is None
        number, item = number + 1, following


def quantized(vectors: np.ndarray, kind: Quantize | None) -> np.ndarray:
    """Returns [n, c] vectors in fewer bytes: int8 with 127 as largest number of each, binary as signs, 8 in a byte."""
    if kind is None:
        return vectors
    if kind == "float16":
        return vectors.astype(np.float16)
    if kind == "int8":
        largest = np.abs(vectors).max(axis=1, keepdims=True)
        return np.rint(vectors * (127 / np.where(largest > 0, largest, 127))).astype(np.int8)
    return np.packbits(vectors > 0, axis=1)


def loaded(model: Model) -> Predictor:
    """Returns a model, loaded if it is not yet."""
    if isinstance(model, str | Path):
        return load(model)
    return model if isinstance(model, Predictor) else model()


def name_of(example: Example) -> str:
    """Returns what names an example in a source of several shards, whose keys are those of its own."""
    return example.images[0].name if example.images and example.images[0].piece else example.id


def check_ray(config: SourceConfig, model: Model) -> None:
    """Checks that workers of a cluster can load the model themselves, if there is to be a cluster."""
    if config.ray is not None:
        require("ray")
        if isinstance(model, Predictor):
            raise ValueError(
                "on Ray every worker loads the model; give what to load, not a loaded model"
            )


def write_lock(uri: str | os.PathLike[str]) -> AbstractContextManager[None]:
    """Holds a table for this process while it is written, where it is a local folder."""
    return nullcontext() if is_url(uri) else locked(Path(uri))
