"""Prepares dataset folders: published sets from their files, sets of packages, generated scenes, a user's pictures."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from bridgetower.data import emoji, flag_questions, flags, pairs
from bridgetower.data.config import ArrowConfig, PairsConfig, PrepareConfig
from bridgetower.data.folders import write_collection, write_listed
from bridgetower.data.info import DatasetInfo
from bridgetower.data.listing import new_listing
from bridgetower.data.published.arrow import ARROW_SETS
from bridgetower.data.published.karpathy import COCO, FLICKR30K
from bridgetower.data.published.links import CC3M, SBU
from bridgetower.data.published.nlvr2 import NLVR2
from bridgetower.data.published.originals import Originals, OriginalSet
from bridgetower.data.published.snli_ve import SNLI_VE
from bridgetower.data.published.vgqa import VGQA
from bridgetower.data.published.visual_genome import VG
from bridgetower.data.published.vqav2 import VQAV2
from bridgetower.data.scenes.collect import collect as collect_scenes
from bridgetower.data.scenes.config import ScenesConfig
from bridgetower.data.sources import read_rows
from bridgetower.data.splits import ordered_splits
from bridgetower.files import sha256_of

SETS = {each.name: each for each in (COCO, FLICKR30K, VG, CC3M, SBU, VQAV2, VGQA, SNLI_VE, NLVR2)}

_FEW = 5  # files of a wrong folder that are named

_COLLECTORS = {"emoji": emoji.collect, "flags": flags.collect, "flag-questions": flag_questions.collect}


def prepare(
    name: Literal["emoji", "flags", "flag-questions"],
    out: Path,
    *,
    seed: int = 0,
    num_test: int | None = None,
    num_validation: int | None = None,
    progress: bool = True,
) -> DatasetInfo:
    """Writes a set of installed packages to the folder `out`; a complete one with the same settings is left as it is.

    Args:
        name: Which set.
        out: Dataset folder.
        seed: Seed of the split.
        num_test: Number of test pictures; None means 200 emoji, 50 flags.
        num_validation: Number of validation pictures; None means 200 emoji, 30 flags.
        progress: Whether to show progress, if standard error is a terminal.

    Raises:
        FileNotFoundError: If a package of the `demo` extra is missing.
        ValueError: If the name is unknown, or `out` holds something else.
    """
    if name not in _COLLECTORS:
        raise ValueError(f"no set called {name!r}; sets are {', '.join(_COLLECTORS)}")
    counts = {"num_test": num_test, "num_validation": num_validation}
    collection = _COLLECTORS[name](seed=seed, **{key: value for key, value in counts.items() if value is not None})
    return write_collection(Path(out), collection, progress=progress)


def prepare_scenes(out: Path, config: ScenesConfig | None = None, *, progress: bool = True) -> DatasetInfo:
    """Writes generated scenes to the folder `out`; a complete one with the same settings is left as it is.

    Args:
        out: Dataset folder.
        config: Which scenes.
        progress: Whether to show progress, if standard error is a terminal.

    Raises:
        ValueError: If `out` holds something else.
    """
    return write_collection(Path(out), collect_scenes(config or ScenesConfig()), progress=progress)


def prepare_set(
    name: str, source: Path, out: Path, config: PrepareConfig | None = None, *, progress: bool = True
) -> DatasetInfo:
    """Writes a published set to the folder `out`; a complete one of the same files is left as it is.

    An attempt that was cut off is continued: its finished Parquet files are kept.

    Args:
        name: Which of `SETS`.
        source: Folder with the original files.
        out: Dataset folder.
        config: What is prepared, and how much may be bad.
        progress: Whether to show progress, if standard error is a terminal.

    Raises:
        FileNotFoundError: If the source or an annotation file is missing.
        ValueError: If the name or a split is unknown, an annotation file cannot be read, too much is bad, or `out`
            holds something else.
    """
    made, config = SETS[name], config or PrepareConfig()
    if type(config) is not made.config:
        raise ValueError(f"{name} takes a {made.config.__name__}, given is a {type(config).__name__}")
    known = (*made.splits, *made.more_splits)
    unknown = [split for split in config.splits if split not in known]
    if unknown:
        raise ValueError(f"{name} has no split {', '.join(unknown)}; it has {', '.join(known)}")
    _check_folder(source, f"the original files of {name}")
    return _prepare_original(made, Path(source), Path(out), config, progress)


def prepare_arrow(
    source: Path, out: Path, config: ArrowConfig | None = None, *, progress: bool = True
) -> dict[str, DatasetInfo]:
    """Writes each set of which ViLT-style Arrow files lie in a folder to a folder of its own in `out`.

    Args:
        source: Folder with the files.
        out: Folder of the dataset folders, which are called like the sets.
        config: Which sets and splits, and how much may be bad.
        progress: Whether to show progress, if standard error is a terminal.

    Returns:
        What was written, by set.

    Raises:
        FileNotFoundError: If the source is missing, or has no file of a set or of one of its splits.
        ValueError: If a set or a split is unknown, a file cannot be read, too much is bad, or a folder in `out` holds
            something else.
    """
    source, config = Path(source), config or ArrowConfig()
    _check_folder(source, "ViLT-style Arrow files")
    names = [each.name for each in ARROW_SETS]
    unknown = [name for name in config.sets if name not in names]
    if unknown:
        raise ValueError(f"no set called {', '.join(unknown)}; sets are {', '.join(names)}")
    found = [each for each in ARROW_SETS if (each.name in config.sets if config.sets else each.any_in(source))]
    known = [split for each in found for split in each.all_stems]
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
        wanted = [split for split in config.splits if split in each.all_stems]
        if wanted or not config.splits:
            own = replace(config, splits=tuple(wanted))
            prepared[each.name] = _prepare_original(each.original(), source, Path(out) / each.name, own, progress)
    return prepared


def _check_folder(source: Path, what: str) -> None:
    if not Path(source).is_dir():
        raise FileNotFoundError(f"no folder {source}; give the folder with {what}")


def _prepare_original(made: OriginalSet, source: Path, out: Path, config: PrepareConfig, progress: bool) -> DatasetInfo:
    originals = Originals(folder=source, splits=config.splits or made.splits, progress=progress)
    with new_listing(made.kind) as listing:
        try:
            made.list(originals, listing, config)
        except (KeyError, TypeError, AttributeError) as error:  # of the content of an annotation file
            place = (originals.used or originals.large)[-1]
            raise ValueError(f"{place} is not as published ({error!r}); check that it is right") from error
        listed = listing.counts()
        listing.finish()
        listing.check_bad(source, config.max_bad)
        empty = listed.keys() - listing.counts().keys()
        if empty:
            raise ValueError(
                f"{source} has no usable image of {', '.join(ordered_splits(empty))}; check that it is the right source"
            )
        info = DatasetInfo(
            name=made.name,
            kind=made.kind,
            seed=0,
            split_rule=made.split_rule,
            protocol=made.protocol,
            sources={
                **{path.name: sha256_of(path) for path in originals.used},
                **{path.name: f"{path.stat().st_size} bytes" for path in originals.large},
            },
            licences=made.licences,
            settings=config.settings,
            left_out=listing.left_out(),
            num_left_out=listing.num_left_out(),
        )
        return write_listed(listing, source, out, info, config, progress=progress)


def prepare_pairs(source: Path, out: Path, config: PairsConfig | None = None, *, progress: bool = True) -> DatasetInfo:
    """Writes a user's own pictures and captions to the folder `out`; a complete one of the same source is left alone.

    An attempt that was cut off is continued: its finished Parquet files are kept.

    Args:
        source: A CSV, TSV, JSON-lines or Parquet file, or a folder; see `bridgetower.data.sources.read_rows`.
        out: Dataset folder.
        config: How the source is read and split.
        progress: Whether to show progress, if standard error is a terminal.

    Raises:
        FileNotFoundError: If the source is missing.
        ValueError: If it cannot be read, too many rows or pictures are bad, or `out` holds something else.
    """
    source, config = Path(source), config or PairsConfig()
    rows = read_rows(
        source,
        image_column=config.image_column,
        caption_column=config.caption_column,
        captions_from=config.captions_from,
    )
    with new_listing("captions") as listing:
        pairs.list_rows(source, rows, listing)
        listing.finish()
        listing.check_bad(source, config.max_bad)
        info = DatasetInfo(
            name=source.resolve().stem,
            seed=config.seed,
            split_rule=pairs.split_pictures(source, listing, config),
            sources={},
            licences={},
            settings=config.settings,
            left_out={},
        )
        return write_listed(listing, source, Path(out), info, config, progress=progress)
