"""Builds an index of images, and brings it up to date with its sources."""

from __future__ import annotations

import errno
import hashlib
import os
import posixpath
import shlex
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, permutations
from operator import attrgetter
from pathlib import Path
from typing import Any

from PIL import Image as PilImage

from bridgetower.data.sets.store import Table, Uri, split_uri
from bridgetower.data.sources.example import Example, FileGroup, check_bad
from bridgetower.data.sources.fetch import is_url, suffix_of, version_of
from bridgetower.data.sources.reader import file_groups, read_group
from bridgetower.files import unfit_name
from bridgetower.inference.embed import (
    Embedded,
    Model,
    Task,
    check_ray,
    embed_tasks,
    example_name,
    load_model,
    number_items,
)
from bridgetower.inference.items import batched
from bridgetower.inference.predictor import Predictor
from bridgetower.inference.vector_files import write_lock
from bridgetower.search.config import IndexConfig
from bridgetower.search.index import COLUMNS, Index, IndexInfo
from bridgetower.search.indexed import location_of
from bridgetower.search.unrelated import note_unrelated

_COMPARED = 1000  # examples that are compared with the index at once
_TASK_SIZE = 512  # examples of a task on Ray
_FIRST_TIME = -62_135_596_800_000_000  # start of the year 1, in microseconds
_LAST_TIME = 253_402_300_799_999_999  # end of the year 9999
# Separates, in the version of an image, the version of its table, shard or video from a digest of the settings.
_SEPARATOR = "|"
# Problems of files that do not exist.
_GONE = (os.strerror(errno.ENOENT), os.strerror(errno.ENOTDIR), os.strerror(errno.ELOOP))

_SourceGroup = tuple[str, FileGroup]  # a source, and files of it that are read together
_ImageRows = tuple[str, list[Example]]  # a source, and its rows about one image


@dataclass(frozen=True, kw_only=True)
class IndexReport:
    """The changes of a run over an index."""

    images: int  # in the index now
    added: int  # that were not in it
    changed: int  # that were in it with other content, captions or times
    removed: int  # that its source no longer has, or that can no longer be read
    reused: int  # of the added and changed images, those whose vectors the index had already
    cut: int  # captions that were too long for the model
    bad: tuple[str, ...]  # images that cannot be used, each with the reason
    seconds: float  # of the run, without loading the model


def build_index(
    source: str | Path | Sequence[str | Path],
    out: Uri,
    model: Model,
    config: IndexConfig | None = None,
    *,
    progress: bool = False,
) -> IndexReport:
    """Builds an index, or brings one up to date: embeds new and changed images, and deletes dropped ones.

    Tables of images, tar shards and videos that have not changed are not read. An image counts as changed if its size,
    its time or its captions differ. It is not embedded again if the index has its content with the same captions, under
    any name. Vectors are written every few seconds. A run that was killed is completed by the next one.

    Args:
        source: As for `bridgetower.data.sources.reader.read`, with images or videos; or several, all local.
        out: Folder of the index, whose name ends in `.lance`, or an object store's URI.
        model: A loaded model, what to load, or what returns one; nothing is loaded for a source that is wrong.
        config: How images are read and embedded.
        progress: Show a bar, or log a line each 20 seconds where standard error is no terminal.

    Raises:
        FileNotFoundError: There is no source.
        FileExistsError: Another process writes the index.
        ValueError: A source names no image, the index is of another model or folder, the model has no contrastive head,
            or more than `max_errors` images cannot be used; the others are in the index then.
        OSError: The index cannot be written, or has damaged vectors.
    """
    config = config or IndexConfig()
    check_ray(config, model)
    split_uri(str(out))  # refuses a name that no index can have
    if isinstance(source, str | Path):
        source = [source]
    sources = [str(path) for path in source]
    root = _common_root(sources)
    groups = []
    for path in sources:
        groups += [(path, group) for group in file_groups(path)]
    predictor = load_model(model)
    predictor.model.head("itc")
    with write_lock(out):
        if Table.exists(out):
            Table(out).recover()
            index = Index(out)
            index.check_model(predictor.fingerprint, predictor.source)
            _check_root(index, root, sources, predictor.source)
        else:
            index = new_index(out, predictor, root)
        update = _Update(index, root, config)
        # Workers of a Ray cluster load the model themselves.
        model_to_run = predictor if config.ray is None else model
        report = update.run(sources, groups, model_to_run, progress)
        note_unrelated(index, predictor)
    remaining = f"the other {report.images} are in the index"
    check_bad(", ".join(sources), report.bad, config.max_errors, remaining)
    return report


def _check_root(index: Index, root: str, sources: Sequence[str], model: str) -> None:
    """Refuses an index of another folder, with the command that builds one of both."""
    indexed_root = index.info.root if is_url(index.info.root) else str(index.root)
    is_local = not is_url(indexed_root) and not is_url(root)
    indexed_folder = index.root.resolve()
    if indexed_root == root or (is_local and indexed_folder == Path(root).resolve()):
        return
    advice = "choose another name for the index"
    if is_local:
        new_sources = []
        is_covered = False
        for source in sources:
            folder = Path(source).resolve()
            if not folder.is_relative_to(indexed_folder):
                new_sources.append(source)
                is_covered |= indexed_folder.is_relative_to(folder)
        if new_sources:
            all_sources = new_sources if is_covered else [indexed_root, *new_sources]
            name = f"{index.uri.removesuffix('.lance')}-all.lance"
            command = ["bridgetower", "index", *all_sources, "--out", name, "--model", model]
            advice = f"for both: {shlex.join(command)}"
        else:
            advice = f"name all its sources, or {advice}"
    raise ValueError(f"{index.uri} is of the images in {indexed_root}, not of {root}; {advice}")


class _Update:
    """A run that brings an index up to date with its sources."""

    def __init__(self, index: Index, root: str, config: IndexConfig) -> None:
        self.index = index
        self.root = root
        self.config = config

        # Content of the index.
        self.known: dict[str, tuple[int, str]] = {}  # state and version by path
        self.group_paths = defaultdict[str, list[str]](list)  # by version of table, shard or video
        self.group_sizes: dict[str, int] = {}  # numbers of images, by the same version
        self.indexed_sizes: set[int] = set()  # of image files, in bytes
        columns = ["path", "version", "captions", "location", "size", "start", "part_size"]
        for batch in index.scan(columns):
            for row in batch.to_pylist():
                self._add_indexed(row)

        # Content of the sources, noted while they are read.
        self.seen: set[str] = set()  # paths
        self.bad: dict[str, str] = {}
        self.unreachable: set[str] = set()  # paths that may exist but cannot be looked at
        self.counts = Counter(added=0, changed=0, removed=0, reused=0, cut=0)
        self.num_usable = Counter[str]()  # images of each source

    def _add_indexed(self, row: Mapping[str, Any]) -> None:
        """Notes a row of the index."""
        path = row["path"]
        version = sys.intern(row["version"])
        self.known[path] = (_state(row), version)
        if _SEPARATOR in version:
            self.group_paths[version].append(path)
            if row["part_size"]:
                self.group_sizes[version] = row["part_size"]
        if row["start"] is None:
            self.indexed_sizes.add(row["size"])

    def run(
        self,
        sources: Sequence[str],
        groups: Sequence[_SourceGroup],
        model: Model,
        progress: bool,
    ) -> IndexReport:
        """Embeds new and changed images, writes them, and deletes dropped ones."""
        start_time = time.perf_counter()

        # Embed and write new and changed images.
        examples = self._new_examples(groups)
        tasks: Iterable[Task] = [lambda: examples]
        if self.config.ray is not None:
            tasks = (partial(iter, chunk) for chunk in batched(examples, _TASK_SIZE))
        self.counts["cut"] = embed_tasks(
            tasks, "all", model, self.config, self._write, progress=progress
        )
        for source in sources:
            if not self.num_usable[source]:
                advice = (
                    f"check that it is the right source, or remove {self.index.uri} to have none"
                )
                reason = next(iter(self.bad.values()), advice)
                raise ValueError(f"{source} names no image; nothing was removed: {reason}")

        # Delete dropped images.
        removed = [path for path in self.known if path not in self.seen and self._is_gone(path)]
        self.index.remove(removed)
        self.counts["removed"] = len(removed)

        # Make the index fast, and check what was written.
        self.index.optimize(self.counts["changed"] + len(removed))
        if self.counts.total() and not is_url(self.index.uri):
            self.index.check_rows(COLUMNS.values())
        if self.config.ann and not self.index.has_ann_index:
            self.index.create_ann_index()
        return IndexReport(
            images=len(self.index),
            bad=tuple(self.bad.values()),
            seconds=time.perf_counter() - start_time,
            **self.counts,
        )

    def _is_gone(self, path: str) -> bool:
        """Tells whether all folders and files on the way to an image could be looked at."""
        ancestors = {"", path}
        for end, letter in enumerate(path):
            if letter in "/#":
                ancestors.add(path[:end])
        return ancestors.isdisjoint(self.unreachable)

    def _write(self, results: Sequence[Embedded]) -> None:
        """Writes images with their vectors, and notes the problems of the others."""
        rows = []
        for result in results:
            path = result.example.id
            if result.problem:
                self.bad[path] = f"{path!r}: {result.problem}"
                if not result.may_pass:
                    self.seen.discard(path)
                continue
            self.counts[self._kind_of_change(path)] += 1
            columns = result.example.fields
            content = {
                "size": columns["size"] or result.size,
                "digest": result.digest,
                "width": result.width,
                "height": result.height,
                "frame": result.frame,
                "image_vector": result.vectors["images"][0],
                "text_vectors": result.vectors.get("texts", []),
                "pair_vectors": result.vectors.get("pairs", []),
            }
            rows.append({**columns, **content})
        self.index.upsert(rows)

    def _kind_of_change(self, path: str) -> str:
        return "changed" if path in self.known else "added"

    def _new_examples(self, groups: Sequence[_SourceGroup]) -> Iterator[Example]:
        """Yields new and changed images, each with the columns of its row as fields."""
        # Several rows of a table may name the same image, unless the table contains the images.
        tables = [(source, group) for source, group in groups if _names_images(group)]
        yield from self._compare(self._rows_of_tables(tables), "")

        for source, group in groups:
            if _names_images(group):
                continue
            version = self._group_version(source, group)
            paths = self.group_paths.get(version, [])
            if paths and len(paths) == self.group_sizes.get(version):
                self.seen.update(paths)
                self.num_usable[source] += len(paths)
            else:
                yield from self._compare(self._image_rows(source, group), version)

    def _group_version(self, source: str, group: FileGroup) -> str:
        """Returns the version of all images of a table, shard or video, or nothing if it cannot be told."""
        if group.kind not in ("table", "tar", "video"):
            return ""
        files = [*group.files, *group.sidecars.values()]
        versions = {file.name: file.version for file in files}
        file = group.files[0]
        if is_url(file.location) and not file.version:  # listings over HTTP have no versions
            with suppress(OSError):  # which reading it raises again
                versions[file.name] = version_of(file.location)
        version = versions[file.name]
        if version == "None" or not all(versions.values()):  # a server that tells nothing
            return ""
        settings = [self._folder(source), self.config.columns, self.config.truncate]
        key = repr([group.kind, *settings, *versions.items()])
        digest = hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8)
        return f"{version}{_SEPARATOR}{digest.hexdigest()}"

    def _folder(self, source: str) -> str:
        """Returns the path of a source within the root of the index."""
        if is_url(source):
            return ""
        path = os.path.relpath(_root_of(source).resolve(), Path(self.root).resolve())
        return "" if path == "." else path

    def _image_rows(self, source: str, group: FileGroup) -> Iterator[_ImageRows]:
        """Yields successive examples of one image together, with its path as their id."""
        folder = self._folder(source)
        examples = read_group(group, self.config.columns)
        with_paths = (self._with_path(example, group, folder) for example in examples)
        for _, rows in groupby(with_paths, attrgetter("id")):
            yield source, list(rows)

    def _with_path(self, example: Example, group: FileGroup, folder: str) -> Example:
        """Gives an example the path of its image in the index as id."""
        is_table = group.kind in ("table", "captions")
        is_whole_file = example.id == group.files[0].name
        if example.problem and is_table and is_whole_file:
            self.unreachable.add("")  # the rest of the table may name any image
        path = example_name(example)
        if example.images and example.images[0].is_file:
            path = example.images[0].name
        if folder and not is_url(path) and not path.startswith("/"):
            path = posixpath.normpath(posixpath.join(folder, path))
        return replace(example, id=path)

    def _rows_of_tables(self, groups: Sequence[_SourceGroup]) -> Iterator[_ImageRows]:
        """Yields all rows of one image together, for which the tables are read twice."""
        counts = Counter[str]()
        for source, group in groups:
            for _, rows in self._image_rows(source, group):
                counts[rows[0].id] += 1
        repeated: dict[str, _ImageRows] = {}
        for source, group in groups:
            for _, rows in self._image_rows(source, group):
                path = rows[0].id
                if counts[path] == 1:
                    yield source, rows
                else:
                    _, all_rows = repeated.setdefault(path, (source, []))
                    all_rows += rows
        yield from repeated.values()

    def _compare(self, image_rows: Iterable[_ImageRows], version: str) -> Iterator[Example]:
        """Yields images that the index lacks. Writes those that it has under another name or time."""
        for batch in batched(number_items(image_rows), _COMPARED):
            new = []
            touched = []  # rows of images whose version alone differs
            for number, (source, rows), is_last in batch:
                part_size = number + 1 if is_last else 0
                example = self._with_columns(rows, version, part_size)
                if example is None:
                    continue
                path = example.id
                if path in self.seen:
                    problem = f"{path!r} already names another image; give each its own name"
                    self._note(f"{example.origin}: {problem}")
                    continue
                self.num_usable[source] += 1
                self.seen.add(path)
                state, old_version = self.known.get(path, (None, ""))
                if state != _state(example.fields):
                    new.append(example)
                elif old_version != example.fields["version"]:
                    touched.append(example.fields)
            self.index.set_versions(touched)
            reused = self.index.reuse(self._possible_copies(new))
            for path in reused:
                self.counts[self._kind_of_change(path)] += 1
            self.counts["reused"] += len(reused)
            yield from (example for example in new if example.id not in reused)

    def _possible_copies(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Returns the rows, with digests, of images whose content the index may have under another name."""
        rows = []
        for example in examples:
            image = example.images[0]
            if image.content is None:
                is_remote = is_url(image.location)
                size = example.fields["size"]
            else:
                is_remote = False
                size = len(image.content)
            if is_remote or image.moment or size not in self.indexed_sizes:
                continue
            # An image that cannot be read is noted when it is embedded.
            with suppress(OSError, ValueError):
                digest = hashlib.sha256(image.read()).hexdigest()
                rows.append({**example.fields, "digest": digest, "size": size})
        return rows

    def _note(self, problem: str) -> None:
        self.bad[problem] = problem

    def _with_columns(
        self, rows: Sequence[Example], version: str, part_size: int
    ) -> Example | None:
        """Joins the usable rows about an image into an example with the columns of its row as fields."""
        usable = self._usable_rows(rows)
        if not usable:
            return None
        example = usable[0]
        path = example.id
        if problem := unfit_name(path):
            self.bad[path] = f"{example.origin}: {problem}"
            return None

        image = example.images[0]
        size = mtime = 0
        file_version = image.version
        try:
            if not is_url(image.location):
                file_version = image.version or version_of(image.location)
                size, mtime = map(int, file_version.split())
        except OSError as error:
            self.bad[path] = f"{example.origin}: no file {path!r} ({error.strerror})"
            if error.strerror not in _GONE:
                self.unreachable.add(path)
            return None
        if image.cell:
            size = 0  # which is known once it was read
        if image.piece:
            _, size = image.piece

        if not version or image.is_file:
            version = file_version
            part_size = 0
        start, end = image.moment or (None, None)
        captions: list[str] = []
        for row in usable:
            captions += row.texts
        columns = {
            "path": path,
            "size": size,
            "mtime": min(max(mtime // 1000, _FIRST_TIME), _LAST_TIME),
            "version": version,
            "part_size": part_size,
            "location": location_of(image, path, self.root),
            "captions": captions,
            "start": start,
            "end": end,
        }
        return replace(example, texts=tuple(captions), fields=columns)

    def _usable_rows(self, rows: Sequence[Example]) -> list[Example]:
        """Returns the rows whose image an index can have, and notes the problems of the others."""
        usable: list[Example] = []
        for row in rows:
            image = next(iter(row.images), None)
            if row.problem:
                self.bad[row.id] = f"{row.id!r}: {row.problem}"
                if row.problem not in _GONE:
                    self.unreachable.add("" if row.id == "." else row.id)
            elif image is None:
                self._note(f"{row.origin} has no image; `index` takes images, `embed` texts too")
            elif image.is_inline:
                self._note(
                    f"{row.origin} has its image as base64, which `index` cannot point to; save it as a file"
                )
            elif usable and not image.is_same(usable[0].images[0]):
                problem = f"{row.id!r} already names another image, that of {usable[0].origin}"
                self._note(f"{row.origin}: {problem}; give each a name of its own")
            else:
                usable.append(row)
        return usable


def _names_images(group: FileGroup) -> bool:
    """Tells whether files are a table in text, whose rows name images."""
    if group.kind == "table":
        return suffix_of(group.files[0].location) not in (".parquet", ".arrow")
    return group.kind == "captions"


def _state(row: Mapping[str, Any]) -> int:
    """Returns a hash that changes when an image must be embedded again."""
    version, _, _ = row["version"].partition(_SEPARATOR)
    content = (version, *row["captions"], row["location"])
    return hash(content)


def new_index(out: Uri, predictor: Predictor, root: Uri) -> Index:
    """Creates an empty index for the vectors of a model and images below a folder or URL."""
    blank = PilImage.new("RGB", (8, 8))
    info = IndexInfo(
        fingerprint=predictor.fingerprint,
        model=predictor.source,
        root=str(root),
        image_width=predictor.embed_images(blank).shape[1],
        pair_width=predictor.embed_pairs(blank, "").shape[1],
    )
    return Index.create(out, info)


def _common_root(sources: Sequence[str]) -> str:
    """Returns the folder that the paths of all sources start from, or the URL of a single source."""
    if not sources:
        raise ValueError("nothing to index; name a folder of images, a table, tar shards or videos")
    if len(sources) == 1:
        return sources[0] if is_url(sources[0]) else str(_root_of(sources[0]))
    for source in sources:
        if is_url(source):
            raise ValueError(
                f"{source} is a URL, of which an index can only have one source; make an index of its own"
            )
    paths = [Path(source).resolve() for source in sources]
    for path, other in permutations(paths, 2):
        if other.is_relative_to(path):
            raise ValueError(f"{other} is given twice, as it is in {path}; leave it out")
    return os.path.commonpath([_root_of(path) for path in paths])


def _root_of(source: str | os.PathLike[str]) -> Path:
    """Returns the folder that the paths of a local source start from."""
    path = Path(source)
    return path if path.is_dir() else path.parent
