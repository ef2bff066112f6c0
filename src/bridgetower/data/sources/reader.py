"""The reader of sources: folders, tables, tar shards, `datasets` repositories and videos, local or at URLs."""

from __future__ import annotations

import csv
import logging
import lzma
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import PurePosixPath

from bridgetower.data.sources.columns import ColumnError, Columns
from bridgetower.data.sources.example import IMAGE_SUFFIXES, Example, FileGroup
from bridgetower.data.sources.fetch import (
    COMPRESSION_SUFFIXES,
    ListedFile,
    is_url,
    list_files,
    suffix_of,
)
from bridgetower.data.sources.media import (
    SUBTITLE_SUFFIXES,
    VIDEO_SUFFIXES,
    is_transport_stream,
    read_images,
    read_video,
    subtitles_of,
    videos_and_subtitles_beside,
)
from bridgetower.data.sources.shards import read_shard
from bridgetower.data.sources.tables import ROW_READERS, SPLITS, read_table
from bridgetower.data.sources.text_files import read_captions, read_texts
from bridgetower.extras import install_command, is_installed, require
from bridgetower.files import check_path


@dataclass(frozen=True)
class SourceFormat:
    """Files that are read in one way.

    Attributes:
        kind: Names the format in groups of files and their versions.
        pattern: Matches the names of its files, without their folders.
        read: Yields the examples of a group of its files.
    """

    kind: str
    pattern: re.Pattern[str]
    read: Callable[[FileGroup, Columns], Iterator[Example]]


def _endings(suffixes: Iterable[str], compressions: Sequence[str] = ()) -> re.Pattern[str]:
    """Returns a pattern of names that end in a suffix, perhaps with that of a compression after it."""
    compression = f"({'|'.join(map(re.escape, compressions))})?" if compressions else ""
    suffix = "|".join(map(re.escape, suffixes))
    return re.compile(f".*({suffix}){compression}", re.IGNORECASE | re.DOTALL)


IMAGES = SourceFormat("images", _endings(IMAGE_SUFFIXES), read_images)
TEXTS = SourceFormat("texts", _endings([".txt"], COMPRESSION_SUFFIXES), read_texts)
VIDEOS = SourceFormat("video", _endings(VIDEO_SUFFIXES), read_video)
FORMATS = (
    # A table of the images of a folder, as `datasets` has it.
    SourceFormat("table", re.compile(r"metadata\.(csv|jsonl|parquet)"), read_table),
    SourceFormat("tar", _endings([".tar"], COMPRESSION_SUFFIXES), read_shard),
    SourceFormat("captions", re.compile(r"captions\.txt"), read_captions),
    # As `datasets.Dataset.save_to_disk` writes it.
    SourceFormat("table", re.compile(r"data-\d+-of-\d+\.arrow"), read_table),
    IMAGES,
    SourceFormat("table", _endings(ROW_READERS, COMPRESSION_SUFFIXES), read_table),
    TEXTS,
    VIDEOS,
)
"""Formats of files. A source is read as the first of them that it has, and its videos too."""

_FilesByFormat = defaultdict[SourceFormat | None, list[ListedFile]]

_READERS = {source_format.kind: source_format.read for source_format in FORMATS}
_IMAGES_TOGETHER = 2000  # images of a folder in a group
_SPLIT_IN_NAME = re.compile(rf"(?:^|[/_.-])({'|'.join(SPLITS)})(?=[/_.-]|$)")

logger = logging.getLogger(__name__)


def read(source: str | os.PathLike[str], columns: Columns | None = None) -> Iterator[Example]:
    """Yields the examples of a source, of which one that cannot be used has a problem.

    Args:
        source: A folder of images (with captions in text files, `captions.txt` or `metadata.*`, in class folders, in
            folders `train`, `val`, `test`), a table (CSV, TSV, JSON, JSON lines, Parquet, Arrow, perhaps compressed), a
            text file with a text per line, tar shards, a `datasets` repository or `save_to_disk` folder, a video; or
            the URL of one, perhaps with a `*` or with {000..099}.
        columns: Which columns are read.

    Raises:
        OSError: There is no such source.
        ValueError: It is none of these, or a column is missing.
    """
    columns = columns or Columns()
    return chain.from_iterable(read_group(group, columns) for group in file_groups(source))


def file_groups(source: str | os.PathLike[str]) -> list[FileGroup]:
    """Returns the groups of files of a source, each of which can be read on its own."""
    source = os.fspath(source)
    files, unreadable = _listed_files(source)

    # Group the files of the first format, and videos, which need an extra.
    files_of = _files_by_format(source, files)
    videos = files_of[VIDEOS]
    groups = _groups_without_videos(source, files_of, is_alone=len(files) == 1)
    if videos and not is_installed("av"):
        if not groups:
            require("video")
        problem = f"the extra 'video' is missing: {install_command('video')}"
        unreadable += [replace(file, problem=problem) for file in videos]
    elif videos:
        # The subtitles of a video that is given alone are those of its folder.
        neighbours = videos
        subtitles = [file for file in files if suffix_of(file.location) in SUBTITLE_SUFFIXES]
        if len(files) + len(unreadable) == 1:
            neighbours, subtitles = videos_and_subtitles_beside(videos[0])
        for video in videos:
            groups.append(_group_of("video", video, subtitles_of(video, neighbours, subtitles)))
    if not groups and not unreadable:
        raise ValueError(
            f"{source} has nothing that can be read; expected images, a table, tar shards or videos"
        )

    # Splits count only where all files have one.
    if not all(group.split for group in groups):
        groups = [replace(group, split="") for group in groups]
    return [*groups, *(FileGroup(kind="problem", files=(file,)) for file in unreadable)]


def _listed_files(source: str) -> tuple[list[ListedFile], list[ListedFile]]:
    """Returns the files of a source that can be read, and those that cannot."""
    if not is_url(source):
        check_path(source)
    try:
        listed = list(list_files(source))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no file or folder {source}; give a folder of images, a table or tar shards"
        ) from error
    unreadable = [file for file in listed if file.problem]
    if len(listed) == 1 and unreadable and unreadable[0].location == source:
        raise ValueError(f"{source}: {unreadable[0].problem}")
    return [file for file in listed if not file.problem], unreadable


def _files_by_format(source: str, files: Sequence[ListedFile]) -> _FilesByFormat:
    """Groups files by the first format whose pattern their names match, or None, and logs those of none."""
    files_of: _FilesByFormat = defaultdict(list)
    # A file of captions that is given alone has texts.
    formats = [entry for entry in FORMATS if len(files) > 1 or entry.kind != "captions"]
    for file in files:
        name = PurePosixPath(file.name).name
        match = next((entry for entry in formats if entry.pattern.fullmatch(name)), None)
        may_be_typescript = name.lower().endswith(".ts") and not is_url(file.location)
        if may_be_typescript and not is_transport_stream(file.location):
            match = None
        files_of[match].append(file)

    unread = Counter(suffix_of(file.location) or file.name for file in files_of[None])
    for suffix in SUBTITLE_SUFFIXES:
        unread.pop(suffix, None)
    if unread:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in unread.most_common(8))
        logger.warning("%s: files that are not read were skipped: %s", source, counts)
    return files_of


def _groups_without_videos(
    source: str, files_of: _FilesByFormat, *, is_alone: bool
) -> list[FileGroup]:
    """Groups the files of the first format that a source has."""
    images = files_of[IMAGES]
    for source_format in FORMATS:
        files = files_of[source_format]
        if not files or source_format is VIDEOS:
            continue
        if source_format is IMAGES:
            return list(_image_groups(images, files_of[TEXTS]))
        if source_format.kind == "tar" and images:
            raise ValueError(
                f"{source} has both tar shards ({files[0].name}) and images ({images[0].name}); give one of them"
            )
        # JSON files beside others are annotations or settings.
        return [
            _group_of(source_format.kind, file)
            for file in files
            if is_alone or suffix_of(file.location) != ".json"
        ]
    return []


def _group_of(kind: str, file: ListedFile, sidecar: ListedFile | None = None) -> FileGroup:
    split = _SPLIT_IN_NAME.search(file.name.lower())
    return FileGroup(
        kind=kind,
        files=(file,),
        sidecars={file.name: sidecar} if sidecar else {},
        split=SPLITS[split[1]] if split else "",
    )


def _image_groups(images: Sequence[ListedFile], texts: Sequence[ListedFile]) -> Iterator[FileGroup]:
    """Groups images by the split that their first folder is named after, if it is."""
    images_of = defaultdict[str, list[ListedFile]](list)
    for image in images:
        folder, separator, _ = image.name.partition("/")
        images_of[SPLITS.get(folder.lower(), "") if separator else ""].append(image)
    text_files = {file.name: file for file in texts}
    for split, group in images_of.items():
        for start in range(0, len(group), _IMAGES_TOGETHER):
            files = group[start : start + _IMAGES_TOGETHER]
            sidecars = dict[str, ListedFile]()
            for file in files:
                text_name = f"{file.name.rpartition('.')[0]}.txt"
                if text_name in text_files:
                    sidecars[file.name] = text_files[text_name]
            yield FileGroup(kind="images", files=tuple(files), sidecars=sidecars, split=split)


def read_group(group: FileGroup, columns: Columns) -> Iterator[Example]:
    """Yields the examples of a group. Where a file cannot be read on, the last example has the problem."""
    file = group.files[0]
    if group.kind == "problem":
        yield Example(id=file.name, origin=file.name, problem=file.problem)
        return
    try:
        for example in _READERS[group.kind](group, columns):
            yield example if example.split else replace(example, split=group.split)
    except ColumnError:
        raise
    except (ValueError, OSError, EOFError, csv.Error, lzma.LZMAError) as error:
        # Errors of the disk or the network say nothing of the file.
        if isinstance(error, OSError) and (error.errno or is_url(file.location)):
            raise
        problem = f"{error}; the rest of it is not read"
        yield Example(id=file.name, origin=file.name, problem=problem)
