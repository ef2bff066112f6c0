"""Prepared sets and tar shards at URLs, opened as folders of their texts; images stay where they are until needed."""

from __future__ import annotations

import io
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from bridgetower.data.answers import ANSWERS_FILE
from bridgetower.data.config import DataConfig
from bridgetower.data.folder import FORMAT, INFO_FILE, DatasetInfo, split_of_file
from bridgetower.data.manifest import check_errors
from bridgetower.data.own import CLASSES_FILE
from bridgetower.data.remote import expanded, file_facts, file_name, is_url, read_file, read_pieces
from bridgetower.data.schema import CAPTIONS, CLASSIFICATION, VQA
from bridgetower.data.shards import LENGTH, PLACE_FILE, START, Shard, ShardCache, image_columns
from bridgetower.data.tars import Sample, tar_samples
from bridgetower.files import cache_folder, json_object, json_text, locked, sha256_of, write_bytes, write_json
from bridgetower.model.plain import from_plain

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

_LISTED_AT_ONCE = 8
_CHECKED_AT_ONCE = 4
_FOOTER = 2**20  # bytes at the end of a Parquet file that are read first
_GAP = 2**16  # bytes between two pieces up to which they are read as one
_ROWS = 100  # of a row group of texts
_VIEWS = "views"
_BESIDE = {VQA.name: ANSWERS_FILE, CLASSIFICATION.name: CLASSES_FILE}  # further file of a kind of set


@contextmanager
def local_sets(config: DataConfig, splits: Sequence[str]) -> Iterator[DataConfig]:
    """Gives a config with a folder of texts for each URL; the folders are removed in the end.

    Texts are read once and kept in the cache; images are copied to the cache, file by file, when they are read. Every
    process has folders of its own, and shares the cache.

    Args:
        config: Folders and URLs, and where the cache is.
        splits: That are read of `folders`; of `train_only` it is `train`.

    Raises:
        OSError: A set cannot be read.
        ValueError: One is no prepared set, more of their files or samples cannot be used than `max_errors` allows, or
            the cache is too small.
    """
    if not any(map(is_url, (*config.folders, *config.train_only))):
        yield config
        return
    folder = Path(config.shard_cache) if config.shard_cache else cache_folder() / "shards"
    cache = ShardCache(folder.absolute(), int(config.shard_cache_limit * 2**30))
    with _view_folder(cache.folder / _VIEWS) as views, ThreadPoolExecutor(_LISTED_AT_ONCE) as pool:
        given = [(url, splits) for url in config.folders] + [(url, ("train",)) for url in config.train_only]
        listed = [_listed(url, set(wanted), cache, pool) if is_url(url) else None for url, wanted in given]
        remote = [each for each in listed if each is not None]
        _check(remote, config)
        places = [
            url if found is None else str(_write_view(views / str(number), found, cache, config))
            for number, ((url, _), found) in enumerate(zip(given, listed, strict=True))
        ]
        for each in remote:
            each.release()
        count = len(config.folders)
        yield replace(config, folders=tuple(places[:count]), train_only=tuple(places[count:]))


@dataclass(frozen=True, kw_only=True)
class _Listed:
    """What is known of a set at a URL.

    Attributes:
        url: Of the set.
        info: Content of its `dataset.json`.
        texts: File with the texts of each of its files, or why there is none, by name.
        files: Content of further files, by name.
        held: Keeps the files of texts.
    """

    url: str
    info: dict[str, Any]
    texts: Mapping[str, Path | str]
    files: Mapping[str, bytes]
    held: ExitStack

    @property
    def shards(self) -> list[Shard]:
        """The files that can be read."""
        found = [Shard.of_texts(path) for path in self.texts.values() if isinstance(path, Path)]
        return [shard for shard in found if shard is not None]

    @property
    def problems(self) -> list[str]:
        """What cannot be used."""
        unread = [reason for reason in self.texts.values() if isinstance(reason, str)]
        return unread + [message for shard in self.shards for message in shard.bad]

    def release(self) -> None:
        """Lets other processes remove the files of texts."""
        self.held.close()


def _listed(url: str, splits: set[str], cache: ShardCache, pool: ThreadPoolExecutor) -> _Listed:
    if PurePosixPath(file_name(url)).suffix.lower() == ".tar":
        return _list_tars(url, cache, pool)
    place = url.rstrip("/")
    try:
        content = read_file(f"{place}/{INFO_FILE}")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no {INFO_FILE} at {place}; give the URL of a folder that `bridgetower prepare` wrote, or of tar shards"
        ) from error
    info = json_object(content, f"{place}/{INFO_FILE}", "copy the set there again")
    described = from_plain(DatasetInfo, info, f"{place}/{INFO_FILE}").splits
    if not splits & described.keys():
        raise FileNotFoundError(f"no split {', '.join(sorted(splits))} in {place}; there: {', '.join(described)}")
    digests = {name: digest for split in splits & described.keys() for name, digest in described[split].files.items()}
    unfit = [name for name in digests if PurePosixPath(name).name != name or not name.endswith(".parquet")]
    if unfit:
        raise ValueError(f"{place}/{INFO_FILE} names {unfit[0]!r}; expected Parquet files beside it")
    shards = {name: Shard(url=f"{place}/{name}", version=digest, digest=digest) for name, digest in digests.items()}
    texts, held = _texts_of(shards, cache, pool, _write_texts)
    return _Listed(url=place, info=info, texts=texts, files=dict(_beside(place, info.get("kind"))), held=held)


def _list_tars(url: str, cache: ShardCache, pool: ThreadPoolExecutor) -> _Listed:
    urls = expanded(url)
    names = _file_names(len(urls))
    unread: dict[str, Path | str] = {}
    shards = {}
    for name, one in zip(names, urls, strict=True):
        try:
            size, version = file_facts(one)
            shards[name] = Shard(url=one, version=version, size=size or 0)
        except OSError as error:
            unread[name] = str(error)
    texts, held = _texts_of(shards, cache, pool, lambda shard, path: _write_tar_texts(shard, cache, path))
    texts = {name: unread.get(name) or texts[name] for name in names}
    return _Listed(url=url, info=_info_of_tars(url, texts), texts=texts, files={}, held=held)


def _file_names(count: int) -> list[str]:
    return ["train.parquet"] if count == 1 else [f"train-{number:05}-of-{count:05}.parquet" for number in range(count)]


def _info_of_tars(url: str, texts: Mapping[str, Path | str]) -> dict[str, Any]:
    shards = {name: Shard.of_texts(path) for name, path in texts.items() if isinstance(path, Path)}
    files = {name: shard.digest for name, shard in shards.items() if shard is not None}
    split = {"images": 0, "texts": 0, "files": dict.fromkeys(texts, "") | files}
    return {
        "format": FORMAT,
        "name": file_name(url),
        "kind": CAPTIONS.name,
        "seed": 0,
        "split_rule": "",
        **{name: {} for name in ("sources", "licences", "settings", "left_out")},
        "splits": {"train": split},
    }


def _beside(place: str, kind: object) -> Iterator[tuple[str, bytes]]:
    name = _BESIDE.get(str(kind))
    if name:
        with suppress(FileNotFoundError):  # as not every set has it, and those who need it say so
            yield name, read_file(f"{place}/{name}")


def _texts_of(
    shards: Mapping[str, Shard], cache: ShardCache, pool: ThreadPoolExecutor, write: Callable[[Shard, Path], None]
) -> tuple[dict[str, Path | str], ExitStack]:
    """Returns the files of texts, or why there is none, and what keeps these files until it is closed."""
    held = ExitStack()

    def texts(shard: Shard) -> Path | str:
        try:
            return held.enter_context(cache.texts(shard, lambda path: write(shard, path)))
        except (OSError, ValueError) as error:
            return str(error)

    return dict(zip(shards, pool.map(texts, shards.values()), strict=True)), held


def _write_texts(shard: Shard, path: Path) -> None:
    """Writes all columns of a Parquet file but its images, of which it reads only these columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    logger.info("reading the texts of %s", shard.url)
    size, _ = file_facts(shard.url)
    if size is None:
        raise ValueError(f"the server of {shard.url} does not tell its size; copy the set to a disk")
    try:
        file = _Pieces(shard.url, size)
        file.read_in([(max(0, size - _FOOTER), min(size, _FOOTER))])
        footer = int.from_bytes(file.piece(size - 8, 4), "little") + 8
        if footer > size:
            raise ValueError(f"{shard.url} is no Parquet file; copy it there again")
        file.read_in([(size - footer, footer)])
        content = pq.ParquetFile(file)
        schema = content.schema_arrow
        images = image_columns(schema)
        names = [name for name in schema.names if name not in images]
        file.read_in(_chunks(content.metadata, set(names)))
        table = content.read(columns=names, use_threads=False)
    except pa.ArrowException as error:
        raise ValueError(f"{shard.url} is no Parquet file ({error}); copy it there again") from error
    columns = [
        pa.nulls(len(table), field.type) if field.name in images else table.column(field.name) for field in schema
    ]
    _write(path, pa.table(columns, schema=replace(shard, size=size).marked(schema)))


def _chunks(content: Any, names: set[str]) -> list[tuple[int, int]]:
    """Returns where some columns are in a Parquet file, and their lengths."""
    pieces = []
    for group in map(content.row_group, range(content.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema.partition(".")[0] in names:
                starts = column.data_page_offset, column.dictionary_page_offset or column.data_page_offset
                pieces.append((min(starts), column.total_compressed_size))
    return pieces


def _write(path: Path, table: pa.Table) -> None:
    import pyarrow.parquet as pq

    pq.write_table(table, path, row_group_size=_ROWS, compression="zstd", use_dictionary=False)


class _Pieces(io.RawIOBase):
    """A file of which only some pieces are in memory."""

    def __init__(self, url: str, size: int) -> None:
        self._url, self._size, self._at = url, size, 0
        self._parts: list[tuple[int, bytes]] = []

    def read_in(self, pieces: Sequence[tuple[int, int]]) -> None:
        """Reads pieces of the file, of which each has a start and a length; near ones in one request."""
        joined: list[tuple[int, int]] = []
        for start, length in sorted(pieces):
            if joined and start - sum(joined[-1]) <= _GAP:
                first = joined[-1][0]
                joined[-1] = (first, max(sum(joined[-1]), start + length) - first)
            else:
                joined.append((start, length))
        new = [piece for piece in joined if self._part(*piece) is None]
        self._parts += zip([start for start, _ in new], read_pieces(self._url, new), strict=True)

    def piece(self, start: int, length: int) -> bytes:
        """Returns what was read."""
        found = self._part(start, length)
        if found is None:
            raise ValueError(f"{self._url} is no Parquet file that `bridgetower prepare` wrote; copy it there again")
        return found

    def _part(self, start: int, length: int) -> bytes | None:
        for first, content in self._parts:
            if first <= start and start + length <= first + len(content):
                return content[start - first : start - first + length]
        return None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        length = self._size - self._at if size < 0 else min(size, self._size - self._at)
        content = self.piece(self._at, length)
        self._at += length
        return content


def _write_tar_texts(shard: Shard, cache: ShardCache, path: Path) -> None:
    """Writes the captions of a tar shard, and where its images are; every image is decoded once."""
    import pyarrow as pa

    columns: dict[str, list[Any]] = {name: [] for name in ("image_id", CAPTIONS.entries, START, LENGTH)}
    bad = []
    with cache.copy(shard) as copy, ThreadPoolExecutor(_CHECKED_AT_ONCE) as pool:
        digest = sha256_of(copy)
        samples = _samples(shard, copy)
        for sample, problem in zip(samples, pool.map(_problem_of, samples), strict=True):
            if problem:
                bad.append(f"{sample.key} in {shard.url}: {problem}")
                continue
            assert sample.image is not None
            assert sample.image.piece is not None
            name = f"{file_name(shard.url)}/{sample.image.name.partition('/')[2]}"
            for column, value in zip(columns, (name, [sample.caption.strip()], *sample.image.piece), strict=True):
                columns[column].append(value)
    schema = replace(shard, digest=digest, bad=tuple(bad)).marked(CAPTIONS.arrow_schema({START: int, LENGTH: int}))
    rows = columns | {"image": [None] * len(columns["image_id"])}
    _write(path, pa.table({name: rows[name] for name in schema.names}, schema=schema))


def _samples(shard: Shard, copy: Path) -> list[Sample]:
    try:
        return list(tar_samples(copy))
    except ValueError as error:
        raise ValueError(str(error).replace(str(copy), shard.url)) from error


def _problem_of(sample: Sample) -> str | None:
    """Returns why a sample cannot be used; None if it can."""
    from bridgetower.processor import open_image  # which needs torch; the help of commands does not

    if sample.image is None:
        return "no image"
    if problem := CAPTIONS.problem_of(sample.caption.strip()):
        return problem
    try:
        open_image(sample.image.read())
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _check(listed: Sequence[_Listed], config: DataConfig) -> None:
    problems = [problem for each in listed for problem in each.problems]
    check_errors(", ".join(each.url for each in listed), problems, config.max_errors)
    for problem in problems:
        logger.warning("left out: %s", problem)
    for each in listed:
        if not each.shards:
            raise ValueError(f"{each.url} has no file that can be read")
    sizes = sorted((shard.size for each in listed for shard in each.shards), reverse=True)
    most = 2 * config.shuffle_shards
    needed = sum(sizes[:most]) / 2**30
    if needed > config.shard_cache_limit:
        raise ValueError(
            f"shard_cache_limit is {config.shard_cache_limit:g} GiB; {min(most, len(sizes))} files, twice "
            f"shuffle_shards, take up to {needed:.3g} GiB: raise the limit, or lower shuffle_shards"
        )


@contextmanager
def _view_folder(root: Path) -> Iterator[Path]:
    """Gives a new folder, which is removed in the end; those of killed processes are removed now."""
    with ExitStack() as stack:
        with locked(root, wait=True):
            for path in root.iterdir():
                if path.is_dir():
                    with suppress(FileExistsError), locked(path):
                        shutil.rmtree(path)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=root)))
            stack.enter_context(locked(folder))
        yield folder


def _write_view(folder: Path, listed: _Listed, cache: ShardCache, config: DataConfig) -> Path:
    """Writes what `read_split` opens: the description of the set and the texts of its files, without images."""
    folder.mkdir()
    present = next(path for path in listed.texts.values() if isinstance(path, Path))
    for name, path in listed.texts.items():
        if isinstance(path, Path):
            _link(path, folder / name)
        else:
            _write_empty(present, folder / name)
            listed.info["splits"][split_of_file(Path(name))]["files"][name] = "left out"
    for name, content in listed.files.items():
        write_bytes(folder / name, content)
    place = {"url": listed.url, "cache": str(cache.folder), "limit": cache.limit, "num_open": config.shuffle_shards + 2}
    write_json(folder / PLACE_FILE, place)
    write_bytes(folder / INFO_FILE, json_text(listed.info).encode())
    return folder


def _link(path: Path, target: Path) -> None:
    try:
        target.hardlink_to(path)
    except OSError:  # a file system without links
        shutil.copyfile(path, target)


def _write_empty(other: Path, path: Path) -> None:
    """Writes a file without rows, and with the columns of another one."""
    import pyarrow.parquet as pq

    pq.write_table(pq.read_schema(other).empty_table().replace_schema_metadata(None), path)
