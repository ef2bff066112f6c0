"""SBU captions (Ordonez et al. 2011)."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from bridgetower.data.config import PrepareConfig
from bridgetower.data.datasets.arrow import captioned, numbered
from bridgetower.data.datasets.links import (
    DOWNLOADS,
    SOURCE,
    Link,
    add_link,
    keep_downloads,
    keep_files,
    leave_out_untaken,
)
from bridgetower.data.datasets.spec import DatasetSpec, Originals, PublishedCount
from bridgetower.data.manifest import Lookup, Manifest
from bridgetower.data.schema import CAPTIONS

_FILE = "sbu-captions-all.json"
_FOLDER = "SBU"
_SEVERAL = "several links"


def _fill(originals: Originals, manifest: Manifest, config: PrepareConfig) -> None:
    path = originals.annotation(_FILE)
    with Lookup() as found, Lookup() as shared:
        keep_downloads(originals, manifest, found)
        # Official `write_sbu.py`: images are named after the end of the link, whichever link that is.
        keep_files(originals, manifest, found, _FOLDER, _name_key)
        for link in _links(originals, path):
            key = _name_key(link.url.rpartition("/")[2])
            shared[key] = link.url if shared.get(key) in (None, link.url) else _SEVERAL
        for link in _links(originals, path):
            key = _name_key(link.url.rpartition("/")[2])
            image = found.take(f"link {link.url}")
            if image is None and found.take(key) and shared.get(key) == _SEVERAL:
                manifest.leave_out("file name that several links end in", link.url)
            else:
                add_link(manifest, link, image or found.take(key), "train")
        leave_out_untaken(manifest, found)


def _name_key(name: str) -> str:
    return f"file {name}"


def _links(originals: Originals, path: Path) -> Iterator[Link]:
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
{DOWNLOADS}
or images named after the ends of their links: SBU/4385058960_b0f291553e.jpg …
""",
    splits=("train",),
    split_rule="all is train",
    protocol="captions of the annotation file, in its order; pictures by their links, or by the names that they end in",
    licences={"captions and pictures": "each its own"},
    published={"train": [PublishedCount(images=1_000_000, texts=1_000_000, source=SOURCE)]},
    fill=_fill,
    arrow=captioned(layout="sbu_0 … 8", split_rule="all is train", stems={"train": numbered("sbu", 9)}),
)
