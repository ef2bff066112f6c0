"""SNLI-VE: statements that follow from a picture of Flickr30k, contradict it, or neither (Xie et al. 2019)."""

from bridgetower.data.config import PrepareConfig
from bridgetower.data.kinds import LABELS, Statement
from bridgetower.data.listing import Listing
from bridgetower.data.published.originals import Originals, OriginalSet

_FILES = {"train": "snli_ve_train.jsonl", "validation": "snli_ve_dev.jsonl", "test": "snli_ve_test.jsonl"}


def _list(originals: Originals, listing: Listing, config: PrepareConfig) -> None:
    for split in filter(originals.wants, _FILES):
        file = _FILES[split]
        path = originals.annotation(file, f"snli_ve/{file}")
        for number, pair in enumerate(originals.lines(path), start=1):
            place = f"{file}, line {number}"
            identifier = pair.get("pairID") or f"{split}-{number}"
            if pair["gold_label"] not in LABELS["snli-ve"]:
                listing.bad(f"{place}: label {pair['gold_label']!r}, expected one of {', '.join(LABELS['snli-ve'])}")
            elif not listing.is_new(identifier):
                listing.bad(f"{place}: pair {identifier!r} comes twice")
            else:
                name = f"{pair['Flickr30K_ID']}.jpg"
                text = pair["sentence2"].strip()
                statement = Statement(statement_id=identifier, text=text, label=pair["gold_label"])
                picture = originals.picture(f"flickr30k-images/{name}")
                listing.add(name, [picture], [statement], split=split, place=place)


SNLI_VE = OriginalSet(
    name="snli-ve",
    kind="snli-ve",
    splits=tuple(_FILES),
    split_rule="as published; dev is validation",
    protocol="the text is sentence2 alone, without spaces at its ends; the picture stands for sentence1",
    licences={"statements": "CC-BY-SA 4.0", "pictures": "for research and education, under the terms of use of Flickr"},
    list=_list,
)
