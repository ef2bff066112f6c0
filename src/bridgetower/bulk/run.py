"""Embeds a source: reads blocks, writes their vectors, goes on where a killed run ended, reports what was left out."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TextIO

from bridgetower.bulk.config import BulkConfig, EmbedConfig
from bridgetower.bulk.embedding import MIN_FOR_WORKERS, EmbeddedBlock, Embedder, Problem, embedded_blocks, num_decoders
from bridgetower.bulk.outputs import JsonLines, NumPy, Output, Parquet, entries_of
from bridgetower.data.items import Block, Unit, left_out_of, read_blocks, units_of
from bridgetower.data.remote import is_url
from bridgetower.extras import require
from bridgetower.files import json_text, unfit_name, write_text
from bridgetower.predictor import Predictor, load
from bridgetower.progress import counting

SUFFIXES = (".jsonl", ".parquet", ".npy", ".lance")
"""Of the places that vectors can be written to."""

_NAMED = 10  # problems spelt out in an error
_DECIDING = (
    *("image_column", "caption_column", "id_column", "captions_from", "every", "max_moments", "truncate", "of"),
    *("quantize", "block_size"),
)

logger = logging.getLogger(__name__)

Model = Predictor | str | Path | Callable[[], Predictor]
"""A loaded model, what to load, or what returns one."""


@dataclass(frozen=True, kw_only=True)
class EmbedReport:
    """What came of embedding a source.

    Attributes:
        vectors: That were written.
        cut: Texts that were cut, as they were too long for the model.
        bad: Items that could not be used.
        problems: The first of them, each with the reason.
        report: File that names all of them; None if there are none.
        left_out: Files in folders of which nothing is read, by suffix.
        seconds: That it took, without loading the model.
    """

    vectors: int
    cut: int
    bad: int
    problems: tuple[str, ...]
    report: str | None
    left_out: dict[str, int]
    seconds: float


def embed_source(
    source: str | Path,
    out: str | Path,
    model: Model,
    config: EmbedConfig | None = None,
    *,
    progress: bool = False,
) -> EmbedReport:
    """Writes the vectors of a source, in memory for a few blocks.

    A run that was killed is continued by the next one with the same arguments. Items that cannot be used are left out
    and named in `OUT.errors.jsonl`.

    Args:
        source: As for `bridgetower.data.items.units_of`.
        out: File or table, whose suffix is one of `SUFFIXES`.
        model: A loaded model, what to load, or what returns one; nothing is loaded for a source that is wrong.
        config: How. From 500 items on, processes decode images unless `num_workers` is 0: a script needs
            `if __name__ == "__main__":` then, because they import it again.
        progress: Show a bar, or log a line a minute where standard error is no terminal.

    Raises:
        FileNotFoundError: There is no source, or a package is missing.
        FileExistsError: Another process writes there, or there is a Lance table.
        ValueError: The source cannot be read, the model has no contrastive head, or more than `max_errors` items cannot
            be used; the vectors of the others are written then.
    """
    config = config or EmbedConfig()
    return embed_units(units_of(source), str(source), out, model, config, progress=progress)


def embed_units(
    units: Sequence[Unit], source: str, out: str | Path, model: Model, config: EmbedConfig, *, progress: bool = False
) -> EmbedReport:
    """Does as `embed_source` with the units of a source, which is named for errors."""
    make = _output(out)
    check_ray(config, model)
    predictor = loaded(model)
    started = time.perf_counter()
    embedder = partial(embedder_of, predictor if config.ray is None else model, config)
    plan = {
        "source": [unit.signature for unit in units],
        "model": predictor.source,
        "fingerprint": predictor.fingerprint,
        **{name: value for name, value in asdict(config).items() if name in _DECIDING},
    }
    left_out = left_out_of(units)
    with make(out, plan, quantize=config.quantize) as output:
        whole = {number for number, unit in enumerate(units) if not unit.is_folder and output.is_whole(number)}
        names = {name for name in output.records if int(name.partition("-")[0]) in whole}
        copies = config.ray is None
        read = read_blocks(units, config.columns, config.block_size, skip=whole.__contains__, copies=copies)
        total = count_items(units, config) if progress else None
        with counting("embedding", total=total, shown=progress) as advance:
            advance(sum(output.records[name].items for name in names))
            known, blocks = _begun(_unwritten(output, read, names, advance), MIN_FOR_WORKERS)
            for block in computed(embedder, blocks, config, known, advance):
                output.write(block)
        output.records = {name: record for name, record in output.records.items() if name in names}
        report = _report(output, left_out, started)
        if not report.vectors:
            check_bad(source, report.problems, report.bad, config, f"{out} would have no vectors")
            reasons = " | ".join(report.problems) or "it names nothing"
            raise ValueError(f"{out} would have no vectors: nothing of {source} could be used: {reasons}")
        output.finish()
        done = f"the {report.vectors} vectors of the others are in {out}"
        check_bad(source, report.problems, report.bad, config, done)  # if more are allowed, the parts are gone on with
        output.remove_parts()
    return replace(report, seconds=time.perf_counter() - started)


def print_units(
    units: Sequence[Unit], source: str, model: Model, config: EmbedConfig, *, file: TextIO | None = None
) -> None:
    """Prints the vectors of a source as JSON lines, block by block.

    Raises:
        OSError, ValueError: As `embed_source`.
    """
    if config.ray is not None:
        raise ValueError("on Ray vectors are written to a file or table, not printed; give its place as out")
    embedder, target = embedder_of(model, config), file or sys.stdout
    problems: list[Problem] = []
    num_bad = num_cut = 0
    size = min(config.block_size, config.batch_size)  # a line comes as soon as it can
    blocks = read_blocks(units, config.columns, size)
    for block in embedded_blocks(embedder, blocks, num_workers=config.num_workers or 0):
        for entry in entries_of(block.rows):
            target.write(entry.json(config.quantize))
        num_bad, num_cut = num_bad + len(block.problems), num_cut + block.num_cut
        problems += block.problems[: _NAMED - len(problems)]
    say_cut(num_cut)
    check_bad(source, tuple(map(str, problems)), num_bad, config, "the vectors of the others are printed")


def loaded(model: Model) -> Predictor:
    """Returns a model, loaded if it is not yet."""
    if isinstance(model, str | Path):
        return load(model)
    return model if isinstance(model, Predictor) else model()


def check_ray(config: BulkConfig, model: Model) -> None:
    """Checks that workers of a cluster can load the model themselves, if there is to be a cluster.

    Raises:
        FileNotFoundError: Ray is not installed.
        ValueError: The model is loaded already.
    """
    if config.ray is None:
        return
    require("ray")
    if isinstance(model, Predictor):
        raise ValueError("on Ray every worker loads the model; give what to load, not a loaded model")


def computed(
    make: Callable[[], Embedder],
    blocks: Iterator[Block],
    config: BulkConfig,
    total: int,
    advance: Callable[[int], None],
) -> Iterator[EmbeddedBlock]:
    """Yields blocks with their vectors: in order, or from a cluster as soon as each is done.

    Args:
        make: Returns the model with what it makes of an item.
        blocks: Of a source.
        config: How.
        total: Items, or some of them if these are enough to decode in processes.
        advance: Called with each number of items that were done.
    """
    if config.ray is None:
        workers = num_decoders(config.num_workers, total)
        yield from embedded_blocks(make(), blocks, num_workers=workers, advance=advance)
        return
    from bridgetower.bulk.on_ray import embedded_on_ray

    for block in embedded_on_ray(make, blocks, address=config.ray, num_workers=config.ray_workers):
        yield block
        advance(len(block.rows) + len(block.problems))


def embedder_of(model: Model, config: EmbedConfig) -> Embedder:
    """Returns what embeds by a config."""
    parts = None if config.of is None else frozenset({config.of})
    return Embedder(loaded(model), parts, truncate=config.truncate, batch_size=config.batch_size)


def count_items(units: Sequence[Unit], config: EmbedConfig) -> int | None:
    """Returns how many items there are; None if a file would have to be fetched to know it."""
    if any(is_url(unit.place) and unit.items is None for unit in units):
        return None
    return sum(len(block.items) for block in read_blocks(units, config.columns, config.block_size))


def say_cut(num_cut: int) -> None:
    """Logs how many texts were cut, if any."""
    if num_cut:
        logger.warning("%d texts were longer than the model takes and were cut", num_cut)


def check_bad(source: object, problems: Sequence[str], num_bad: int, config: BulkConfig, others: str) -> None:
    """Checks how many items could not be used.

    Raises:
        ValueError: More than are allowed.
    """
    if num_bad <= config.max_errors:
        return
    shown = problems[:_NAMED]
    more = f" and {num_bad - len(shown)} more" if num_bad > len(shown) else ""
    bad = f"{num_bad} bad item{'s' if num_bad > 1 else ''}, allowed are {config.max_errors} (max_errors=N allows more)"
    raise ValueError(f"{source}: {bad}; {others}: {' | '.join(shown)}{more}")


def _output(out: str | Path) -> type[Output]:
    """Returns what writes to a place, by its suffix.

    Raises:
        ValueError: It has another suffix.
        FileNotFoundError: A package is missing.
    """
    if problem := unfit_name(str(out)):
        raise ValueError(problem)
    suffix = Path(out).suffix
    if suffix == ".lance":
        require("search")
        from bridgetower.bulk.lance import LanceTable

        return LanceTable
    kinds: dict[str, type[Output]] = {".jsonl": JsonLines, ".parquet": Parquet, ".npy": NumPy}
    if suffix not in kinds:
        raise ValueError(f"{str(out)!r} has no suffix of vectors; expected one of {', '.join(SUFFIXES)}")
    if suffix != ".jsonl":
        require("search", "pyarrow")
    return kinds[suffix]


def _unwritten(
    output: Output, blocks: Iterator[Block], names: set[str], advance: Callable[[int], None]
) -> Iterator[Block]:
    """Yields the blocks that are still to be written, and notes the names of all."""
    for block in blocks:
        names.add(block.name)
        if output.has(block):
            block.release()
            advance(len(block.items))
        else:
            yield block


def _begun(blocks: Iterator[Block], enough: int) -> tuple[int, Iterator[Block]]:
    """Reads blocks until they have enough items; returns how many these have, and all blocks."""
    first: list[Block] = []
    count = 0
    for block in blocks:
        first.append(block)
        count += len(block.items)
        if count >= enough:
            break
    return count, chain(first, blocks)


def _report(output: Output, left_out: dict[str, int], started: float) -> EmbedReport:
    """Returns what came of a run, and writes what could not be used."""
    records = [output.records[name] for name in sorted(output.records)]
    problems = [problem for record in records for problem in record.problems]
    if problems:
        lines = ({"id": one.id, "place": one.place, "problem": one.problem} for one in problems)
        write_text(output.report, "".join(json_text(line) + "\n" for line in lines))
    else:
        output.report.unlink(missing_ok=True)
    num_cut = sum(record.num_cut for record in records)
    say_cut(num_cut)
    return EmbedReport(
        vectors=sum(record.vectors for record in records),
        cut=num_cut,
        bad=len(problems),
        problems=tuple(map(str, problems[:_NAMED])),
        report=str(output.report) if problems else None,
        left_out=left_out,
        seconds=time.perf_counter() - started,
    )
