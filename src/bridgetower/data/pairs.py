"""A user's own pictures with captions, brought together by picture and put into splits."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from bridgetower.data.config import PairsConfig
from bridgetower.data.listing import Listing
from bridgetower.data.sources import CAPTIONS_FILE, Row
from bridgetower.data.splits import split_rank, split_sizes

_FEWEST_SPLIT = 3  # pictures: one each for train, validation and test


def list_rows(source: Path, rows: Iterable[Row], listing: Listing) -> None:
    """Brings the rows about each picture together.

    Raises:
        ValueError: If a picture is in two splits, or no picture has a caption.
    """
    any_row = any_caption = False
    for row in rows:
        any_row, any_caption = True, any_caption or bool(row.captions)
        name, split = row.picture.name, row.split or ""
        stripped = [caption.strip() for caption in row.captions]
        if not all(stripped) or not stripped:
            listing.bad(f"{row.place}: {'empty' if stripped else 'no'} caption of {name!r}")
        others = [other for other in listing.splits_of(name) if other and split and other != split]
        if others:
            raise ValueError(f"{source}, {row.place}: {name!r} is in {split} and in {others[0]}; give it one split")
        listing.add(name, [row.picture], [caption for caption in stripped if caption], split=split, place=row.place)
    if any_row and not any_caption:
        raise ValueError(
            f"{source} has pictures but no captions; expected {CAPTIONS_FILE} in it or a .txt file beside each; "
            "or give the table that has them, or captions_from folder"
        )


def split_pictures(source: Path, listing: Listing, config: PairsConfig) -> str:
    """Gives the pictures splits, unless the source did.

    Returns:
        The rule, in words.

    Raises:
        ValueError: If there is no picture, some rows have a split and others none, or fractions are given although the
            source has splits.
    """
    counts = listing.counts()
    if not counts:
        raise ValueError(f"{source} has no usable picture with a caption; check that it is the right source")
    if "" not in counts:
        if (config.test_fraction, config.validation_fraction) != (None, None):
            raise ValueError(f"{source} has a split column, so fractions would be ignored; leave out one of them")
        return "as the source's split column says"
    if len(counts) > 1:
        name = next(listing.entries("")).image_id
        given = sum(counts.values()) - counts[""]
        raise ValueError(f"{source} gives {given} pictures a split but not {name!r}; give each a split, or none")
    listing.assign(partial(split_rank, config.seed), _split_sizes(counts[""], config))
    return _seeded_rule(counts[""], config)


def _seeded_rule(num_pictures: int, config: PairsConfig) -> str:
    rule = "pictures ranked by hash of seed and name"
    if num_pictures < _FEWEST_SPLIT and any(config.fractions):
        return f"{rule}; {num_pictures} are too few for test and validation, which need {_FEWEST_SPLIT}"
    return rule


def _split_sizes(total: int, config: PairsConfig) -> dict[str, int]:
    # A fraction that is not zero gives at least one picture, so that training has something to be judged on.
    fewest = 0 if total < _FEWEST_SPLIT else 1
    num_test, num_validation = (
        max(round(fraction * total), fewest if fraction > 0 else 0) for fraction in config.fractions
    )
    return split_sizes(total, num_test=num_test, num_validation=num_validation)
