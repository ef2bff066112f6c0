"""Brings an index up to date with a folder or table of images: new and changed ones in, dropped ones out."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count, islice
from pathlib import Path

import torch
from PIL import Image

from bridgetower.bulk.embedding import Embedded, EmbeddedBlock, Embedder
from bridgetower.bulk.lance import Uri, split
from bridgetower.bulk.run import Model, check_bad, check_ray, computed, loaded, say_cut
from bridgetower.data.images import ImageRef
from bridgetower.data.items import Block, SourceItem, left_out_of, units_of
from bridgetower.files import sha256_of
from bridgetower.predictor import Predictor
from bridgetower.progress import counting
from bridgetower.search.config import IndexConfig
from bridgetower.search.connection import write_lock
from bridgetower.search.index import Index
from bridgetower.search.listing import Listing, read_sources, root_of_all
from bridgetower.search.table import IndexedRow, SourceImage

_LISTED_AT_ONCE = 1000
_REMOVED_AT_ONCE = 1000


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
        left_out: Files in folders of which nothing is read, by suffix.
        seconds: That it took, without loading the model.
    """

    images: int
    added: int
    changed: int
    removed: int
    reused: int
    cut: int
    bad: tuple[str, ...]
    left_out: dict[str, int]
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

    An image counts as changed if its size, its time or its captions differ. It is not embedded again if the index has
    its content with the same captions, under any name. What was embedded is written every few seconds. A run that was
    killed is completed by the next one.

    Args:
        source: As for `bridgetower.data.items.units_of`, with images or videos; or several, all local.
        out: Folder of the index, whose name ends in `.lance`, or an object store's URI.
        model: A loaded model, what to load, or what returns one; nothing is loaded for a source that is wrong.
        config: How.
        storage_options: Settings of an object store.
        progress: Show a bar, or log a line a minute where standard error is no terminal.

    Raises:
        FileNotFoundError: There is no source.
        FileExistsError: Another process writes the index.
        ValueError: The source names no image, the index is of another model or folder, the model has no contrastive
            head, or more than `max_errors` images cannot be used; the others are in the index then.
    """
    config = config or IndexConfig()
    check_ray(config, model)
    split(out)  # refuses what is no name for an index
    sources = [source] if isinstance(source, str | Path) else source
    root = root_of_all(sources)
    named = ", ".join(map(str, sources))
    with Listing(Path(root)) as listing:
        started = time.perf_counter()
        units = [units_of(one) for one in sources]
        for items in read_sources(sources, units, config.columns, _LISTED_AT_ONCE):
            listing.add(items)
        if not len(listing) and not (listing.bad and listing.names_images):
            reason = next(
                iter(listing.bad.values()), f"check that it is the right source, or remove {out} to have none"
            )
            raise ValueError(f"{named} names no image; nothing was changed: {reason}")
        listed = time.perf_counter()
        predictor = loaded(model)
        started += time.perf_counter() - listed
        predictor.model.contrastive_head()
        with write_lock(out):
            index = _opened(out, predictor, root, storage_options)
            update = _Update(index, predictor if config.ray is None else model, listing, config)
            update.run(progress)
    report = IndexReport(
        images=len(index),
        added=update.num_added,
        changed=update.num_changed,
        removed=update.num_removed,
        reused=update.num_reused,
        cut=update.num_cut,
        bad=(*listing.bad.values(), *update.bad.values()),
        left_out=left_out_of([*chain.from_iterable(units)]),
        seconds=time.perf_counter() - started,
    )
    say_cut(report.cut)
    check_bad(named, report.bad, len(report.bad), config, f"the other {report.images} are in the index")
    return report


class _Update:
    """One run over an index."""

    def __init__(self, index: Index, model: Model, listing: Listing, config: IndexConfig) -> None:
        self.index, self.listing, self.config = index, listing, config
        self.make = partial(_embedder, model, config)
        listing.add_indexed(index.listed())
        self.num_wanted = listing.num_wanted()
        self.num_added = self.num_changed = self.num_reused = self.num_cut = self.num_removed = 0
        self.bad: dict[str, str] = {}
        self._sources: dict[str, SourceImage] = {}

    def run(self, progress: bool) -> None:
        """Embeds, writes and deletes."""
        rows: list[IndexedRow] = []
        written = time.monotonic()
        with counting("embedding", total=self.num_wanted, shown=progress and self.num_wanted > 0) as advance:
            for block in computed(self.make, self._blocks(advance), self.config, self.num_wanted, advance):
                rows += self._rows(block)
                if self.config.ray is not None or time.monotonic() - written >= self.config.commit_seconds:
                    self.index.upsert(rows)
                    rows, written = [], time.monotonic()
        self.index.upsert(rows)
        self._remove()
        if self.num_wanted or self.num_removed:
            self.index.optimize(self.num_changed + self.num_removed)
        if self.config.ann and not self.index.has_ann_index:
            self.index.create_ann_index()
        self.index.write_exact()

    def _unknown(self, advance: Callable[[int], None]) -> Iterator[tuple[SourceItem, SourceImage]]:
        """Yields what is to be embedded; what the index has under another name or time is written at once."""
        wanted = self.listing.wanted()
        while part := list(islice(wanted, _LISTED_AT_ONCE)):
            digests = {source: digest for item, source, known in part if known and (digest := _digest_of(item.image))}
            reused = self.index.reuse(digests)
            self.num_reused += len(reused)
            advance(len(reused))
            for item, source, _ in part:
                if source.path in reused:
                    self._count(source.path)
                else:
                    yield item, source

    def _count(self, path: str) -> None:
        known = self.listing.is_indexed(path)
        self.num_added, self.num_changed = self.num_added + (not known), self.num_changed + known

    def _blocks(self, advance: Callable[[int], None]) -> Iterator[Block]:
        """Yields what is to be embedded, a batch at a time."""
        wanted = self._unknown(advance)
        size = self.config.batch_size if self.config.ray is None else self.config.block_size
        for number in count():
            part = list(islice(wanted, size))
            if not part:
                return
            self._sources |= {item.id: source for item, source in part}
            yield Block(unit=0, number=number, items=tuple(item for item, _ in part), last=False)

    def _rows(self, block: EmbeddedBlock) -> list[IndexedRow]:
        """Returns the rows of a block, keeping count of what it had."""
        self.num_cut += block.num_cut
        for problem in block.problems:
            del self._sources[problem.id]
            self.bad[problem.id] = str(problem)
        for row in block.rows:
            self._count(row.item.id)
        return [indexed_row(row, self._sources.pop(row.item.id)) for row in block.rows]

    def _remove(self) -> None:
        """Deletes what the source has no more, and what had been indexed and is bad now."""
        gone = chain(self.listing.removed(), filter(self.listing.is_indexed, self.bad))
        while part := list(islice(gone, _REMOVED_AT_ONCE)):
            self.index.remove(part)
            self.num_removed += len(part)


def _digest_of(image: ImageRef | None) -> str | None:
    """Returns the SHA-256 of an image in a file or a shard on this machine; None of others, or if it cannot be read."""
    if image is None or image.url or image.cell or image.moment:
        return None
    try:
        return sha256_of(image.path) if image.is_file else hashlib.sha256(image.read()).hexdigest()
    except (OSError, ValueError):  # embedding it says what is wrong
        return None


def _embedder(model: Model, config: IndexConfig) -> Embedder:
    size, truncate = config.batch_size, config.truncate
    return Embedder(loaded(model), frozenset({"images"}), truncate=truncate, batch_size=size, with_texts=True)


def indexed_row(row: Embedded, source: SourceImage) -> IndexedRow:
    """Returns the entry of an index for an image that was embedded.

    Args:
        row: With the vector of its image.
        source: Where it comes from; without a size it gets that of the file.
    """
    assert row.image_vector is not None  # it is asked for
    return IndexedRow(
        source=replace(source, size=source.size or row.size),
        digest=row.digest,
        width=row.width,
        height=row.height,
        frame=row.frame,
        image_vector=torch.from_numpy(row.image_vector),
        text_vectors=torch.from_numpy(row.text_vectors),
        pair_vectors=torch.from_numpy(row.pair_vectors),
    )


def new_index(out: Uri, predictor: Predictor, root: Uri, *, storage_options: Mapping[str, str] | None = None) -> Index:
    """Makes an empty index for the vectors of a model.

    Args:
        out: Where it shall be.
        predictor: The model.
        root: Folder or URL that paths of images start from.
        storage_options: Settings of an object store.
    """
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


def _opened(out: Uri, predictor: Predictor, root: Path | str, storage_options: Mapping[str, str] | None) -> Index:
    """Opens the index, or makes an empty one."""
    if not Index.exists(out, storage_options=storage_options):
        return new_index(out, predictor, root, storage_options=storage_options)
    index = Index(out, storage_options=storage_options)
    index.check_model(predictor.fingerprint, predictor.source)
    if not index.is_of(root):
        raise ValueError(f"{out} is of the images in {index.root}, not of {root}; choose another name for the index")
    return index
