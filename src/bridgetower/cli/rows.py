"""Rows of results: printed, or written to a file."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bridgetower.cli.output import emit_result, emit_results
from bridgetower.extras import require
from bridgetower.files import json_text, replacing, require_parent

ROW_SUFFIXES = (".csv", ".jsonl", ".parquet")

Row = Mapping[str, Any]


class RowOutput:
    """Takes rows as they come, and prints them or keeps them for a file."""

    def __init__(self, out: Path | None, *, json: bool) -> None:
        self.out = out
        self.json = json
        self.rows: list[Row] = []

    def add(self, rows: Iterable[Row]) -> None:
        if self.out is None:
            emit_results(rows, json=self.json)
        else:
            self.rows += rows

    def add_results(
        self, inputs: Mapping[str, Sequence[object]], name: str, results: Iterable[Any]
    ) -> None:
        """Adds results, numbers or choices of a head, each with its inputs. A single input goes with all results."""
        count = max(map(len, inputs.values()))
        rows = []
        for number, result in enumerate(results):
            row: dict[str, Any] = {}
            for column, values in inputs.items():
                row[column] = str(values[number if len(values) == count else 0])
            row[name] = result if isinstance(result, float) else list(map(vars, result))
            rows.append(row)
        self.add(rows)

    @property
    def destination(self) -> str:
        """Says where the rows are, for an error about others."""
        return "printed" if self.out is None else f"in {self.out}"


@contextmanager
def row_output(out: Path | None, *, json: bool) -> Iterator[RowOutput]:
    """Yields an output. A file is written whole, at the end.

    Raises:
        ValueError: The name of the file ends in none of `ROW_SUFFIXES`.
    """
    if out is not None:
        if out.suffix not in ROW_SUFFIXES:
            raise ValueError(
                f"out is {out}; expected a name that ends in {', '.join(ROW_SUFFIXES)}"
            )
        if out.suffix == ".parquet":
            require("search")
        require_parent(out)
    output = RowOutput(out, json=json)
    yield output
    if out is not None:
        write_rows(out, output.rows)
        emit_result({"out": str(out), "rows": len(output.rows)}, json=json)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Writes rows by the ending of the file. A CSV has the likeliest choice in columns of its own, and all as JSON."""
    with replacing(path) as temporary:
        if path.suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(list(map(dict, rows))), temporary)
        elif path.suffix == ".jsonl":
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(json_text(row) + "\n" for row in rows)
        else:
            # Lists of choices become columns: those of the first choice, and all of them as JSON.
            flat_rows = []
            for row in rows:
                flat: dict[str, Any] = {}
                for name, value in row.items():
                    if isinstance(value, list):
                        flat |= value[0] if value else {}
                    flat[name] = json_text(value) if isinstance(value, list) else value
                flat_rows.append(flat)
            with temporary.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(flat_rows[0]) if flat_rows else [])
                writer.writeheader()
                writer.writerows(flat_rows)
