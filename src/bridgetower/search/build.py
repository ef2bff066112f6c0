"""Brings an index up to date with a folder or table of images: new and changed ones in, dropped ones out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from bridgetower.predictor import Predictor, load
from bridgetower.processor import Resized
from bridgetower.progress import count_bars
from bridgetower.search.config import IndexConfig
from bridgetower.search.index import Index, write_lock
from bridgetower.search.pictures import Decoded, Pictures, SourceManifest, decode, list_pictures
from bridgetower.search.places import Uri, split
from bridgetower.search.table import IndexedRow

_MAX_NAMED = 10  # bad images spelt out in an error


@dataclass(frozen=True, kw_only=True)
class IndexReport:
    """What was done to an index.

    Attributes:
        pictures: In the index now.
        added: That were not in it.
        changed: That were in it with other content, captions or times.
        removed: That its source no longer has, or that can no longer be read.
        bad: What cannot be used, each with the reason.
        seconds: That it took, without loading the model.
    """

    pictures: int
    added: int
    changed: int
    removed: int
    bad: tuple[str, ...]
    seconds: float


def build_index(
    source: str | Path,
    out: Uri,
    model: Predictor | str | Path | Callable[[], Predictor],
    config: IndexConfig | None = None,
    *,
    storage_options: Mapping[str, str] | None = None,
    progress: bool = False,
) -> IndexReport:
    """Makes an index, or brings one up to date: new and changed images are embedded, dropped ones deleted.

    Whether an image changed is told by its size, its time and its captions.
    What was embedded is written every few seconds. A run that was killed is completed by the next one.

    Args:
        source: A folder of images, perhaps with a text file of captions beside each, or a table of images and
            captions (CSV, TSV, JSON lines).
        out: Folder of the index, whose name ends in `.lance`, or an object store's URI.
        model: A loaded model, what to load, or what returns one; nothing is loaded for a source that is wrong.
        config: How.
        storage_options: Settings of an object store.
        progress: Show a bar, if standard error is a terminal.

    Raises:
        FileNotFoundError: There is no source.
        FileExistsError: Another process writes the index.
        ValueError: The source names no image, the index is of another model or folder, the model has no contrastive
            head, or more than `max_errors` images cannot be used; the others are in the index then.
    """
    started, config = time.perf_counter(), config or IndexConfig()
    split(out)  # refuses what is no name for an index
    manifest = list_pictures(Path(source), config)
    listed = time.perf_counter()
    predictor = _loaded(model)
    started += time.perf_counter() - listed
    predictor.model.contrastive_head()
    with write_lock(out):
        index = _opened(out, predictor, manifest.root, storage_options)
        update = _Update(index, predictor, manifest, config)
        update.run(progress)
    bad = (*manifest.bad, *update.bad.values())
    report = IndexReport(
        pictures=len(index),
        added=len(update.wanted) - len(update.changed) - len(update.bad.keys() - update.changed.keys()),
        changed=len(update.changed.keys() - update.bad.keys()),
        removed=len(update.removed),
        bad=bad,
        seconds=time.perf_counter() - started,
    )
    _check_bad(source, report, config.max_errors)
    return report


def _loaded(model: Predictor | str | Path | Callable[[], Predictor]) -> Predictor:
    if isinstance(model, str | Path):
        return load(model)
    return model if isinstance(model, Predictor) else model()


class _Update:
    """One run over an index."""

    def __init__(self, index: Index, predictor: Predictor, manifest: SourceManifest, config: IndexConfig) -> None:
        self.index, self.predictor, self.manifest, self.config = index, predictor, manifest, config
        before = index.listed()
        self.wanted = [picture for path, picture in manifest.pictures.items() if before.get(path) != picture]
        self.changed = {picture.path: before[picture.path] for picture in self.wanted if picture.path in before}
        self.removed = {path: row for path, row in before.items() if path not in manifest.pictures}
        self.bad: dict[str, str] = {}

    def run(self, progress: bool) -> None:
        """Embeds, writes and deletes."""
        pictures = Pictures(self.manifest.root, self.wanted, self.predictor.processor)
        rows: list[IndexedRow] = []
        written = time.monotonic()
        with count_bars(shown=progress and bool(self.wanted)) as bar:
            task = bar.add_task("embedding", total=len(self.wanted))
            for batch in decode(pictures, self.config):
                decoded = batch.unpacked()
                rows += self._embedded(decoded)
                bar.advance(task, len(decoded))
                if time.monotonic() - written >= self.config.commit_seconds:
                    self.index.upsert(rows)
                    rows, written = [], time.monotonic()
        self.index.upsert(rows)
        self.removed |= {path: row for path, row in self.changed.items() if path in self.bad}
        self.index.remove(self.removed)
        if self.wanted or self.removed:
            self.index.optimize(len(self.changed) + len(self.removed))
        if self.config.ann and not self.index.has_ann_index:
            self.index.create_ann_index()

    def _embedded(self, decoded: Iterable[Decoded]) -> list[IndexedRow]:
        """Embeds a batch, keeping count of the bad ones."""
        good: list[tuple[Decoded, Resized]] = []
        for one in decoded:
            problem = one.problem or self._problem_of(one.picture.captions)
            if problem:
                self.bad[one.picture.path] = f"{one.picture.path!r}: {problem}"
            elif one.image is not None:
                good.append((one, one.image))
        return _embed(self.predictor, good, self.config.batch_size)

    def _problem_of(self, captions: Sequence[str]) -> str | None:
        if not captions:
            return None
        try:
            self.predictor.processor.token_ids(captions, truncate=self.config.truncate)
        except ValueError as error:
            return f"caption {error}"
        return None


def _embed(predictor: Predictor, good: Sequence[tuple[Decoded, Resized]], batch_size: int) -> list[IndexedRow]:
    if not good:
        return []
    image_vectors = predictor.embed_images([image for _, image in good], batch_size=batch_size)
    owners = [(image, caption) for one, image in good for caption in one.picture.captions]
    counts = [len(one.picture.captions) for one, _ in good]
    if owners:
        images, captions = map(list, zip(*owners, strict=True))
        text_vectors = predictor.embed_texts(captions, batch_size=batch_size, truncate=True)
        pair_vectors = predictor.embed_pairs(images, captions, batch_size=batch_size, truncate=True)
    else:
        text_vectors = pair_vectors = image_vectors[:0]
    vectors = zip(image_vectors, text_vectors.split(counts), pair_vectors.split(counts), strict=True)
    return [
        IndexedRow(
            picture=one.picture,
            digest=one.digest,
            width=image.width,
            height=image.height,
            image_vector=image_vector,
            text_vectors=texts,
            pair_vectors=pairs,
        )
        for (one, image), (image_vector, texts, pairs) in zip(good, vectors, strict=True)
    ]


def _opened(out: Uri, predictor: Predictor, root: Path, storage_options: Mapping[str, str] | None) -> Index:
    """Opens the index, or makes an empty one."""
    if not Index.exists(out, storage_options=storage_options):
        blank = Image.new("RGB", (8, 8))
        return Index.create(
            out,
            fingerprint=predictor.fingerprint,
            model=predictor.source,
            root=root,
            image_width=predictor.embed_images(blank).shape[1],
            pair_width=predictor.embed_pairs(blank, "").shape[1],
            storage_options=storage_options,
        )
    index = Index(out, storage_options=storage_options)
    index.check_model(predictor.fingerprint, predictor.source)
    if index.root.resolve() != root.resolve():
        raise ValueError(f"{out} is of the images in {index.root}, not of {root}; choose another name for the index")
    return index


def _check_bad(source: str | Path, report: IndexReport, max_errors: int) -> None:
    bad = report.bad
    if len(bad) <= max_errors:
        return
    more = f" and {len(bad) - _MAX_NAMED} more" if len(bad) > _MAX_NAMED else ""
    raise ValueError(
        f"{source} has {len(bad)} bad images, allowed are {max_errors} (max_errors); the other {report.pictures} are "
        f"in the index: {' | '.join(bad[:_MAX_NAMED])}{more}"
    )
