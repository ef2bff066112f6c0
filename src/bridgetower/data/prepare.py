"""Prepares dataset folders: published sets from their files, and a user's own images."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from bridgetower.data.classification import Classes, write_classes
from bridgetower.data.config import ArrowConfig, OwnSetConfig, PairsConfig, PrepareConfig, TableConfig
from bridgetower.data.datasets import DATASETS
from bridgetower.data.datasets.spec import DatasetSpec, Originals
from bridgetower.data.info import DatasetInfo
from bridgetower.data.manifest import Manifest, new_manifest
from bridgetower.data.schema import CAPTIONS, CLASSIFICATION, LabelledEntry
from bridgetower.data.sources import CAPTIONS_FILE, LabelledRow, Row, read_labelled, read_rows
from bridgetower.data.splits import ordered_splits, split_rank, split_sizes
from bridgetower.data.writer import write_manifest
from bridgetower.files import sha256_of

_FEW = 5  # files of a wrong folder that are named
_FEWEST_SPLIT = 3  # images: one each for train, validation and test


def prepare_set(
    dataset: str | DatasetSpec, source: Path, out: Path, config: PrepareConfig | None = None, *, progress: bool = True
) -> DatasetInfo:
    """Writes a set to the folder `out`; a complete one of the same files is left as it is.

    An attempt that was cut off is continued: its finished Parquet files are kept.

    Args:
        dataset: Name of one of `DATASETS`, or a set of your own.
        source: Folder with the original files.
        out: Dataset folder.
        config: What is prepared, and how many errors are allowed.
        progress: Whether to show progress, if standard error is a terminal.

    Raises:
        FileNotFoundError: If the source or an annotation file is missing.
        ValueError: If the name or a split is unknown, an annotation file cannot be read, there are too many errors, or
            `out` holds something else.
    """
    known = [name for name, each in DATASETS.items() if each.fill]
    if isinstance(dataset, str) and dataset not in known:
        raise ValueError(f"no set called {dataset!r}; sets are {', '.join(known)}")
    spec = DATASETS[dataset] if isinstance(dataset, str) else dataset
    config = config or PrepareConfig()
    if type(config) is not spec.config:
        raise ValueError(f"{spec.name} takes a {spec.config.__name__}, given is a {type(config).__name__}")
    splits = (*spec.splits, *spec.more_splits)
    unknown = [split for split in config.splits if split not in splits]
    if unknown:
        raise ValueError(f"{spec.name} has no split {', '.join(unknown)}; it has {', '.join(splits)}")
    _check_folder(source, f"the original files of {spec.name}")
    return _prepare(spec, Path(source), Path(out), config, progress)


def prepare_arrow(
    source: Path, out: Path, config: ArrowConfig | None = None, *, progress: bool = True
) -> dict[str, DatasetInfo]:
    """Writes each set of which ViLT-style Arrow files lie in a folder to a folder of its own in `out`.

    Args:
        source: Folder with the files.
        out: Folder of the dataset folders, which are called like the sets.
        config: Which sets and splits, and how many errors are allowed.
        progress: Whether to show progress, if standard error is a terminal.

    Returns:
        What was written, by set.

    Raises:
        FileNotFoundError: If the source is missing, or has no file of a set or of one of its splits.
        ValueError: If a set or a split is unknown, a file cannot be read, there are too many errors, or a folder in
            `out` holds something else.
    """
    source, config = Path(source), config or ArrowConfig()
    _check_folder(source, "ViLT-style Arrow files")
    unknown = [name for name in config.sets if name not in DATASETS]
    if unknown:
        raise ValueError(f"no set called {', '.join(unknown)}; sets are {', '.join(DATASETS)}")
    found = [
        each.arrow.spec(each)
        for each in DATASETS.values()
        if each.arrow and (each.name in config.sets if config.sets else each.arrow.any_in(source))
    ]
    known = [split for each in found for split in (*each.splits, *each.more_splits)]
    if not found:
        there = sorted(path.name for path in source.glob("*.arrow"))
        raise FileNotFoundError(
            f"{source} has {', '.join(there[:_FEW]) or 'no file'}{', …' if len(there) > _FEW else ''}; expected Arrow "
            "files as the official code names them, such as coco_caption_karpathy_train.arrow"
        )
    strange = [split for split in config.splits if split not in known]
    if strange:
        raise ValueError(
            f"no split {', '.join(strange)} of {', '.join(each.name for each in found)}; splits are "
            f"{', '.join(dict.fromkeys(known))}"
        )
    prepared = {}
    for each in found:
        wanted = [split for split in config.splits if split in (*each.splits, *each.more_splits)]
        if wanted or not config.splits:
            own = replace(config, splits=tuple(wanted))
            prepared[each.name] = _prepare(each, source, Path(out) / each.name, own, progress)
    return prepared


def _check_folder(source: Path, what: str) -> None:
    if not Path(source).is_dir():
        raise FileNotFoundError(f"no folder {source}; give the folder with {what}")


def _prepare(spec: DatasetSpec, source: Path, out: Path, config: PrepareConfig, progress: bool) -> DatasetInfo:
    originals = Originals(folder=source, splits=config.splits or spec.splits, progress=progress)
    with new_manifest(spec.schema) as manifest:
        assert spec.fill is not None  # as the callers check
        try:
            spec.fill(originals, manifest, config)
        except (KeyError, TypeError, AttributeError) as error:  # of the content of an annotation file
            place = (originals.used or originals.large)[-1]
            raise ValueError(f"{place} is not as published ({error!r}); check that it is right") from error
        listed = manifest.counts()
        manifest.finish()
        manifest.check_errors(source, config.max_errors)
        empty = listed.keys() - manifest.counts().keys()
        if empty:
            raise ValueError(
                f"{source} has no usable image of {', '.join(ordered_splits(empty))}; check that it is the right source"
            )
        info = DatasetInfo(
            name=spec.name,
            kind=spec.schema.name,
            seed=0,
            split_rule=spec.split_rule,
            protocol=spec.protocol,
            sources={
                **{path.name: sha256_of(path) for path in originals.used},
                **{path.name: f"{path.stat().st_size} bytes" for path in originals.large},
            },
            licences=spec.licences,
            settings=config.settings,
            left_out=manifest.left_out(),
            num_left_out=manifest.num_left_out(),
        )
        return write_manifest(manifest, source, out, info, config, progress=progress)


def prepare_pairs(source: Path, out: Path, config: PairsConfig | None = None, *, progress: bool = True) -> DatasetInfo:
    """Writes a user's own images and captions to the folder `out`; a complete one of the same source is left alone.

    An attempt that was cut off is continued: its finished Parquet files are kept.

    Args:
        source: A CSV, TSV, JSON-lines or Parquet file, or a folder; see `bridgetower.data.sources.read_rows`.
        out: Dataset folder.
        config: How the source is read and split.
        progress: Whether to show progress, if standard error is a terminal.

    Raises:
        FileNotFoundError: If the source is missing.
        ValueError: If it cannot be read, too many rows or images are bad, or `out` holds something else.
    """
    source, config = Path(source), config or PairsConfig()
    rows = read_rows(
        source,
        image_column=config.image_column,
        caption_column=config.caption_column,
        captions_from=config.captions_from,
    )
    with new_manifest(CAPTIONS) as manifest:
        _add_rows(source, rows, manifest)
        return _write_own(manifest, source, out, config, progress)


def _add_rows(source: Path, rows: Iterable[Row], manifest: Manifest) -> None:
    """Brings the rows about each image together.

    Raises:
        ValueError: If an image is in two splits, or no image has a caption.
    """
    any_row = any_caption = False
    for row in rows:
        any_row, any_caption = True, any_caption or bool(row.captions)
        name = row.image.name
        stripped = [caption.strip() for caption in row.captions]
        if not all(stripped) or not stripped:
            manifest.bad(f"{row.place}: {'empty' if stripped else 'no'} caption of {name!r}")
        _check_split(source, row, name, manifest)
        manifest.add(
            name, [row.image], [caption for caption in stripped if caption], split=row.split or "", place=row.place
        )
    if any_row and not any_caption:
        raise ValueError(
            f"{source} has images but no captions; expected {CAPTIONS_FILE} in it or a .txt file beside each; "
            "or give the table that has them, or captions_from folder"
        )


def prepare_classification(
    source: Path, out: Path, config: TableConfig | None = None, *, progress: bool = True
) -> DatasetInfo:
    """Writes a user's own table of images, texts and labels to the folder `out`; see `prepare_pairs`.

    Rows about one image come into the same split. The names of the classes, in order, are in `classes.json`.

    Args:
        source: A CSV, TSV, JSON-lines or Parquet file; see `bridgetower.data.sources.read_labelled`.
        out: Dataset folder.
        config: How the table is read and split.
        progress: Whether to show progress, if standard error is a terminal.

    Raises:
        FileNotFoundError: If the source is missing.
        ValueError: If it cannot be read, too many rows or images are bad, or `out` holds something else.
    """
    source, config = Path(source), config or TableConfig()
    with new_manifest(CLASSIFICATION) as manifest:
        classes = _add_labelled(source, read_labelled(source, config), manifest)
        written = _write_own(manifest, source, out, config, progress)
    write_classes(Path(out), classes)
    return written


def _add_labelled(source: Path, rows: Iterable[LabelledRow], manifest: Manifest) -> Classes:
    """Brings the rows about each image together; a row without one stands alone.

    Raises:
        ValueError: If an image is in two splits, some rows have one label and others several, or there are fewer than
            two classes.
    """
    names: set[str] = set()
    several: dict[bool, str] = {}
    for row in rows:
        if row.labels is not None:
            several.setdefault(row.several, row.place)
            names.update(row.labels)
        text = row.text.strip()
        if row.image is None and not text:
            manifest.bad(f"{row.place}: neither image nor text")
            continue
        if not manifest.is_new(row.id):
            manifest.bad(f"{row.place}: id {row.id!r} comes twice")
            continue
        name = f"row {row.id}" if row.image is None else row.image.name
        _check_split(source, row, name, manifest)
        example = LabelledEntry(example_id=row.id, text=text, labels=row.labels or (), labelled=row.labels is not None)
        manifest.add(name, [] if row.image is None else [row.image], [example], split=row.split or "", place=row.place)
    if len(several) > 1:
        raise ValueError(
            f"{source}: {several[True]} has a list of labels and {several[False]} a single one; give a list in each row"
        )
    if len(names) < 2:
        raise ValueError(f"{source} has {len(names)} classes ({', '.join(names)}); expected at least two labels")
    return Classes(names=tuple(sorted(names, key=_numbers_first)), multi_label=True in several)


def _numbers_first(name: str) -> tuple[bool, int, str]:
    """Sorts whole numbers by value, then all other names."""
    return not name.isdecimal(), int(name) if name.isdecimal() else 0, name


def _check_split(source: Path, row: Row | LabelledRow, name: str, manifest: Manifest) -> None:
    others = [other for other in manifest.splits_of(name) if other and row.split and other != row.split]
    if others:
        raise ValueError(f"{source}, {row.place}: {name!r} is in {row.split} and in {others[0]}; give it one split")


def _write_own(manifest: Manifest, source: Path, out: Path, config: OwnSetConfig, progress: bool) -> DatasetInfo:
    """Writes the rows of a user's own set, in the splits that the source or the config gives."""
    manifest.finish()
    manifest.check_errors(source, config.max_errors)
    info = DatasetInfo(
        name=source.resolve().stem,
        kind=manifest.schema.name,
        seed=config.seed,
        split_rule=_split_images(source, manifest, config),
        sources={},
        licences={},
        settings=config.settings,
        left_out={},
    )
    return write_manifest(manifest, source, Path(out), info, config, progress=progress)


def _split_images(source: Path, manifest: Manifest, config: OwnSetConfig) -> str:
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
        return "as the source's split column says"
    if len(counts) > 1:
        name = next(manifest.entries("")).image_id
        given = sum(counts.values()) - counts[""]
        raise ValueError(f"{source} gives {given} images a split but not {name!r}; give each a split, or none")
    manifest.assign(partial(split_rank, config.seed), _split_sizes(counts[""], config))
    return _seeded_rule(counts[""], config)


def _seeded_rule(num_images: int, config: OwnSetConfig) -> str:
    rule = "images ranked by hash of seed and name"
    if num_images < _FEWEST_SPLIT and any(config.fractions):
        return f"{rule}; {num_images} are too few for test and validation, which need {_FEWEST_SPLIT}"
    return rule


def _split_sizes(total: int, config: OwnSetConfig) -> dict[str, int]:
    # A fraction that is not zero gives at least one image, so that training has something to be judged on.
    fewest = 0 if total < _FEWEST_SPLIT else 1
    num_test, num_validation = (
        max(round(fraction * total), fewest if fraction > 0 else 0) for fraction in config.fractions
    )
    return split_sizes(total, num_test=num_test, num_validation=num_validation)
