"""Files of images and videos as examples, with the text files and subtitles beside them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath

from bridgetower.data.sources.columns import Columns
from bridgetower.data.sources.example import (
    Example,
    FileGroup,
    Image,
    folder_caption,
    nonempty_texts,
)
from bridgetower.data.sources.fetch import (
    ListedFile,
    is_url,
    list_files,
    read_location,
    suffix_of,
    version_of,
)
from bridgetower.data.sources.text_files import MAX_TEXT_LENGTH

VIDEO_SUFFIXES = (
    ".avi",
    ".flv",
    ".m4v",
    ".mkv",
    ".mov",
    ".mp4",
    ".mpeg",
    ".mpg",
    ".ogv",
    ".ts",
    ".webm",
    ".wmv",
)
SUBTITLE_SUFFIXES = (".vtt", ".srt")

_LANGUAGE = (
    r"\.[A-Za-z]{2,3}([-_][A-Za-z0-9]+)*(\.(forced|sdh))?"  # in the name of a file of subtitles
)

logger = logging.getLogger(__name__)


def read_images(group: FileGroup, columns: Columns) -> Iterator[Example]:
    """Yields an example for each image, with its class and its captions."""
    for file in group.files:
        folder = PurePosixPath(file.name).parent
        is_split = group.split and len(folder.parts) == 1
        text_file = group.sidecars.get(file.name)
        texts: tuple[str, ...] = ()
        problem = ""
        if columns.captions_from == "folder":
            texts = folder_caption(file.name)
        elif text_file is not None:
            try:
                # A link to it must not show a file that is outside of the source.
                path = Path(text_file.location)
                if not is_url(file.location) and path.is_symlink():
                    root = Path(file.location.removesuffix(file.name)).resolve()
                    if not path.resolve().is_relative_to(root):
                        raise ValueError(
                            "it is a link to a file outside of the folder; copy it there"
                        )
                content = read_location(text_file.location, most=MAX_TEXT_LENGTH)
                texts = nonempty_texts(content.decode("utf-8-sig").splitlines())
            except (OSError, ValueError) as error:
                problem = f"{text_file.name}: {error}"
        yield Example(
            id=file.name,
            images=(Image(name=file.name, location=file.location, version=file.version),),
            texts=texts,
            fields={"label": folder.name} if folder.name and not is_split else {},
            origin=file.name,
            problem=problem,
        )


def read_video(group: FileGroup, columns: Columns) -> Iterator[Example]:
    """Yields an example for each moment of a video."""
    from bridgetower.data.sources.video import moments_of  # needs torch and PyAV

    (file,) = group.files
    try:
        moments, problems = moments_of(file, group.sidecars.get(file.name), columns.cutting)
    except (OSError, ValueError) as error:
        moments = []
        problems = [str(error)]
    for moment in moments:
        name = f"{file.name}#t={moment.start:.3f},{moment.end:.3f}"
        image = Image(
            name=name,
            location=file.location,
            moment=(moment.start, moment.end),
            version=file.version,
        )
        yield Example(id=name, images=(image,), texts=nonempty_texts([moment.text]), origin=name)
    if problems:
        yield Example(id=file.name, origin=file.name, problem="; ".join(problems))


def is_transport_stream(location: str) -> bool:
    """Returns whether a local file called .ts is a video and not TypeScript."""
    with suppress(OSError, ValueError):
        return read_location(location, (0, 1)) == b"G"
    return False


def videos_and_subtitles_beside(
    video: ListedFile,
) -> tuple[list[ListedFile], list[ListedFile]]:
    """Returns the videos and the subtitles in the folder of a video. HTTP lists no folder, and gives subtitles only."""
    if not is_url(video.location):
        paths = sorted(Path(video.location).parent.iterdir())
        files = [ListedFile(str(path), path.name) for path in paths]
    elif video.location.lower().startswith("http"):
        stem = video.location.partition("?")[0].rpartition(".")[0]
        name = PurePosixPath(stem).name
        files = [ListedFile(stem + suffix, name + suffix) for suffix in SUBTITLE_SUFFIXES]
    else:
        listed = list_files(video.location.rpartition("/")[0])
        files = [file for file in listed if "/" not in file.name]
    videos = [file for file in files if suffix_of(file.location) in VIDEO_SUFFIXES]
    subtitles = list[ListedFile]()
    for file in files:
        if suffix_of(file.location) in SUBTITLE_SUFFIXES:
            with suppress(FileNotFoundError):
                subtitles.append(replace(file, version=version_of(file.location)))
    return videos, subtitles


def subtitles_of(
    video: ListedFile, videos: Sequence[ListedFile], subtitles: Sequence[ListedFile]
) -> ListedFile | None:
    """Returns `NAME.vtt`, `NAME.srt` or `NAME.LANGUAGE.vtt` of a video, in this order, unless another video has it."""
    stem = _stem(video)
    other_stems = {_stem(file) for file in videos} - {stem}
    pattern = re.compile(rf"{re.escape(stem)}({_LANGUAGE})?\.(vtt|srt)", re.ASCII)
    matches = [
        file
        for file in subtitles
        if pattern.fullmatch(file.name) and _stem(file) not in other_stems
    ]
    matches.sort(key=lambda file: (file.name.count("."), not file.name.endswith(".vtt"), file.name))
    if len(matches) > 1:
        logger.warning(
            "%s has %d files of subtitles; %s is read", video.name, len(matches), matches[0].name
        )
    return matches[0] if matches else None


def _stem(file: ListedFile) -> str:
    return file.name.rpartition(".")[0]
