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


def annotation_of(originals: Originals, file: str) -> Path:
    """An annotation file, which may be in the folder or in its `annotations`."""
    return originals.annotation(file, f"annotations/{file}")


def pictures_in_coco(originals: Originals, config: VgConfig) -> set[int]:
    """Numbers of the images that COCO has in the splits that are to be left out.

    Raises:
        FileNotFoundError: If a file that says so is missing.
        ValueError: If the file of the splits has no image of one of them.
    """
    if not config.leave_out:
        return set()
    splits = config.karpathy or originals.annotation("dataset_coco.json", "karpathy/dataset_coco.json")
    pictures = annotation_of(originals, "image_data.json")
    if config.karpathy:
        originals.used.append(config.karpathy)
    held_out = {
        image["cocoid"]: image["split"]
        for image in originals.items(splits, "images.item")
        if image["split"] in config.leave_out
    }
    missing = set(config.leave_out) - set(held_out.values())
    if missing:
        raise ValueError(
            f"{splits} has no image of split {', '.join(sorted(missing))}; check that it is the right file"
        )
    return {image["image_id"] for image in originals.items(pictures, "item") if image["coco_id"] in held_out}


def leave_out(listing: Listing, image_id: int, config: VgConfig) -> None:
    """Notes that a picture of `pictures_in_coco` is not taken."""
    listing.leave_out(f"picture in COCO's {' or '.join(config.leave_out)} split", str(image_id))


def _list(originals: Originals, listing: Listing, config: VgConfig) -> None:
    held_out = pictures_in_coco(originals, config)
    for picture in originals.items(annotation_of(originals, "region_descriptions.json"), "item"):
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
