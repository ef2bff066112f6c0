"""Visual Genome: descriptions of regions, and which of its images COCO has too (Krishna et al. 2017)."""

from pathlib import Path

from bridgetower.data.config import VgConfig
from bridgetower.data.datasets.arrow import captioned
from bridgetower.data.datasets.spec import DatasetSpec, Originals, PublishedCount
from bridgetower.data.images import ImageRef
from bridgetower.data.manifest import Manifest
from bridgetower.data.schema import CAPTIONS

_FOLDERS = ("images/VG_100K", "images/VG_100K_2", "VG_100K", "VG_100K_2")


def image_of(originals: Originals, image_id: int) -> ImageRef:
    """The image with a number, which may be in any of four folders."""
    return originals.image(*(f"{folder}/{image_id}.jpg" for folder in _FOLDERS))


def annotation_of(originals: Originals, file: str) -> Path:
    """An annotation file, which may be in the folder or in its `annotations`."""
    return originals.annotation(file, f"annotations/{file}")


def images_in_coco(originals: Originals, config: VgConfig) -> set[int]:
    """Numbers of the images that COCO has in the splits that are to be left out.

    Raises:
        FileNotFoundError: If a file that tells is missing.
        ValueError: If the file of the splits has no image of one of them.
    """
    if not config.leave_out:
        return set()
    splits = config.karpathy or originals.annotation("dataset_coco.json", "karpathy/dataset_coco.json")
    images = annotation_of(originals, "image_data.json")
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
    return {image["image_id"] for image in originals.items(images, "item") if image["coco_id"] in held_out}


def leave_out(manifest: Manifest, image_id: int, config: VgConfig) -> None:
    """Notes that an image of `images_in_coco` is not taken."""
    manifest.leave_out(f"picture in COCO's {' or '.join(config.leave_out)} split", str(image_id))


def _fill(originals: Originals, manifest: Manifest, config: VgConfig) -> None:
    held_out = images_in_coco(originals, config)
    for image in originals.items(annotation_of(originals, "region_descriptions.json"), "item"):
        if image["id"] in held_out:
            leave_out(manifest, image["id"], config)
            continue
        phrases = [region["phrase"].strip() for region in image["regions"]]
        for region in (region for region, phrase in zip(image["regions"], phrases, strict=True) if not phrase):
            manifest.leave_out("empty description", str(region["region_id"]))
        texts = [phrase for phrase in phrases if phrase]
        manifest.add(str(image["id"]), [image_of(originals, image["id"])], texts, split="train")


VG = DatasetSpec(
    name="vg",
    schema=CAPTIONS,
    summary="Visual Genome, the descriptions of regions as captions.",
    layout="""
region_descriptions.json (or in annotations/)
images/VG_100K/2.jpg … and images/VG_100K_2/1.jpg … (or without images/)
with --leave-out also: image_data.json (or in annotations/)
with --leave-out also: dataset_coco.json (or in karpathy/, or where --karpathy says)
""",
    splits=("train",),
    split_rule="all is train",
    protocol="every description of a region is a caption of the whole picture; boxes are not kept",
    licences={"descriptions and pictures": "CC-BY 4.0"},
    config=VgConfig,
    published={"train": [PublishedCount(images=108_077, source="Visual Genome's page")]},
    fill=_fill,
    arrow=captioned(layout="vg", split_rule="all is train", stems={"train": ("vg",)}),
)
