"""Prepares dataset folders: emoji and flags from installed packages, generated scenes, a user's own pictures."""

from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar

from rich.console import Console
from rich.progress import track

from bridgetower.data import emoji, flag_questions, flags, pairs
from bridgetower.data.config import PairsConfig
from bridgetower.data.info import INFO_FILE, DatasetInfo, read_info, write_info
from bridgetower.data.records import Collection, is_own_parquet, sha256_of, write_split
from bridgetower.data.scenes.collect import collect as collect_scenes
from bridgetower.data.scenes.config import ScenesConfig
from bridgetower.data.sources import read_rows
from bridgetower.data.splits import parquet_path
from bridgetower.data.vocabulary import write_vocabulary

_COLLECTORS = {"emoji": emoji.collect, "flags": flags.collect, "flag-questions": flag_questions.collect}

T = TypeVar("T")


def prepare(
    name: Literal["emoji", "flags", "flag-questions"],
    out: Path,
    *,
    seed: int = 0,
    num_test: int | None = None,
    num_validation: int | None = None,
    progress: bool = True,
) -> DatasetInfo:
    """Writes a set of installed packages to the folder `out`; a complete one with the same settings is left as it is.

    Args:
        name: Which set.
        out: Dataset folder.
        seed: Seed of the split.
        num_test: Number of test pictures; None means 200 emoji, 50 flags.
        num_validation: Number of validation pictures; None means 200 emoji, 30 flags.
        progress: Whether to show progress, if standard error is a terminal.

    Raises:
        FileNotFoundError: If a package of the `demo` extra is missing.
        ValueError: If the name is unknown, or `out` holds something else.
    """
    if name not in _COLLECTORS:
        raise ValueError(f"no set called {name!r}; sets are {', '.join(_COLLECTORS)}")
    counts = {"num_test": num_test, "num_validation": num_validation}
    collection = _COLLECTORS[name](seed=seed, **{key: value for key, value in counts.items() if value is not None})
    return _write_unless_finished(Path(out), collection, progress)


def prepare_pairs(source: Path, out: Path, config: PairsConfig | None = None, *, progress: bool = True) -> DatasetInfo:
    """Writes a user's own pictures and captions to the folder `out`; a complete one of the same source is left alone.

    Args:
        source: A CSV, TSV, JSON-lines or Parquet file, or a folder; see `bridgetower.data.sources.read_rows`.
        out: Dataset folder.
        config: How the source is read and split.
        progress: Whether to show progress, if standard error is a terminal.

    Raises:
        FileNotFoundError: If the source is missing.
        ValueError: If it cannot be read, too many rows or pictures are bad, or `out` holds something else.
    """
    source, out, config = Path(source), Path(out), config or PairsConfig()
    rows = read_rows(
        source,
        image_column=config.image_column,
        caption_column=config.caption_column,
        captions_from=config.captions_from,
    )
    read = pairs.group_rows(source, rows)
    finished = _finished(out, read.name, config.seed, read.sources, config.settings)
    if finished:
        return finished
    broken = pairs.find_broken(
        read, num_workers=config.num_workers, progress=lambda names: _shown(names, "checking pictures", progress)
    )
    return _write(out, pairs.collect(read, broken, config), progress)


def prepare_scenes(out: Path, config: ScenesConfig | None = None, *, progress: bool = True) -> DatasetInfo:
    """Writes generated scenes to the folder `out`; a complete one with the same settings is left as it is.

    Args:
        out: Dataset folder.
        config: Which scenes.
        progress: Whether to show progress, if standard error is a terminal.

    Raises:
        ValueError: If `out` holds something else.
    """
    return _write_unless_finished(Path(out), collect_scenes(config or ScenesConfig()), progress)


def _write_unless_finished(out: Path, collection: Collection, progress: bool) -> DatasetInfo:
    info = collection.info
    return _finished(out, info.name, info.seed, info.sources, info.settings) or _write(out, collection, progress)


def _finished(
    out: Path, name: str, seed: int, sources: Mapping[str, str], settings: Mapping[str, object]
) -> DatasetInfo | None:
    """What `out` holds if that is complete and the same; None if it has to be written.

    Raises:
        ValueError: If `out` holds another dataset or files that are not ours.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder")
    if not (out / INFO_FILE).exists():
        _refuse_foreign(out)
        return None
    info = read_info(out)
    there = {"name": info.name, "seed": info.seed, "sources": info.sources, **info.settings}
    wanted = {"name": name, "seed": seed, "sources": dict(sources), **settings}
    differing = [key for key in wanted if there.get(key) != wanted[key]]
    if differing:
        raise ValueError(
            f"{out} holds a dataset with another {', '.join(differing)}; choose another folder or delete it"
        )
    digests = {out / name: digest for split in info.splits.values() for name, digest in split.files.items()}
    if all(path.is_file() and sha256_of(path) == digest for path, digest in digests.items()):
        return info
    _refuse_foreign(out, own={path.name for path in digests})
    return None


def _refuse_foreign(out: Path, own: Container[str] = ()) -> None:
    for path in out.glob("*.parquet"):
        if path.name not in own and not is_own_parquet(path):
            raise ValueError(f"{path} was not written by bridgetower; choose another folder")


def _write(out: Path, collection: Collection, progress: bool) -> DatasetInfo:
    (out / INFO_FILE).unlink(missing_ok=True)  # its presence says that the rest is complete
    for path in out.glob("*.parquet"):
        path.unlink()
    splits = {
        split: write_split(
            parquet_path(out, split),
            _shown(records, f"writing {split}", progress),
            kind=collection.info.kind,
            columns=collection.columns,
        )
        for split, records in collection.splits.items()
    }
    if collection.vocabulary:
        write_vocabulary(out, collection.vocabulary)
    info = replace(collection.info, splits=splits)
    write_info(out, info)
    return info


def _shown(items: Iterable[T], description: str, progress: bool) -> Iterable[T]:
    console = Console(stderr=True)
    return track(items, description, console=console, disable=not (progress and console.is_terminal))
