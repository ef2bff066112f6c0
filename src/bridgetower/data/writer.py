"""Writing of prepared sets: complete folders are left as they are, others continued, a user's files never touched."""

import hashlib
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from bridgetower.data.config import WritingConfig
from bridgetower.data.folder import (
    FORMAT,
    INFO_FILE,
    DatasetInfo,
    SplitInfo,
    parquet_files,
    parquet_path,
    read_info,
    read_schema,
    shard_paths,
    write_info,
)
from bridgetower.data.manifest import Entry, Manifest, check_errors
from bridgetower.data.schema import CAPTIONS, Schema
from bridgetower.files import escaped, locked, read_json, remove_leftovers, replacing, sha256_of, write_json
from bridgetower.progress import count_bars, counted

_MARK = b"bridgetower"  # schema metadata key: marks our own Parquet files, which may be replaced


class ImageFile(NamedTuple):
    """An image file.

    Attributes:
        name: Under which it is stored, extension included.
        content: The file's own bytes, not re-encoded.
    """

    name: str
    content: bytes

    def __repr__(self) -> str:
        return f"{self.name!r} of {len(self.content)} bytes"


@dataclass(frozen=True, kw_only=True)
class Record:
    """A row: one image, or as many as the schema has columns for, with all entries about it.

    Attributes:
        image_id: Unique within the split.
        images: In the order of the schema's columns.
        entries: One or more.
        extra: Values of the further columns.
    """

    image_id: str
    images: Sequence[ImageFile]
    entries: Sequence[Any]
    extra: Mapping[str, object] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of the images."""
        return sum(len(image.content) for image in self.images)

    def row(self, schema: Schema) -> dict[str, object]:
        """Values of the columns."""
        images = zip(schema.image_columns, self.images, strict=bool(self.images))
        entries = [entry if isinstance(entry, str) else vars(entry) for entry in self.entries]
        return {
            **dict.fromkeys(schema.image_columns),
            **{column: {"bytes": image.content, "path": image.name} for column, image in images},
            **{"image_id": self.image_id, schema.entries: entries},
            **self.extra,
        }


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


def write_split(
    path: Path,
    records: Iterable[Record],
    *,
    schema: Schema = CAPTIONS,
    columns: Mapping[str, Any] | None = None,
    row_group_bytes: int = 2**20,
    before: Callable[[SplitInfo], None] | None = None,
    may_be_empty: bool = False,
) -> SplitInfo:
    """Writes `records` to one Parquet file, atomically, holding one row group in memory at a time.

    Args:
        path: The file to write; replaced if it exists.
        records: The rows, read once.
        schema: What the rows hold.
        columns: Type of each further column, such as `str` or `tuple[str, ...]`; the
            records' `extra` must have exactly these.
        row_group_bytes: Image bytes after which a row group is closed; all of a group are read to get one of them.
        before: Called with what the file holds before it gets its name.
        may_be_empty: Whether no record is no error.

    Returns:
        Counts and digest of the file.

    Raises:
        ValueError: If there is no record, an image_id comes twice, or a record does not fit the schema or the columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, further = Path(path), columns or {}
    arrow_schema = schema.arrow_schema(further)
    arrow_schema = arrow_schema.with_metadata({**arrow_schema.metadata, _MARK: str(FORMAT).encode()})
    seen: set[str] = set()
    num_texts = 0
    with replacing(path) as temporary:
        # A dictionary and statistics of images cost much to read and are of no use.
        options = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
        with pq.ParquetWriter(temporary, arrow_schema, **options) as writer:
            for group in _grouped(records, row_group_bytes):
                for record in group:
                    if problem := _problem_of(record, schema, seen, further):
                        raise ValueError(problem)
                    seen.add(record.image_id)
                    num_texts += len(record.entries)
                rows = [record.row(schema) for record in group]
                writer.write_table(pa.Table.from_pylist(rows, schema=arrow_schema))
        if not seen and not may_be_empty:
            raise ValueError(f"no record to write to {path}; a split needs at least one image, or no file at all")
        info = SplitInfo(images=len(seen), texts=num_texts, files={path.name: sha256_of(temporary)})
        if before:
            before(info)
    return info


def is_own_parquet(path: Path) -> bool:
    """Whether `path` was written by `write_split` and may be replaced."""
    try:
        return _MARK in (read_schema(Path(path)).metadata or {})
    except ValueError:  # no Parquet file, in spite of its name
        return False


def _problem_of(record: Record, schema: Schema, seen: set[str], further: Mapping[str, Any]) -> str | None:
    name = f"record {record.image_id!r}"
    if not record.image_id:
        return f"record of {record.images} has an empty image_id; give it a unique name"
    if record.image_id in seen:
        return f"image_id {record.image_id!r} comes twice; ids must be unique"
    if len(record.images) != len(schema.image_columns) and (record.images or not schema.optional):
        return f"{name} has {len(record.images)} images, expected {len(schema.image_columns)}"
    for image in record.images:
        if not image.content:
            return f"image {image.name!r} of {name} has 0 bytes; give the file's content"
    if not record.entries:
        return f"{schema.entries} of {name} are missing; give at least one"
    for problem in filter(None, map(schema.problem_of, record.entries)):
        return f"{schema.entries} of {name}: {problem}; leave it out"
    if record.extra.keys() != further.keys():
        return f"{name} has columns {sorted(record.extra)}, expected {sorted(further)}"
    return None


def _grouped(records: Iterable[Record], group_bytes: int) -> Iterator[list[Record]]:
    group: list[Record] = []
    size = 0
    for record in records:
        group.append(record)
        size += record.size
        if size >= group_bytes:
            yield group
            group, size = [], 0
    if group:
        yield group


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
    forget_attempts(out)
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


def forget_attempts(out: Path) -> None:
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
