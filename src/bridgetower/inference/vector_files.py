"""Vectors and scores of a whole source, in a file or a Lance table.

They are first committed to a Lance table, from which a killed run continues, and then exported.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image as PilImage

from bridgetower.data.sets.store import Table
from bridgetower.data.sources.columns import Columns
from bridgetower.data.sources.example import (
    IMAGE_SUFFIXES,
    MAX_SHOWN_PROBLEMS,
    Example,
    FileGroup,
    Image,
    check_bad,
)
from bridgetower.data.sources.fetch import ListedFile, is_url, list_files, suffix_of, version_of
from bridgetower.data.sources.reader import file_groups, read, read_group
from bridgetower.extras import require
from bridgetower.files import (
    escaped,
    json_text,
    locked,
    remove_leftovers,
    replacing,
    unfit_name,
    write_text,
)
from bridgetower.inference.config import EmbedConfig, Quantize, ScoreConfig
from bridgetower.inference.embed import (
    Embedded,
    Model,
    check_ray,
    embed_tasks,
    example_name,
    load_model,
    number_items,
)
from bridgetower.inference.predictor import Predictor

if TYPE_CHECKING:
    import pyarrow as pa

Config = EmbedConfig | ScoreConfig
Group = FileGroup | Sequence[Example]
"""Examples that are read together: files of a source, or examples in memory."""

_SUFFIXES = {
    "vectors": (".jsonl", ".parquet", ".npy", ".lance"),
    "scores": (".csv", ".jsonl", ".parquet"),
}
_EXPORTED = 4096  # rows at once
_DTYPES: dict[Quantize | None, str] = {
    None: "float32",
    "float16": "float16",
    "int8": "int8",
    "binary": "uint8",
}
# Settings on which vectors depend: a run with others cannot be continued.
_SETTINGS = (
    "image_column",
    "caption_column",
    "id_column",
    "captions_from",
    "every",
    "max_moments",
    "transcribe",
    "transcribe_model",
    "truncate",
    "of",
)
# Columns of an unfinished table, which the result lacks, and their types.
_RUN_COLUMNS = {
    "part": "int32",  # index of the group of examples
    "number": "int64",  # of the example in its group
    "is_last": "bool",
    "is_image": "bool",
    "origin": "string",
    "problem": "string",
    "may_pass": "bool",
}


@dataclass(frozen=True, kw_only=True)
class EmbedReport:
    """Summary of an embedding run."""

    vectors: int  # that were written
    cut: int  # texts that this run cut, as they were too long for the model
    bad: int  # items that could not be used
    problems: tuple[str, ...]  # of the first bad items
    report: str | None  # file with the problems of all bad items; None if there are none
    seconds: float  # of the run, without loading the model


def embed_source(
    source: str | Path | Sequence[Example],
    out: str | Path,
    model: Model,
    config: Config | None = None,
    *,
    progress: bool = False,
) -> EmbedReport:
    """Writes the vectors of a source, or scores of its pairs, in memory for a few seconds of work.

    A run that was killed is continued by the next one with the same arguments: its vectors are in the table OUT,
    or `.OUT.lance` beside another output. Unusable items are skipped and listed in `OUT.errors.jsonl`.

    Args:
        source: As for `bridgetower.data.sources.reader.read`, or examples.
        out: File or table, which ends in `.jsonl`, `.parquet`, `.npy` or `.lance`; of scores in `.csv`, `.jsonl` or
            `.parquet`.
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
    # What can be refused is refused before a model is loaded.
    config = config or EmbedConfig()
    out = str(out)
    if problem := unfit_name(out):
        raise ValueError(problem)
    suffix = Path(out).suffix
    results = "scores" if config.of == "scores" else "vectors"
    suffixes = _SUFFIXES[results]
    if suffix not in suffixes:
        raise ValueError(
            f"{out!r} has no suffix of {results}; expected one of {', '.join(suffixes)}"
        )
    require("search")
    check_ray(config, model)
    groups: list[Group] = [*file_groups(source)] if isinstance(source, str | Path) else [source]
    predictor = load_model(model)
    start_time = time.perf_counter()

    uri = _table_uri(out)
    report = Path(f"{Path(out).name if is_url(out) else out}.errors.jsonl")
    with write_lock(uri):
        if not is_url(out):
            for path in (Path(out), report, Path(uri), Path(out).with_suffix(".ids.jsonl")):
                remove_leftovers(path.parent, path.name)
        run = _EmbeddingRun(uri, groups, predictor, config)
        num_cut = run.fill(model, progress=progress)
        indices, bad = run.split_rows(report)

        # Too many bad items are refused before anything is exported.
        problems = [f"{row['id']!r}: {row['problem']}" for row in bad]
        source_name = _name_source(source)
        if len(indices):
            remaining = f"the {len(indices)} {results} of the others are kept"
            advice = f"{remaining}, and the same command with a larger N writes them"
            check_bad(source_name, problems, config.max_errors, advice)
        else:
            run.table.drop()
            empty = f"{out} would have no {results}"
            check_bad(source_name, problems, config.max_errors, empty, has_good=False)
            reasons = " | ".join(problems[:MAX_SHOWN_PROBLEMS]) or "it names nothing"
            raise ValueError(f"{empty}: nothing of {source_name} could be used: {reasons}")

        # A Lance table is the output itself.
        if suffix != ".lance":
            run.export(Path(out), indices)
            run.table.drop()
        elif not run.is_finished:
            run.finish_table()
    return EmbedReport(
        vectors=len(indices),
        cut=num_cut,
        bad=len(problems),
        problems=tuple(problems[:MAX_SHOWN_PROBLEMS]),
        report=str(report) if problems else None,
        seconds=time.perf_counter() - start_time,
    )


def _name_source(source: object) -> str:
    return str(source) if isinstance(source, str | Path) else "the input"


def _table_uri(out: str) -> str:
    """Returns the place of the table from which a run continues: the output, or a hidden folder beside it."""
    path = Path(out)
    if path.suffix == ".lance":
        return out
    folder = out.removesuffix(f"/{path.name}") if is_url(out) else path.parent
    return f"{folder}/.{re.sub(r'[^A-Za-z0-9_.-]', '_', path.name)}.lance"


class _EmbeddingRun:
    """A run whose results are in a table, from which the next one continues if it is killed."""

    def __init__(
        self, uri: str, groups: Sequence[Group], predictor: Predictor, config: Config
    ) -> None:
        self.groups = groups
        self.predictor = predictor
        self.config = config
        self.table = self._open_table(uri)

    @property
    def is_finished(self) -> bool:
        return "part" not in self.table.schema.names

    def _open_table(self, uri: str) -> Table:
        """Opens the table of an unfinished or finished run with the same plan, or creates one."""
        import pyarrow as pa

        # The columns, with the width of the vectors.
        config = self.config
        model = self.predictor.model
        if config.of == "scores":
            heads = (model.itm_head, model.itc_head)
            width = sum(head is not None for head in heads) or model.head("itm")
        elif config.of == "pairs":
            width = self.predictor.embed_pairs(PilImage.new("RGB", (8, 8)), "").shape[1]
        else:
            width = self.predictor.embed_texts("").shape[1]
        if config.quantize == "binary":
            width = -(-width // 8)
        columns = {name: pa.type_for_alias(kind) for name, kind in _RUN_COLUMNS.items()}
        columns |= {"id": pa.string(), "text": pa.string()}
        columns["vector"] = pa.list_(pa.type_for_alias(_DTYPES[config.quantize]), width)
        plan = self._plan()
        schema = pa.schema(list(columns.items()), metadata={"bridgetower": json.dumps(plan)})

        # A table of another plan is replaced if it is empty, or finished and of another source.
        try:
            table = Table(uri)
        except FileNotFoundError:
            return Table.create(uri, schema, checked="vector")
        table.recover()
        old_plan = json.loads((table.schema.metadata or {}).get(b"bridgetower", b"{}"))
        if old_plan == plan:
            return table
        is_unfinished = "part" in table.schema.names
        if is_unfinished and len(table):
            raise ValueError(
                f"{uri} has rows of an unfinished run with another source, model or settings; finish it with the same "
                "command, or remove that folder"
            )
        if not is_unfinished and {**old_plan, "source": ""} != {**plan, "source": ""}:
            raise FileExistsError(f"{uri} exists; choose another name or remove it")
        return Table.create(uri, schema, checked="vector", replace=True)

    def _plan(self) -> dict[str, Any]:
        """Returns all that vectors depend on."""
        versions = hashlib.sha256()
        for group in self.groups:
            version = group.version if isinstance(group, FileGroup) else repr(group)
            versions.update(version.encode(errors="surrogateescape"))
        return {
            "model": self.predictor.source,
            "fingerprint": self.predictor.fingerprint,
            "source": versions.hexdigest(),
            "quantize": self.config.quantize,
            **{name: getattr(self.config, name) for name in _SETTINGS},
        }

    def fill(self, model: Model, *, progress: bool) -> int:
        """Embeds examples that the table lacks or whose problem may have passed. Returns how many texts were cut."""
        if self.is_finished:
            return 0
        table = self.table
        if table.column("may_pass").any():
            with table.writing():
                table.lance.delete("may_pass")
        groups = self.groups
        group_indices = table.column("part")
        numbers = table.column("number")
        is_last = table.column("is_last")
        order = np.argsort(group_indices, kind="stable")
        starts = np.searchsorted(group_indices, np.arange(len(groups) + 1), sorter=order)
        tasks = []
        num_done = 0
        for index, group in enumerate(groups):
            rows = order[starts[index] : starts[index + 1]]
            done = np.unique(numbers[rows])
            num_done += len(done)
            is_complete = is_last[rows].any() and len(done) == done[-1] + 1
            if not is_complete:
                columns = self.config.columns
                done_numbers = frozenset(done.tolist())
                tasks.append(partial(_missing_examples, index, group, done_numbers, columns))

        # Rows of tables are not counted before they are read.
        sizes = [len(group.files if isinstance(group, FileGroup) else group) for group in groups]
        is_counted = all(
            not isinstance(group, FileGroup) or group.kind == "images" for group in groups
        )
        return embed_tasks(
            tasks,
            self.config.of,
            self.predictor if self.config.ray is None else model,
            self.config,
            self.append,
            num_done=num_done,
            total=sum(sizes) if is_counted else None,
            progress=progress,
        )

    def append(self, results: Sequence[Embedded]) -> None:
        """Writes results to the table in one commit."""
        import pyarrow as pa

        if not results:
            return
        table = self.table
        quantize = self.config.quantize
        vector_type = table.schema.field("vector").type
        blank = np.zeros(vector_type.list_size, _DTYPES[quantize])
        rows = []
        vectors = []
        for result in results:
            example = result.example
            row = {
                **example.fields,
                "id": escaped(example_name(example)),
                "origin": escaped(example.origin),
                "problem": escaped(result.problem),
                "is_image": bool(example.images),
                "may_pass": result.may_pass or result.may_be_mended,
            }
            for text, vector in list(_texts_and_vectors(result, quantize)) or [(None, blank)]:
                rows.append({**row, "text": text})
                vectors.append(vector)
        # Lance would write a table without its first rows.
        if not is_url(table.uri) and not Path(table.uri, "_versions").is_dir():
            raise FileNotFoundError(
                f"{table.uri} was removed while it was written; run the same command again"
            )
        fields = [table.schema.field(name) for name in (*_RUN_COLUMNS, "id", "text")]
        values = pa.array(np.stack(vectors).ravel(), vector_type.value_type)
        column = pa.FixedSizeListArray.from_arrays(values, vector_type.list_size)
        table.append(pa.Table.from_pylist(rows, pa.schema(fields)).append_column("vector", column))

    def split_rows(self, report: Path) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Returns the indices of rows with vectors, in the order of the source, and the bad rows, as in the report.

        The report of an unfinished run is written anew.
        """
        table = self.table
        if self.is_finished:
            lines = report.read_text(encoding="utf-8").splitlines() if report.is_file() else []
            return np.arange(len(table)), [json.loads(line) for line in lines]
        problems = table.column("problem").astype(object)
        order = np.lexsort((table.column("number"), table.column("part")))
        has_vector = problems[order] == ""
        bad_indices = order[~has_vector].tolist()
        bad = table.take(bad_indices, ["id", "origin", "problem"]).to_pylist()
        report.unlink(missing_ok=True)
        if bad:
            write_text(report, "".join(json_text(row) + "\n" for row in bad))
        return order[has_vector], bad

    def finish_table(self) -> None:
        """Leaves only the vectors in the table."""
        with self.table.writing():
            self.table.lance.delete("problem != ''")
            self.table.lance.drop_columns(list(_RUN_COLUMNS))
        self.table.compact()

    def export(self, out: Path, indices: np.ndarray) -> None:
        """Writes rows of the table to a file, whole or not at all."""
        names = ["id", "text", "vector", "is_image", "part", "number"]
        batches: Iterator[pa.Table] = (
            self.table.take(indices[start : start + _EXPORTED].tolist(), names)
            for start in range(0, len(indices), _EXPORTED)
        )
        is_scores = self.config.of == "scores"
        if is_scores:
            batches = map(self._score_columns, batches)
        with replacing(out) as temporary:
            if out.suffix in (".parquet", ".csv"):
                tables = batches if is_scores else (rows.select(names[:3]) for rows in batches)
                self._write_tables(temporary, tables, out.suffix)
            elif out.suffix == ".jsonl":
                with temporary.open("w", encoding="utf-8") as file:
                    for row in chain.from_iterable(batch.to_pylist() for batch in batches):
                        line = (
                            json_text(row) + "\n" if is_scores else _json_line(row, row["vector"])
                        )
                        file.write(line)
            else:
                with replacing(out.with_suffix(".ids.jsonl")) as ids:
                    self._write_npy(temporary, ids, batches, len(indices))

    def _write_tables(self, path: Path, tables: Iterator[pa.Table], suffix: str) -> None:
        """Writes rows as Parquet or CSV."""
        from pyarrow.csv import CSVWriter
        from pyarrow.parquet import ParquetWriter

        first = next(tables)
        schema = first.schema.with_metadata(self.table.schema.metadata)
        writer_class = ParquetWriter if suffix == ".parquet" else CSVWriter
        with writer_class(path, schema) as writer:
            for rows in chain([first], tables):
                writer.write_table(rows.cast(schema))

    def _write_npy(
        self, path: Path, ids_path: Path, batches: Iterator[pa.Table], num_rows: int
    ) -> None:
        """Writes vectors as a NumPy array, and the id and text of each to another file."""
        shape = (num_rows, self.table.schema.field("vector").type.list_size)
        with path.open("wb") as file, ids_path.open("w", encoding="utf-8") as ids:
            for batch in batches:
                vectors = batch["vector"].combine_chunks().flatten().to_numpy()
                if not file.tell():
                    header = {"descr": vectors.dtype.str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(np.ascontiguousarray(vectors).data)
                rows = batch.select(["id", "text"]).to_pylist()
                ids.writelines(json_text(row) + "\n" for row in rows)

    def _score_columns(self, rows: pa.Table) -> pa.Table:
        """Returns the scores that the model has heads for, with the file and the row in it of each pair."""
        import pyarrow as pa

        files = []
        numbers = []
        for row in rows.select(["part", "number"]).to_pylist():
            group = self.groups[row["part"]]
            names = [file.name for file in group.files] if isinstance(group, FileGroup) else [""]
            is_file_of_rows = len(names) == 1
            files.append(names[0] if is_file_of_rows else names[row["number"]])
            numbers.append(row["number"] if is_file_of_rows else 0)
        columns = {"id": rows["id"], "text": rows["text"], "file": files, "row": numbers}
        outputs = torch.from_numpy(np.stack(rows["vector"].to_numpy()))
        outputs = outputs.double()  # in which large log-odds give different probabilities
        model = self.predictor.model
        if model.itm_head is not None:
            reranking = self.predictor.reranking
            columns[reranking.measure] = reranking.match(outputs[:, 0]).numpy()
        if model.itc_head is not None:
            columns["cosine"] = outputs[:, -1].numpy()
        return pa.table(columns)


def _missing_examples(
    index: int, group: Group, done: Set[int], columns: Columns
) -> Iterator[Example]:
    """Yields the examples of a group that the table lacks, with columns of the table as fields."""
    examples = read_group(group, columns) if isinstance(group, FileGroup) else group
    for number, example, is_last in number_items(examples):
        if number not in done:
            yield replace(example, fields={"part": index, "number": number, "is_last": is_last})


def print_vectors(
    source: str | Path | Sequence[Example], model: Model, config: EmbedConfig
) -> None:
    """Prints the vectors of a source as JSON lines, batch by batch."""
    if config.ray is not None:
        raise ValueError(
            "on Ray vectors are written to a file or table, not printed; give its place as out"
        )
    examples = read(source, config.columns) if isinstance(source, str | Path) else source
    problems = []

    def write(results: Sequence[Embedded]) -> None:
        for result in results:
            name = example_name(result.example)
            if result.problem:
                problems.append(f"{name!r}: {result.problem}")
            for text, vector in _texts_and_vectors(result, config.quantize):
                row = {"id": name, "text": text, "is_image": bool(result.example.images)}
                sys.stdout.write(_json_line(row, vector.tolist()))

    config = replace(config, num_workers=config.num_workers or 0, commit_seconds=0)
    embed_tasks([lambda: examples], config.of, model, config, write)
    remaining = "the vectors of the others are printed"
    check_bad(_name_source(source), problems, config.max_errors, remaining)


def given_examples(images: Sequence[Path], texts: Sequence[str], *, pairs: bool) -> list[Example]:
    """Returns images, or folders of images, and texts as examples, with the paths of images as ids.

    With `pairs`, text n goes with image n.
    """
    if pairs and len(images) != len(texts):
        raise ValueError(
            f"{len(images)} images and {len(texts)} texts; expected one text per image"
        )
    files = []
    for path in images:
        if path.is_dir() and not pairs:
            listed = list_files(str(path))
            files += [file for file in listed if suffix_of(file.location) in IMAGE_SUFFIXES]
        else:
            version = version_of(str(path)) if path.is_file() else ""
            files.append(ListedFile(str(path), str(path), version))
    examples = []
    for number, file in enumerate(files):
        location = file.location
        image = Image(name=location, location=location, version=file.version)
        caption = (texts[number],) if pairs else ()
        examples.append(Example(id=location, images=(image,), texts=caption, origin=location))
    if not pairs:
        examples += [Example(id="", texts=(text,), origin=repr(text)) for text in texts]
    return examples


def _texts_and_vectors(
    result: Embedded, quantize: Quantize | None
) -> Iterator[tuple[str | None, np.ndarray]]:
    """Yields the quantized vectors of an example, each with its text or without one."""
    for content, vectors in result.vectors.items():
        texts = (None,) if content == "images" else result.example.texts
        for text, vector in zip(texts, vectors, strict=True):
            yield text, quantized(vector, quantize)


def _json_line(row: Mapping[str, Any], values: Sequence[float]) -> str:
    content = {}
    if row["id"]:
        content["image" if row["is_image"] else "id"] = row["id"]
    if row["text"] is not None:
        content["text"] = row["text"]
    return json_text({**content, "embedding": values}) + "\n"


def quantized(vectors: np.ndarray, kind: Quantize | None) -> np.ndarray:
    """Quantizes one or several vectors.

    In int8, 127 is the largest absolute number of each vector. In binary, a byte has the signs of 8 numbers.
    """
    if kind is None:
        return vectors
    if kind == "float16":
        return vectors.astype(np.float16)
    if kind == "int8":
        largest = np.abs(vectors).max(axis=-1, keepdims=True)
        return np.rint(vectors * (127 / np.where(largest > 0, largest, 127))).astype(np.int8)
    return np.packbits(vectors > 0, axis=-1)


def write_lock(uri: str | os.PathLike[str]) -> AbstractContextManager[None]:
    """Keeps other processes from writing a table in a local folder."""
    return nullcontext() if is_url(uri) else locked(Path(uri))
