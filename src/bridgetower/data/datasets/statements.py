"""SNLI-VE, statements about an image of Flickr30k (Xie et al. 2019), and NLVR2, about two photos (Suhr et al. 2019)."""

from bridgetower.data import schema
from bridgetower.data.config import PrepareConfig
from bridgetower.data.datasets.arrow import ArrowFiles
from bridgetower.data.datasets.spec import DatasetSpec, Originals, published
from bridgetower.data.prepared_set import SetWriter
from bridgetower.data.schema import Statement

_SNLI_VE_FILES = {"train": "snli_ve_train.jsonl", "validation": "snli_ve_dev.jsonl", "test": "snli_ve_test.jsonl"}


def _fill_snli_ve(originals: Originals, writer: SetWriter, config: PrepareConfig) -> None:
    for split in filter(originals.wants, _SNLI_VE_FILES):
        file = _SNLI_VE_FILES[split]
        path = originals.annotation(file, f"snli_ve/{file}")
        for number, pair in enumerate(originals.lines(path), start=1):
            place = f"{file}, line {number}"
            identifier = pair.get("pairID") or f"{split}-{number}"
            if pair["gold_label"] not in schema.SNLI_VE.labels:
                expected = ", ".join(schema.SNLI_VE.labels)
                writer.refuse(f"{place}: label {pair['gold_label']!r}, expected one of {expected}")
            elif not writer.is_new(identifier):
                writer.refuse(f"{place}: pair {identifier!r} comes twice")
            else:
                name = f"{pair['Flickr30K_ID']}.jpg"
                text = pair["sentence2"].strip()
                statement = Statement(statement_id=identifier, text=text, label=pair["gold_label"])
                image = originals.image(f"flickr30k-images/{name}")
                writer.add([image], [statement], name=name, split=split, place=place)


SNLI_VE = DatasetSpec(
    name="snli-ve",
    schema=schema.SNLI_VE,
    summary="SNLI-VE, statements about images of Flickr30k.",
    layout="""
snli_ve_train.jsonl, snli_ve_dev.jsonl, snli_ve_test.jsonl (or in snli_ve/)
flickr30k-images/1000092795.jpg …
""",
    splits=tuple(_SNLI_VE_FILES),
    split_rule="as published; dev is validation",
    protocol="the text is sentence2 alone, without spaces at its ends; the image stands for sentence1",
    licences={"statements": "CC-BY-SA 4.0", "images": "for research and education, under the terms of use of Flickr"},
    published=published(
        "SNLI-VE's page", {"train": (29_783, 529_527), "validation": (1_000, 17_858), "test": (1_000, 17_901)}
    ),
    fill=_fill_snli_ve,
    arrow=ArrowFiles(
        layout="snli_{train,dev,test}",
        stems={"train": ("snli_train",), "validation": ("snli_dev",), "test": ("snli_test",)},
    ),
)

_NLVR2_FILES = {
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
_USUAL = ("train", "validation", "test1")


def _fill_nlvr2(originals: Originals, writer: SetWriter, config: PrepareConfig) -> None:
    for split in filter(originals.wants, _NLVR2_FILES):
        file = _NLVR2_FILES[split]
        path = originals.annotation(*(f"{folder}/{file}" for folder in _FOLDERS))
        for row in originals.lines(path):
            identifier, label = row["identifier"], row.get("label", "")
            if label not in schema.NLVR2.labels and (label or split != _UNLABELLED):
                writer.refuse(f"{identifier} of {file}: label {label!r}, expected the text True or False")
            elif not writer.is_new(f"{identifier} of {split}"):
                writer.refuse(f"{identifier} of {file} comes twice")
            else:
                statement = Statement(statement_id=identifier, text=row["sentence"].strip(), label=label)
                pair = identifier.rpartition("-")[0]
                subset = pair.partition("-")[0]
                folders = [f"images/train/{row['directory']}"] if subset == "train" else [subset, f"images/{subset}"]
                images = [originals.image(*(f"{one}/{pair}-img{side}.png" for one in folders)) for side in (0, 1)]
                writer.add(images, [statement], name=pair, split=split)


NLVR2 = DatasetSpec(
    name="nlvr2",
    schema=schema.NLVR2,
    summary=(
        "NLVR2, statements about two images.\n\n"
        "By --splits also test2, balanced-validation, balanced-test1, unbalanced-validation and unbalanced-test1."
    ),
    layout="""
nlvr2/data/train.json, dev.json, test1.json (or in data/ or nlvr/nlvr2/data/)
images/train/0/train-10108-0-img0.png …
dev/dev-0-0-img0.png … (or in images/)
test1/test1-0-0-img0.png … (or in images/)
""",
    splits=_USUAL,
    more_splits=tuple(split for split in _NLVR2_FILES if split not in _USUAL),
    split_rule="as published; dev is validation",
    protocol="every statement, without spaces at its ends; a row is a pair of images with all statements about it",
    licences={"statements": "CC-BY 4.0", "images": "as on the pages that they are from"},
    published=published(
        "NLVR2's page",
        {"train": (None, 86_373), "validation": (None, 6_982), "test1": (None, 6_967), "test2": (None, 6_970)},
    ),
    fill=_fill_nlvr2,
    arrow=ArrowFiles(
        layout="nlvr2_{train,dev,test1}, and by --splits nlvr2_{balanced,unbalanced}_{dev,test1}",
        stems={"train": ("nlvr2_train",), "validation": ("nlvr2_dev",), "test1": ("nlvr2_test1",)},
        more_stems={
            f"{part}-{split}": (f"nlvr2_{part}_{subset}",)
            for part in ("balanced", "unbalanced")
            for split, subset in (("validation", "dev"), ("test1", "test1"))
        },
    ),
)
