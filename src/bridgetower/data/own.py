"""Sets of a user's own, from a table or a folder: one spec for each kind, such as images with captions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from bridgetower.data.config import NOT_CONTENT, WritingConfig
from bridgetower.data.folder import DatasetInfo, split_rank, split_sizes
from bridgetower.data.manifest import Manifest, new_manifest
from bridgetower.data.schema import CAPTIONS, CLASSIFICATION, LabelledEntry, Schema
from bridgetower.data.sources import (
    CAPTION_COLUMNS,
    CAPTIONS_FILE,
    IMAGE_COLUMNS,
    CaptionsFrom,
    Cells,
    cell_image,
    cell_text,
    find_column,
    read_rows,
    read_table,
    split_of,
)
from bridgetower.data.writer import write_manifest
from bridgetower.files import read_json
from bridgetower.model.plain import from_plain

TEXT_COLUMNS = (*CAPTION_COLUMNS, "title", "description")
LABEL_COLUMNS = ("label", "labels", "class", "category", "categories", "tags")
NUMBER_COLUMNS = (*LABEL_COLUMNS, "score", "rating")
CLASSES_FILE = "classes.json"

_FEWEST_SPLIT = 3  # images: one each for train, validation and test


@dataclass(frozen=True, kw_only=True)
class OwnSetConfig(WritingConfig):
    """How a set of a user's own is split and written.

    Attributes:
        image_column: Column with paths or, in Parquet, image bytes; None looks for the usual names.
        test_fraction: Share of the images for test, where the source gives no splits; None means 0.1.
        validation_fraction: Share of the images for validation, likewise.
        seed: Seed of the split, where the source gives none.
    """

    image_column: str | None = None
    test_fraction: float | None = None
    validation_fraction: float | None = None
    seed: int = field(default=0, metadata=NOT_CONTENT)  # `dataset.json` has it beside the settings

    def __post_init__(self) -> None:
        """Checks fractions and counts."""
        super().__post_init__()
        test, validation = self.fractions
        if min(test, validation) < 0 or test + validation >= 1:
            raise ValueError(
                f"fractions for test and validation are {test} and {validation}; give >= 0, together below 1"
            )

    @property
    def fractions(self) -> tuple[float, float]:
        """Shares for test and validation."""
        test, validation = self.test_fraction, self.validation_fraction
        return 0.1 if test is None else test, 0.1 if validation is None else validation


@dataclass(frozen=True, kw_only=True)
class OwnSpec:
    """A kind of set that is prepared from a user's own file or folder.

    Attributes:
        name: Of its command.
        schema: What its rows hold.
        summary: Help of its command: a line, and perhaps paragraphs.
        source: Help of the source: what it may be.
        config: Type of the settings.
        fill: Reads the source and fills the manifest; images without a split are split by the config.
    """

    name: str
    schema: Schema
    summary: str
    source: str
    config: type[OwnSetConfig] = OwnSetConfig
    fill: Callable[[Path, Manifest, Any], None]


def prepare_own(
    kind: str | OwnSpec, source: Path, out: Path, config: OwnSetConfig | None = None, *, progress: bool = True
) -> DatasetInfo:
    """Writes a user's own set to the folder `out`; a complete one of the same source is left as it is.

    An attempt that was cut off is continued: its finished Parquet files are kept.

    Args:
        kind: Name of one of `OWN_SETS`, or a kind of your own.
        source: A table or a folder, as the kind reads it.
        out: Dataset folder.
        config: How the source is read and split.
        progress: Whether to show progress, if standard error is a terminal.

    Raises:
        FileNotFoundError: If the source is missing.
        ValueError: If the kind is unknown, the source cannot be read, too many rows or images are bad, or `out` holds
            something else.
    """
    if isinstance(kind, str) and kind not in OWN_SETS:
        raise ValueError(f"no kind of set called {kind!r}; there are {', '.join(OWN_SETS)}")
    spec = OWN_SETS[kind] if isinstance(kind, str) else kind
    source, config = Path(source), config or spec.config()
    if type(config) is not spec.config:
        raise ValueError(f"{spec.name} takes a {spec.config.__name__}, given is a {type(config).__name__}")
    with new_manifest(spec.schema) as manifest:
        spec.fill(source, manifest, config)
        manifest.finish()
        manifest.check_errors(source, config.max_errors)
        info = DatasetInfo(
            name=source.resolve().stem,
            kind=spec.schema.name,
            seed=config.seed,
            split_rule=split_images(source, manifest, config),
            sources={},
            licences={},
            settings=config.settings,
            left_out={},
        )
        return write_manifest(manifest, source, Path(out), info, config, progress=progress)


def split_images(source: Path, manifest: Manifest, config: OwnSetConfig) -> str:
    """Gives the images splits, unless the source did.

    Returns:
        The rule, in words.

    Raises:
        ValueError: If there is no image, some rows have a split and others none, or fractions are given although the
            source has splits.
    """
    counts = manifest.counts()
    if not counts:
        raise ValueError(f"{source} has no usable row; check that it is the right source")
    if "" not in counts:
        if (config.test_fraction, config.validation_fraction) != (None, None):
            raise ValueError(f"{source} has a split column, so fractions would be ignored; leave out one of them")
        return "as in the source's split column"
    if len(counts) > 1:
        name = next(manifest.entries("")).image_id
        given = sum(counts.values()) - counts[""]
        raise ValueError(f"{source} gives {given} images a split but not {name!r}; give each a split, or none")
    total = counts[""]
    # A fraction that is not zero gives at least one image, so that training has something to be evaluated on.
    fewest = 0 if total < _FEWEST_SPLIT else 1
    test, validation = (max(round(share * total), fewest if share > 0 else 0) for share in config.fractions)
    manifest.assign(partial(split_rank, config.seed), split_sizes(total, num_test=test, num_validation=validation))
    rule = "images ranked by hash of seed and name"
    if total < _FEWEST_SPLIT and any(config.fractions):
        return f"{rule}; {total} are too few for test and validation, which need {_FEWEST_SPLIT}"
    return rule


def _checked_split(source: Path, place: str, split: str | None, image_id: str, manifest: Manifest) -> str:
    """Returns the split of a row for the manifest; empty if the source gives none.

    Raises:
        ValueError: If another row has the image in another split.
    """
    others = [other for other in manifest.splits_of(image_id) if other and split and other != split]
    if others:
        raise ValueError(f"{source}, {place}: {image_id!r} is in {split} and in {others[0]}; give it one split")
    return split or ""


@dataclass(frozen=True, kw_only=True)
class PairsConfig(OwnSetConfig):
    """How images with captions are read and split.

    Attributes:
        caption_column: Column with a caption or a list of captions; None looks for the usual names.
        captions_from: "folder" takes the name of the folder that a image is in as its caption.
    """

    caption_column: str | None = None
    captions_from: CaptionsFrom = "text"


def _fill_pairs(source: Path, manifest: Manifest, config: PairsConfig) -> None:
    """Brings the rows about each image together.

    Raises:
        ValueError: If an image is in two splits, or no image has a caption.
    """
    rows = read_rows(
        source,
        image_column=config.image_column,
        caption_column=config.caption_column,
        captions_from=config.captions_from,
    )
    any_row = any_caption = False
    for row in rows:
        if row.problem:
            manifest.bad(f"{row.place}: {row.problem}")
            continue
        any_row, any_caption = True, any_caption or bool(row.captions)
        name = row.image.name
        if row.image.piece and not manifest.is_new(name):
            manifest.bad(f"{row.place}: the shard has {name!r} twice; write the shard again")
            continue
        stripped = [caption.strip() for caption in row.captions]
        if not all(stripped) or not stripped:
            manifest.bad(f"{row.place}: {'empty' if stripped else 'no'} caption of {name!r}")
        split = _checked_split(source, row.place, row.split, name, manifest)
        manifest.add(name, [row.image], [caption for caption in stripped if caption], split=split, place=row.place)
    if any_row and not any_caption:
        raise ValueError(
            f"{source} has images but no captions; expected {CAPTIONS_FILE} in it or a .txt file beside each; "
            "or give the table that has them, or captions_from folder"
        )


@dataclass(frozen=True, kw_only=True)
class TableConfig(OwnSetConfig):
    """How a table of images, texts and labels is read and split.

    Attributes:
        text_column: Column with a text; None looks for the usual names.
        label_column: Column with a label or, where several may hold, a list of them; None looks for the usual names.
        label_separator: What stands between the labels of a cell, such as ";"; None: a cell is one label.
    """

    text_column: str | None = None
    label_column: str | None = None
    label_separator: str | None = None


@dataclass(frozen=True, kw_only=True)
class Classes:
    """What a row of a table with labels can be, as `classes.json` holds it.

    Attributes:
        names: Of the classes, in the order of their numbers; none if the labels are numbers.
        multi_label: Whether several may hold at once.
    """

    names: tuple[str, ...]
    multi_label: bool

    @property
    def numbers(self) -> bool:
        """Whether the labels are numbers."""
        return not self.names


def read_classes(folder: str | Path) -> Classes:
    """Reads the classes of a prepared set.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds something else.
    """
    path = Path(folder) / CLASSES_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"no {CLASSES_FILE} in {folder}; give a set that `bridgetower prepare classification` wrote"
        )
    return from_plain(Classes, read_json(path), str(path))


def _fill_labelled(source: Path, manifest: Manifest, config: TableConfig, *, numbers: bool = False) -> None:
    """Brings the rows about each image together; a row without one stands alone.

    A cell without a value is an unknown label; of several labels, an empty list or cell says that no class holds.

    Raises:
        ValueError: If an image is in two splits, some rows have one label and others several, or there are fewer than
            two classes.
    """
    names: set[str] = set()
    several: dict[bool, str] = {}
    usual = NUMBER_COLUMNS if numbers else LABEL_COLUMNS
    for number, (place, cells) in enumerate(read_table(source), start=1):
        image_column, text_column, label_column = _columns(source, cells, config, usual)
        labels = _labels(cells[label_column], config.label_separator)
        example = LabelledEntry(
            example_id=cell_text(cells.get("id")).strip() or str(number),
            text=cell_text(cells[text_column]).strip() if text_column else "",
            labels=labels or (),
            labelled=labels is not None,
        )
        image = cell_image(source.parent, cells[image_column]) if image_column and cells[image_column] else None
        if image is None and not example.text:
            manifest.bad(f"{place}: neither image nor text")
        elif not manifest.is_new(example.example_id):
            manifest.bad(f"{place}: id {example.example_id!r} comes twice")
        elif numbers and labels is not None and not _is_number(labels):
            manifest.bad(f"{place}: label {', '.join(labels)!r} is no number")
        else:
            if labels is not None:
                several.setdefault(config.label_separator is not None or isinstance(cells[label_column], list), place)
                names.update(labels)
            name = f"row {example.example_id}" if image is None else image.name
            split = _checked_split(source, place, split_of(source, place, cells), name, manifest)
            manifest.add(name, [] if image is None else [image], [example], split=split, place=place)
    if len(several) > 1:
        raise ValueError(
            f"{source}: {several[True]} has a list of labels and {several[False]} a single one; give a list in each row"
        )
    if numbers:
        manifest.files = {CLASSES_FILE: asdict(Classes(names=(), multi_label=False))}
        return
    if len(names) < 2:
        manifest.check_errors(source, config.max_errors)  # rows that were refused may have had the others
        raise ValueError(f"{source} has {len(names)} classes ({', '.join(names)}); expected at least two labels")
    classes = Classes(names=tuple(sorted(names, key=_numbers_first)), multi_label=True in several)
    manifest.files = {CLASSES_FILE: asdict(classes)}


def _columns(source: Path, cells: Cells, config: TableConfig, labels: Sequence[str]) -> tuple[str, str, str]:
    """Returns the columns of images, texts and labels."""
    image = find_column(source, cells, config.image_column, IMAGE_COLUMNS, "image", optional=True)
    text = find_column(source, cells, config.text_column, TEXT_COLUMNS, "text", optional=True)
    if not image and not text:
        raise ValueError(f"{source} has no column of images and none of texts; it has {', '.join(cells)}: name one")
    return image, text, find_column(source, cells, config.label_column, labels, "label")


def _labels(cell: object, separator: str | None) -> tuple[str, ...] | None:
    """The labels in a cell, each once; None if they are not known."""
    if cell is None or (separator is None and cell == ""):
        return None
    parts = cell if isinstance(cell, list) else str(cell).split(separator) if separator else [cell]
    return tuple(dict.fromkeys(name for name in (cell_text(part).strip() for part in parts) if name))


def _is_number(labels: tuple[str, ...]) -> bool:
    try:
        return len(labels) == 1 and isfinite(float(labels[0]))
    except ValueError:
        return False


def _numbers_first(name: str) -> tuple[bool, int, str]:
    """Sorts whole numbers by value, then all other names."""
    return not name.isdecimal(), int(name) if name.isdecimal() else 0, name


PAIRS = OwnSpec(
    name="pairs",
    schema=CAPTIONS,
    summary=("Your own images with captions.\n\nExample: bridgetower prepare pairs photos.csv --out data/photos"),
    source=(
        "CSV, TSV, JSON lines or Parquet with image and caption columns, a folder of images, or tar shards as "
        "img2dataset writes them: one, or a folder of them."
    ),
    config=PairsConfig,
    fill=_fill_pairs,
)

LABELLED = OwnSpec(
    name="classification",
    schema=CLASSIFICATION,
    summary=(
        "Your own table of images, texts and labels: one label per row, or several.\n\n"
        "An image or a text may be missing in a row. Rows about one image come into the same split. The names of the "
        "classes are in classes.json.\n\n"
        "Example: bridgetower prepare classification memes.jsonl --out data/memes"
    ),
    source=(
        "CSV, TSV, JSON lines or Parquet with a column of labels, and one of images or of texts; columns split and id "
        "are read if there are any."
    ),
    config=TableConfig,
    fill=_fill_labelled,
)

NUMBERED = replace(
    LABELLED,
    name="regression",
    summary=(
        "Your own table of images, texts and numbers, such as ratings.\n\n"
        "An image or a text may be missing in a row. Rows about one image come into the same split.\n\n"
        "Example: bridgetower prepare regression ratings.csv --out data/ratings"
    ),
    fill=partial(_fill_labelled, numbers=True),
)

OWN_SETS: Mapping[str, OwnSpec] = {each.name: each for each in (PAIRS, LABELLED, NUMBERED)}
"""Every kind of set of a user's own, by name."""
