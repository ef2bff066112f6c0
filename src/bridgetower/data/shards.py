"""Writing of a listing: pictures are checked and go to Parquet files, of which finished ones are kept."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

from bridgetower.data.info import SplitInfo
from bridgetower.data.kinds import Kind
from bridgetower.data.listing import Entry, Listing
from bridgetower.data.records import (
    PairRecord,
    PictureRecord,
    QuestionRecord,
    Record,
    StatementRecord,
    write_split,
)
from bridgetower.data.splits import shard_paths
from bridgetower.files import read_json, sha256_of, write_json
from bridgetower.processor import open_image

S = TypeVar("S")
T = TypeVar("T")

_AHEAD_PER_WORKER = 8  # pictures in flight
_NOTES = ".notes.json"
_RECORDS: Mapping[Kind, type[PictureRecord]] = {
    "captions": Record,
    "vqa": QuestionRecord,
    "snli-ve": StatementRecord,
    "nlvr2": PairRecord,
}
_FIELDS: Mapping[Kind, str] = {"captions": "captions", "vqa": "questions"}


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A Parquet file to be written.

    Attributes:
        path: The file.
        split: Its split.
        start: Number of its first picture in the split.
        count: Number of its pictures, before bad ones are left out.
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
        bad: Pictures that were left out, with the reason.
    """

    info: SplitInfo
    bad: tuple[str, ...]


def plan_shards(listing: Listing, out: Path, *, shard_rows: int) -> list[Shard]:
    """Cuts every split into files of at most `shard_rows` pictures."""
    shards: list[Shard] = []
    for split, total in listing.counts().items():
        entries = listing.entries(split)
        for number, path in enumerate(shard_paths(out, split, max(1, -(-total // shard_rows)))):
            start = number * shard_rows
            count = min(shard_rows, total - start)
            digest = hashlib.sha256(listing.kind.encode())
            for entry in islice(entries, count):
                digest.update(entry.digest.encode())
            shards.append(Shard(path=path, split=split, start=start, count=count, fingerprint=digest.hexdigest()))
    return shards


def write_shards(
    listing: Listing,
    shards: Sequence[Shard],
    *,
    num_workers: int,
    progress: Callable[[int], None],
) -> dict[Shard, Written]:
    """Writes the files that are not there yet; those of an earlier attempt with the same content are kept.

    Pictures that were bad then are read again, as they may have been repaired.

    Args:
        listing: Of the pictures.
        shards: Of `plan_shards`.
        num_workers: Threads that read and check pictures.
        progress: Told of pictures that are done.
    """
    written: dict[Shard, Written] = {}
    with ThreadPoolExecutor(num_workers) as pool:
        for shard in shards:
            finished = _finished(listing, shard)
            if finished:
                progress(shard.count)
            written[shard] = finished or _write(listing, shard, pool, num_workers, progress)
    return written


def forget_attempts(out: Path) -> None:
    """Removes what `write_shards` notes for another attempt; the files of a complete set need none."""
    for path in out.glob(f".*{_NOTES}"):
        path.unlink()


def _notes_path(shard: Shard) -> Path:
    """Of a file beside the shard: in it, the fingerprint would give the same pictures another digest."""
    return shard.path.with_name(f".{shard.path.stem}{_NOTES}")


def _finished(listing: Listing, shard: Shard) -> Written | None:
    path = _notes_path(shard)
    if not (shard.path.is_file() and path.is_file()):
        return None
    notes = read_json(path)
    info = SplitInfo(**notes["info"])
    same = notes["fingerprint"] == shard.fingerprint and info.files == {shard.path.name: sha256_of(shard.path)}
    if not same:
        return None
    entries = enumerate(listing.entries(shard.split, shard.start, shard.count)) if notes["bad"] else ()
    again = [_load(listing.kind, entry) for number, entry in entries if str(number) in notes["bad"]]
    bad = tuple(message for message in again if isinstance(message, str))
    return Written(info=info, bad=bad) if len(bad) == len(notes["bad"]) else None


def _write(
    listing: Listing, shard: Shard, pool: ThreadPoolExecutor, num_workers: int, progress: Callable[[int], None]
) -> Written:
    bad: dict[int, str] = {}

    def good() -> Iterator[PictureRecord]:
        entries = listing.entries(shard.split, shard.start, shard.count)
        records = _in_order(pool, partial(_load, listing.kind), entries, _AHEAD_PER_WORKER * num_workers)
        for number, loaded in enumerate(records):
            progress(1)
            if isinstance(loaded, str):
                bad[number] = loaded
            else:
                yield loaded

    def note(info: SplitInfo) -> None:
        write_json(_notes_path(shard), {"fingerprint": shard.fingerprint, "info": asdict(info), "bad": bad})

    info = write_split(shard.path, good(), kind=listing.kind, before=note, may_be_empty=True)
    return Written(info=info, bad=tuple(bad.values()))


def _load(kind: Kind, entry: Entry) -> PictureRecord | str:
    """Reads and checks the pictures of an entry; returns the row, or what is wrong."""
    contents: list[bytes] = []
    for picture in entry.pictures:
        try:
            content = picture.read()
            open_image(content)
        except (ValueError, OSError) as error:
            return f"{picture.name!r}: {error}"
        contents.append(content)
    values = {"image": contents[0], "file_name": entry.pictures[0].file_name, "image_id": entry.image_id}
    second = {"image_2": contents[1], "file_name_2": entry.pictures[1].file_name} if kind == "nlvr2" else {}
    return _RECORDS[kind](**values, **second, **{_FIELDS.get(kind, "statements"): entry.texts})  # type: ignore[arg-type]


def _in_order(pool: ThreadPoolExecutor, function: Callable[[S], T], items: Iterable[S], ahead: int) -> Iterator[T]:
    """Like `pool.map`, but takes only so many items ahead."""
    waiting: deque[Future[T]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
