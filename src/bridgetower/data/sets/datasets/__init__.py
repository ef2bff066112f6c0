"""Published sets, and their preparation from the files of their authors."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bridgetower.data.config import PrepareConfig
from bridgetower.data.sets.custom import check_config, finished_set
from bridgetower.data.sets.datasets.sets import DATASETS as DATASETS
from bridgetower.data.sets.datasets.spec import (
    ARROW_ROWS,
    ArrowConfig,
    DatasetSpec,
    Originals,
    fill_from_arrow,
)
from bridgetower.data.sets.prepared_set import DatasetInfo, SetWriter
from bridgetower.files import sha256_of


def prepare_set(
    dataset: str | DatasetSpec,
    source: Path,
    out: Path,
    config: PrepareConfig | None = None,
    *,
    progress: bool = True,
) -> DatasetInfo:
    """Writes a published set to a folder, unless the folder has the complete set of the same files.

    Args:
        dataset: Name of one of `DATASETS`, or a custom specification.
        source: Folder with the original files.
        out: Folder of the set.
        config: How the set is prepared.
        progress: Show bars, or log lines where standard error is no terminal.

    Raises:
        FileNotFoundError: The source or a file of it is missing.
        ValueError: The set or a split is unknown, a file is not as published, too much of the source is bad, or `out`
            holds another set.
    """
    # What can be refused is refused before anything is written.
    if isinstance(dataset, str):
        names = [name for name, spec in DATASETS.items() if spec.fill]
        if dataset not in names:
            raise ValueError(f"no set called {dataset!r}; sets are {', '.join(names)}")
        spec = DATASETS[dataset]
    else:
        spec = dataset
    source = Path(source)
    out = Path(out)
    config = config or PrepareConfig()
    check_config(spec.name, config, spec.config)
    unknown = [split for split in config.splits if split not in spec.all_splits]
    if unknown:
        raise ValueError(
            f"{spec.name} has no split {', '.join(unknown)}; it has {', '.join(spec.all_splits)}"
        )
    if not source.is_dir():
        raise FileNotFoundError(
            f"no folder {source}; give the folder with the original files of {spec.name}"
        )

    # A finished set stays as it is.
    originals = Originals(folder=source, splits=config.splits or spec.splits, progress=progress)
    settings = {"set": spec.name, **config.settings, "splits": list(originals.splits)}
    finished = finished_set(out, settings, config.max_errors)
    if finished:
        for name, identity in finished.sources.items():
            if _identity(source / name) not in ("", identity):
                raise ValueError(
                    f"{out} holds a set of another {name}; choose another folder, or remove it"
                )
        return finished

    with SetWriter(out, spec.schema, config, progress=progress) as writer:
        fill: Any = spec.fill
        try:
            fill(originals, writer, config)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{originals.used[-1]} is not as published ({error!r}); check that it is right"
            ) from error

        # The files that were read are named with their digests.
        sources = {}
        for path in originals.used:
            name = str(path.relative_to(source)) if path.is_relative_to(source) else path.name
            sources[name] = _identity(path)
        info = DatasetInfo(
            name=spec.name,
            split_rule=spec.split_rule,
            protocol=spec.protocol,
            sources=sources,
            licences=spec.licences,
            settings=settings,
        )
        return writer.finish(source, info, splits=originals.splits)


def _identity(path: Path) -> str:
    """Returns the digest of a file, the size of an Arrow file, which is large, or nothing if there is none."""
    if not path.is_file():
        return ""
    return f"{path.stat().st_size} bytes" if path.suffix == ".arrow" else sha256_of(path)


def prepare_arrow(
    source: Path, out: Path, config: ArrowConfig | None = None, *, progress: bool = True
) -> dict[str, DatasetInfo]:
    """Writes the sets whose ViLT-style Arrow files lie in a folder, each to a folder of its own in `out`.

    Raises:
        FileNotFoundError: The source is missing or has no such file.
        ValueError: A set or a split is unknown, or as for `prepare_set`.
    """
    source = Path(source)
    config = config or ArrowConfig()
    if not source.is_dir():
        raise FileNotFoundError(f"no folder {source}; give the folder with ViLT-style Arrow files")
    unknown_sets = [name for name in config.sets if name not in DATASETS]
    if unknown_sets:
        raise ValueError(f"no set called {', '.join(unknown_sets)}; sets are {', '.join(DATASETS)}")

    # Sets that are named, or that have a file.
    specs = []
    for spec in DATASETS.values():
        files = spec.arrow
        if files and (spec.name in config.sets if config.sets else files.any_in(source)):
            arrow_spec = replace(
                spec,
                splits=tuple(files.stems),
                more_splits=tuple(files.more_stems),
                split_rule=files.split_rule or spec.split_rule,
                protocol=ARROW_ROWS[spec.schema.name].protocol,
                licences={"images and texts": f"as those of {spec.name}"},
                config=ArrowConfig,
                fill=partial(fill_from_arrow, files),
            )
            specs.append(arrow_spec)

    # There are such sets, and each split is one of theirs.
    if not specs:
        names = sorted(path.name for path in source.glob("*.arrow"))
        raise FileNotFoundError(
            f"{source} has {', '.join(names[:5]) or 'no file'}{', …' if len(names) > 5 else ''}; expected Arrow "
            "files as the official code names them, such as coco_caption_karpathy_train.arrow"
        )
    all_splits = dict.fromkeys(split for spec in specs for split in spec.all_splits)
    unknown_splits = [split for split in config.splits if split not in all_splits]
    if unknown_splits:
        raise ValueError(
            f"no split {', '.join(unknown_splits)} of {', '.join(spec.name for spec in specs)}; splits are "
            f"{', '.join(all_splits)}"
        )

    # Sets without any of the splits are left out.
    prepared = {}
    for spec in specs:
        splits = tuple(split for split in config.splits if split in spec.all_splits)
        if splits or not config.splits:
            folder = Path(out) / spec.name
            split_config = replace(config, splits=splits)
            prepared[spec.name] = prepare_set(spec, source, folder, split_config, progress=progress)
    return prepared
