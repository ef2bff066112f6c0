"""CC3M (Sharma et al. 2018) and SBU (Ordonez et al. 2011): links with captions; images are what a user downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bridgetower.data.config import PrepareConfig
from bridgetower.data.datasets.originals import Originals
from bridgetower.data.datasets.spec import ArrowFiles, DatasetSpec, PublishedCount, numbered
from bridgetower.data.images import ImageRef, parquet_rows
from bridgetower.data.manifest import Lookup, Manifest
from bridgetower.data.schema import CAPTIONS
from bridgetower.data.tars import tar_samples
from bridgetower.progress import counted

_DOWNLOADS = (
    "what img2dataset wrote, in any folder: 00000.tar … (--output_format webdataset) or 00000.parquet … (parquet)"
)
_SOURCE = "links, of which many are dead"


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


def _add_link(manifest: Manifest, link: Link, found: str | None, split: str) -> None:
    """Adds the image of a link, if there is one."""
    if found is None:
        manifest.leave_out("link of which there is no image", link.url)
    elif not link.caption:
        manifest.leave_out("empty caption", link.url)
    else:
        manifest.add(link.url, [ImageRef.unpacked(found)], [link.caption], split=split)


def _keep_downloads(originals: Originals, manifest: Manifest, found: Lookup) -> None:
    """Notes the images that img2dataset wrote, to tar shards or to Parquet, by their links."""
    shards = sorted(originals.folder.rglob("*.tar"))
    for shard in counted(shards, "reading shards", shown=originals.progress and bool(shards)):
        for sample in tar_samples(shard):
            url = sample.details.get("url")
            if not url or sample.image is None:
                manifest.bad(f"{sample.key} in {shard.name} has no {'image' if url else 'link'}")
            else:
                _keep(found, f"link {url}", sample.image)
    # Beside shards they only describe them.
    tables = [] if shards else sorted(originals.folder.rglob("*.parquet"))
    for table in counted(tables, "reading tables", shown=originals.progress and bool(tables)):
        for row in parquet_rows(table):
            image = next((cell for cell in row.values() if isinstance(cell, ImageRef)), None)
            if image and row.get("url"):
                _keep(found, f"link {row['url']}", image)
            elif image:  # None: the download failed
                manifest.bad(f"{image.name} has no link; expected the column url of img2dataset")


def _keep_files(
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


def _leave_out_untaken(manifest: Manifest, found: Lookup) -> None:
    """Notes the images of which there is no link."""
    for key in found.untaken():
        manifest.leave_out("image of which there is no link", key)


def _keep(found: Lookup, key: str, image: ImageRef) -> None:
    if found.get(key) is None:
        found[key] = image.packed()


_CC3M_FILES = {"train": "Train_GCC-training.tsv", "validation": "Validation_GCC-1.1.0-Validation.tsv"}
_CC3M_FOLDERS = {"train": "train_image", "validation": "val_image"}


def _fill_cc3m(originals: Originals, manifest: Manifest, config: PrepareConfig) -> None:
    with Lookup() as found:
        _keep_downloads(originals, manifest, found)
        for split in filter(originals.wants, _CC3M_FILES):
            path = originals.annotation(_CC3M_FILES[split], f"utils/{_CC3M_FILES[split]}")
            # Official `write_conceptual_caption.py`: images are named after the line.
            _keep_files(originals, manifest, found, _CC3M_FOLDERS[split], partial(_line_key, split))
            for link in _cc3m_links(originals, manifest, path):
                image = found.take(f"link {link.url}") or found.take(f"{split} line {link.number}")
                _add_link(manifest, link, image, split)
        _leave_out_untaken(manifest, found)


def _line_key(split: str, name: str) -> str | None:
    stem = name.partition(".")[0]
    return f"{split} line {int(stem)}" if stem.isdecimal() else None


def _cc3m_links(originals: Originals, manifest: Manifest, path: Path) -> Iterator[Link]:
    for number, line in enumerate(originals.text_lines(path)):
        caption, tab, url = line.rpartition("\t")
        if tab and url.strip():
            yield Link(number, url.strip(), caption.strip())
        else:
            manifest.bad(f"{path.name}, line {number + 1}: no tab between caption and link")


CC3M = DatasetSpec(
    name="cc3m",
    schema=CAPTIONS,
    summary="Conceptual Captions 3M, as much of it as you have; by --splits also validation.",
    layout=f"""
Train_GCC-training.tsv (or in utils/), and for validation Validation_GCC-1.1.0-Validation.tsv
{_DOWNLOADS}
or images named after the lines of the list, from 0: train_image/0.jpg …, val_image/0.jpg …
""",
    splits=("train",),
    more_splits=("validation",),
    split_rule="as published",
    protocol="captions of the annotation file, in its order; images by their links, or by the numbers of their lines",
    licences={"captions": "free to use, with the attribution on its page", "images": "each its own"},
    published={
        "train": [PublishedCount(images=3_318_333, texts=3_318_333, source=_SOURCE)],
        "validation": [PublishedCount(images=15_840, texts=15_840, source=_SOURCE)],
    },
    fill=_fill_cc3m,
    arrow=ArrowFiles(
        layout="conceptual_caption_train_0 … 30, and by --splits validation conceptual_caption_val_0",
        stems={"train": numbered("conceptual_caption_train", 31)},
        more_stems={"validation": numbered("conceptual_caption_val", 1)},
    ),
)


_SBU_FILE = "sbu-captions-all.json"
_SBU_FOLDER = "SBU"
_SEVERAL = "several links"


def _fill_sbu(originals: Originals, manifest: Manifest, config: PrepareConfig) -> None:
    path = originals.annotation(_SBU_FILE)
    with Lookup() as found, Lookup() as shared:
        _keep_downloads(originals, manifest, found)
        # Official `write_sbu.py`: images are named after the end of the link, whichever link that is.
        _keep_files(originals, manifest, found, _SBU_FOLDER, _name_key)
        for link in _sbu_links(originals, path):
            key = _name_key(link.url.rpartition("/")[2])
            shared[key] = link.url if shared.get(key) in (None, link.url) else _SEVERAL
        for link in _sbu_links(originals, path):
            key = _name_key(link.url.rpartition("/")[2])
            image = found.take(f"link {link.url}")
            if image is None and found.take(key) and shared.get(key) == _SEVERAL:
                manifest.leave_out("file name that several links end in", link.url)
            else:
                _add_link(manifest, link, image or found.take(key), "train")
        _leave_out_untaken(manifest, found)


def _name_key(name: str) -> str:
    return f"file {name}"


def _sbu_links(originals: Originals, path: Path) -> Iterator[Link]:
    urls = originals.items(path, "image_urls.item")
    captions = replace(originals, progress=False).items(path, "captions.item")
    for number, (url, caption) in enumerate(zip(urls, captions, strict=True)):
        yield Link(number, url, caption.strip())


SBU = DatasetSpec(
    name="sbu",
    schema=CAPTIONS,
    summary="SBU captions, as much of them as you have.",
    layout=f"""
sbu-captions-all.json
{_DOWNLOADS}
or images named after the ends of their links: SBU/4385058960_b0f291553e.jpg …
""",
    splits=("train",),
    split_rule="all is train",
    protocol="captions of the annotation file, in its order; images by their links, or by the names that they end in",
    licences={"captions and images": "each its own"},
    published={"train": [PublishedCount(images=1_000_000, texts=1_000_000, source=_SOURCE)]},
    fill=_fill_sbu,
    arrow=ArrowFiles(layout="sbu_0 … 8", stems={"train": numbered("sbu", 9)}),
)
