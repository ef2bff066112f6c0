"""SNLI-VE: statements that follow from an image of Flickr30k, contradict it, or neither (Xie et al. 2019)."""

from bridgetower.data.config import PrepareConfig
from bridgetower.data.datasets.spec import STATEMENTS, ArrowFiles, DatasetSpec, Originals, Row, published
from bridgetower.data.prepared_set import SetWriter
from bridgetower.data.schema import SNLI_VE as SCHEMA
from bridgetower.data.schema import Statement

_FILES = {"train": "snli_ve_train.jsonl", "validation": "snli_ve_dev.jsonl", "test": "snli_ve_test.jsonl"}


def _fill(originals: Originals, writer: SetWriter, config: PrepareConfig) -> None:
    for split in filter(originals.wants, _FILES):
        file = _FILES[split]
        path = originals.annotation(file, f"snli_ve/{file}")
        for number, pair in enumerate(originals.lines(path), start=1):
            place = f"{file}, line {number}"
            identifier = pair.get("pairID") or f"{split}-{number}"
            if pair["gold_label"] not in SCHEMA.labels:
                expected = ", ".join(SCHEMA.labels)
                writer.refuse(f"{place}: label {pair['gold_label']!r}, expected one of {expected}")
            elif not writer.is_new(identifier):
                writer.refuse(f"{place}: pair {identifier!r} comes twice")
            else:
                name = f"{pair['Flickr30K_ID']}.jpg"
                text = pair["sentence2"].strip()
                statement = Statement(statement_id=identifier, text=text, label=pair["gold_label"])
                image = originals.image(f"flickr30k-images/{name}")
                writer.add([image], [statement], name=name, split=split, place=place)


def _arrow_statements(writer: SetWriter, name: str, row: Row) -> list[Statement]:
    """Statements of a row; wrong labels are bad."""
    statements: list[Statement] = []
    for place, ((_, text), label) in enumerate(zip(row["sentences"], row["labels"], strict=True)):
        identifier = f"{name}-{place}"
        if not 0 <= label < len(SCHEMA.labels):
            writer.refuse(f"{identifier}: label {label}, expected 0 to {len(SCHEMA.labels) - 1}")
        else:
            statements.append(Statement(statement_id=identifier, text=text.strip(), label=SCHEMA.labels[label]))
    return statements


SNLI_VE = DatasetSpec(
    name="snli-ve",
    schema=SCHEMA,
    summary="SNLI-VE, statements about images of Flickr30k.",
    layout="""
snli_ve_train.jsonl, snli_ve_dev.jsonl, snli_ve_test.jsonl (or in snli_ve/)
flickr30k-images/1000092795.jpg …
""",
    splits=tuple(_FILES),
    split_rule="as published; dev is validation",
    protocol="the text is sentence2 alone, without spaces at its ends; the image stands for sentence1",
    licences={"statements": "CC-BY-SA 4.0", "images": "for research and education, under the terms of use of Flickr"},
    published=published(
        "SNLI-VE's page", {"train": (29_783, 529_527), "validation": (1_000, 17_858), "test": (1_000, 17_901)}
    ),
    fill=_fill,
    arrow=ArrowFiles(
        layout="snli_{train,dev,test}",
        protocol=f"{STATEMENTS}; numbered anew, like the images, as the files name neither",
        stems={"train": ("snli_train",), "validation": ("snli_dev",), "test": ("snli_test",)},
        columns=("sentences", "labels"),
        image_id=None,
        entries=_arrow_statements,
    ),
)
