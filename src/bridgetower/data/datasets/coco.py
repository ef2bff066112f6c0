"""COCO captions in the splits of Karpathy and Fei-Fei (2015), which Flickr30k has too."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from bridgetower.data.config import PrepareConfig
from bridgetower.data.datasets.arrow import captioned
from bridgetower.data.datasets.spec import DatasetSpec, Originals, PublishedCount
from bridgetower.data.manifest import Manifest
from bridgetower.data.schema import CAPTIONS

KARPATHY = "Karpathy's splits"
PROTOCOL = "every caption in its order, repeated ones included, without spaces at its ends"

_SPLITS = {"train": "train", "restval": "train", "val": "validation", "test": "test"}


def fill_from_karpathy(file: str, originals: Originals, manifest: Manifest, config: PrepareConfig) -> None:
    """Reads a file of Karpathy's, which holds captions and splits."""
    path = originals.annotation(file, f"karpathy/{file}")
    for image in originals.items(path, "images.item"):
        split = _SPLITS.get(image["split"])
        if split is None:
            manifest.bad(f"{image['filename']}: split {image['split']!r}, expected one of {', '.join(_SPLITS)}")
        elif originals.wants(split):
            found = originals.image(f"{image.get('filepath', 'flickr30k-images')}/{image['filename']}")
            manifest.add(image["filename"], [found], _captions(image, manifest), split=split)


def _captions(image: Mapping[str, Any], manifest: Manifest) -> list[str]:
    captions = [sentence["raw"].strip() for sentence in image["sentences"]]
    if not all(captions):
        manifest.leave_out("empty caption", image["filename"])
    return [caption for caption in captions if caption]


COCO = DatasetSpec(
    name="coco",
    schema=CAPTIONS,
    summary="COCO captions in Karpathy's splits.",
    layout="""
dataset_coco.json (or in karpathy/)
train2014/COCO_train2014_000000000009.jpg …
val2014/COCO_val2014_000000000042.jpg …
""",
    splits=("train", "validation", "test"),
    split_rule="Karpathy's splits; restval belongs to train",
    protocol=PROTOCOL,
    licences={"captions": "CC-BY 4.0", "pictures": "terms of use of Flickr"},
    published={
        "train": [PublishedCount(images=113_287, texts=566_747, source=KARPATHY)],
        "validation": [PublishedCount(images=5_000, texts=25_010, source=KARPATHY)],
        "test": [PublishedCount(images=5_000, texts=25_010, source=KARPATHY)],
    },
    fill=partial(fill_from_karpathy, "dataset_coco.json"),
    arrow=captioned(
        layout="coco_caption_karpathy_{train,restval,val,test}",
        split_rule="Karpathy's splits; restval belongs to train",
        stems={
            "train": ("coco_caption_karpathy_train", "coco_caption_karpathy_restval"),
            "validation": ("coco_caption_karpathy_val",),
            "test": ("coco_caption_karpathy_test",),
        },
    ),
)
