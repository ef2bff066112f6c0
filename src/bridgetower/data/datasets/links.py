"""CC3M (Sharma et al. 2018) and SBU (Ordonez et al. 2011) as the Arrow files of the official code.

Their authors publish links; `prepare pairs` reads what img2dataset downloads of them.
"""

from bridgetower.data.datasets.spec import ArrowFiles, DatasetSpec, PublishedCount, numbered
from bridgetower.data.schema import CAPTIONS

_SOURCE = "links, of which many are dead"

CC3M = DatasetSpec(
    name="cc3m",
    schema=CAPTIONS,
    published={
        "train": [PublishedCount(images=3_318_333, texts=3_318_333, source=_SOURCE)],
        "validation": [PublishedCount(images=15_840, texts=15_840, source=_SOURCE)],
    },
    split_rule="as published",
    arrow=ArrowFiles(
        layout="conceptual_caption_train_0 … 30, and by --splits validation conceptual_caption_val_0",
        stems={"train": numbered("conceptual_caption_train", 31)},
        more_stems={"validation": numbered("conceptual_caption_val", 1)},
    ),
)
SBU = DatasetSpec(
    name="sbu",
    schema=CAPTIONS,
    split_rule="all is train",
    published={"train": [PublishedCount(images=1_000_000, texts=1_000_000, source=_SOURCE)]},
    arrow=ArrowFiles(layout="sbu_0 … 8", stems={"train": numbered("sbu", 9)}),
)
