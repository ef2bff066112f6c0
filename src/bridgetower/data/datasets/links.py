"""What CC3M and SBU share: they are published as links, with captions; images are what a user could download."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from bridgetower.data.datasets.spec import Originals
from bridgetower.data.images import ImageRef
from bridgetower.data.manifest import Lookup, Manifest
from bridgetower.data.tables import parquet_rows
from bridgetower.data.tars import tar_samples
from bridgetower.progress import counted

DOWNLOADS = (
    "what img2dataset wrote, in any folder: 00000.tar … (--output_format webdataset) or 00000.parquet … (parquet)"
)
SOURCE = "links, of which many are dead"


class Link(NamedTuple):
    """What the authors publish of an image.

    Attributes:
        number: Place in the annotation file, from 0.
        url: Where it was.
        caption: Its caption.
    """

    number: int
    url: str
    caption: str


def add_link(manifest: Manifest, link: Link, found: str | None, split: str) -> None:
    """Adds the image of a link, if there is one."""
    if found is None:
        manifest.leave_out("link of which there is no picture", link.url)
    elif not link.caption:
        manifest.leave_out("empty caption", link.url)
    else:
        manifest.add(link.url, [ImageRef.unpacked(found)], [link.caption], split=split)


def keep_downloads(originals: Originals, manifest: Manifest, found: Lookup) -> None:
    """Notes the images that img2dataset wrote, to tar shards or to Parquet, by their links."""
    shards = sorted(originals.folder.rglob("*.tar"))
    for shard in counted(shards, "reading shards", shown=originals.progress and bool(shards)):
        for sample in tar_samples(shard):
            url = sample.details.get("url")
            if not url or sample.image is None:
                manifest.bad(f"{sample.key} in {shard.name} has no {'picture' if url else 'link'}")
            else:
                _keep(found, f"link {url}", sample.image)
    # Beside shards they only tell about them.
    tables = [] if shards else sorted(originals.folder.rglob("*.parquet"))
    for table in counted(tables, "reading tables", shown=originals.progress and bool(tables)):
        for row in parquet_rows(table):
            image = next((cell for cell in row.values() if isinstance(cell, ImageRef)), None)
            if image:  # None: the download failed
                _keep(found, f"link {row['url']}", image)


def keep_files(
    originals: Originals, manifest: Manifest, found: Lookup, folder: str, key_of: Callable[[str], str | None]
) -> None:
    """Notes the files of a folder by their names."""
    place = originals.folder / folder
    if not place.is_dir():
        return
    with os.scandir(place) as entries:
        for entry in entries:
            key = key_of(entry.name)
            if key is None:
                manifest.leave_out("file that is not named after a line", f"{folder}/{entry.name}")
            else:
                _keep(found, key, ImageRef.of_file(originals.folder, f"{folder}/{entry.name}"))


def leave_out_untaken(manifest: Manifest, found: Lookup) -> None:
    """Notes the images of which there is no link."""
    for key in found.untaken():
        manifest.leave_out("picture of which there is no link", key)


def _keep(found: Lookup, key: str, image: ImageRef) -> None:
    if found.get(key) is None:
        found[key] = image.packed()
