"""NLVR2: statements that are true or false of two photos (Suhr et al. 2019)."""

from collections.abc import Mapping
from typing import Any

from bridgetower.data.config import PrepareConfig
from bridgetower.data.kinds import LABELS, Statement
from bridgetower.data.listing import Listing
from bridgetower.data.locations import FilePicture
from bridgetower.data.published.originals import Originals, OriginalSet

_FILES = {
    "train": "train.json",
    "validation": "dev.json",
    "test1": "test1.json",
    "test2": "test2.json",
    "balanced-validation": "balanced/balanced_dev.json",
    "balanced-test1": "balanced/balanced_test1.json",
    "unbalanced-validation": "unbalanced/unbalanced_dev.json",
    "unbalanced-test1": "unbalanced/unbalanced_test1.json",
}
_FOLDERS = ("nlvr2/data", "nlvr/nlvr2/data", "data")
_UNLABELLED = "test2"  # which was held back, and may come without labels


def _list(originals: Originals, listing: Listing, config: PrepareConfig) -> None:
    for split in filter(originals.wants, _FILES):
        file = _FILES[split]
        path = originals.annotation(*(f"{folder}/{file}" for folder in _FOLDERS))
        for row in originals.lines(path):
            identifier, label = row["identifier"], row.get("label", "")
            if label not in LABELS["nlvr2"] and (label or split != _UNLABELLED):
                listing.bad(f"{identifier} of {file}: label {label!r}, expected the text True or False")
            elif not listing.is_new(f"{identifier} of {split}"):
                listing.bad(f"{identifier} of {file} comes twice")
            else:
                statement = Statement(statement_id=identifier, text=row["sentence"].strip(), label=label)
                pair = identifier.rpartition("-")[0]
                listing.add(pair, _pictures(originals, pair, row), [statement], split=split)


def _pictures(originals: Originals, pair: str, row: Mapping[str, Any]) -> list[FilePicture]:
    subset = pair.partition("-")[0]
    folders = [f"images/train/{row['directory']}"] if subset == "train" else [subset, f"images/{subset}"]
    return [originals.picture(*(f"{folder}/{pair}-img{side}.png" for folder in folders)) for side in (0, 1)]


NLVR2 = OriginalSet(
    name="nlvr2",
    kind="nlvr2",
    splits=("train", "validation", "test1"),
    more_splits=tuple(split for split in _FILES if split not in ("train", "validation", "test1")),
    split_rule="as published; dev is validation",
    protocol="every statement, without spaces at its ends; a row is a pair of pictures with all statements about it",
    licences={"statements": "CC-BY 4.0", "pictures": "as the pages say that they are from"},
    list=_list,
)
