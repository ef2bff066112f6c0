"""How many pictures and texts published sets have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bridgetower.data.kinds import Kind


@dataclass(frozen=True, kw_only=True)
class Published:
    """How large a split is.

    Attributes:
        images: Pictures, or pairs of pictures; None if it is not published.
        texts: Captions, questions or statements; None if it is not published.
        source: Who says so.
    """

    images: int | None = None
    texts: int | None = None
    source: str


_KARPATHY = "Karpathy's splits"
_VQA = "visualqa.org"
_FIXED = "official code, answers in normal form, questions with an answer of the vocabulary"
_RAW = "official code, answers as given, questions with an answer of the vocabulary"
_SNLI_VE = "SNLI-VE's page"
_LINKS = "links, of which many are dead"
_NLVR2 = "NLVR2's page"

_COUNTS: Mapping[tuple[str, Kind], Mapping[str, Sequence[Published]]] = {
    ("coco", "captions"): {
        "train": [Published(images=113_287, texts=566_747, source=_KARPATHY)],
        "validation": [Published(images=5_000, texts=25_010, source=_KARPATHY)],
        "test": [Published(images=5_000, texts=25_010, source=_KARPATHY)],
    },
    ("flickr30k", "captions"): {
        "train": [Published(images=29_000, texts=145_000, source=_KARPATHY)],
        "validation": [Published(images=1_014, texts=5_070, source=_KARPATHY)],
        "test": [Published(images=1_000, texts=5_000, source=_KARPATHY)],
    },
    ("vg", "captions"): {"train": [Published(images=108_077, source="Visual Genome's page")]},
    ("cc3m", "captions"): {
        "train": [Published(images=3_318_333, texts=3_318_333, source=_LINKS)],
        "validation": [Published(images=15_840, texts=15_840, source=_LINKS)],
    },
    ("sbu", "captions"): {"train": [Published(images=1_000_000, texts=1_000_000, source=_LINKS)]},
    ("vqav2", "vqa"): {
        "train": [
            Published(images=82_783, texts=443_757, source=_VQA),
            Published(images=82_774, texts=435_174, source=_FIXED),
            Published(images=82_774, texts=434_867, source=_RAW),
        ],
        "validation": [
            Published(images=40_504, texts=214_354, source=_VQA),
            Published(images=40_503, texts=210_207, source=_FIXED),
            Published(images=40_503, texts=210_051, source=_RAW),
        ],
        "test": [Published(images=81_434, texts=447_793, source=_VQA)],
        "test-dev": [Published(texts=107_394, source=_VQA)],
    },
    ("snli-ve", "snli-ve"): {
        "train": [Published(images=29_783, texts=529_527, source=_SNLI_VE)],
        "validation": [Published(images=1_000, texts=17_858, source=_SNLI_VE)],
        "test": [Published(images=1_000, texts=17_901, source=_SNLI_VE)],
    },
    ("nlvr2", "nlvr2"): {
        "train": [Published(texts=86_373, source=_NLVR2)],
        "validation": [Published(texts=6_982, source=_NLVR2)],
        "test1": [Published(texts=6_967, source=_NLVR2)],
        "test2": [Published(texts=6_970, source=_NLVR2)],
    },
}


def published_counts(name: str, kind: Kind, split: str, images: int, texts: int) -> Published | None:
    """What is published of a split: the counts that it has if they are among those published, else the first.

    Args:
        name: Of the set.
        kind: Of the set.
        split: Name.
        images: What the split has.
        texts: Likewise.
    """
    known = _COUNTS.get((name, kind), {}).get(split, ())
    equal = (each for each in known if each.images in (None, images) and each.texts in (None, texts))
    return next(equal, known[0] if known else None)
