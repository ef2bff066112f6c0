"""Visual Genome: where its pictures are, and which of them COCO has too (Krishna et al. 2017)."""

from collections.abc import Container
from pathlib import Path

from bridgetower.data.listing import Listing
from bridgetower.data.locations import FilePicture
from bridgetower.data.published.originals import Originals

_FOLDERS = ("images/VG_100K", "images/VG_100K_2", "VG_100K", "VG_100K_2")


def picture_of(originals: Originals, image_id: int) -> FilePicture:
    """The picture with a number, which may be in any of four folders."""
    return originals.picture(*(f"{folder}/{image_id}.jpg" for folder in _FOLDERS))


def annotation_of(originals: Originals, listing: Listing, file: str) -> Path | None:
    """An annotation file, which may be in the folder or in its `annotations`."""
    return originals.annotation(listing, file, f"annotations/{file}")


def pictures_in_coco(
    originals: Originals, listing: Listing, karpathy: Path | None, subsets: Container[str]
) -> set[int]:
    """Numbers of the pictures that COCO has in some of Karpathy's splits.

    Args:
        originals: Has `image_data.json`, and Karpathy's file if `karpathy` is None.
        listing: Counts missing files.
        karpathy: `dataset_coco.json`, if it is elsewhere.
        subsets: Such as ("val", "test").
    """
    splits = karpathy or originals.annotation(listing, "dataset_coco.json", "karpathy/dataset_coco.json")
    pictures = annotation_of(originals, listing, "image_data.json")
    if karpathy:
        originals.used.append(karpathy)
    if not splits or not pictures:
        return set()
    coco = {image["cocoid"] for image in originals.items(splits, "images.item") if image["split"] in subsets}
    return {image["image_id"] for image in originals.items(pictures, "item") if image["coco_id"] in coco}
