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
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image as PilImage
from torch import Tensor

from bridgetower.data.example import NAMED, Example, Image, check_bad
from bridgetower.data.fetch import is_url, list_files, suffix_of
from bridgetower.data.reader import IMAGE_SUFFIXES, Part, parts_of, read, read_part
from bridgetower.distributed import available_cores
from bridgetower.extras import require
from bridgetower.files import escaped, json_text, locked, remove_leftovers, replacing, unfit_name
from bridgetower.inference import Item, Tokens
from bridgetower.predictor import Predictor, load
from bridgetower.processor import Processor
from bridgetower.processor.loading import load_items
from bridgetower.progress import counting
from bridgetower.search.config import Content, EmbedConfig, Quantize, SourceConfig

if TYPE_CHECKING:
    from bridgetower.data.store import Table

Model = Predictor | str | Path | Callable[[], Predictor]
"""A loaded model, what to load, or what returns one."""

Task = tuple[int, Part | Sequence[Example], Set[int]]
"""Number of a part of a source, the part or its examples, and numbers of the examples that are not needed."""

Numbered = tuple[int, int, bool, "Embedded"]
"""An example with the number of its part, its number there, and whether it is the last."""

T = TypeVar("T")
Result = TypeVar("Result")

SUFFIXES = (".jsonl", ".parquet", ".npy", ".lance")  # of the places that vectors can be written to
MIN_FOR_WORKERS = 500  # images from which on processes decode: starting these takes about as long as decoding so many

_LOCAL = "local"  # instead of an address: a cluster of this machine, which ends with the run
_COMMITTED = 2**16  # rows, after which they are committed
_SHARE = 0.01  # of the time so far: commits get rarer, so that what Lance notes of each stays little
_EXPORTED = 4096  # rows at once
_DTYPES: dict[Quantize | None, str] = {None: "float32", "float16": "float16", "int8": "int8", "binary": "uint8"}
_DECIDING = ("image_column", "caption_column", "id_column", "captions_from", "every", "max_moments", "truncate", "of")
_OF_RUN = ("part", "number", "is_last", "is_image", "place", "problem", "may_pass")  # columns that the result lacks
_OF_BYTES = re.compile(r"^the \d+ image bytes")
_STAYING = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
_NONE = np.empty((0, 0), np.float32)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """An example with its vectors, or with the reason why it has none."""

    example: Example  # without the bytes of its image
    digest: str = ""  # SHA-256 of the image file
    size: int = 0  # of the same, in bytes
    width: int = 0  # of the upright image, in pixels; 0 without one
    height: int = 0
    frame: bytes | None = field(default=None, repr=False)  # the image file if it was made of a frame of a video
    image_vector: Float[np.ndarray, " c"] | None = None
    text_vectors: Float[np.ndarray, "t c"] = field(default_factory=lambda: _NONE)
    pair_vectors: Float[np.ndarray, "t e"] = field(default_factory=lambda: _NONE)
    num_cut: int = 0  # texts that were too long
    problem: str = ""
    may_pass: bool = False  # the problem may be gone when the image is read again, as of a network


@dataclass(frozen=True, kw_only=True)
class EmbedReport:
    """What came of embedding a source.

    Attributes:
        vectors: That were written.
        cut: Texts that were cut in this run, as they were too long for the model.
        bad: Items that could not be used.
        problems: The first of them, each with the reason.
        report: File that names all of them; None if there are none.
        seconds: That it took, without loading the model.
    """

    vectors: int
    cut: int
    bad: int
    problems: tuple[str, ...]
    report: str | None
    seconds: float


def embed_source(
    source: str | Path | Sequence[Example],
    out: str | Path,
    model: Model,
    config: EmbedConfig | None = None,
    *,
    progress: bool = False,
) -> EmbedReport:
    """Writes the vectors of a source, in memory for a few seconds of work.

    A run that was killed is continued by the next one with the same arguments: what it embedded is in the table OUT,
    or `.OUT.lance` beside another output. Items that cannot be used are left out and named in `OUT.errors.jsonl`.

    Args:
        source: As for `bridgetower.data.reader.read`, or examples.
        out: File or table, which ends in `.jsonl`, `.parquet`, `.npy` or `.lance`.
        model: A loaded model, what to load, or what returns one; nothing is loaded for a source that is wrong.
        config: How. From 500 items on, processes decode images unless `num_workers` is 0: a script needs
            `if __name__ == "__main__":` then, because they import it again.
        progress: Show a bar, or log a line a minute where standard error is no terminal.

    Raises:
        FileNotFoundError: There is no source, or a package is missing.
        FileExistsError: Another process writes there, or there is another Lance table.
        ValueError: The source cannot be read, the model has no contrastive head, there is an unfinished run of another
            source, model or settings, or more than `max_errors` items cannot be used; what was embedded is kept then.
    """
    config, suffix = config or EmbedConfig(), Path(out).suffix
    if problem := unfit_name(str(out)):
        raise ValueError(problem)
    if suffix not in SUFFIXES:
        raise ValueError(f"{str(out)!r} has no suffix of vectors; expected one of {', '.join(SUFFIXES)}")
    require("search")
    check_ray(config, model)
    parts: list[Part | Sequence[Example]] = [*parts_of(source)] if isinstance(source, str | Path) else [source]
    predictor = loaded(model)
    started, out = time.perf_counter(), str(out)
    versions = hashlib.sha256()
    for part in parts:
        versions.update((part.version if isinstance(part, Part) else repr(part)).encode(errors="surrogateescape"))
    plan = {
        "model": predictor.source,
        "fingerprint": predictor.fingerprint,
        "source": versions.hexdigest(),
        "quantize": config.quantize,
        **{name: getattr(config, name) for name in _DECIDING},
    }
    parent, _, name = out.rpartition("/") if is_url(out) else (str(Path(out).parent), "", Path(out).name)
    uri = out if suffix == ".lance" else f"{parent}/.{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.lance"
    report, num_cut = Path(f"{name if is_url(out) else out}.errors.jsonl"), 0
    with nullcontext() if is_url(uri) else locked(Path(uri)):
        for place in [] if is_url(out) else [Path(out), report, Path(uri), Path(out).with_suffix(".ids.jsonl")]:
            remove_leftovers(place.parent, place.name)
        table = _opened(uri, plan, predictor, config)
        is_finished = "part" not in table.schema.names
        if is_finished:
            found = map(json.loads, report.read_text(encoding="utf-8").splitlines() if report.is_file() else [])
            places, problems = np.arange(len(table)), [f"{one['id']!r}: {one['problem']}" for one in found]
        else:
            total = sum(len(part.files) if isinstance(part, Part) else len(part) for part in parts)
            counted = all(not isinstance(part, Part) or part.kind == "images" for part in parts)
            with counting("embedding", total=total if counted else None, shown=progress) as advance:
                num_cut = _fill(table, parts, predictor if config.ray is None else model, config, advance)
            places, problems = _results(table, report)
        named = str(source) if isinstance(source, str | Path) else "the input"
        if not len(places):
            table.drop()
            check_bad(named, problems, config.max_errors, f"{out} would have no vectors")
            reasons = " | ".join(problems[:NAMED]) or "it names nothing"
            raise ValueError(f"{out} would have no vectors: nothing of {named} could be used: {reasons}")
        kept = f"the {len(places)} vectors of the others are kept, and the same command with a larger N writes them"
        check_bad(named, problems, config.max_errors, kept)
        if not is_finished and suffix == ".lance":
            with table.writing():
                table.lance.delete("problem != ''")
                table.lance.drop_columns(list(_OF_RUN))
                table.lance.optimize(cleanup_older_than=timedelta(milliseconds=1))  # of 0 LanceDB warns
        elif not is_finished:
            _export(table, Path(out), places)
            table.drop()
    say_cut(num_cut)
    return EmbedReport(
        vectors=len(places),
        cut=num_cut,
        bad=len(problems),
        problems=tuple(problems[:NAMED]),
        report=str(report) if problems else None,
        seconds=time.perf_counter() - started,
    )


def _opened(uri: str, plan: dict[str, Any], predictor: Predictor, config: EmbedConfig) -> Table:
    """Opens the table of a run that is to go on, or of one that is through, or makes a new one."""
    import pyarrow as pa

    from bridgetower.data.store import Table

    if config.of == "pairs":
        width = predictor.embed_pairs(PilImage.new("RGB", (8, 8)), "").shape[1]
    else:
        width = predictor.embed_texts("").shape[1]
    kinds = [pa.int32(), pa.int64(), pa.bool_(), pa.bool_(), pa.string(), pa.string(), pa.bool_()]
    dtype = pa.from_numpy_dtype(np.dtype(_DTYPES[config.quantize]))
    vector = pa.list_(dtype, -(-width // 8) if config.quantize == "binary" else width)
    columns = dict(zip(_OF_RUN, kinds, strict=True)) | {"id": pa.string(), "text": pa.string(), "vector": vector}
    schema = pa.schema(list(columns.items()), metadata={"bridgetower": json.dumps(plan)})
    try:
        table = Table(uri)
    except FileNotFoundError:
        return Table.create(uri, schema, checked="vector")
    there = json.loads((table.schema.metadata or {}).get(b"bridgetower", b"{}"))
    if there == plan:
        return table
    if "part" in table.schema.names:
        raise ValueError(
            f"{uri} has vectors of an unfinished run with another source, model or settings; finish it with the same "
            "command, or remove that folder"
        )
    if {**there, "source": ""} != {**plan, "source": ""}:
        raise FileExistsError(f"{uri} exists; choose another name or remove it")
    return Table.create(uri, schema, checked="vector", replace=True)


def _fill(
    table: Table,
    parts: Sequence[Part | Sequence[Example]],
    model: Model,
    config: EmbedConfig,
    advance: Callable[[int], None],
) -> int:
    """Embeds what is not in the table, and what failed for a reason that may have passed; returns how many were cut."""
    if table.column("may_pass").any():
        with table.writing():
            table.lance.delete("may_pass")
    part, number, is_last = (table.column(name) for name in ("part", "number", "is_last"))
    order = np.argsort(part, kind="stable")
    starts = np.searchsorted(part, np.arange(len(parts) + 1), sorter=order)
    tasks: list[Task] = []
    for place, files in enumerate(parts):
        rows = order[starts[place] : starts[place + 1]]
        known = np.unique(number[rows])
        advance(len(known))
        if not (is_last[rows].any() and len(known) == known[-1] + 1):
            tasks.append((place, files, frozenset(known.tolist())))
    waiting, commits, num_cut = list[Numbered](), Commits(config.commit_seconds), 0
    try:
        for found in computed(partial(_embedded_parts, config), tasks, model, config):
            waiting += found
            num_cut += sum(one.num_cut for *_, one in found)
            advance(len(found))
            if commits.due(len(waiting)):
                _add(table, waiting, config.quantize)
                waiting = []
    finally:
        _add(table, waiting, config.quantize)
    return num_cut


def _embedded_parts(config: EmbedConfig, predictor: Predictor, tasks: Iterable[Task]) -> Iterator[list[Numbered]]:
    """Embeds parts, whose examples share batches."""
    numbers: deque[tuple[int, int, bool]] = deque()  # of the examples that were read and are not embedded yet

    def examples() -> Iterator[Example]:
        for part, files, known in tasks:
            found = read_part(files, config.columns) if isinstance(files, Part) else files
            for number, example, is_last in numbered(found):
                if number not in known:
                    numbers.append((part, number, is_last))
                    yield example

    for found in embedded(predictor, examples(), config.of, config):
        yield [(*numbers.popleft(), one) for one in found]


def _add(table: Table, rows: Sequence[Numbered], quantize: Quantize | None) -> None:
    import pyarrow as pa

    if not rows:
        return
    schema = table.schema
    kind = schema.field("vector").type
    cells, vectors = list[tuple[Any, ...]](), list[np.ndarray]()
    for part, number, is_last, one in rows:
        found = _vectors_of(one) or [(None, np.zeros(0))]
        about = bool(one.example.images), one.example.place, one.problem, one.may_pass, name_of(one.example)
        cells += [(part, number, is_last, *about, text) for text, _ in found]
        if one.problem:
            vectors.append(np.zeros(kind.list_size, _DTYPES[quantize]))
        else:
            vectors += [*quantized(np.stack([vector for _, vector in found]), quantize)]
    if not is_url(table.uri) and not Path(table.uri, "_versions").is_dir():  # Lance would write a damaged one
        raise FileNotFoundError(f"{table.uri} was removed while it was written; run the same command again")
    columns = [
        pa.array([escaped(cell) if isinstance(cell, str) else cell for cell in values], schema.field(name).type)
        for values, name in zip(zip(*cells, strict=True), (*_OF_RUN, "id", "text"), strict=True)
    ]
    flat = pa.array(np.stack(vectors).ravel(), kind.value_type)
    columns.append(pa.FixedSizeListArray.from_arrays(flat, kind.list_size))
    table.append(pa.table(columns, names=[*_OF_RUN, "id", "text", "vector"]))


def _results(table: Table, report: Path) -> tuple[np.ndarray, list[str]]:
    """Returns the places of rows with a vector, in the order of the source, and what the report says of the others."""
    order = np.lexsort((table.column("number"), table.column("part")))
    is_good = (table.column("problem").astype(object) == "")[order]
    bad = table.take(order[~is_good].tolist(), ["id", "place", "problem"]).to_pylist()
    report.unlink(missing_ok=True)
    if bad:
        with replacing(report) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(json_text(row) + "\n" for row in bad)
    return order[is_good], [f"{row['id']!r}: {row['problem']}" for row in bad]


def _export(table: Table, out: Path, places: np.ndarray) -> None:
    """Writes rows of the table to a file, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns, schema = ["id", "text", "vector"], table.schema

    def rows(*others: str) -> Iterator[Any]:
        for start in range(0, len(places), _EXPORTED):
            yield table.take(places[start : start + _EXPORTED].tolist(), [*columns, *others])

    with ExitStack() as stack:
        temporary = stack.enter_context(replacing(out))
        if out.suffix == ".parquet":
            schema = pa.schema([schema.field(name) for name in columns], schema.metadata)
            writer = stack.enter_context(pq.ParquetWriter(temporary, schema))
            for some in rows():
                writer.write_table(some.cast(schema))
            return
        file = stack.enter_context(temporary.open("wb"))
        if out.suffix == ".jsonl":
            for some in rows("is_image"):
                for row in some.to_pylist():
                    file.write(_json_line(row["id"], row["text"], row["is_image"], row["vector"]).encode())
            return
        kind = schema.field("vector").type
        lines = stack.enter_context(stack.enter_context(replacing(out.with_suffix(".ids.jsonl"))).open("wb"))
        dtype = np.dtype(kind.value_type.to_pandas_dtype())
        header = {"descr": dtype.str, "fortran_order": False, "shape": (len(places), kind.list_size)}
        np.lib.format.write_array_header_1_0(file, header)
        for some in rows():
            file.write(np.ascontiguousarray(some["vector"].combine_chunks().flatten().to_numpy()).data)
            lines.writelines((json_text(row) + "\n").encode() for row in some.select(["id", "text"]).to_pylist())


def print_vectors(source: str | Path | Sequence[Example], model: Model, config: EmbedConfig) -> None:
    """Prints the vectors of a source as JSON lines, batch by batch."""
    if config.ray is not None:
        raise ValueError("on Ray vectors are written to a file or table, not printed; give its place as out")
    examples = read(source, config.columns) if isinstance(source, str | Path) else source
    problems, num_cut = list[str](), 0
    config = replace(config, num_workers=config.num_workers or 0)
    for one in chain.from_iterable(embedded(loaded(model), examples, config.of, config)):
        num_cut += one.num_cut
        problems += [f"{name_of(one.example)!r}: {one.problem}"] if one.problem else []
        for text, vector in _vectors_of(one):
            values = quantized(vector[None], config.quantize)[0].tolist()
            sys.stdout.write(_json_line(name_of(one.example), text, bool(one.example.images), values))
    say_cut(num_cut)
    named = str(source) if isinstance(source, str | Path) else "the input"
    check_bad(named, problems, config.max_errors, "the vectors of the others are printed")


def given_examples(images: Sequence[Path], texts: Sequence[str], *, pairs: bool) -> list[Example]:
    """Returns images, or folders of them, and texts that are given one by one as examples; paths name images."""
    if pairs and len(images) != len(texts):
        raise ValueError(f"{len(images)} images and {len(texts)} texts; expected one text per image")
    places = list[str]()
    for given in images:
        if given.is_dir() and not pairs:
            places += [one.place for one in list_files(str(given)) if suffix_of(one.place) in IMAGE_SUFFIXES]
        else:
            places.append(str(given))
    of_images: list[tuple[str, ...]] = [(text,) for text in texts] if pairs else [()] * len(places)
    shown = [
        Example(id=place, images=(Image(name=place, place=place),), texts=own, place=place)
        for place, own in zip(places, of_images, strict=True)
    ]
    return shown if pairs else [*shown, *(Example(id="", texts=(text,), place=repr(text)) for text in texts)]


def _vectors_of(one: Embedded) -> list[tuple[str | None, np.ndarray]]:
    """Returns the vectors of an example with the text of each: of the image, or of each text or pair."""
    if one.problem:
        return []
    if one.image_vector is not None:
        return [(None, one.image_vector)]
    return list(zip(one.example.texts, one.pair_vectors if len(one.pair_vectors) else one.text_vectors, strict=True))


def _json_line(name: str, text: str | None, is_image: bool, values: Sequence[float]) -> str:
    named = {"image" if is_image else "id": name} if name else {}
    return json_text({**named, **({} if text is None else {"text": text}), "embedding": values}) + "\n"


def embedded(
    predictor: Predictor, examples: Iterable[Example], of: Content | Literal["all"] | None, config: SourceConfig
) -> Iterator[list[Embedded]]:
    """Embeds examples in order, batch by batch, each with its problem if it has one.

    `of` None embeds the image, or the texts where there is none; "all" the image, its texts and both together.
    """
    if of != "pairs":
        predictor.model.head("itc")
    left, num_workers = iter(examples), config.num_workers
    if num_workers is None:
        first = list(islice(left, MIN_FOR_WORKERS)) if config.ray is None else []
        num_workers = available_cores() if len(first) >= MIN_FOR_WORKERS else 0
        left = chain(first, left)
    batches = iter(lambda: list(islice(left, config.batch_size)), [])
    for decoded, pixels in load_items(
        partial(decode, predictor.processor, of != "texts"), batches, num_workers=num_workers
    ):
        yield _with_vectors(predictor, decoded, pixels, of, config)


def decode(
    processor: Processor, images: bool, batch: Sequence[Example]
) -> tuple[list[Embedded], UInt8[Tensor, "n 3 h w"]]:
    """Returns examples without vectors and, if images are needed, in one block the pixels of those with an image."""
    found, pixels = list[Embedded](), list[Tensor]()
    for example in batch:
        without = replace(example, images=tuple(replace(image, content=None) for image in example.images))
        one = Embedded(example=without, problem=example.problem)
        if images and not example.problem and len(example.images) > 1:
            problem = f"it has {len(example.images)} images; expected one: name its column as image_column"
            one = replace(one, problem=problem)
        elif images and not example.problem and example.images:
            image = example.images[0]
            try:
                content = image.read()
                resized = processor.prepare(content)
            except (ValueError, OSError) as error:
                problem = _OF_BYTES.sub("it", str(error))
                if isinstance(error, FileNotFoundError) and error.filename:
                    problem = f"no image file at {image.place}"
                elif problem.startswith(image.place) and image.is_file:
                    problem = f"it{problem.removeprefix(image.place)}"
                may_pass = isinstance(error, OSError) and not isinstance(error, _STAYING)
                one = replace(one, problem=problem, may_pass=may_pass)
            else:
                pixels.append(resized.pixels)
                digest, frame = hashlib.sha256(content).hexdigest(), content if image.moment else None
                one = replace(one, digest=digest, size=len(content), frame=frame)
                one = replace(one, width=resized.width, height=resized.height)
        found.append(one)
    return found, torch.stack(pixels) if pixels else torch.empty(0, dtype=torch.uint8)


def _with_vectors(
    predictor: Predictor,
    decoded: Sequence[Embedded],
    pixels: UInt8[Tensor, "n 3 h w"],
    of: Content | Literal["all"] | None,
    config: SourceConfig,
) -> list[Embedded]:
    """Gives vectors to what was decoded, or problems."""

    def tokens(text: str) -> tuple[Tokens, bool]:
        """Returns the ids of a text, and whether it was cut."""
        try:
            return tuple(predictor.processor.token_ids([text])[0]), False
        except ValueError:
            return tuple(predictor.processor.token_ids([text], truncate=config.truncate)[0]), True

    items: dict[str, list[Item]] = {"images": [], "texts": [], "pairs": []}
    found, wanted, left = list[Embedded](), list[tuple[str, ...]](), iter(pixels)
    for one in decoded:
        image, texts, problem = next(left) if one.width else None, one.example.texts, one.problem
        if of is None:
            kinds: tuple[str, ...] = ("images",) if one.example.images else ("texts",)
        else:
            kinds = (of,) if of != "all" else ("images", "texts", "pairs") if texts else ("images",)
        cut = list[tuple[Tokens, bool]]()
        if not problem and image is None and kinds != ("texts",):
            problem = "it has no image"
        elif not problem and kinds != ("images",):
            try:
                cut = [tokens(text) for text in texts]
                problem = "" if texts else "it has no text"
            except ValueError as error:
                problem = f"caption {error}"
        kinds = () if problem else kinds
        for kind in kinds:
            shown = None if kind == "texts" else image
            items[kind] += [Item(image=shown, ids=ids) for ids, _ in cut] if kind != "images" else [Item(image=shown)]
        found.append(replace(one, problem=problem, num_cut=0 if problem else sum(is_cut for _, is_cut in cut)))
        wanted.append(kinds)

    def computed_of(items: Sequence[Item]) -> Iterator[np.ndarray]:
        for start in range(0, len(items), config.batch_size):
            yield from (vector.numpy() for vector in predictor.compute(items[start : start + config.batch_size]))  # type: ignore[union-attr]  # of embeddings

    vectors = {kind: computed_of(some) for kind, some in items.items()}
    return [
        replace(
            one,
            image_vector=next(vectors["images"]) if "images" in kinds else None,
            text_vectors=np.stack([next(vectors["texts"]) for _ in one.example.texts]) if "texts" in kinds else _NONE,
            pair_vectors=np.stack([next(vectors["pairs"]) for _ in one.example.texts]) if "pairs" in kinds else _NONE,
        )
        for one, kinds in zip(found, wanted, strict=True)
    ]


def computed(
    work: Callable[[Predictor, Iterable[T]], Iterator[list[Result]]],
    tasks: Iterable[T],
    model: Model,
    config: SourceConfig,
) -> Iterator[list[Result]]:
    """Yields what comes of tasks: in order here or, task by task, on a cluster, where models take one after the other.

    What a worker had that died is done again.
    """
    if config.ray is None:
        yield from work(loaded(model), tasks)
        return
    import ray
    from ray.util import ActorPool

    with _cluster(config):
        resources, cores = ray.cluster_resources(), 1 + (config.num_workers or 0)
        gpus = int(resources.get("GPU", 0))
        room, unit = gpus or int(resources["CPU"]) // cores, "GPU" if gpus else "core"
        count = config.ray_workers or room
        if count > room:
            raise ValueError(f"ray_workers is {count}, but the cluster has {room} {unit}s, one for each worker")
        actor: Any = ray.remote(max_restarts=-1, max_task_retries=-1, num_cpus=cores, num_gpus=int(gpus > 0))(_Worker)
        workers, pool = list[Any](), ActorPool([])
        for task in tasks:
            if len(workers) < count:
                workers.append(actor.remote(model, work))
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
    def __init__(self, model: Model, work: Callable[[Predictor, Iterable[Any]], Iterator[list[Any]]]) -> None:
        self._predictor, self._work = loaded(model), work

    def done(self, task: Any) -> list[Any]:
        return [*chain.from_iterable(self._work(self._predictor, [task]))]


def _cluster(config: SourceConfig) -> AbstractContextManager[Any]:
    """Connects to a cluster, or starts one; in a process that is connected already, that one is used and stays."""
    import ray

    if ray.is_initialized():
        return nullcontext()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    cores = max(available_cores(), config.ray_workers or 1)
    options: dict[str, Any] = {"include_dashboard": False, "num_cpus": cores} if config.ray == _LOCAL else {}
    try:
        return ray.init(address=config.ray, log_to_driver=False, logging_level=logging.WARNING, **options)
    except ConnectionError as error:
        raise OSError(f"no Ray cluster at {config.ray} ({error}); start one, or give {_LOCAL}") from error


class Commits:
    """Says when rows are to be committed: every few seconds, less often in long runs, and before they are too many."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._started = seconds, time.monotonic()
        self._last = self._started

    def due(self, num_rows: int) -> bool:
        """Whether to commit so many rows now; the clock starts anew then."""
        now = time.monotonic()
        wait = max(self._seconds, _SHARE * (now - self._started)) if self._seconds else 0.0
        if not num_rows or (num_rows < _COMMITTED and now - self._last < wait):
            return False
        self._last = now
        return True


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


def say_cut(num_cut: int) -> None:
    """Logs how many texts were cut, if any."""
    if num_cut:
        logger.warning("%d texts were longer than the model takes and were cut", num_cut)


def check_ray(config: SourceConfig, model: Model) -> None:
    """Checks that workers of a cluster can load the model themselves, if there is to be a cluster."""
    if config.ray is not None:
        require("ray")
        if isinstance(model, Predictor):
            raise ValueError("on Ray every worker loads the model; give what to load, not a loaded model")
