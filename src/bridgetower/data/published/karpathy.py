"""COCO and Flickr30k captions in the splits of Karpathy and Fei-Fei (2015)."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from bridgetower.data.config import PrepareConfig
from bridgetower.data.listing import Listing
from bridgetower.data.published.originals import Originals, OriginalSet

_SPLITS = {"train": "train", "restval": "train", "val": "validation", "test": "test"}
_PROTOCOL = "every caption in its order, repeated ones included, without spaces at its ends"


def _list(name: str, originals: Originals, listing: Listing, config: PrepareConfig) -> None:
    file = f"dataset_{name}.json"
    path = originals.annotation(file, f"karpathy/{file}")
    for image in originals.items(path, "images.item"):
        split = _SPLITS.get(image["split"])
        if split is None:
            listing.bad(f"{image['filename']}: split {image['split']!r}, expected one of {', '.join(_SPLITS)}")
        elif originals.wants(split):
            picture = originals.picture(f"{image.get('filepath', 'flickr30k-images')}/{image['filename']}")
            listing.add(image["filename"], [picture], _captions(image, listing), split=split)


def _captions(image: Mapping[str, Any], listing: Listing) -> list[str]:
    captions = [sentence["raw"].strip() for sentence in image["sentences"]]
    if not all(captions):
        listing.leave_out("empty caption", image["filename"])
    return [caption for caption in captions if caption]


COCO = OriginalSet(
    name="coco",
    kind="captions",
    splits=("train", "validation", "test"),
    split_rule="Karpathy's splits; restval belongs to train",
    protocol=_PROTOCOL,
    licences={"captions": "CC-BY 4.0", "pictures": "terms of use of Flickr"},
    list=partial(_list, "coco"),
)
FLICKR30K = OriginalSet(
    name="flickr30k",
    kind="captions",
    splits=("train", "validation", "test"),
    split_rule="Karpathy's splits",
    protocol=_PROTOCOL,
    licences={"captions and pictures": "for research and education, under the terms of use of Flickr"},
    list=partial(_list, "flickr30k"),
)
