"""Published sets, and their preparation from the files of their authors."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from bridgetower.data.config import PrepareConfig
from bridgetower.data.sets.custom import finished_set
from bridgetower.data.sets.datasets.sets import DATASETS as DATASETS
from bridgetower.data.sets.datasets.spec import (
    ROWS,
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
    """Writes one of `DATASETS`, or a custom set, to a folder; a complete one of the same files is left as it is."""
    known = [name for name, each in DATASETS.items() if each.fill]
    if isinstance(dataset, str) and dataset not in known:
        raise ValueError(f"no set called {dataset!r}; sets are {', '.join(known)}")
    spec = DATASETS[dataset] if isinstance(dataset, str) else dataset
    source, out, config = Path(source), Path(out), config or PrepareConfig()
    if type(config) is not spec.config:
        raise ValueError(
            f"{spec.name} takes a {spec.config.__name__}, given is a {type(config).__name__}"
        )
    splits = (*spec.splits, *spec.more_splits)
    unknown = [split for split in config.splits if split not in splits]
    if unknown:
        raise ValueError(
            f"{spec.name} has no split {', '.join(unknown)}; it has {', '.join(splits)}"
        )
    if not source.is_dir():
        raise FileNotFoundError(
            f"no folder {source}; give the folder with the original files of {spec.name}"
        )
    originals = Originals(folder=source, splits=config.splits or spec.splits, progress=progress)
    settings = {"set": spec.name, **config.settings, "splits": list(originals.splits)}

    def mark(path: Path) -> str:  # of a file with images its size
        return f"{path.stat().st_size} bytes" if path.suffix == ".arrow" else sha256_of(path)

    if finished := finished_set(out, settings, config.max_errors):
        there = {name: source / name for name in finished.sources if (source / name).is_file()}
        if changed := [
            name for name, path in there.items() if mark(path) != finished.sources[name]
        ]:
            raise ValueError(
                f"{out} holds a set of another {changed[0]}; choose another folder, or remove it"
            )
        return finished
    with SetWriter(out, spec.schema, config, progress=progress) as writer:
        assert spec.fill is not None  # as the callers check
        try:
            spec.fill(originals, writer, config)
        except (
            KeyError,
            TypeError,
            AttributeError,
        ) as error:  # of the content of an annotation file
            place = (originals.used or originals.large)[-1]
            raise ValueError(
                f"{place} is not as published ({error!r}); check that it is right"
            ) from error
        info = DatasetInfo(
            name=spec.name,
            split_rule=spec.split_rule,
            protocol=spec.protocol,
            sources={
                str(path.relative_to(source)) if path.is_relative_to(source) else path.name: mark(
                    path
                )
                for path in (*originals.used, *originals.large)
            },
            licences=spec.licences,
            settings=settings,
        )
        return writer.finish(source, info, splits=originals.splits)


def prepare_arrow(
    source: Path, out: Path, config: ArrowConfig | None = None, *, progress: bool = True
) -> dict[str, DatasetInfo]:
    """Writes each set of which ViLT-style Arrow files lie in a folder to a folder of its own in `out`."""
    source, config = Path(source), config or ArrowConfig()
    if not source.is_dir():
        raise FileNotFoundError(f"no folder {source}; give the folder with ViLT-style Arrow files")
    unknown = [name for name in config.sets if name not in DATASETS]
    if unknown:
        raise ValueError(f"no set called {', '.join(unknown)}; sets are {', '.join(DATASETS)}")
    found = [
        replace(
            each,
            splits=tuple(files.stems),
            more_splits=tuple(files.more_stems),
            split_rule=files.split_rule or each.split_rule,
            protocol=ROWS[each.schema.name].protocol,
            licences={"images and texts": f"as those of {each.name}"},
            config=ArrowConfig,
            fill=partial(fill_from_arrow, files),
        )
        for each in DATASETS.values()
        if (files := each.arrow)
        and (each.name in config.sets if config.sets else files.any_in(source))
    ]
    known = [split for each in found for split in (*each.splits, *each.more_splits)]
    if not found:
        there = sorted(path.name for path in source.glob("*.arrow"))
        raise FileNotFoundError(
            f"{source} has {', '.join(there[:5]) or 'no file'}{', …' if len(there) > 5 else ''}; expected Arrow "
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
            prepared[each.name] = prepare_set(
                each, source, Path(out) / each.name, own, progress=progress
            )
    return prepared
