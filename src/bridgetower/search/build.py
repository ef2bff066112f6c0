"""Brings an index up to date with its sources: new and changed images in, dropped ones out."""

from __future__ import annotations

import errno
import hashlib
import os
import posixpath
import shlex
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

from PIL import Image as PilImage

from bridgetower.data.sets.store import Table, Uri, split_uri
from bridgetower.data.sources.example import Example, check_bad
from bridgetower.data.sources.fetch import is_url, suffix_of, version_of
from bridgetower.data.sources.reader import FileGroup, file_groups, read_group
from bridgetower.files import unfit_name
from bridgetower.inference.embed import (
    Embedded,
    Model,
    check_ray,
    embed_tasks,
    loaded,
    name_of,
    numbered,
    write_lock,
)
from bridgetower.inference.predictor import Predictor
from bridgetower.search.checksums import CRCS
from bridgetower.search.config import IndexConfig
from bridgetower.search.index import Index, IndexInfo, location_of
from bridgetower.search.unrelated import note_unrelated

_AT_ONCE = 1000  # examples that are compared
_TASK = 512  # examples that a worker on Ray gets
_FIRST_TIME, _LAST_TIME = (
    -62_135_596_800_000_000,
    253_402_300_799_999_999,
)  # the years 1 to 9999, in microseconds
_OF_PART = "|"  # between the version of a file with several images and the key of the settings that it was read with
_GONE = tuple(os.strerror(number) for number in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP))


@dataclass(frozen=True, kw_only=True)
class IndexReport:
    """The changes of a run over an index."""

    images: int  # in the index now
    added: int  # that were not in it
    changed: int  # that were in it with other content, captions or times
    removed: int  # that its source no longer has, or that can no longer be read
    reused: int  # of those added or changed, how many got vectors that the index had of the same content and captions
    cut: int  # captions that were cut, as they were too long for the model
    bad: tuple[str, ...]  # what cannot be used, each with the reason
    seconds: float  # that it took, without loading the model


def build_index(
    source: str | Path | Sequence[str | Path],
    out: Uri,
    model: Model,
    config: IndexConfig | None = None,
    *,
    progress: bool = False,
) -> IndexReport:
    """Makes an index, or brings one up to date: new and changed images are embedded, dropped ones deleted.

    Tables of images, tar shards and videos that have not changed are not read. An image counts as changed if its size,
    its time or its captions differ. It is not embedded again if the index has its content with the same captions, under
    any name. What was embedded is written every few seconds. A run that was killed is completed by the next one.

    Args:
        source: As for `bridgetower.data.sources.reader.read`, with images or videos; or several, all local.
        out: Folder of the index, whose name ends in `.lance`, or an object store's URI.
        model: A loaded model, what to load, or what returns one; nothing is loaded for a source that is wrong.
        config: How.
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
    split_uri(str(out))  # refuses what is no name for an index
    sources = [str(one) for one in ([source] if isinstance(source, str | Path) else source)]
    root = _root_of_all(sources)
    parts = [
        (one, part) for one in sources for part in file_groups(one)
    ]  # of what is no source nothing is loaded
    predictor = loaded(model)
    predictor.model.head("itc")
    with write_lock(out):
        if Table.exists(out):
            Table(out).recover()
            index = Index(out)
            index.check_model(predictor.fingerprint, predictor.source)
            there = index.info.root if is_url(index.info.root) else str(index.root)
            if there != root and (
                is_url(there) or is_url(root) or index.root.resolve() != Path(root).resolve()
            ):
                old, advice = index.root.resolve(), "choose another name for the index"
                new = [one for one in sources if not Path(one).resolve().is_relative_to(old)]
                if not is_url(there) and not is_url(root):
                    given = (
                        new
                        if any(old.is_relative_to(Path(one).resolve()) for one in new)
                        else [there, *new]
                    )
                    name = f"{str(out).removesuffix('.lance')}-all.lance"
                    words = [
                        "bridgetower",
                        "index",
                        *given,
                        "--out",
                        name,
                        "--model",
                        predictor.source,
                    ]
                    advice = (
                        f"for both: {shlex.join(words)}"
                        if new
                        else f"name all its sources, or {advice}"
                    )
                raise ValueError(f"{out} is of the images in {there}, not of {root}; {advice}")
        else:
            index = new_index(out, predictor, root)
        update = _Update(index, root, config)
        report = update.run(sources, parts, predictor if config.ray is None else model, progress)
        note_unrelated(index, predictor)
    others = f"the other {report.images} are in the index"
    check_bad(", ".join(sources), report.bad, config.max_errors, others)
    return report


class _Update:
    """One run over an index."""

    def __init__(self, index: Index, root: str, config: IndexConfig) -> None:
        self.index, self.root, self.config = index, root, config
        self.known: dict[
            str, tuple[int, str]
        ] = {}  # of what is in the index, by path: its state, and its version
        self.parts = defaultdict[str, list[str]](
            list
        )  # paths by the version of a file with several images
        self.part_sizes: dict[str, int] = {}  # how many images such files have
        self.sizes: set[int] = set()  # of image files
        self.seen: set[str] = set()  # paths
        self.bad: dict[str, str] = {}
        self.unreachable: set[str] = set()  # what may be there, but cannot be looked at
        self.counts: Counter[str] = Counter()
        self.usable: Counter[str] = Counter()  # images that each source names
        names = ["path", "version", "captions", "location", "size", "start", "part_size"]
        for batch in index.scan(names):
            for path, version, captions, location, size, start, part_size in zip(
                *(batch[name].to_pylist() for name in names), strict=True
            ):
                self.known[path] = _state(version, captions, location), sys.intern(version)
                if _OF_PART in version:
                    self.parts[version].append(path)
                    if part_size:
                        self.part_sizes[version] = part_size
                if start is None:
                    self.sizes.add(size)

    def run(
        self,
        sources: Sequence[str],
        parts: Sequence[tuple[str, FileGroup]],
        model: Model,
        progress: bool,
    ) -> IndexReport:
        """Embeds, writes and deletes; each part is of one of the sources."""
        started = time.perf_counter()
        examples = self._wanted(parts)
        tasks: Iterable[Callable[[], Iterable[Example]]] = [lambda: examples]
        if self.config.ray is not None:
            tasks = (
                partial(iter, some) for some in iter(lambda: list(islice(examples, _TASK)), [])
            )
        self.counts["cut"] = embed_tasks(
            tasks, "all", model, self.config, self._write, progress=progress
        )
        for source in sources:
            if not self.usable[source]:
                advice = (
                    f"check that it is the right source, or remove {self.index.uri} to have none"
                )
                raise ValueError(
                    f"{source} names no image; nothing was removed: {next(iter(self.bad.values()), advice)}"
                )
        gone = []
        for path in self.known.keys() - self.seen:
            ends = [0, *(place for place, letter in enumerate(path) if letter in "/#"), len(path)]
            gone += [] if any(path[:end] in self.unreachable for end in ends) else [path]
        self.index.remove(gone)
        self.counts["removed"] = len(gone)
        self.index.optimize(self.counts["changed"] + len(gone))
        if self.counts.total() and not is_url(self.index.uri):
            deque(self.index.checked_scan(tuple(CRCS)), maxlen=0)
        if self.config.ann and not self.index.has_ann_index:
            self.index.create_ann_index()
        numbers = {
            name: self.counts[name] for name in ("added", "changed", "removed", "reused", "cut")
        }
        seconds = time.perf_counter() - started
        return IndexReport(
            images=len(self.index), bad=tuple(self.bad.values()), seconds=seconds, **numbers
        )

    def _write(self, found: Sequence[Embedded]) -> None:
        for one in found:
            path = one.example.id
            if not one.problem:
                self.counts["changed" if path in self.known else "added"] += 1
                continue
            self.bad[path] = f"{path!r}: {one.problem}"
            if not one.may_pass:
                self.seen.discard(path)
        self.index.upsert([row_of(one) for one in found if not one.problem])

    def _wanted(self, parts: Sequence[tuple[str, FileGroup]]) -> Iterator[Example]:
        """Yields the images that are new or changed, each with the columns of its row as fields."""
        of_texts, others = list[tuple[str, FileGroup]](), list[tuple[str, FileGroup]]()
        for (
            source,
            part,
        ) in parts:  # rows of a table that is no binary name images, and several may be about one
            is_binary = suffix_of(part.files[0].location) in (".parquet", ".arrow")
            is_of_texts = part.kind == "captions" or (part.kind == "table" and not is_binary)
            (of_texts if is_of_texts else others).append((source, part))
        yield from self._compared(self._text_rows(of_texts), "")
        for source, part in others:
            version = self._version_of(source, part)
            paths = self.parts.get(version, [])
            if paths and len(paths) == self.part_sizes.get(version):
                self.seen.update(paths)
                self.usable[source] += len(paths)
            else:
                yield from self._compared(self._groups(source, part), version)

    def _version_of(self, source: str, part: FileGroup) -> str:
        """Returns the version that the rows of a file with several images have; empty if that cannot be told."""
        if part.kind not in ("table", "tar", "video"):
            return ""
        versions = {one.name: one.version for one in (*part.files, *part.sidecars.values())}
        file = part.files[0]
        if is_url(file.location) and not file.version:  # which listings over HTTP do not tell
            with suppress(OSError):  # reading it says what is wrong
                versions[file.name] = version_of(file.location)
        if versions[file.name] == "None" or not all(
            versions.values()
        ):  # of which a server tells nothing
            return ""
        about = [
            part.kind,
            self._folder(source),
            self.config.columns,
            self.config.truncate,
            *versions.items(),
        ]
        digest = hashlib.blake2b(
            repr(about).encode(errors="surrogateescape"), digest_size=8
        ).hexdigest()
        return f"{versions[file.name]}{_OF_PART}{digest}"

    def _folder(self, source: str) -> str:
        """Returns where a source is in the folder of several."""
        path = (
            ""
            if is_url(source)
            else os.path.relpath(_root_of(source).resolve(), Path(self.root).resolve())
        )
        return "" if path == "." else path

    def _groups(self, source: str, part: FileGroup) -> Iterator[tuple[str, list[Example]]]:
        """Yields a source with its examples, those together that follow each other with one path, which is their id."""
        folder = self._folder(source)

        def named(example: Example) -> Example:
            if (
                example.problem
                and part.kind in ("table", "captions")
                and example.id == part.files[0].name
            ):
                self.unreachable.add("")  # what the rest of the table names, which may be anywhere
            image = next(iter(example.images), None)
            name = image.name if image is not None and image.is_file else name_of(example)
            inside = folder and not (is_url(name) or name.startswith("/"))
            return replace(
                example, id=posixpath.normpath(posixpath.join(folder, name)) if inside else name
            )

        examples = map(named, read_group(part, self.config.columns))
        for _, group in groupby(examples, lambda example: example.id):
            yield source, list(group)

    def _text_rows(
        self, parts: Sequence[tuple[str, FileGroup]]
    ) -> Iterator[tuple[str, list[Example]]]:
        """Yields the rows of tables that name images, all rows about one together; they are read twice for that."""
        counts = Counter(group[0].id for one in parts for _, group in self._groups(*one))
        kept: dict[str, tuple[str, list[Example]]] = {}
        for source, group in chain.from_iterable(self._groups(*one) for one in parts):
            if counts[group[0].id] > 1:
                kept.setdefault(group[0].id, (source, []))[1].extend(group)
            else:
                yield source, group
        yield from kept.values()

    def _compared(
        self, groups: Iterator[tuple[str, list[Example]]], version: str
    ) -> Iterator[Example]:
        """Yields what the index lacks; what it has under another name or time is written at once."""
        left = numbered(groups)
        while part := list(islice(left, _AT_ONCE)):
            wanted, same, kept = list[Example](), list[dict[str, Any]](), list[dict[str, Any]]()
            for number, (source, group), is_last in part:
                if (
                    example := self._with_columns(group, version, number + 1 if is_last else 0)
                ) is None:
                    continue
                path, image, columns = example.id, example.images[0], dict(example.fields)
                if path in self.seen:
                    message = f"{example.origin}: {path!r} already names another image; give each its own name"
                    self.bad[message] = message
                    continue
                self.usable[source] += 1
                self.seen.add(path)
                state, before = self.known.get(path, (0, ""))
                if path in self.known and state == _state(
                    columns["version"], columns["captions"], columns["location"]
                ):
                    kept += [] if before == columns["version"] else [columns]
                    continue
                wanted.append(example)
                size = len(image.content) if image.content is not None else columns["size"]
                is_at_hand = image.content is not None or not is_url(image.location)
                if is_at_hand and not image.moment and size in self.sizes:
                    with suppress(OSError, ValueError):  # embedding it says what is wrong
                        same.append(
                            columns
                            | {"digest": hashlib.sha256(image.read()).hexdigest(), "size": size}
                        )
            self.index.set_versions(kept)
            reused = self.index.reuse(same)
            for path in reused:
                self.counts.update(["changed" if path in self.known else "added", "reused"])
            yield from (example for example in wanted if example.id not in reused)

    def _with_columns(
        self, group: Sequence[Example], version: str, part_size: int
    ) -> Example | None:
        """Returns an example with the captions of all rows about its image; None, with a note, if none can be used."""
        usable: list[Example] = []
        for one in group:
            first, image = (
                usable[0].images[0] if usable else None,
                one.images[0] if one.images else None,
            )
            if one.problem:
                self.bad[one.id] = f"{one.id!r}: {one.problem}"
                if one.problem not in _GONE:
                    self.unreachable.add("" if one.id == "." else one.id)
            elif image is None:
                message = f"{one.origin} has no image; `index` takes images, `embed` texts too"
                self.bad[message] = message
            elif image.is_inline:
                message = f"{one.origin} has its image as base64, which `index` cannot point to; save it as a file"
                self.bad[message] = message
            elif (
                first
                and image != first
                and (image.content is None or image.content != first.content)
            ):
                message = f"{one.origin}: {one.id!r} already names another image, that of {usable[0].origin}"
                self.bad[message] = f"{message}; give each a name of its own"
            else:
                usable.append(one)
        if not usable:
            return None
        example, image, path = usable[0], usable[0].images[0], usable[0].id
        if problem := unfit_name(path):
            self.bad[path] = f"{example.origin}: {problem}"
            return None
        try:
            own = image.version or ("" if is_url(image.location) else version_of(image.location))
        except OSError as error:
            self.bad[path] = f"{example.origin}: no file {path!r} ({error.strerror})"
            if error.strerror not in _GONE:
                self.unreachable.add(path)
            return None
        size, mtime = (0, 0) if is_url(image.location) else (int(one) for one in own.split())
        is_of_part, (start, end) = version and not image.is_file, image.moment or (None, None)
        captions = tuple(text for one in usable for text in one.texts)
        columns = {
            "path": path,
            "size": image.piece[1] if image.piece else 0 if image.cell else size,
            "mtime": min(max(mtime // 1000, _FIRST_TIME), _LAST_TIME),
            "version": version if is_of_part else own,
            "part_size": part_size if is_of_part else 0,
            "location": location_of(image, path, self.root),
            "captions": list(captions),
            "start": start,
            "end": end,
        }
        return replace(example, texts=captions, fields=columns)


def row_of(one: Embedded) -> dict[str, Any]:
    """Returns a row for what was embedded, whose fields are the columns that its source tells."""
    own = {name: getattr(one, name) for name in ("digest", "width", "height", "frame")}
    images, texts, pairs = (one.vectors.get(kind, []) for kind in ("images", "texts", "pairs"))
    vectors = {"image_vector": (images or texts)[0], "text_vectors": texts, "pair_vectors": pairs}
    return {
        **one.example.fields,
        **own,
        **vectors,
        "size": one.example.fields.get("size") or one.size,
    }


def _state(version: str, captions: Sequence[str], location: str) -> int:
    """What differs once an image is to be embedded again."""
    return hash((version.partition(_OF_PART)[0], *captions, location))


def new_index(out: Uri, predictor: Predictor, root: Uri) -> Index:
    """Makes an empty index for the vectors of a model and images below a folder or URL."""
    blank = PilImage.new("RGB", (8, 8))
    info = IndexInfo(
        fingerprint=predictor.fingerprint,
        model=predictor.source,
        root=str(root),
        image_width=predictor.embed_images(blank).shape[1],
        pair_width=predictor.embed_pairs(blank, "").shape[1],
    )
    return Index.create(out, info)


def _root_of_all(sources: Sequence[str]) -> str:
    """Returns the folder that the paths of sources start from, or the URL of the only one."""
    if not sources:
        raise ValueError("nothing to index; name a folder of images, a table, tar shards or videos")
    if len(sources) == 1:
        return sources[0] if is_url(sources[0]) else str(_root_of(sources[0]))
    if urls := [source for source in sources if is_url(source)]:
        raise ValueError(
            f"{urls[0]} is a URL, of which an index can only have one source; make an index of its own"
        )
    places = [Path(source).resolve() for source in sources]
    for number, place in enumerate(places):
        if inside := [
            one for one in places[:number] + places[number + 1 :] if one.is_relative_to(place)
        ]:
            raise ValueError(f"{inside[0]} is given twice, as it is in {place}; leave it out")
    return os.path.commonpath([_root_of(place) for place in places])


def _root_of(source: str | os.PathLike[str]) -> Path:
    """Returns the folder that the paths of a local source start from."""
    path = Path(source)
    return path if path.is_dir() else path.parent
