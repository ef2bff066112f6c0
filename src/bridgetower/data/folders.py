"""Dataset folders: complete ones are left as they are, others written or continued, a user's files never touched."""

import hashlib
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from bridgetower.data.config import PairsConfig, PrepareConfig
from bridgetower.data.info import INFO_FILE, DatasetInfo, SplitInfo, read_info, write_info
from bridgetower.data.listing import Listing, check_bad
from bridgetower.data.records import Collection, is_own_parquet, write_split
from bridgetower.data.shards import Shard, Written, forget_attempts, plan_shards, write_shards
from bridgetower.data.splits import parquet_files, parquet_path
from bridgetower.data.vocabulary import write_vocabulary
from bridgetower.files import escaped, locked, remove_leftovers, sha256_of
from bridgetower.progress import count_bars, counted

_BAD = "cannot be used"


def write_collection(out: Path, collection: Collection, *, progress: bool) -> DatasetInfo:
    """Writes a set to the folder `out`; a complete one with the same settings is left as it is.

    Raises:
        ValueError: If `out` holds something else.
    """
    finished = _finished(out, collection.info)
    if finished:
        return finished
    with _writing(out, ()):
        splits = {
            split: write_split(
                parquet_path(out, split),
                counted(records, f"writing {split}", shown=progress),
                kind=collection.info.kind,
                columns=collection.columns,
            )
            for split, records in collection.splits.items()
        }
        return _complete(out, replace(collection.info, splits=splits), collection.vocabulary)


def write_listed(
    listing: Listing,
    source: Path,
    out: Path,
    info: DatasetInfo,
    config: PrepareConfig | PairsConfig,
    *,
    progress: bool,
) -> DatasetInfo:
    """Writes listed pictures to the folder `out`; a complete one of the same source is left as it is.

    Args:
        listing: Finished and checked, with splits.
        source: What was listed.
        out: Dataset folder.
        info: What the set is, without its files and what is bad.
        config: How much may be bad, and how pictures are read and written.
        progress: Whether to show progress.

    Raises:
        ValueError: If there is no picture, too much is bad, or `out` holds something else.
    """
    shards = plan_shards(listing, out, shard_rows=config.shard_rows)
    if not shards:
        raise ValueError(f"{source} has no usable picture with a text; check that it is the right source")
    content = hashlib.sha256("".join(shard.fingerprint for shard in shards).encode()).hexdigest()
    info = replace(info, sources={**info.sources, source.resolve().name: content})
    finished = _finished(out, info)
    if finished:
        check_bad(source, finished.left_out.get(_BAD, ()), config.max_bad)
        return finished
    with _writing(out, {shard.path for shard in shards}), count_bars(shown=progress) as bars:
        task = bars.add_task(f"preparing {info.name}", total=sum(shard.count for shard in shards))
        written = write_shards(
            listing, shards, num_workers=config.num_workers, progress=lambda count: bars.advance(task, count)
        )
        bad = [*listing.bad_messages(), *(message for part in written.values() for message in part.bad)]
        check_bad(source, bad, config.max_bad)
        left_out = {**info.left_out, **({_BAD: bad} if bad else {})}
        info = replace(info, splits=_splits(source, written), left_out=left_out)
        return _complete(out, info, listing.vocabulary)


def _splits(source: Path, written: Mapping[Shard, Written]) -> dict[str, SplitInfo]:
    names = dict.fromkeys(shard.split for shard in written)
    splits = {
        name: SplitInfo.of_shards(part.info for shard, part in written.items() if shard.split == name) for name in names
    }
    empty = [name for name, split in splits.items() if not split.images]
    if empty:
        raise ValueError(f"{source} has no usable picture of {', '.join(empty)}; check that it is the right source")
    return splits


def _complete(out: Path, info: DatasetInfo, vocabulary: Sequence[str]) -> DatasetInfo:
    if vocabulary:
        write_vocabulary(out, vocabulary)
    write_info(out, info)
    forget_attempts(out)
    return info


@contextmanager
def _writing(out: Path, kept: Container[Path]) -> Iterator[None]:
    """Holds the folder, cleared of the Parquet files that are not to be kept."""
    with locked(out):
        (out / INFO_FILE).unlink(missing_ok=True)  # its presence says that the rest is complete
        remove_leftovers(out)
        for path in parquet_files(out):
            if path not in kept:
                path.unlink()
        yield


def _finished(out: Path, wanted: DatasetInfo) -> DatasetInfo | None:
    """What `out` holds if that is complete and the same; None if it has to be written.

    Raises:
        ValueError: If `out` holds another dataset or files that are not ours.
    """
    if escaped(str(out)) != str(out):
        raise ValueError(f"{str(out)!r} is not UTF-8, which Parquet files cannot be written to; choose another folder")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder")
    if not (out / INFO_FILE).exists():
        _refuse_foreign(out)
        return None
    info = read_info(out)
    there, expected = _identity(info), _identity(wanted)
    differing = [key for key in expected if there.get(key) != expected[key]]
    if differing:
        raise ValueError(
            f"{out} holds a dataset that differs in {', '.join(differing)}; choose another folder or delete it"
        )
    digests = info.digests()
    if all((out / name).is_file() and sha256_of(out / name) == digest for name, digest in digests.items()):
        return info
    _refuse_foreign(out, own=digests)
    return None


def _identity(info: DatasetInfo) -> Mapping[str, object]:
    """What decides the content; where the source lies, and what its folder is called, does not."""
    return {"name": info.name, "seed": info.seed, "sources": sorted(info.sources.values()), **info.settings}


def _refuse_foreign(out: Path, own: Container[str] = ()) -> None:
    for path in parquet_files(out):
        if path.name not in own and not is_own_parquet(path):
            raise ValueError(f"{path} was not written by bridgetower; choose another folder")
