"""Where vectors go: JSON lines, Parquet, NumPy or a Lance table, block by block, so that a killed run goes on."""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from bridgetower.bulk.config import Quantize
from bridgetower.bulk.embedding import Embedded, EmbeddedBlock, Problem
from bridgetower.bulk.quantize import quantized
from bridgetower.data.items import Block
from bridgetower.files import (
    escaped,
    json_text,
    locked,
    read_json,
    remove_folder,
    remove_leftovers,
    replacing,
    write_json,
    write_text,
)
from bridgetower.model.plain import from_plain

_FORMAT = 2  # of records
_PLAN = "plan.json"
_JOINED = "joined"  # an empty file that tells that all parts are in the output
_RECORD = "{}.json"
_PART = "{}.part"
_DTYPES: Mapping[Quantize | None, str] = {None: "float32", "float16": "float16", "int8": "int8", "binary": "uint8"}


@dataclass(frozen=True, kw_only=True)
class Record:
    """What became of a block.

    Attributes:
        digest: Of its items, as they were before they were read.
        has_files: Whether images of it are files of their own.
        last: Whether it is the last one of its unit.
        items: Embedded or not.
        vectors: That were written.
        num_cut: Texts that were cut.
        problems: What could not be used.
    """

    digest: str
    has_files: bool
    last: bool
    items: int
    vectors: int
    num_cut: int
    problems: tuple[Problem, ...]

    @property
    def may_pass(self) -> bool:
        """Whether reading it again could go better."""
        return any(problem.may_pass for problem in self.problems)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A vector, as it is written.

    Attributes:
        id: Of the item.
        is_image: Whether it has an image.
        text: That the vector is of, or also of; None: of the image alone.
        vector: float32.
    """

    id: str
    is_image: bool
    text: str | None
    vector: np.ndarray

    def json(self, quantize: Quantize | None) -> str:
        """Returns a line of JSON."""
        name = {"image" if self.is_image else "id": self.id} if self.id else {}
        text = {} if self.text is None else {"text": self.text}
        vector = quantized(self.vector[None], quantize)[0].tolist()
        return json_text({**name, **text, "embedding": vector}) + "\n"


def entries_of(rows: Sequence[Embedded]) -> Iterator[Entry]:
    """Yields the vectors of items: of the image, or of each of the texts, or of each pair."""
    for row in rows:
        about: dict[str, Any] = {"id": row.item.id, "is_image": row.item.image is not None}
        if row.image_vector is not None:
            yield Entry(**about, text=None, vector=row.image_vector)
            continue
        of_texts = row.pair_vectors if len(row.pair_vectors) else row.text_vectors
        for text, vector in zip(row.item.texts, of_texts, strict=True):
            yield Entry(**about, text=text, vector=vector)


class Output(ABC):
    """Vectors on disk: a part for each block beside `out`, all in one in the end.

    Attributes:
        out: What is written in the end.
        work: Folder of the parts and of a record for each; it is removed in the end.
        records: Of the blocks that are written, by name.
    """

    def __init__(self, out: str | Path, plan: Mapping[str, Any], *, quantize: Quantize | None) -> None:
        """Opens nothing yet.

        Args:
            out: Path.
            plan: All that decides what is written: a run with another plan does not go on with this one's parts.
            quantize: How vectors are written.
        """
        self.out, self.plan, self.quantize = Path(out), {**plan, "format": _FORMAT}, quantize
        self.work = Path(f"{out}.parts")
        self.records: dict[str, Record] = {}
        self._noted: dict[str, tuple[str, bool]] = {}
        self._held = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(locked(self.work))
            for path in self.places():
                remove_leftovers(path.parent, path.name)
            remove_leftovers(self.work)
            plan = self.work / _PLAN
            begun = plan.exists()
            if begun and read_json(plan) != self.plan:
                if not (self.work / _JOINED).exists():
                    raise ValueError(
                        f"{self.work} has parts of other vectors: of another source, model, version or store, or with "
                        "other settings; finish that run, or remove the folder"
                    )
                plan.unlink()
                begun = False
            (self.work / _JOINED).unlink(missing_ok=True)
            self.open(begun=begun)
            if not begun:
                write_json(plan, self.plan)
            self._held = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def is_whole(self, unit: int) -> bool:
        """Whether all blocks of a unit are written, and none can have changed while the unit did not."""
        own = {name: record for name, record in self.records.items() if name.startswith(f"{unit:06}-")}
        if any(record.has_files or record.may_pass for record in own.values()):
            return False
        number = next((int(name.partition("-")[2]) for name, record in own.items() if record.last), None)
        return number is not None and len(own) >= number + 1

    def has(self, block: Block) -> bool:
        """Whether a block is written, with these items; otherwise it is noted what they are, for its record.

        Call it before images are read: a file that changes after that is read again by a run that goes on.
        """
        digest, known = block.digest(), self.records.get(block.name)
        if known is not None and known.digest == digest and not known.may_pass:
            return True
        self._noted[block.name] = digest, block.has_files
        return False

    def write(self, block: EmbeddedBlock) -> None:
        """Writes a block, which was given to `has`, and its record."""
        digest, has_files = self._noted.pop(block.name)
        entries = list(entries_of(block.rows))
        self.write_part(block.name, entries)
        record = Record(
            digest=digest,
            has_files=has_files,
            last=block.last,
            items=len(block.rows) + len(block.problems),
            vectors=len(entries),
            num_cut=block.num_cut,
            problems=tuple(block.problems),
        )
        write_json(self.work / _RECORD.format(block.name), asdict(record))
        self.records[block.name] = record

    def finish(self) -> None:
        """Makes one of the parts.

        Raises:
            OSError: It cannot be written; the parts stay.
        """
        self.join([self.work / _PART.format(name) for name in sorted(self.records)])
        (self.work / _JOINED).touch()

    def remove_parts(self) -> None:
        """Removes the parts and their records, once nothing is left to be done."""
        remove_folder(self.work)

    @property
    def report(self) -> Path:
        """File of what could not be used."""
        return Path(f"{self.work.with_suffix('')}.errors.jsonl")

    def places(self) -> tuple[Path, ...]:
        """Returns all that is written."""
        return self.out, self.work, self.report

    def open(self, *, begun: bool) -> None:
        """Reads the records of an earlier run.

        Args:
            begun: Whether there was one with the same plan; records of other runs are removed.
        """
        for path in self.work.glob(_RECORD.format("*-*")):
            if begun:
                self.records[path.stem] = from_plain(Record, read_json(path), str(path))
            else:
                path.unlink()

    @abstractmethod
    def write_part(self, name: str, entries: Sequence[Entry]) -> None:
        """Writes the vectors of a block, whole or not at all."""

    @abstractmethod
    def join(self, parts: Sequence[Path]) -> None:
        """Makes the output of parts, whole or not at all."""


class JsonLines(Output):
    """A line for each vector: {"image", "id" or neither, "text" where there is one, "embedding"}."""

    def write_part(self, name: str, entries: Sequence[Entry]) -> None:
        """Writes the lines of a block."""
        write_text(self.work / _PART.format(name), "".join(entry.json(self.quantize) for entry in entries))

    def join(self, parts: Sequence[Path]) -> None:
        """Writes the lines of all blocks to one file."""
        with replacing(self.out) as temporary, temporary.open("wb") as file:
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, file)


class Parquet(Output):
    """Columns `id`, `text` and `vector`, with what made them as metadata."""

    def write_part(self, name: str, entries: Sequence[Entry]) -> None:
        """Writes the rows of a block."""
        import pyarrow.parquet as pq

        with replacing(self.work / _PART.format(name)) as temporary:
            pq.write_table(self.table(entries), temporary)

    def join(self, parts: Sequence[Path]) -> None:
        """Writes the rows of all blocks to one file."""
        import pyarrow.parquet as pq

        schema = self.schema_of(parts)
        with replacing(self.out) as temporary, pq.ParquetWriter(temporary, schema) as writer:
            for part in parts:
                table = pq.read_table(part)
                if len(table):
                    writer.write_table(table.cast(schema))

    def schema_of(self, parts: Sequence[Path]) -> Any:
        """Returns the columns of the first part with vectors; those of others without have no width."""
        import pyarrow.parquet as pq

        return next(pq.read_schema(part) for part in parts if pq.read_metadata(part).num_rows)

    def table(self, entries: Sequence[Entry]) -> Any:
        """Returns vectors as an Arrow table."""
        import pyarrow as pa

        vectors = np.stack([entry.vector for entry in entries]) if entries else np.empty((0, 1), np.float32)
        values = quantized(vectors, self.quantize)
        kind = pa.from_numpy_dtype(values.dtype)
        vector = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel(), kind), values.shape[1])
        columns = {
            "id": pa.array([escaped(entry.id) for entry in entries], pa.string()),
            "text": pa.array([entry.text for entry in entries], pa.string()),
            "vector": vector,
        }
        return pa.table(columns, metadata={"bridgetower": json.dumps(self.plan)})


class NumPy(Parquet):
    """An array [n, c] in `.npy`, and beside it `NAME.ids.jsonl` with the {"id", "text"} of each row."""

    @property
    def ids(self) -> Path:
        """File of what each vector is of."""
        return self.out.with_suffix(".ids.jsonl")

    def places(self) -> tuple[Path, ...]:
        """Returns all that is written."""
        return *super().places(), self.ids

    def join(self, parts: Sequence[Path]) -> None:
        """Writes the vectors of all blocks to one array, and their ids beside it."""
        import pyarrow.parquet as pq

        width = self.schema_of(parts).field("vector").type.list_size
        shape = sum(record.vectors for record in self.records.values()), width
        header = {"descr": np.dtype(_DTYPES[self.quantize]).str, "fortran_order": False, "shape": shape}
        with ExitStack() as stack:
            places = [stack.enter_context(replacing(path)) for path in (self.out, self.ids)]
            file, lines = stack.enter_context(places[0].open("wb")), stack.enter_context(places[1].open("wb"))
            np.lib.format.write_array_header_1_0(file, header)
            for table in map(pq.read_table, parts):
                for chunk in table["vector"].chunks:
                    file.write(np.ascontiguousarray(chunk.flatten().to_numpy(zero_copy_only=False)).data)
                rows = table.select(["id", "text"]).to_pylist()
                lines.writelines((json_text(row) + "\n").encode() for row in rows)
