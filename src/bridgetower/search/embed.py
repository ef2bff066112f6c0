"""Vectors of a source: committed to a Lance table as they come, so that killed runs go on, and exported in the end."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from bridgetower.data.example import Example, Image
from bridgetower.data.fetch import is_url, list_files, suffix_of
from bridgetower.data.reader import IMAGE_SUFFIXES, Columns, Part, parts_of
from bridgetower.extras import require
from bridgetower.files import escaped, json_text, locked, remove_leftovers, replacing, unfit_name
from bridgetower.predictor import Predictor
from bridgetower.progress import counting
from bridgetower.search.config import EmbedConfig, Quantize
from bridgetower.search.embedding import (
    Embedded,
    Embedder,
    Model,
    Task,
    check_bad,
    check_ray,
    embedded,
    embedded_parts,
    loaded,
    quantized,
)

SUFFIXES = (".jsonl", ".parquet", ".npy", ".lance")
"""Of the places that vectors can be written to."""

_DTYPES: dict[Quantize | None, str] = {None: "float32", "float16": "float16", "int8": "int8", "binary": "uint8"}
_DECIDING = ("image_column", "caption_column", "id_column", "captions_from", "every", "max_moments", "truncate", "of")
_COMMITTED = 2**16  # rows, after which they are committed
_SHARE = 0.01  # of the time so far: commits get rarer, so that what Lance notes of each stays little
_EXPORTED = 4096  # rows at once
_NAMED = 10  # problems that are returned
# Columns of a run, which its result lacks. The row after the last one of a part has -1 - their count as number.
_OF_RUN = ("part", "number", "is_image", "place", "problem", "may_pass")

logger = logging.getLogger(__name__)


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
        out: File or table, whose suffix is one of `SUFFIXES`.
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
    started = time.perf_counter()
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
    with _Run(out, plan, predictor, config) as run:
        if not run.is_finished:
            total = sum(len(part.files) if isinstance(part, Part) else len(part) for part in parts)
            counted = all(not isinstance(part, Part) or part.kind == "images" for part in parts)
            with counting("embedding", total=total if counted else None, shown=progress) as advance:
                run.embed(parts, predictor if config.ray is None else model, config, advance)
        vectors, num_bad, problems = run.finish(str(source) if isinstance(source, str | Path) else "the input", config)
    say_cut(run.num_cut)
    return EmbedReport(
        vectors=vectors,
        cut=run.num_cut,
        bad=num_bad,
        problems=tuple(problems),
        report=run.report if num_bad else None,
        seconds=time.perf_counter() - started,
    )


def print_vectors(
    source: str | Path | Sequence[Example], model: Model, config: EmbedConfig, *, file: TextIO | None = None
) -> None:
    """Prints the vectors of a source as JSON lines, batch by batch."""
    from bridgetower.data.reader import read

    if config.ray is not None:
        raise ValueError("on Ray vectors are written to a file or table, not printed; give its place as out")
    examples = read(source, config.columns) if isinstance(source, str | Path) else source
    embedder, target = embedder_of(config, model), file or sys.stdout
    problems: list[str] = []
    num_bad = num_cut = 0
    for one in chain.from_iterable(embedded(embedder, examples, num_workers=config.num_workers or 0)):
        num_cut += one.num_cut
        if one.problem:
            num_bad += 1
            problems += [_told(name_of(one.example), one.problem)] if num_bad <= _NAMED else []
        for text, vector in _vectors_of(one):
            values = quantized(vector[None], config.quantize)[0].tolist()
            target.write(_json_line(name_of(one.example), text, bool(one.example.images), values))
    say_cut(num_cut)
    named = str(source) if isinstance(source, str | Path) else "the input"
    check_bad(named, problems, num_bad, config.max_errors, "the vectors of the others are printed")


def given_examples(images: Sequence[Path], texts: Sequence[str], *, pairs: bool) -> list[Example]:
    """Returns images, or folders of them, and texts that are given one by one as examples; paths name images."""
    if pairs and len(images) != len(texts):
        raise ValueError(f"{len(images)} images and {len(texts)} texts; expected one text per image")
    places = [
        str(place)
        for given in images
        for place in ([one.place for one in list_files(str(given))] if given.is_dir() and not pairs else [given])
        if not given.is_dir() or suffix_of(str(place)) in IMAGE_SUFFIXES
    ]
    shown = [Example(id=place, images=(Image(name=place, place=place),), place=place) for place in places]
    if pairs:
        return [
            Example(id=one.id, images=one.images, texts=(text,), place=one.place)
            for one, text in zip(shown, texts, strict=True)
        ]
    return [*shown, *(Example(id="", texts=(text,), place=repr(text)) for text in texts)]


def embedder_of(config: EmbedConfig, model: Model) -> Embedder:
    """Returns what embeds by a config."""
    return Embedder(loaded(model), config.of, truncate=config.truncate, batch_size=config.batch_size)


def name_of(example: Example) -> str:
    """Returns what names an example in a source of several shards, whose keys are those of its own."""
    return example.images[0].name if example.images and example.images[0].piece else example.id


def say_cut(num_cut: int) -> None:
    """Logs how many texts were cut, if any."""
    if num_cut:
        logger.warning("%d texts were longer than the model takes and were cut", num_cut)


class Commits:
    """Says when rows are to be committed: every few seconds, less often in long runs, and before they are too many."""

    def __init__(self, seconds: float) -> None:
        """Starts the clock."""
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


def _told(name: str, problem: str) -> str:
    return f"{name!r}: {problem}"


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


def _task_done(
    columns: Columns, num_workers: int | None, embedder: Embedder, task: Task
) -> list[tuple[int, int, Embedded | None]]:
    return [*chain.from_iterable(embedded_parts(embedder, [task], columns, num_workers))]


class _Run:
    """The table of a run, to which rows are added; it becomes the output.

    Attributes:
        report: File of what could not be used.
        is_finished: Whether the output is there already.
        num_cut: Texts that were cut.
    """

    def __init__(self, out: str | Path, plan: dict[str, Any], predictor: Predictor, config: EmbedConfig) -> None:
        self.out, self._plan, self._quantize = str(out), plan, config.quantize
        self._parent, _, name = (
            self.out.rpartition("/") if is_url(self.out) else (str(Path(out).parent), "", Path(out).name)
        )
        self._is_table = name.endswith(".lance")
        hidden = f".{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.lance"
        self.uri = self.out if self._is_table else f"{self._parent}/{hidden}"
        self.report = f"{name if is_url(self.out) else self.out}.errors.jsonl"
        of_pairs = config.of == "pairs"
        width = (predictor.embed_pairs(_blank(), "") if of_pairs else predictor.embed_texts("")).shape[1]
        self._width = -(-width // 8) if config.quantize == "binary" else width
        self.num_cut = 0
        self._held = ExitStack()

    def __enter__(self) -> _Run:
        import pyarrow as pa

        from bridgetower.data.store import Table

        with ExitStack() as stack:
            stack.enter_context(nullcontext() if is_url(self.uri) else locked(Path(self.uri)))
            places = [self.out, self.report, self.uri, str(Path(self.out).with_suffix(".ids.jsonl"))]
            for place in [] if is_url(self.out) else map(Path, places):
                remove_leftovers(place.parent, place.name)
            vector = pa.list_(pa.from_numpy_dtype(np.dtype(_DTYPES[self._quantize])), self._width)
            kinds = [pa.int32(), pa.int64(), pa.bool_(), pa.string(), pa.string(), pa.bool_()]
            columns = dict(zip(_OF_RUN, kinds, strict=True)) | {
                "id": pa.string(),
                "text": pa.string(),
                "vector": vector,
            }
            self._schema = pa.schema(list(columns.items()), metadata={"bridgetower": json.dumps(self._plan)})
            try:
                self._table = Table(self.uri)
                there = json.loads((self._table.schema.metadata or {}).get(b"bridgetower", b"{}"))
            except FileNotFoundError:
                self._table, there = Table.create(self.uri, self._schema, checked="vector"), self._plan
            self.is_finished = "part" not in self._table.schema.names
            if there != self._plan:
                if not self.is_finished:
                    raise ValueError(
                        f"{self.uri} has vectors of an unfinished run with another source, model or settings; finish "
                        "it with the same command, or remove that folder"
                    )
                if {**there, "source": ""} != {**self._plan, "source": ""}:
                    raise FileExistsError(f"{self.uri} exists; choose another name or remove it")
                self._table, self.is_finished = (
                    Table.create(self.uri, self._schema, checked="vector", replace=True),
                    False,
                )
            self._held = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def embed(
        self,
        parts: Sequence[Part | Sequence[Example]],
        model: Model,
        config: EmbedConfig,
        advance: Callable[[int], None],
    ) -> None:
        """Embeds what is not in the table, and what failed for a reason that may have passed."""
        if self._table.column("may_pass").any():
            with self._table.writing():
                self._table.lance.delete("may_pass")
        part, number, _ = self._rows()
        starts = np.searchsorted(part, np.arange(len(parts) + 1))
        tasks: list[Task] = []
        for place, files in enumerate(parts):
            numbers = number[starts[place] : starts[place + 1]]
            known = np.unique(numbers[numbers >= 0])
            advance(len(known))
            if not (len(numbers) and numbers.min() == -1 - len(known)):
                tasks.append((place, files, frozenset(known.tolist())))
        make = partial(embedder_of, config, model)
        results: Iterator[list[tuple[int, int, Embedded | None]]]
        if config.ray is None:
            results = embedded_parts(make(), tasks, config.columns, config.num_workers)
        else:
            from bridgetower.search.on_ray import done_on_ray

            results = done_on_ray(make, partial(_task_done, config.columns, config.num_workers or 0), tasks, config)
        rows: list[tuple[int, int, Embedded | None]] = []
        commits = Commits(config.commit_seconds)
        try:
            for found in results:
                rows += found
                advance(len(found))
                if commits.due(len(rows)):
                    self._add(rows)
                    rows = []
        except (KeyboardInterrupt, ValueError):
            self._add(rows)
            raise
        self._add(rows)

    def _add(self, rows: Sequence[tuple[int, int, Embedded | None]]) -> None:
        import pyarrow as pa

        cells: list[tuple[Any, ...]] = []
        vectors: list[np.ndarray] = []
        zeros = np.zeros(self._width, _DTYPES[self._quantize])
        for part, number, one in rows:
            if one is None:
                cells.append((part, number, False, "", "", False, "", None))
                vectors.append(zeros)
                continue
            self.num_cut += one.num_cut
            name, is_image = name_of(one.example), bool(one.example.images)
            about = part, number, is_image, one.example.place, one.problem, one.may_pass, name
            found = _vectors_of(one)
            cells += [(*about, text) for text, _ in found] or [(*about, None)]
            vectors += [*quantized(np.stack([vector for _, vector in found]), self._quantize)] if found else [zeros]
        if cells:
            if not is_url(self.uri) and not Path(self.uri, "_versions").is_dir():  # Lance would write a damaged one
                raise FileNotFoundError(f"{self.uri} was removed while it was written; run the same command again")
            kind = self._schema.field("vector").type
            flat = pa.array(np.stack(vectors).ravel(), kind.value_type)
            columns = [
                pa.array([escaped(cell) if isinstance(cell, str) else cell for cell in values], field.type)
                for values, field in zip(zip(*cells, strict=True), self._schema, strict=False)
            ]
            vector = pa.FixedSizeListArray.from_arrays(flat, kind.list_size)
            self._table.append(pa.table([*columns, vector], schema=self._schema))

    def _rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns part and number of all rows, sorted, and the places of those that have a vector, likewise."""
        part, number = self._table.column("part"), self._table.column("number")
        good = [batch["problem"].to_numpy(zero_copy_only=False) == "" for batch in self._table.scan(["problem"])]
        order = np.lexsort((number, part))
        with_vector = (number >= 0) & np.concatenate([np.empty(0, bool), *good])
        return part[order], number[order], order[with_vector[order]]

    def finish(self, source: str, config: EmbedConfig) -> tuple[int, int, list[str]]:
        """Makes the output of the table; returns the number of vectors, of what is bad, and what is wrong with some."""
        if self.is_finished:
            lines = Path(self.report).read_text(encoding="utf-8").splitlines() if Path(self.report).is_file() else []
            found = list(map(json.loads, lines))
            problems = [_told(one["id"], one["problem"]) for one in found]
            num_vectors = len(self._table)
        else:
            _, _, places = self._rows()
            num_vectors, problems = len(places), self._write_report()
        if not num_vectors:
            self._table.drop()
            reasons = " | ".join(problems[:_NAMED]) or "it names nothing"
            check_bad(source, problems, len(problems), config.max_errors, f"{self.out} would have no vectors")
            raise ValueError(f"{self.out} would have no vectors: nothing of {source} could be used: {reasons}")
        kept = f"the {num_vectors} vectors of the others are kept, and the same command with a larger N writes them"
        check_bad(source, problems, len(problems), config.max_errors, kept)
        if self.is_finished:
            pass
        elif self._is_table:
            with self._table.writing():
                self._table.lance.delete("number < 0 OR problem != ''")
                self._table.lance.drop_columns(list(_OF_RUN))
                self._table.lance.optimize(cleanup_older_than=timedelta(0))
        else:
            self._export(places)
            self._table.drop()
        return num_vectors, len(problems), problems[:_NAMED]

    def _write_report(self) -> list[str]:
        """Names what could not be used, in the order of the source."""
        import pyarrow.compute as pc

        found = []
        for batch in self._table.scan(["part", "number", "id", "place", "problem"]):
            found += batch.filter(pc.not_equal(batch["problem"], "")).to_pylist()
        found.sort(key=lambda row: (row["part"], row["number"]))
        path = Path(self.report)
        if found:
            with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
                file.writelines(json_text({n: row[n] for n in ("id", "place", "problem")}) + "\n" for row in found)
        else:
            path.unlink(missing_ok=True)
        return [_told(row["id"], row["problem"]) for row in found]

    def _export(self, places: np.ndarray) -> None:
        """Writes rows of the table to a file, whole or not at all."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        def tables(*columns: str) -> Iterator[Any]:
            for start in range(0, len(places), _EXPORTED):
                yield self._table.take(places[start : start + _EXPORTED].tolist(), columns)

        out, columns = Path(self.out), ["id", "text", "vector"]
        with ExitStack() as stack:
            temporary = stack.enter_context(replacing(out))
            if out.suffix == ".parquet":
                schema = pa.schema([self._schema.field(name) for name in columns], self._schema.metadata)
                writer = stack.enter_context(pq.ParquetWriter(temporary, schema))
                for table in tables(*columns):
                    writer.write_table(table.cast(schema))
                return
            file = stack.enter_context(temporary.open("wb"))
            if out.suffix == ".jsonl":
                for table in tables(*columns, "is_image"):
                    file.writelines(
                        _json_line(row["id"], row["text"], row["is_image"], row["vector"]).encode()
                        for row in table.to_pylist()
                    )
                return
            dtype, names = np.dtype(_DTYPES[self._quantize]), out.with_suffix(".ids.jsonl")
            lines = stack.enter_context(stack.enter_context(replacing(names)).open("wb"))
            header = {"descr": dtype.str, "fortran_order": False, "shape": (len(places), self._width)}
            np.lib.format.write_array_header_1_0(file, header)
            for table in tables(*columns):
                for chunk in table["vector"].chunks:
                    file.write(np.ascontiguousarray(chunk.flatten().to_numpy(zero_copy_only=False)).data)
                lines.writelines((json_text(row) + "\n").encode() for row in table.select(["id", "text"]).to_pylist())


def _blank() -> Any:
    from PIL import Image as PilImage

    return PilImage.new("RGB", (8, 8))
