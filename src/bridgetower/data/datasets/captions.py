"""COCO and Flickr30k in Karpathy's splits (2015), CC3M (Sharma et al. 2018) and SBU (Ordonez et al. 2011).

Of the last two only links are published; their Arrow files are read here, and `prepare pairs` reads what img2dataset
downloads.
"""

from functools import partial

from bridgetower.data.config import PrepareConfig
from bridgetower.data.datasets.arrow import ArrowFiles
from bridgetower.data.datasets.spec import DatasetSpec, Originals, published
from bridgetower.data.prepared_set import SetWriter
from bridgetower.data.schema import CAPTIONS

_KARPATHY = "Karpathy's splits"
_LINKS = "links, of which many are dead"
_PROTOCOL = "every caption of an image once, in its order, without spaces at its ends"

_SPLITS = {"train": "train", "restval": "train", "val": "validation", "test": "test"}


def _fill(file: str, originals: Originals, writer: SetWriter, config: PrepareConfig) -> None:
    path = originals.annotation(file, f"karpathy/{file}")
    for image in originals.items(path, "images"):
        split = _SPLITS.get(image["split"])
        if split is None:
            writer.refuse(f"{image['filename']}: split {image['split']!r}, expected one of {', '.join(_SPLITS)}")
        elif originals.wants(split):
            found = originals.image(f"{image.get('filepath', 'flickr30k-images')}/{image['filename']}")
            captions = [sentence["raw"] for sentence in image["sentences"]]
            texts = writer.filled_captions(image["filename"], captions)
            writer.add([found], texts, name=image["filename"], split=split)


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
    protocol=_PROTOCOL,
    licences={"captions": "CC-BY 4.0", "images": "terms of use of Flickr"},
    published=published(
        _KARPATHY, {"train": (113_287, 566_747), "validation": (5_000, 25_010), "test": (5_000, 25_010)}
    ),
    fill=partial(_fill, "dataset_coco.json"),
    arrow=ArrowFiles(
        layout="coco_caption_karpathy_{train,restval,val,test}",
        stems={
            "train": ("coco_caption_karpathy_train", "coco_caption_karpathy_restval"),
            "validation": ("coco_caption_karpathy_val",),
            "test": ("coco_caption_karpathy_test",),
        },
    ),
)


FLICKR30K = DatasetSpec(
    name="flickr30k",
    schema=CAPTIONS,
    summary="Flickr30k captions in Karpathy's splits.",
    layout="""
dataset_flickr30k.json (or in karpathy/)
flickr30k-images/1000092795.jpg …
""",
    splits=("train", "validation", "test"),
    split_rule=_KARPATHY,
    protocol=_PROTOCOL,
    licences={"captions and images": "for research and education, under the terms of use of Flickr"},
    published=published(_KARPATHY, {"train": (29_000, 145_000), "validation": (1_014, 5_070), "test": (1_000, 5_000)}),
    fill=partial(_fill, "dataset_flickr30k.json"),
    arrow=ArrowFiles(
        layout="f30k_caption_karpathy_{train,val,test}",
        stems={
            "train": ("f30k_caption_karpathy_train",),
            "validation": ("f30k_caption_karpathy_val",),
            "test": ("f30k_caption_karpathy_test",),
        },
    ),
)

CC3M = DatasetSpec(
    name="cc3m",
    schema=CAPTIONS,
    published=published(_LINKS, {"train": (3_318_333, 3_318_333), "validation": (15_840, 15_840)}),
    split_rule="as published",
    arrow=ArrowFiles(
        layout="conceptual_caption_train_0 … 30, and by --splits validation conceptual_caption_val_0",
        stems={"train": tuple(f"conceptual_caption_train_{number}" for number in range(31))},
        more_stems={"validation": ("conceptual_caption_val_0",)},
    ),
)
SBU = DatasetSpec(
    name="sbu",
    schema=CAPTIONS,
    split_rule="all is train",
    published=published(_LINKS, {"train": (1_000_000, 1_000_000)}),
    arrow=ArrowFiles(layout="sbu_0 … 8", stems={"train": tuple(f"sbu_{number}" for number in range(9))}),
)
