"""Brings an index up to date with a folder or table of images: new and changed ones in, dropped ones out."""

from __future__ import annotations

import stat
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bridgetower.data.sources import read_rows
from bridgetower.distributed import available_cores
from bridgetower.files import sha256_of, unfit_name
from bridgetower.predictor import Predictor, load
from bridgetower.processor import Processor, Resized
from bridgetower.progress import count_bars
from bridgetower.search.config import IndexConfig
from bridgetower.search.index import Index, write_lock
from bridgetower.search.table import IndexedRow, SourceImage, Uri, split

_FIRST_TIME, _LAST_TIME = -62_135_596_800_000_000, 253_402_300_799_999_999  # the years 1 to 9999, in microseconds

MIN_FOR_WORKERS = 500  # images; starting processes takes about as long as decoding these
_MAX_NAMED = 10  # bad images spelt out in an error


@dataclass(frozen=True, kw_only=True)
class IndexReport:
    """The changes of a run over an index.

    Attributes:
        images: In the index now.
        added: That were not in it.
        changed: That were in it with other content, captions or times.
        removed: That its source no longer has, or that can no longer be read.
        bad: What cannot be used, each with the reason.
        seconds: That it took, without loading the model.
    """

    images: int
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

    An image counts as changed if its size, its time or its captions differ.
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
    manifest = list_images(Path(source), config)
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
        images=len(index),
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
        self.wanted = [image for path, image in manifest.images.items() if before.get(path) != image]
        self.changed = {image.path: before[image.path] for image in self.wanted if image.path in before}
        self.removed = {path: row for path, row in before.items() if path not in manifest.images}
        self.bad: dict[str, str] = {}

    def run(self, progress: bool) -> None:
        """Embeds, writes and deletes."""
        images = SourceImages(self.manifest.root, self.wanted, self.predictor.processor)
        rows: list[IndexedRow] = []
        written = time.monotonic()
        with count_bars(shown=progress and bool(self.wanted)) as bar:
            task = bar.add_task("embedding", total=len(self.wanted))
            for batch in decode(images, self.config):
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
            problem = one.problem or self._problem_of(one.source.captions)
            if problem:
                self.bad[one.source.path] = f"{one.source.path!r}: {problem}"
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
    owners = [(image, caption) for one, image in good for caption in one.source.captions]
    counts = [len(one.source.captions) for one, _ in good]
    if owners:
        images, captions = map(list, zip(*owners, strict=True))
        text_vectors = predictor.embed_texts(captions, batch_size=batch_size, truncate=True)
        pair_vectors = predictor.embed_pairs(images, captions, batch_size=batch_size, truncate=True)
    else:
        text_vectors = pair_vectors = image_vectors[:0]
    vectors = zip(image_vectors, text_vectors.split(counts), pair_vectors.split(counts), strict=True)
    return [
        IndexedRow(
            source=one.source,
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
        f"{source} has {len(bad)} bad images, allowed are {max_errors} (max_errors); the other {report.images} are "
        f"in the index: {' | '.join(bad[:_MAX_NAMED])}{more}"
    )


@dataclass(frozen=True, kw_only=True)
class SourceManifest:
    """The images of a source.

    Attributes:
        root: Folder that the paths start from.
        images: By path.
        bad: What cannot be used, each with the reason.
    """

    root: Path
    images: Mapping[str, SourceImage] = field(repr=False)
    bad: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """The result of decoding one image.

    Attributes:
        source: As listed.
        digest: SHA-256 of the file; empty if it could not be read.
        image: What was decoded, unless there is a problem.
        problem: Why it cannot be used.
    """

    source: SourceImage
    digest: str = ""
    image: Resized | None = None
    problem: str | None = None


def list_images(source: Path, config: IndexConfig) -> SourceManifest:
    """Finds the images of a folder or a table; no image is opened.

    Args:
        source: As for `bridgetower.data.sources.read_rows`, but Parquet with images in it is refused: an image that
            is found must be a file that can be opened.
        config: Names of the columns.

    Raises:
        FileNotFoundError: There is no source.
        ValueError: It cannot be read, holds images itself, or names no image.
    """
    source = Path(source)
    rows = read_rows(
        source,
        image_column=config.image_column,
        caption_column=config.caption_column,
        captions_from=config.captions_from,
    )
    root = source if source.is_dir() else source.parent
    found: dict[str, SourceImage] = {}
    bad: dict[str, str] = {}
    for row in rows:
        if not row.image.is_file:
            raise ValueError(f"{source} holds images, which a search could not open; write them to files first")
        path, captions = row.image.name, tuple(filter(None, map(str.strip, row.captions)))
        if path in found:
            found[path] = replace(found[path], captions=(*found[path].captions, *captions))
            continue
        listed = _listed(root, path, captions)
        if isinstance(listed, SourceImage):
            found[path] = listed
        elif listed is not None:
            bad[path] = f"{row.place}: {listed}"
    if not found and not bad:
        raise ValueError(f"{source} names no image; nothing was changed: check that it is the right source")
    return SourceManifest(root=root, images=found, bad=tuple(bad.values()))


def _listed(root: Path, path: str, captions: tuple[str, ...]) -> SourceImage | str | None:
    """Checks a file; returns what is wrong with it, or None if it is a folder or a device with an image's name."""
    unfit = unfit_name(path)
    if unfit:
        return unfit
    try:
        status = (root / path).stat()
    except OSError as error:
        return f"no file {path!r} ({error.strerror})"
    if not stat.S_ISREG(status.st_mode):
        return None
    mtime = min(max(status.st_mtime_ns // 1000, _FIRST_TIME), _LAST_TIME)
    return SourceImage(path=path, size=status.st_size, mtime=mtime, captions=captions)


class SourceImages(Dataset[Decoded]):
    """Decodes listed images, each on its own."""

    def __init__(self, root: Path, images: Sequence[SourceImage], processor: Processor) -> None:
        """Keeps them.

        Args:
            root: Folder that the paths start from.
            images: What to decode.
            processor: The model's.
        """
        self.root, self.images, self.processor = root, images, processor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> Decoded:
        """Reads an image; one that cannot be used comes back with the reason."""
        source = self.images[number]
        file = self.root / source.path
        try:
            image = self.processor.prepare(file)  # first: it reads no file that is too long
            return Decoded(source=source, digest=sha256_of(file), image=image)
        except (ValueError, OSError) as error:
            return Decoded(source=source, problem=str(error).replace(str(file), "it"))


@dataclass(frozen=True, kw_only=True)
class DecodedBatch:
    """Some images with the pixels of those that were decoded in one tensor, which is quicker to hand over.

    Attributes:
        decoded: Without their images.
        sizes: Of each upright image, width and height; None where nothing was decoded.
        pixels: Of those with a size, in order.
    """

    decoded: Sequence[Decoded]
    sizes: Sequence[tuple[int, int] | None]
    pixels: UInt8[Tensor, "b 3 h w"]

    @staticmethod
    def of(decoded: Sequence[Decoded]) -> DecodedBatch:
        """Packs images."""
        images = [one.image for one in decoded]
        present = [image.pixels for image in images if image is not None]
        return DecodedBatch(
            decoded=[replace(one, image=None) for one in decoded],
            sizes=[None if image is None else (image.width, image.height) for image in images],
            pixels=torch.stack(present) if present else torch.empty(0, 3, 0, 0, dtype=torch.uint8),
        )

    def unpacked(self) -> list[Decoded]:
        """Returns the images as they were packed."""
        pixels = iter(self.pixels)
        return [
            one if size is None else replace(one, image=Resized(pixels=next(pixels), width=size[0], height=size[1]))
            for one, size in zip(self.decoded, self.sizes, strict=True)
        ]


def decode(images: SourceImages, config: IndexConfig) -> Iterable[DecodedBatch]:
    """Decodes all images in order, in batches, as many ahead as the processes manage.

    The processes are started afresh and not forked: the libraries of the index run threads, which a fork loses.
    """
    workers = config.num_workers
    if workers is None:
        workers = available_cores() if len(images) >= MIN_FOR_WORKERS else 0
    workers = min(workers, -(-len(images) // config.batch_size))
    return DataLoader(
        images,
        batch_size=config.batch_size,
        num_workers=workers,
        collate_fn=DecodedBatch.of,
        multiprocessing_context="forkserver" if workers else None,
    )
