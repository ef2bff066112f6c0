"""Writing of prepared sets: complete folders are left as they are, others continued, a user's files never touched."""

import hashlib
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from bridgetower.data.config import WritingConfig
from bridgetower.data.folder import (
    INFO_FILE,
    DatasetInfo,
    SplitInfo,
    parquet_files,
    parquet_path,
    read_info,
    shard_paths,
    write_info,
)
from bridgetower.data.manifest import Entry, Manifest, check_errors
from bridgetower.data.records import ImageFile, Record, is_own_parquet, write_split
from bridgetower.data.schema import CAPTIONS, Schema
from bridgetower.files import escaped, locked, read_json, remove_leftovers, sha256_of, write_json
from bridgetower.progress import count_bars, counted


@dataclass(frozen=True, kw_only=True)
class Collection:
    """A set about to be written.

    Attributes:
        info: What it is, without the splits' files.
        schema: What its rows hold.
        splits: Records of each split.
        columns: Type of each further column, such as `str` or `tuple[str, ...]`.
        files: Content of further JSON files, by name, such as the vocabulary of questions.
    """

    info: DatasetInfo
    schema: Schema = CAPTIONS
    splits: Mapping[str, Iterable[Record]]
    columns: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)


S = TypeVar("S")
T = TypeVar("T")

_AHEAD_PER_WORKER = 8  # images in flight
_NOTES = ".notes.json"
_ERRORS = "cannot be used"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A Parquet file to be written.

    Attributes:
        path: The file.
        split: Its split.
        start: Number of its first image in the split.
        count: Number of its images, before bad ones are left out.
        fingerprint: Changes when any of its content does.
    """

    path: Path
    split: str
    start: int
    count: int
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a shard holds.

    Attributes:
        info: Counts and digest.
        bad: Images that were left out, with the reason.
    """

    info: SplitInfo
    bad: tuple[str, ...]


def write_collection(out: Path, collection: Collection, *, progress: bool = True) -> DatasetInfo:
    """Writes a set to the folder `out`; a complete one with the same settings is left as it is.

    Raises:
        ValueError: If `out` holds something else.
    """
    finished = _finished(out, collection.info, collection.files)
    if finished:
        return finished
    with _writing(out, ()):
        splits = {
            split: write_split(
                parquet_path(out, split),
                counted(records, f"writing {split}", shown=progress),
                schema=collection.schema,
                columns=collection.columns,
            )
            for split, records in collection.splits.items()
        }
        return _complete(out, replace(collection.info, splits=splits), collection.files)


def write_manifest(
    manifest: Manifest,
    source: Path,
    out: Path,
    info: DatasetInfo,
    config: WritingConfig,
    *,
    progress: bool,
) -> DatasetInfo:
    """Writes the images of a manifest to the folder `out`; a complete one of the same source is left as it is.

    Args:
        manifest: Finished and checked, with splits.
        source: Where it is from.
        out: Dataset folder.
        info: What the set is, without its files and what is bad.
        config: How much may be bad, and how images are read and written.
        progress: Whether to show progress.

    Raises:
        ValueError: If there is no image, too much is bad, or `out` holds something else.
    """
    shards = plan_shards(manifest, out, shard_rows=config.shard_rows)
    if not shards:
        raise ValueError(f"{source} has no usable image with a text; check that it is the right source")
    content = hashlib.sha256("".join(shard.fingerprint for shard in shards).encode()).hexdigest()
    info = replace(info, sources={**info.sources, source.resolve().name: content})
    finished = _finished(out, info, manifest.files)
    if finished:
        check_errors(source, finished.left_out.get(_ERRORS, ()), config.max_errors)
        return finished
    with _writing(out, {shard.path for shard in shards}), count_bars(shown=progress) as bars:
        task = bars.add_task(f"preparing {info.name}", total=sum(shard.count for shard in shards))
        written = write_shards(
            manifest, shards, num_workers=config.num_workers, progress=lambda count: bars.advance(task, count)
        )
        bad = [*manifest.errors(), *(message for part in written.values() for message in part.bad)]
        check_errors(source, bad, config.max_errors)
        left_out = {**info.left_out, **({_ERRORS: bad} if bad else {})}
        info = replace(info, splits=_splits(source, written), left_out=left_out)
        return _complete(out, info, manifest.files)


def _splits(source: Path, written: Mapping[Shard, Written]) -> dict[str, SplitInfo]:
    names = dict.fromkeys(shard.split for shard in written)
    splits = {
        name: SplitInfo.of_shards(part.info for shard, part in written.items() if shard.split == name) for name in names
    }
    empty = [name for name, split in splits.items() if not split.images]
    if empty:
        raise ValueError(f"{source} has no usable image of {', '.join(empty)}; check that it is the right source")
    return splits


def _complete(out: Path, info: DatasetInfo, files: Mapping[str, Any]) -> DatasetInfo:
    for name, content in files.items():
        write_json(out / name, content)
    write_info(out, info)
    _forget_attempts(out)
    return info


@contextmanager
def _writing(out: Path, kept: Container[Path]) -> Iterator[None]:
    """Holds the folder, cleared of the Parquet files that are not to be kept."""
    with locked(out):
        (out / INFO_FILE).unlink(missing_ok=True)  # its presence marks the rest as complete
        remove_leftovers(out)
        for path in parquet_files(out):
            if path not in kept:
                path.unlink()
        yield


def _finished(out: Path, wanted: DatasetInfo, files: Iterable[str]) -> DatasetInfo | None:
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
    whole = all((out / name).is_file() and sha256_of(out / name) == digest for name, digest in digests.items())
    if whole and all((out / name).is_file() for name in files):
        with suppress(OSError):  # of a set that may only be read
            _forget_attempts(out)
            remove_leftovers(out)
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


def plan_shards(manifest: Manifest, out: Path, *, shard_rows: int) -> list[Shard]:
    """Cuts every split into files of at most `shard_rows` images."""
    shards: list[Shard] = []
    for split, total in manifest.counts().items():
        entries = manifest.entries(split)
        for number, path in enumerate(shard_paths(out, split, max(1, -(-total // shard_rows)))):
            start = number * shard_rows
            count = min(shard_rows, total - start)
            digest = hashlib.sha256(manifest.schema.name.encode())
            for entry in islice(entries, count):
                digest.update(entry.digest.encode())
            shards.append(Shard(path=path, split=split, start=start, count=count, fingerprint=digest.hexdigest()))
    return shards


def write_shards(
    manifest: Manifest,
    shards: Sequence[Shard],
    *,
    num_workers: int,
    progress: Callable[[int], None],
) -> dict[Shard, Written]:
    """Writes the files that are not there yet; those of an earlier attempt with the same content are kept.

    Images that were bad then are read again, as they may have been repaired.

    Args:
        manifest: Of the images.
        shards: Of `plan_shards`.
        num_workers: Threads that read and check images.
        progress: Called with the number of images that are done.
    """
    written: dict[Shard, Written] = {}
    with ThreadPoolExecutor(num_workers) as pool:
        for shard in shards:
            finished = _finished_shard(manifest, shard)
            if finished:
                progress(shard.count)
            written[shard] = finished or _write_shard(manifest, shard, pool, num_workers, progress)
    return written


def _forget_attempts(out: Path) -> None:
    """Removes what `write_shards` notes for another attempt; the files of a complete set need none."""
    for path in out.glob(f".*{_NOTES}"):
        path.unlink()


def _notes_path(shard: Shard) -> Path:
    """Of a file beside the shard: in it, the fingerprint would give the same images another digest."""
    return shard.path.with_name(f".{shard.path.stem}{_NOTES}")


def _finished_shard(manifest: Manifest, shard: Shard) -> Written | None:
    path = _notes_path(shard)
    if not (shard.path.is_file() and path.is_file()):
        return None
    notes = read_json(path)
    info = SplitInfo(**notes["info"])
    same = notes["fingerprint"] == shard.fingerprint and info.files == {shard.path.name: sha256_of(shard.path)}
    if not same:
        return None
    entries = enumerate(manifest.entries(shard.split, shard.start, shard.count)) if notes["bad"] else ()
    again = [_load(entry) for number, entry in entries if str(number) in notes["bad"]]
    bad = tuple(message for message in again if isinstance(message, str))
    return Written(info=info, bad=bad) if len(bad) == len(notes["bad"]) else None


def _write_shard(
    manifest: Manifest, shard: Shard, pool: ThreadPoolExecutor, num_workers: int, progress: Callable[[int], None]
) -> Written:
    bad: dict[int, str] = {}

    def good() -> Iterator[Record]:
        entries = manifest.entries(shard.split, shard.start, shard.count)
        records = _in_order(pool, _load, entries, _AHEAD_PER_WORKER * num_workers)
        for number, loaded in enumerate(records):
            progress(1)
            if isinstance(loaded, str):
                bad[number] = loaded
            else:
                yield loaded

    def note(info: SplitInfo) -> None:
        write_json(_notes_path(shard), {"fingerprint": shard.fingerprint, "info": asdict(info), "bad": bad})

    info = write_split(shard.path, good(), schema=manifest.schema, before=note, may_be_empty=True)
    return Written(info=info, bad=tuple(bad.values()))


def _load(entry: Entry) -> Record | str:
    """Reads and checks the images of an entry; returns the row, or what is wrong."""
    from bridgetower.processor import open_image  # which needs torch; the help of commands does not

    images: list[ImageFile] = []
    for image in entry.images:
        try:
            content = image.read()
            open_image(content)
        except (ValueError, OSError) as error:
            return f"{image.name!r}: {error}"
        images.append(ImageFile(image.file_name, content))
    return Record(image_id=entry.image_id, images=images, entries=entry.texts)


def _in_order(pool: ThreadPoolExecutor, function: Callable[[S], T], items: Iterable[S], ahead: int) -> Iterator[T]:
    """Like `pool.map`, but takes only so many items ahead."""
    waiting: deque[Future[T]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
