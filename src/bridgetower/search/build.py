"""Brings an index up to date with its sources: new and changed images in, dropped ones out."""

from __future__ import annotations

import errno
import hashlib
import os
import posixpath
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PilImage

from bridgetower.data.example import Example, Image
from bridgetower.data.fetch import is_url, suffix_of, version_of
from bridgetower.data.reader import Part, parts_of, read_part
from bridgetower.data.store import Uri, split_uri
from bridgetower.files import unfit_name
from bridgetower.predictor import Predictor
from bridgetower.progress import counting
from bridgetower.search.config import IndexConfig
from bridgetower.search.embed import Commits, name_of, say_cut
from bridgetower.search.embedding import Embedded, Embedder, Model, check_bad, check_ray, embedded, loaded
from bridgetower.search.index import Index, place_of, write_lock

_AT_ONCE = 1000  # examples that are compared, and rows that are removed
_TASK = 512  # examples that a worker on Ray gets
_FIRST_TIME, _LAST_TIME = -62_135_596_800_000_000, 253_402_300_799_999_999  # the years 1 to 9999, in microseconds
# Between the version of a file and the key of the part that it is; the latter ends so until all of the part is there.
_OF_PART, _BEGUN = "|", "?"
_GONE = tuple(os.strerror(number) for number in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP))


@dataclass(frozen=True, kw_only=True)
class IndexReport:
    """The changes of a run over an index.

    Attributes:
        images: In the index now.
        added: That were not in it.
        changed: That were in it with other content, captions or times.
        removed: That its source no longer has, or that can no longer be read.
        reused: Of those added or changed, how many got vectors that the index had of the same content and captions.
        cut: Captions that were cut, as they were too long for the model.
        bad: What cannot be used, each with the reason.
        seconds: That it took, without loading the model.
    """

    images: int
    added: int
    changed: int
    removed: int
    reused: int
    cut: int
    bad: tuple[str, ...]
    seconds: float


def build_index(
    source: str | Path | Sequence[str | Path],
    out: Uri,
    model: Model,
    config: IndexConfig | None = None,
    *,
    storage_options: Mapping[str, str] | None = None,
    progress: bool = False,
) -> IndexReport:
    """Makes an index, or brings one up to date: new and changed images are embedded, dropped ones deleted.

    Tables of images, tar shards and videos that have not changed are not read. An image counts as changed if its size,
    its time or its captions differ. It is not embedded again if the index has its content with the same captions, under
    any name. What was embedded is written every few seconds. A run that was killed is completed by the next one.

    Args:
        source: As for `bridgetower.data.reader.read`, with images or videos; or several, all local.
        out: Folder of the index, whose name ends in `.lance`, or an object store's URI.
        model: A loaded model, what to load, or what returns one; nothing is loaded for a source that is wrong.
        config: How.
        storage_options: Settings of an object store.
        progress: Show a bar, or log a line a minute where standard error is no terminal.

    Raises:
        FileNotFoundError: There is no source.
        FileExistsError: Another process writes the index.
        ValueError: A source names no image, the index is of another model or folder, the model has no contrastive head,
            or more than `max_errors` images cannot be used; the others are in the index then.
    """
    config = config or IndexConfig()
    check_ray(config, model)
    split_uri(str(out))  # refuses what is no name for an index
    sources = [source] if isinstance(source, str | Path) else source
    root = root_of_all(sources)
    for one in sources:
        parts_of(one)  # of what is no source nothing is loaded
    predictor = loaded(model)
    predictor.model.contrastive_head()
    with write_lock(out):
        index = _opened(out, predictor, root, storage_options)
        report = _Update(index, predictor if config.ray is None else model, str(root), config).run(sources, progress)
    say_cut(report.cut)
    named = ", ".join(map(str, sources))
    others = f"the other {report.images} are in the index"
    check_bad(named, report.bad, len(report.bad), config.max_errors, others)
    return report


class _Known:
    """The rows that an index had, as numbers that are quickly looked up: some 30 bytes of each are kept in memory."""

    def __init__(self, index: Index) -> None:
        paths, states, sizes, versions = array("q"), array("q"), array("q"), array("i")
        names: dict[str, int] = {"": 0}  # versions of parts
        columns = ["path", "version", "captions", "place", "size", "start"]
        for batch in index.scan(columns):
            cells = (batch[name].to_pylist() for name in columns)
            for path, version, captions, place, size, start in zip(*cells, strict=True):
                paths.append(hash(path))
                states.append(_state(version, captions, place))
                sizes.append(-1 if start is not None else size)
                versions.append(names.setdefault(version, len(names)) if _OF_PART in version else 0)
        self._names, self._texts, self._versions = names, list(names), np.array(versions, np.int32)
        self._by_version = np.argsort(self._versions, kind="stable")
        self._paths, self._states = np.array(paths, np.int64), np.array(states, np.int64)
        self._order = np.argsort(self._paths, kind="stable")
        self._sorted = self._paths[self._order]
        self.sizes = np.unique(np.array(sizes, np.int64))
        self.seen = np.zeros(len(self._paths), bool)

    def version(self, row: int) -> str:
        """Returns the version of a row that is in a part."""
        return self._texts[self._versions[row]]

    def with_version(self, version: str) -> np.ndarray:
        """Returns the numbers of the rows of a whole part."""
        number = self._names.get(version, -1)
        start, end = np.searchsorted(self._versions, [number, number + 1], sorter=self._by_version)
        return self._by_version[start:end]

    def row(self, path: str) -> int:
        """Returns the number of the row of a path; -1 if there was none."""
        place = int(np.searchsorted(self._sorted, hash(path)))
        found = place < len(self._sorted) and self._sorted[place] == hash(path)
        return int(self._order[place]) if found else -1

    def is_same(self, row: int, state: int) -> bool:
        """Whether a row was in a state."""
        return bool(self._states[row] == state)


class _Seen:
    """Hashes that came before, in sorted arrays of growing length."""

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def new(self, hashes: Sequence[int]) -> list[bool]:
        """Notes hashes; returns of each whether it comes for the first time."""
        given = np.array(hashes, np.int64)
        unique, first = np.unique(given, return_index=True)
        known = np.zeros(len(unique), bool)
        for run in self._runs:
            known |= run[np.minimum(np.searchsorted(run, unique), len(run) - 1)] == unique
        self._runs += [unique[~known]] if not known.all() else []
        while len(self._runs) > 1 and len(self._runs[-2]) <= 2 * len(self._runs[-1]):
            self._runs[-2:] = [np.sort(np.concatenate(self._runs[-2:]))]
        is_new = np.zeros(len(given), bool)
        is_new[first[~known]] = True
        return list(map(bool, is_new))


class _Update:
    """One run over an index.

    Of a part whose images are in it, rows have a version that ends in `_BEGUN` until all of them are there; then the
    part is not read again as long as it does not change.
    """

    def __init__(self, index: Index, model: Model, root: str, config: IndexConfig) -> None:
        self.index, self.model, self.root, self.config = index, model, root, config
        self.known, self.seen = _Known(index), _Seen()
        self.bad: dict[str, str] = {}
        self.unreachable: set[str] = set()  # what may be there, but cannot be looked at
        self.counts: Counter[str] = Counter()
        self.usable: Counter[str] = Counter()  # images that each source names
        self.rows: list[dict[str, Any]] = []  # to be written
        self.about: dict[str, tuple[dict[str, Any], str]] = {}  # columns, and version of the part, of what is embedded
        self.left: Counter[str] = Counter()  # images of a part that are being embedded
        self.listed: set[str] = set()  # parts that are read to their end
        self.partial: set[str] = {""}  # parts of which something cannot be used, or is not in them
        self.versions: dict[str, set[str]] = {}  # that rows of a part have in the index
        self.whole: list[tuple[set[str], str]] = []  # versions to be replaced

    def run(self, sources: Sequence[str | Path], progress: bool) -> IndexReport:
        """Embeds, writes and deletes."""
        parts = [(str(one), _versioned(part)) for one in sources for part in parts_of(one)]
        started, commits = time.perf_counter(), Commits(self.config.commit_seconds)
        with counting("embedding", total=None, shown=progress) as advance:
            try:
                for found in self._embedded(self._wanted(parts)):
                    for one in found:
                        self._take(one)
                    advance(len(found))
                    if commits.due(len(self.rows)):
                        self._flush()
            finally:
                self._flush()
        for source in map(str, sources):
            if not self.usable[source]:
                advice = f"check that it is the right source, or remove {self.index.uri} to have none"
                raise ValueError(
                    f"{source} names no image; nothing was removed: {next(iter(self.bad.values()), advice)}"
                )
        self._remove()
        if self.counts:
            self.index.optimize(self.counts["changed"] + self.counts["removed"])
        if self.config.ann and not self.index.has_ann_index:
            self.index.create_ann_index()
        self.index.write_exact()
        return IndexReport(
            images=len(self.index),
            added=self.counts["added"],
            changed=self.counts["changed"],
            removed=self.counts["removed"],
            reused=self.counts["reused"],
            cut=self.counts["cut"],
            bad=tuple(self.bad.values()),
            seconds=time.perf_counter() - started,
        )

    def _embedded(self, examples: Iterator[Example]) -> Iterator[list[Embedded]]:
        make = partial(_embedder, self.model, self.config)
        if self.config.ray is None:
            return embedded(make(), examples, num_workers=self.config.num_workers)
        from bridgetower.search.on_ray import done_on_ray

        tasks = iter(lambda: list(islice(examples, _TASK)), [])
        return done_on_ray(make, partial(_task_done, self.config.num_workers or 0), tasks, self.config)

    def _wanted(self, parts: Sequence[tuple[str, Part]]) -> Iterator[Example]:
        """Yields the images that are new or changed."""
        of_texts = [one for one in parts if _is_of_texts(one[1])]
        yield from self._compared(self._text_rows(of_texts), "")
        for source, part in parts:
            if _is_of_texts(part):
                continue
            folder = self._folder(source)
            key = _version_of_part(part, folder, self.config)
            rows = self.known.with_version(key) if key else ()
            self.known.seen[list(rows)] = True
            self.usable[source] += len(rows)
            if not len(rows):
                yield from self._compared(self._groups(source, part), key)
                self.listed.add(key)
                self._end(key)

    def _folder(self, source: str) -> str:
        """Returns where a source is in the folder of several."""
        path = "" if is_url(source) else os.path.relpath(root_of(source).resolve(), Path(self.root).resolve())
        return "" if path == "." else path

    def _groups(self, source: str, part: Part) -> Iterator[tuple[str, list[Example]]]:
        """Yields a source with its examples, those together that follow each other with one path, which is their id."""
        folder = self._folder(source)

        def named(example: Example) -> Example:
            image = next(iter(example.images), None)
            name = image.name if image is not None and image.is_file else name_of(example)
            inside = folder and not (is_url(name) or name.startswith("/"))
            return replace(example, id=posixpath.normpath(posixpath.join(folder, name)) if inside else name)

        examples = map(named, read_part(part, self.config.columns))
        for _, group in groupby(examples, lambda example: example.id):
            yield source, list(group)

    def _text_rows(self, parts: Sequence[tuple[str, Part]]) -> Iterator[tuple[str, list[Example]]]:
        """Yields the rows of tables that name images, all rows about one together; they are read twice for that."""
        hashes = array("q", (hash(group[0].id) for one in parts for _, group in self._groups(*one)))
        found, counts = np.unique(np.frombuffer(hashes, np.int64) if hashes else [], return_counts=True)
        scattered = set(found[counts > 1].tolist())
        kept: dict[str, tuple[str, list[Example]]] = {}
        for source, group in chain.from_iterable(self._groups(*one) for one in parts):
            if hash(group[0].id) in scattered:
                kept.setdefault(group[0].id, (source, []))[1].extend(group)
            else:
                yield source, group
        yield from kept.values()

    def _compared(self, groups: Iterator[tuple[str, list[Example]]], key: str) -> Iterator[Example]:
        """Yields what the index lacks; what it has under another name or time is written at once."""
        while part := list(islice(groups, _AT_ONCE)):
            usable = [
                (source, example, columns)
                for source, group in part
                if (example := self._merged(group, key)) and (columns := self._described(example, key)) is not None
            ]
            is_new = self.seen.new([hash(example.id) for _, example, _ in usable])
            wanted = []
            for (source, example, columns), first in zip(usable, is_new, strict=True):
                row = self.known.row(example.id)
                if not first or (row >= 0 and self.known.seen[row]):
                    message = f"{example.place}: {example.id!r} already names another image; give each its own name"
                    self._refuse(message, message, key)
                    continue
                self.usable[source] += 1
                if row >= 0:
                    self.known.seen[row] = True
                    if self.known.is_same(row, _state(columns["version"], example.texts, columns["place"])):
                        self.versions.setdefault(key, set()).add(self.known.version(row))
                        continue
                wanted.append((example, columns))
            reused = self._reused(wanted)
            for example, columns in wanted:
                if example.id not in reused:
                    self.about[example.id] = columns, key
                    self.left[key] += 1
                    yield example

    def _merged(self, group: Sequence[Example], key: str) -> Example | None:
        """Returns an example with the captions of all rows about its image; None if there is none that can be used."""
        usable: list[Example] = []
        for one in group:
            if one.problem:
                self._refuse(one.id, f"{one.id!r}: {one.problem}", key)
                if one.problem not in _GONE:
                    self.unreachable.add("" if one.id == "." else one.id)
            elif not one.images:
                message = f"{one.place} has no image; `index` takes images, `embed` texts too"
                self._refuse(message, message, key)
            elif usable and not _is_same(usable[0].images[0], one.images[0]):
                message = f"{one.place}: {one.id!r} already names another image, that of {usable[0].place}"
                self._refuse(message, f"{message}; give each a name of its own", key)
            else:
                usable.append(one)
        return replace(usable[0], texts=tuple(text for one in usable for text in one.texts)) if usable else None

    def _described(self, example: Example, key: str) -> dict[str, Any] | None:
        """Returns columns of an image that its source tells; None, with a note, if it cannot be used."""
        image, path = example.images[0], example.id
        if problem := unfit_name(path):
            self._refuse(path, f"{example.place}: {problem}", key)
            return None
        try:
            own = image.version or ("" if is_url(image.place) else version_of(image.place))
        except OSError as error:
            self._refuse(path, f"{example.place}: no file {path!r} ({error.strerror})", key)
            if error.strerror not in _GONE:
                self.unreachable.add(path)
            return None
        size, mtime = (0, 0) if is_url(image.place) else (int(one) for one in own.split())
        if image.is_file:
            self.partial.add(key)
        start, end = image.moment or (None, None)
        return {
            "path": path,
            "size": image.piece[1] if image.piece else 0 if image.cell else size,
            "mtime": min(max(mtime // 1000, _FIRST_TIME), _LAST_TIME),
            "version": key + _BEGUN if key and not image.is_file else own,
            "place": place_of(image, path, self.root),
            "captions": list(example.texts),
            "start": start,
            "end": end,
        }

    def _reused(self, wanted: Sequence[tuple[Example, dict[str, Any]]]) -> set[str]:
        """Writes images that the index has, and returns their paths."""
        found = []
        for example, columns in wanted:
            image = example.images[0]
            size = len(image.content) if image.content is not None else columns["size"]
            place = np.searchsorted(self.known.sizes, size)
            known = place < len(self.known.sizes) and self.known.sizes[place] == size
            if known and not image.moment and (image.content is not None or not is_url(image.place)):
                try:
                    digest = hashlib.sha256(image.read()).hexdigest()
                except (OSError, ValueError):  # embedding it says what is wrong
                    continue
                found.append(columns | {"digest": digest, "size": size})
        reused = self.index.reuse(found)
        for columns in found:
            if columns["path"] in reused:
                self._count(columns["path"], "reused")
                self.versions.setdefault(columns["version"].removesuffix(_BEGUN), set()).add(columns["version"])
        return reused

    def _count(self, path: str, *others: str) -> None:
        self.counts.update(["added" if self.known.row(path) < 0 else "changed", *others])

    def _refuse(self, name: str, message: str, key: str) -> None:
        self.bad[name] = message
        self.partial.add(key)

    def _take(self, one: Embedded) -> None:
        """Notes what was embedded for the next commit."""
        path = one.example.id
        columns, key = self.about.pop(path)
        self.left[key] -= 1
        self.counts["cut"] += one.num_cut
        if one.problem:
            self._refuse(path, f"{path!r}: {one.problem}", key)
            if not one.may_pass and (row := self.known.row(path)) >= 0:
                self.known.seen[row] = False
        else:
            self._count(path)
            self.rows.append(row_of(one, columns))
        self._end(key)

    def _end(self, key: str) -> None:
        """Notes that all of a part is in the index, once it is."""
        if self.left[key] or key not in self.listed:
            return
        self.listed.discard(key)
        before = self.versions.pop(key, set()) - {key}
        if key not in self.partial:
            for row in self.rows:
                row["version"] = key if row["version"] == key + _BEGUN else row["version"]
            self.whole += [(before, key)] if before else []

    def _flush(self) -> None:
        rows, self.rows = self.rows, []
        self.index.upsert(rows)
        for version in {row["version"] for row in rows if row["version"].endswith(_BEGUN)}:
            self.versions.setdefault(version.removesuffix(_BEGUN), set()).add(version)
        while self.whole:
            self.index.set_version(*self.whole.pop())

    def _remove(self) -> None:
        """Deletes what the sources have no more."""
        gone = []
        for path in self.index.paths() if not self.known.seen.all() else ():
            row = self.known.row(path)
            if row >= 0 and not self.known.seen[row] and not self._may_be_there(path):
                gone.append(path)
        self.index.remove(gone)
        self.counts["removed"] += len(gone)

    def _may_be_there(self, path: str) -> bool:
        """Whether an image is in a folder or file that cannot be read."""
        ends = [0, *(place for place, letter in enumerate(path) if letter in "/#"), len(path)]
        return any(path[:end] in self.unreachable for end in ends)


def row_of(one: Embedded, columns: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row for an image that was embedded, with what its source tells; without a size that of the file."""
    return {
        **columns,
        "size": columns.get("size") or one.size,
        "digest": one.digest,
        "width": one.width,
        "height": one.height,
        "frame": one.frame,
        "image_vector": one.image_vector,
        "text_vectors": one.text_vectors,
        "pair_vectors": one.pair_vectors,
    }


def _embedder(model: Model, config: IndexConfig) -> Embedder:
    size, truncate = config.batch_size, config.truncate
    return Embedder(loaded(model), "images", truncate=truncate, batch_size=size, with_texts=True)


def _task_done(num_workers: int, embedder: Embedder, examples: Sequence[Example]) -> list[Embedded]:
    return [*chain.from_iterable(embedded(embedder, examples, num_workers=num_workers))]


def _state(version: str, captions: Sequence[str], place: str) -> int:
    """What differs once an image is to be embedded again."""
    return hash((version.partition(_OF_PART)[0], tuple(captions), place))


def _versioned(part: Part) -> Part:
    """Returns a part with the version of its file, which listings over HTTP do not tell."""
    file = part.files[0]
    if not is_url(file.place) or file.version or part.kind not in ("table", "tar", "video"):
        return part
    try:
        version = version_of(file.place)
    except OSError:  # reading it says what is wrong
        return part
    return replace(part, files=(replace(file, version="" if version == "None" else version),))


def _version_of_part(part: Part, folder: str, config: IndexConfig) -> str:
    """Returns the version that all rows of a part have once they are there; empty if that cannot be told."""
    files = [*part.files, *part.beside.values()]
    if part.kind not in ("table", "tar", "video") or not all(one.version for one in files):
        return ""
    about = [part.kind, folder, config.columns, config.truncate, *((one.name, one.version) for one in files)]
    digest = hashlib.blake2b(repr(about).encode(errors="surrogateescape"), digest_size=8).hexdigest()
    return f"{part.files[0].version}{_OF_PART}{digest}"


def _is_of_texts(part: Part) -> bool:
    """Whether rows name images, and several rows may be about one."""
    return part.kind == "captions" or (
        part.kind == "table" and suffix_of(part.files[0].place) not in (".parquet", ".arrow")
    )


def _is_same(image: Image, other: Image) -> bool:
    """Whether two rows have the same image; what was not read with them is not."""
    return image == other or (image.content is not None and image.content == other.content)


def new_index(out: Uri, predictor: Predictor, root: Uri, *, storage_options: Mapping[str, str] | None = None) -> Index:
    """Makes an empty index for the vectors of a model and images below a folder or URL."""
    blank = PilImage.new("RGB", (8, 8))
    return Index.create(
        out,
        fingerprint=predictor.fingerprint,
        model=predictor.source,
        root=root,
        image_width=predictor.embed_images(blank).shape[1],
        pair_width=predictor.embed_pairs(blank, "").shape[1],
        storage_options=storage_options,
    )


def _opened(out: Uri, predictor: Predictor, root: Path | str, storage_options: Mapping[str, str] | None) -> Index:
    """Opens the index, or makes an empty one."""
    if not Index.exists(out, storage_options=storage_options):
        return new_index(out, predictor, root, storage_options=storage_options)
    index = Index(out, storage_options=storage_options)
    index.check_model(predictor.fingerprint, predictor.source)
    if not index.is_of(root):
        raise ValueError(f"{out} is of the images in {index.root}, not of {root}; choose another name for the index")
    return index


def root_of_all(sources: Sequence[str | Path]) -> str | Path:
    """Returns the folder that the paths of sources start from, or the URL of the only one."""
    if not sources:
        raise ValueError("nothing to index; name a folder of images, a table, tar shards or videos")
    if len(sources) == 1:
        return str(sources[0]) if is_url(sources[0]) else root_of(sources[0])
    if urls := [str(source) for source in sources if is_url(source)]:
        raise ValueError(f"{urls[0]} is a URL, of which an index can only have one source; make an index of its own")
    places = [Path(source).resolve() for source in sources]
    for number, place in enumerate(places):
        if inside := [one for one in places[:number] + places[number + 1 :] if one.is_relative_to(place)]:
            raise ValueError(f"{inside[0]} is given twice, as it is in {place}; leave it out")
    return Path(os.path.commonpath([root_of(place) for place in places]))


def root_of(source: str | os.PathLike[str]) -> Path:
    """Returns the folder that the paths of a local source start from."""
    path = Path(source)
    return path if path.is_dir() else path.parent
