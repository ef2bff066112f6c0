"""Flickr30k captions in the splits of Karpathy and Fei-Fei (2015)."""

from functools import partial

from bridgetower.data.datasets.arrow import captioned
from bridgetower.data.datasets.coco import KARPATHY, PROTOCOL, fill_from_karpathy
from bridgetower.data.datasets.spec import DatasetSpec, PublishedCount
from bridgetower.data.schema import CAPTIONS

FLICKR30K = DatasetSpec(
    name="flickr30k",
    schema=CAPTIONS,
    summary="Flickr30k captions in Karpathy's splits.",
    layout="""
dataset_flickr30k.json (or in karpathy/)
flickr30k-images/1000092795.jpg …
""",
    splits=("train", "validation", "test"),
    split_rule=KARPATHY,
    protocol=PROTOCOL,
    licences={"captions and pictures": "for research and education, under the terms of use of Flickr"},
    published={
        "train": [PublishedCount(images=29_000, texts=145_000, source=KARPATHY)],
        "validation": [PublishedCount(images=1_014, texts=5_070, source=KARPATHY)],
        "test": [PublishedCount(images=1_000, texts=5_000, source=KARPATHY)],
    },
    fill=partial(fill_from_karpathy, "dataset_flickr30k.json"),
    arrow=captioned(
        layout="f30k_caption_karpathy_{train,val,test}",
        split_rule=KARPATHY,
        stems={
            "train": ("f30k_caption_karpathy_train",),
            "validation": ("f30k_caption_karpathy_val",),
            "test": ("f30k_caption_karpathy_test",),
        },
    ),
)
