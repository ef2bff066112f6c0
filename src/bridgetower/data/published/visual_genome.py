"""Visual Genome: descriptions of regions, and which of its pictures COCO has too (Krishna et al. 2017)."""

from pathlib import Path

from bridgetower.data.config import VgConfig
from bridgetower.data.listing import Listing
from bridgetower.data.locations import FilePicture
from bridgetower.data.published.originals import Originals, OriginalSet

_FOLDERS = ("images/VG_100K", "images/VG_100K_2", "VG_100K", "VG_100K_2")


def picture_of(originals: Originals, image_id: int) -> FilePicture:
    """The picture with a number, which may be in any of four folders."""
    return originals.picture(*(f"{folder}/{image_id}.jpg" for folder in _FOLDERS))


def annotation_of(originals: Originals, listing: Listing, file: str) -> Path | None:
    """An annotation file, which may be in the folder or in its `annotations`."""
    return originals.annotation(listing, file, f"annotations/{file}")


def pictures_in_coco(originals: Originals, listing: Listing, config: VgConfig) -> set[int]:
    """Numbers of the pictures that COCO has in the splits that are to be left out."""
    if not config.leave_out:
        return set()
    splits = config.karpathy or originals.annotation(listing, "dataset_coco.json", "karpathy/dataset_coco.json")
    pictures = annotation_of(originals, listing, "image_data.json")
    if config.karpathy:
        originals.used.append(config.karpathy)
    if not splits or not pictures:
        return set()
    coco = {image["cocoid"] for image in originals.items(splits, "images.item") if image["split"] in config.leave_out}
    return {image["image_id"] for image in originals.items(pictures, "item") if image["coco_id"] in coco}


def leave_out(listing: Listing, image_id: int, config: VgConfig) -> None:
    """Notes that a picture of `pictures_in_coco` is not taken."""
    listing.leave_out(f"picture in COCO's {' or '.join(config.leave_out)} split", str(image_id))


def _list(originals: Originals, listing: Listing, config: VgConfig) -> None:
    held_out = pictures_in_coco(originals, listing, config)
    path = annotation_of(originals, listing, "region_descriptions.json")
    for picture in originals.items(path, "item") if path else ():
        if picture["id"] in held_out:
            leave_out(listing, picture["id"], config)
            continue
        phrases = [region["phrase"].strip() for region in picture["regions"]]
        for region in (region for region, phrase in zip(picture["regions"], phrases, strict=True) if not phrase):
            listing.leave_out("empty description", str(region["region_id"]))
        texts = [phrase for phrase in phrases if phrase]
        listing.add(str(picture["id"]), [picture_of(originals, picture["id"])], texts, split="train")


VG = OriginalSet(
    name="vg",
    kind="captions",
    splits=("train",),
    split_rule="all is train",
    protocol="every description of a region is a caption of the whole picture; boxes are not kept",
    licences={"descriptions and pictures": "CC-BY 4.0"},
    config=VgConfig,
    list=_list,
)
