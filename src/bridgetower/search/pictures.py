"""The images that a source names, and their decoding in other processes."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bridgetower.data.sources import read_rows
from bridgetower.distributed import available_cores
from bridgetower.files import unfit_name
from bridgetower.processor import Processor, Resized
from bridgetower.search.config import IndexConfig

_FIRST_TIME, _LAST_TIME = -62_135_596_800_000_000, 253_402_300_799_999_999  # the years 1 to 9999, in microseconds

MIN_FOR_WORKERS = 500  # images; starting processes takes about as long as decoding these


@dataclass(frozen=True, kw_only=True)
class Listed:
    """An image as its source names it.

    Attributes:
        path: From the source's folder.
        size: Of the file, in bytes.
        mtime: Of the file, in microseconds since 1970, within the years 1 to 9999.
        captions: Stripped, none empty.
    """

    path: str
    size: int
    mtime: int
    captions: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SourceManifest:
    """All that a source names.

    Attributes:
        root: Folder that the paths start from.
        pictures: By path.
        bad: What cannot be used, each with the reason.
    """

    root: Path
    pictures: Mapping[str, Listed] = field(repr=False)
    bad: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What came of one image.

    Attributes:
        picture: As listed.
        digest: SHA-256 of the file; empty if it could not be read.
        image: What was decoded, unless there is a problem.
        problem: Why it cannot be used.
    """

    picture: Listed
    digest: str = ""
    image: Resized | None = None
    problem: str | None = None


def list_pictures(source: Path, config: IndexConfig) -> SourceManifest:
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
    found: dict[str, Listed] = {}
    bad: dict[str, str] = {}
    for row in rows:
        if not row.image.is_file:
            raise ValueError(f"{source} holds images, which a search could not open; write them to files first")
        path, captions = row.image.name, tuple(filter(None, map(str.strip, row.captions)))
        if path in found:
            found[path] = replace(found[path], captions=(*found[path].captions, *captions))
            continue
        listed = _listed(root, path, captions)
        if isinstance(listed, Listed):
            found[path] = listed
        elif listed is not None:
            bad[path] = f"{row.place}: {listed}"
    if not found and not bad:
        raise ValueError(f"{source} names no image; nothing was changed: check that it is the right source")
    return SourceManifest(root=root, pictures=found, bad=tuple(bad.values()))


def _listed(root: Path, path: str, captions: tuple[str, ...]) -> Listed | str | None:
    """Looks at a file; returns what is wrong with it, or None if it is a folder or a device with an image's name."""
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
    return Listed(path=path, size=status.st_size, mtime=mtime, captions=captions)


class Pictures(Dataset[Decoded]):
    """Decodes listed images, each on its own."""

    def __init__(self, root: Path, pictures: Sequence[Listed], processor: Processor) -> None:
        """Keeps them.

        Args:
            root: Folder that the paths start from.
            pictures: What to decode.
            processor: The model's.
        """
        self.root, self.pictures, self.processor = root, pictures, processor

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, number: int) -> Decoded:
        """Reads an image; one that cannot be used comes back with the reason."""
        picture = self.pictures[number]
        file = self.root / picture.path
        try:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            return Decoded(picture=picture, digest=digest, image=self.processor.prepare(file))
        except (ValueError, OSError) as error:
            return Decoded(picture=picture, problem=str(error).replace(str(file), "it"))


@dataclass(frozen=True, kw_only=True)
class Batch:
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
    def of(decoded: Sequence[Decoded]) -> Batch:
        """Packs images."""
        images = [one.image for one in decoded]
        present = [image.pixels for image in images if image is not None]
        return Batch(
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


def decode(pictures: Pictures, config: IndexConfig) -> Iterable[Batch]:
    """Decodes all images in order, in batches, as many ahead as the processes manage.

    The processes are started afresh and not forked: the libraries of the index run threads, which a fork loses.
    """
    workers = config.num_workers
    if workers is None:
        workers = available_cores() if len(pictures) >= MIN_FOR_WORKERS else 0
    workers = min(workers, -(-len(pictures) // config.batch_size))
    return DataLoader(
        pictures,
        batch_size=config.batch_size,
        num_workers=workers,
        collate_fn=Batch.of,
        multiprocessing_context="forkserver" if workers else None,
    )
