"""NLVR2: statements that are true or false of two photos (Suhr et al. 2019)."""

from bridgetower.data.config import PrepareConfig
from bridgetower.data.datasets.spec import STATEMENTS, ArrowFiles, DatasetSpec, Originals, Row, published
from bridgetower.data.prepared_set import SetWriter
from bridgetower.data.schema import NLVR2 as SCHEMA
from bridgetower.data.schema import Statement, nlvr2_sentence

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
_USUAL = ("train", "validation", "test1")


def _fill(originals: Originals, writer: SetWriter, config: PrepareConfig) -> None:
    for split in filter(originals.wants, _FILES):
        file = _FILES[split]
        path = originals.annotation(*(f"{folder}/{file}" for folder in _FOLDERS))
        for row in originals.lines(path):
            identifier, label = row["identifier"], row.get("label", "")
            if label not in SCHEMA.labels and (label or split != _UNLABELLED):
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


def _arrow_pair(name: str) -> str:
    """The image pair that a row is about: its identifier without the number of a sentence."""
    return name.rpartition("-")[0] if nlvr2_sentence(name) else name


def _arrow_statements(writer: SetWriter, name: str, row: Row) -> list[Statement]:
    """Statements of a row; wrong labels are bad, and several statements under the identifier of one.

    The official code writes a row per image pair, without the numbers of its sentences. What is made of its name here
    is no identifier of NLVR2, so that nothing is computed or submitted by sentences that are not known.
    """
    statements: list[Statement] = []
    known = nlvr2_sentence(name) is not None
    if known and len(row["questions"]) > 1:
        writer.refuse(f"{name}: {len(row['questions'])} statements, expected the one that the identifier names")
        return []
    for place, (text, label) in enumerate(zip(row["questions"], row["answers"], strict=True)):
        identifier = name if known else f"{name}#{place}"
        if label not in SCHEMA.labels:
            writer.refuse(f"{identifier}: label {label!r}, expected the text True or False")
        else:
            statements.append(Statement(statement_id=identifier, text=text.strip(), label=label))
    return statements


NLVR2 = DatasetSpec(
    name="nlvr2",
    schema=SCHEMA,
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
    more_splits=tuple(split for split in _FILES if split not in _USUAL),
    split_rule="as published; dev is validation",
    protocol="every statement, without spaces at its ends; a row is a pair of images with all statements about it",
    licences={"statements": "CC-BY 4.0", "images": "as on the pages that they are from"},
    published=published(
        "NLVR2's page",
        {"train": (None, 86_373), "validation": (None, 6_982), "test1": (None, 6_967), "test2": (None, 6_970)},
    ),
    fill=_fill,
    arrow=ArrowFiles(
        layout="nlvr2_{train,dev,test1}, and by --splits nlvr2_{balanced,unbalanced}_{dev,test1}",
        protocol=f"{STATEMENTS}; their identifiers are NLVR2's only where the files have the number of the sentence",
        stems={"train": ("nlvr2_train",), "validation": ("nlvr2_dev",), "test1": ("nlvr2_test1",)},
        more_stems={
            f"{part}-{split}": (f"nlvr2_{part}_{subset}",)
            for part in ("balanced", "unbalanced")
            for split, subset in (("validation", "dev"), ("test1", "test1"))
        },
        columns=("questions", "answers", "identifier"),
        images=("image_0", "image_1"),
        image_id="identifier",
        image_of=_arrow_pair,
        entries=_arrow_statements,
    ),
)
