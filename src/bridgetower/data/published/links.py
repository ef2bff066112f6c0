"""Sets that are published as links, CC3M and SBU: captions from the authors, pictures as a user could download them."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from bridgetower.data.config import PrepareConfig
from bridgetower.data.listing import Listing
from bridgetower.data.locations import CellPicture, FilePicture, Picture, unpacked
from bridgetower.data.lookup import Lookup
from bridgetower.data.published.originals import Originals, OriginalSet
from bridgetower.data.tables import parquet_rows
from bridgetower.data.tars import tar_samples
from bridgetower.progress import counted

_CC3M_FILES = {"train": "Train_GCC-training.tsv", "validation": "Validation_GCC-1.1.0-Validation.tsv"}
_CC3M_FOLDERS = {"train": "train_image", "validation": "val_image"}
_SBU_FILE = "sbu-captions-all.json"
_SBU_FOLDER = "SBU"
_SEVERAL = "several links"


@dataclass(frozen=True, kw_only=True)
class Link:
    """What the authors publish of a picture.

    Attributes:
        number: Place in the annotation file, from 0.
        url: Where it was.
        caption: What is said about it.
    """

    number: int
    url: str
    caption: str


def _list_cc3m(originals: Originals, listing: Listing, config: PrepareConfig) -> None:
    with Lookup() as held:
        _hold_downloads(originals, listing, held)
        for split in filter(originals.wants, _CC3M_FILES):
            file = _CC3M_FILES[split]
            path = originals.annotation(file, f"utils/{file}")
            # Official `write_conceptual_caption.py`: pictures are named after the line.
            _hold_files(originals, listing, held, _CC3M_FOLDERS[split], partial(_line_key, split))
            for link in _read_cc3m(originals, listing, path):
                _add(listing, link, held.take(f"link {link.url}") or held.take(f"{split} line {link.number}"), split)
        _leave_out_untaken(listing, held)


def _line_key(split: str, name: str) -> str | None:
    stem = name.partition(".")[0]
    return f"{split} line {int(stem)}" if stem.isdecimal() else None


def _read_cc3m(originals: Originals, listing: Listing, path: Path) -> Iterator[Link]:
    for number, line in enumerate(originals.text_lines(path)):
        caption, tab, url = line.rpartition("\t")
        if tab and url.strip():
            yield Link(number=number, url=url.strip(), caption=caption.strip())
        else:
            listing.bad(f"{path.name}, line {number + 1}: no tab between caption and link")


def _list_sbu(originals: Originals, listing: Listing, config: PrepareConfig) -> None:
    path = originals.annotation(_SBU_FILE)
    with Lookup() as held, Lookup() as shared:
        _hold_downloads(originals, listing, held)
        # Official `write_sbu.py`: pictures are named after the end of the link, whichever link that is.
        _hold_files(originals, listing, held, _SBU_FOLDER, _name_key)
        for link in _read_sbu(originals, path):
            key = _name_key(_end_of(link))
            shared[key] = link.url if shared.get(key) in (None, link.url) else _SEVERAL
        for link in _read_sbu(originals, path):
            key = _name_key(_end_of(link))
            found = held.take(f"link {link.url}")
            if found is None and held.take(key) and shared.get(key) == _SEVERAL:
                listing.leave_out("file name that several links end in", link.url)
            else:
                _add(listing, link, found or held.take(key), "train")
        _leave_out_untaken(listing, held)


def _name_key(name: str) -> str:
    return f"file {name}"


def _end_of(link: Link) -> str:
    return link.url.rpartition("/")[2]


def _read_sbu(originals: Originals, path: Path) -> Iterator[Link]:
    urls = originals.items(path, "image_urls.item")
    captions = replace(originals, progress=False).items(path, "captions.item")
    for number, (url, caption) in enumerate(zip(urls, captions, strict=True)):
        yield Link(number=number, url=url, caption=caption.strip())


def _add(listing: Listing, link: Link, found: str | None, split: str) -> None:
    if found is None:
        listing.leave_out("link of which there is no picture", link.url)
    elif not link.caption:
        listing.leave_out("empty caption", link.url)
    else:
        listing.add(link.url, [unpacked(found)], [link.caption], split=split)


def _hold_downloads(originals: Originals, listing: Listing, held: Lookup) -> None:
    """Notes the pictures that img2dataset wrote, to tar shards or to Parquet, by their links."""
    shards = sorted(originals.folder.rglob("*.tar"))
    for shard in counted(shards, "reading shards", shown=originals.progress and bool(shards)):
        for sample in tar_samples(shard):
            url = sample.details.get("url")
            if not url or sample.picture is None:
                listing.bad(f"{sample.key} in {shard.name} has no {'picture' if url else 'link'}")
            else:
                _hold(held, f"link {url}", sample.picture)
    # Beside shards they only tell about them.
    tables = [] if shards else sorted(originals.folder.rglob("*.parquet"))
    for table in counted(tables, "reading tables", shown=originals.progress and bool(tables)):
        for row in parquet_rows(table):
            picture = next((cell for cell in row.values() if isinstance(cell, CellPicture)), None)
            if picture:  # None: the download failed
                _hold(held, f"link {row['url']}", picture)


def _hold_files(
    originals: Originals, listing: Listing, held: Lookup, folder: str, key_of: Callable[[str], str | None]
) -> None:
    """Notes the files of a folder by their names."""
    place = originals.folder / folder
    if not place.is_dir():
        return
    with os.scandir(place) as entries:
        for entry in entries:
            key = key_of(entry.name)
            if key is None:
                listing.leave_out("file that is not named after a line", f"{folder}/{entry.name}")
            else:
                _hold(held, key, FilePicture(root=originals.folder, name=f"{folder}/{entry.name}"))


def _hold(held: Lookup, key: str, picture: Picture) -> None:
    if held.get(key) is None:
        held[key] = picture.packed()


def _leave_out_untaken(listing: Listing, held: Lookup) -> None:
    for key in held.untaken():
        listing.leave_out("picture of which there is no link", key)


CC3M = OriginalSet(
    name="cc3m",
    kind="captions",
    splits=("train",),
    more_splits=("validation",),
    split_rule="as published",
    protocol="captions of the annotation file, in its order; pictures by their links, or by the numbers of their lines",
    licences={"captions": "free to use, with the attribution that its page asks for", "pictures": "each its own"},
    list=_list_cc3m,
)
SBU = OriginalSet(
    name="sbu",
    kind="captions",
    splits=("train",),
    split_rule="all is train",
    protocol="captions of the annotation file, in its order; pictures by their links, or by the names that they end in",
    licences={"captions and pictures": "each its own"},
    list=_list_sbu,
)
