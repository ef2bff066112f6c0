"""Miniature copies of published sets: file names, fields and nesting of the originals."""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def jpeg(number: int, *, size: tuple[int, int] = (12, 9)) -> bytes:
    """Returns a small picture, another for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def write(path: Path, content: object) -> None:
    """Writes bytes, text or JSON, with the folders that it takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def write_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Writes a JSON object per line."""
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


def coco_name(number: int, year: str) -> str:
    """Returns the file name of a COCO picture."""
    return f"COCO_{year}_{number:012d}.jpg"


def write_coco(folder: Path) -> None:
    """Writes eleven pictures of COCO in Karpathy's splits.

    Two captions of picture 57870 are the same, and one has spaces and a line break around it.
    """
    splits = {"train": 4, "restval": 3, "val": 2, "test": 2}
    numbers = iter((57870, 9, 25, 30, 318219, 554625, 574769, 522418, 184613, 391895, 60623))
    images = []
    for split, count in splits.items():
        year = "train2014" if split == "train" else "val2014"
        for number in (next(numbers) for _ in range(count)):
            captions = [f"Picture {number}, caption {n}." for n in range(6 if number == 391895 else 5)]
            if number == 57870:
                captions[3] = captions[1]
                captions[4] = " A restaurant has modern wooden tables and chairs.\n"
            images.append(_karpathy_image(len(images), coco_name(number, year), split, captions))
            images[-1] |= {"filepath": year, "cocoid": number}
            write(folder / year / coco_name(number, year), jpeg(number))
    write(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})


def write_flickr30k(folder: Path) -> None:
    """Writes six pictures of Flickr30k in Karpathy's splits, the JSON file in its folder."""
    images = []
    for number, split in enumerate(("train", "train", "train", "val", "test", "test")):
        name = f"{1000092795 + number}.jpg"
        images.append(_karpathy_image(number, name, split, [f"Picture {number}, caption {n}." for n in range(5)]))
        write(folder / "flickr30k-images" / name, jpeg(number))
    write(folder / "karpathy" / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})


def _karpathy_image(number: int, name: str, split: str, captions: Sequence[str]) -> dict[str, object]:
    sentences = [
        {"tokens": caption.lower().split(), "raw": caption, "imgid": number, "sentid": 10 * number + place}
        for place, caption in enumerate(captions)
    ]
    return {
        "imgid": number,
        "filename": name,
        "split": split,
        "sentences": sentences,
        "sentids": [sentence["sentid"] for sentence in sentences],
    }
