"""The one reader of sources: folders, tables, tar shards, `datasets` repositories, videos; local or at URLs."""

from __future__ import annotations

import base64
import binascii
import codecs
import csv
import io
import json
import logging
import lzma
import os
import posixpath
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal

from bridgetower.data.sources.column_files import ColumnFile, cell_bytes
from bridgetower.data.sources.columns import (
    IMAGES,
    ColumnError,
    ColumnRoles,
    Columns,
    columns_named,
    listed_names,
    missing_column_message,
    roles_of,
)
from bridgetower.data.sources.example import IMAGE_SUFFIXES, Example, Image
from bridgetower.data.sources.fetch import (
    ListedFile,
    is_url,
    list_files,
    open_location,
    read_location,
    suffix_of,
    version_of,
)
from bridgetower.data.sources.json_lists import JsonLists
from bridgetower.extras import install, is_installed, require
from bridgetower.files import check_path

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
SPLITS = {  # as sources name them, and their names here
    **{"train": "train", "training": "train", "test": "test", "testing": "test"},
    **{"validation": "validation", "valid": "validation", "val": "validation", "dev": "validation"},
}

_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow")
_OF_ROWS = {**dict.fromkeys(_TABLES, "table"), ".tar": "tar", ".txt": "texts"}
_KINDS = {
    **dict.fromkeys(IMAGE_SUFFIXES, "images"),
    **dict.fromkeys(VIDEO_SUFFIXES, "video"),
    **dict.fromkeys(SUBTITLE_SUFFIXES, "subtitles"),
    **{
        suffix + packed: kind
        for suffix, kind in _OF_ROWS.items()
        for packed in ("", ".gz", ".bz2", ".xz", ".zst")
    },
}
_DESCRIBES = re.compile(
    r"metadata\.(csv|jsonl|parquet)"
)  # a table of the images of a folder, as `datasets` has it
_LONGEST = (
    2**20
)  # characters of a line of a text file or of a cell, bytes of a header in a tar shard
_LONGEST_ROW = 2**24  # characters of a row of a table, which may have images as base64
_LARGEST = 2**29  # bytes of an image in a tar shard
_PART = 2000  # images of a folder that are read together
_STATED_DELIMITER = re.compile(r"sep=(.)\s*")  # a first line for Excel
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII | re.IGNORECASE)
_HEAD = 64  # bytes of a file that are looked at
_BASE64 = re.compile(r"[A-Za-z0-9+/]{64}[A-Za-z0-9+/\s]*={0,2}\s*")
_IMAGE_HEAD = re.compile(  # of JPEG, PNG, GIF, WebP, BMP, TIFF, and AVIF or HEIC
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8|RIFF....WEBP|BM....\0\0\0\0|II\*\0|MM\0\*|....ftyp", re.DOTALL
)
_IN_NAME = re.compile(
    r"(?:^|[/_.-])(train|training|validation|valid|val|dev|test|testing)(?=[/_.-]|$)"
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FileGroup:
    """Files of a source that are read together: a table, a tar shard, a video, or some images of a folder."""

    kind: Literal["table", "tar", "texts", "captions", "images", "video", "problem"]
    files: tuple[ListedFile, ...]
    sidecars: Mapping[str, ListedFile] = field(
        default_factory=dict
    )  # texts and subtitles, by the name of the image or video
    split: str = ""  # that the names of the files give

    @property
    def version(self) -> str:
        """What changes when a file does."""
        return " ".join(
            [
                self.kind,
                *(
                    f"{one.location} {one.version}"
                    for one in (*self.files, *self.sidecars.values())
                ),
            ]
        )


def read(source: str | os.PathLike[str], columns: Columns | None = None) -> Iterator[Example]:
    """Yields the examples of a source; what cannot be used comes with its problem.

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
    return chain.from_iterable(read_group(part, columns) for part in file_groups(source))


def file_groups(source: str | os.PathLike[str]) -> list[FileGroup]:
    """Returns the parts of a source, each of which can be read on its own; see `read`."""
    source = os.fspath(source)
    if not is_url(source):
        check_path(source)
    try:
        listed = list(list_files(source))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no file or folder {source}; give a folder of images, a table or tar shards"
        ) from error
    bad = [one for one in listed if one.problem]
    files = [one for one in listed if not one.problem]
    if len(listed) == 1 and listed[0].location == source and bad:
        raise ValueError(f"{source}: {bad[0].problem}")
    kinds = defaultdict[str, list[ListedFile]](list)
    for one in files:
        kinds[_kind(one)].append(one)
    images, tables, tars, videos, subtitles = (
        kinds[name] for name in ("images", "table", "tar", "video", "subtitles")
    )
    captions = [one for one in kinds["texts"] if PurePosixPath(one.name).name == "captions.txt"]
    described = [one for one in tables if _DESCRIBES.fullmatch(PurePosixPath(one.name).name)]
    if tars and images and not described:
        raise ValueError(
            f"{source} has both tar shards ({tars[0].name}) and images ({images[0].name}); give one of them"
        )
    # As `datasets.Dataset.save_to_disk` writes it.
    saved = any(
        PurePosixPath(one.name).name in ("state.json", "dataset_dict.json") for one in files
    )
    arrow = [one for one in tables if saved and suffix_of(one.location) == ".arrow"]
    choices = (
        *(
            ("table", described),
            ("tar", tars),
            ("captions", captions if len(files) > 1 else []),
            ("table", arrow),
        ),
        *(("images", images), ("table", tables), ("texts", kinds["texts"])),
    )
    kind, chosen = next((choice for choice in choices if choice[1]), ("", []))
    if kind == "images":
        found = [*_image_parts(images, {one.name: one for one in kinds["texts"]})]
    else:
        chosen = [one for one in chosen if len(files) == 1 or suffix_of(one.location) != ".json"]
        found = [_part(kind, one) for one in chosen]
    if videos and not found:
        require("video")
    if videos and not is_installed("av"):
        bad += [
            replace(one, problem=f"the extra 'video' is missing: {install('video')}")
            for one in videos
        ]
    elif videos:
        if len(listed) == 1:
            videos, subtitles = _beside(videos[0])
        found += [
            _part("video", one, _subtitles_of(one, videos, subtitles)) for one in kinds["video"]
        ]
    if kinds["other"] and not saved:
        unused = Counter(suffix_of(one.location) or one.name for one in kinds["other"])
        counts = ", ".join(f"{count} {suffix}" for suffix, count in unused.most_common(8))
        logger.warning("%s: files that are not read were skipped: %s", source, counts)
    if not found and not bad:
        raise ValueError(
            f"{source} has nothing that can be read; expected images, a table, tar shards or videos"
        )
    if found and not all(part.split for part in found):
        found = [replace(part, split="") for part in found]
    return [*found, *(FileGroup(kind="problem", files=(one,)) for one in bad)]


def read_group(part: FileGroup, columns: Columns) -> Iterator[Example]:
    """Yields the examples of a part of a source; of a file that cannot be read on, the last one has the problem."""
    file = part.files[0]
    if part.kind == "problem":
        yield Example(id=file.name, origin=file.name, problem=file.problem)
        return
    read = {
        "table": _table,
        "tar": _tar,
        "captions": _captions,
        "texts": _texts,
        "images": _images,
        "video": _video,
    }
    try:
        for example in read[part.kind](part, columns):
            yield example if example.split else replace(example, split=part.split)
    except ColumnError:
        raise
    except (ValueError, OSError, EOFError, csv.Error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and (error.errno or is_url(file.location)):
            raise  # of the disk or the network: the file may be sound
        yield Example(
            id=file.name, origin=file.name, problem=f"{error}; the rest of it is not read"
        )


def _kind(file: ListedFile) -> str:
    suffix = suffix_of(file.location)
    if suffix == ".ts" and not is_url(file.location):  # which is also the ending of TypeScript
        with suppress(OSError, ValueError):
            return "video" if read_location(file.location, (0, 1)) == b"G" else "other"
        return "other"
    return _KINDS.get(suffix, "other")


def _part(kind: Any, file: ListedFile, beside: ListedFile | None = None) -> FileGroup:
    split = _IN_NAME.search(file.name.lower())
    near = {file.name: beside} if beside else {}
    return FileGroup(
        kind=kind, files=(file,), sidecars=near, split=SPLITS[split[1]] if split else ""
    )


def _image_parts(
    images: Sequence[ListedFile], texts: Mapping[str, ListedFile]
) -> Iterator[FileGroup]:
    """Groups images by the split that their first folder is named after, if it is."""
    by_split: dict[str, list[ListedFile]] = {}
    for image in images:
        first = image.name.partition("/")[0].lower()
        by_split.setdefault(SPLITS.get(first, "") if "/" in image.name else "", []).append(image)
    for split, group in by_split.items():
        for start in range(0, len(group), _PART):
            chosen = tuple(group[start : start + _PART])
            stems = ((one.name, f"{one.name.rpartition('.')[0]}.txt") for one in chosen)
            beside = {name: texts[text] for name, text in stems if text in texts}
            yield FileGroup(kind="images", files=chosen, sidecars=beside, split=split)


def _beside(video: ListedFile) -> tuple[list[ListedFile], list[ListedFile]]:
    """Returns the videos and the subtitles in the folder of a video that is given alone; HTTP lists no folder."""
    if not is_url(video.location):
        near = [
            ListedFile(str(path), path.name)
            for path in sorted(Path(video.location).parent.iterdir())
        ]
    elif video.location.lower().startswith("http"):
        stem = video.location.partition("?")[0].rpartition(".")[0]
        near = [
            ListedFile(f"{stem}{suffix}", PurePosixPath(stem).name + suffix)
            for suffix in SUBTITLE_SUFFIXES
        ]
    else:
        near = [one for one in list_files(video.location.rpartition("/")[0]) if "/" not in one.name]
    subtitles = list[ListedFile]()
    for one in near:
        if suffix_of(one.location) in SUBTITLE_SUFFIXES:
            with suppress(FileNotFoundError):
                subtitles.append(replace(one, version=version_of(one.location)))
    return [one for one in near if suffix_of(one.location) in VIDEO_SUFFIXES], subtitles


def _subtitles_of(
    video: ListedFile, videos: Sequence[ListedFile], subtitles: Sequence[ListedFile]
) -> ListedFile | None:
    """Returns `NAME.vtt`, `NAME.srt` or `NAME.LANGUAGE.vtt` of a video, in this order, unless it is another video's."""
    stem = video.name.rpartition(".")[0]
    others = {one.name.rpartition(".")[0] for one in videos} - {stem}
    language = re.compile(
        re.escape(stem) + r"\.([A-Za-z]{2,3}([-_][A-Za-z0-9]+)*(\.(forced|sdh))?\.)?(vtt|srt)",
        re.ASCII,
    )
    found = [
        one
        for one in subtitles
        if language.fullmatch(one.name) and one.name.rpartition(".")[0] not in others
    ]
    found.sort(key=lambda one: (one.name.count("."), not one.name.endswith(".vtt"), one.name))
    if len(found) > 1:
        logger.warning(
            "%s has %d files of subtitles; %s is read", video.name, len(found), found[0].name
        )
    return found[0] if found else None


def _images(part: FileGroup, columns: Columns) -> Iterator[Example]:
    for file in part.files:
        image = Image(name=file.name, location=file.location, version=file.version)
        folder, beside = PurePosixPath(file.name).parent, part.sidecars.get(file.name)
        is_class = folder.name and not (part.split and len(folder.parts) == 1)
        fields, texts, problem = {"label": folder.name} if is_class else {}, tuple[str, ...](), ""
        if columns.captions_from == "folder":
            texts = _stripped([re.sub(r"[_-]+", " ", folder.name)])
        elif beside is not None:
            try:
                root = Path(file.location.removesuffix(file.name)).resolve()
                is_link = not is_url(file.location) and Path(beside.location).is_symlink()
                if is_link and not Path(beside.location).resolve().is_relative_to(
                    root
                ):  # which an index would then show
                    raise ValueError("it is a link to a file outside of the folder; copy it there")
                texts = _stripped(
                    read_location(beside.location, most=_LONGEST).decode("utf-8-sig").splitlines()
                )
            except (OSError, ValueError) as error:
                problem = f"{beside.name}: {error}"
        yield Example(
            id=file.name,
            images=(image,),
            texts=texts,
            fields=fields,
            origin=file.name,
            problem=problem,
        )


def _video(part: FileGroup, columns: Columns) -> Iterator[Example]:
    from bridgetower.data.sources.video import moments_of  # needs torch and PyAV

    (file,) = part.files
    try:
        moments, problems = moments_of(file, part.sidecars.get(file.name), columns.cutting)
    except (OSError, ValueError) as error:
        moments, problems = [], [str(error)]
    for one in moments:
        name = f"{file.name}#t={one.start:.3f},{one.end:.3f}"
        image = Image(
            name=name, location=file.location, moment=(one.start, one.end), version=file.version
        )
        yield Example(id=name, images=(image,), texts=_stripped([one.text]), origin=name)
    if problems:
        yield Example(id=file.name, origin=file.name, problem="; ".join(problems))


class _Headers:
    """A tar archive of which headers are read, so many bytes for each member."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self._read, self.left = file.seek, file.tell, file.read, _LONGEST

    def read(self, size: int) -> bytes:
        self.left -= size
        if size < 0 or self.left < 0:
            raise tarfile.ReadError(f"a header has more than {_LONGEST} bytes")
        return self._read(size)


def _members(opened: BinaryIO) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yields the key, the suffix and the header of each file; as in WebDataset, a key ends at the first full stop."""
    headers = _Headers(opened)
    with tarfile.open(fileobj=headers, mode="r:") as archive:  # type: ignore[call-overload]
        while (member := archive.next()) is not None:
            if member.size < 0:
                raise tarfile.ReadError(f"{member.name} has {member.size} bytes")
            if member.isfile():
                path = PurePosixPath(member.name)
                stem, dot, ending = path.name.partition(".")
                yield str(path.parent / stem), (dot + ending).lower(), member
            archive.members, archive.pax_headers = (
                [],
                {},
            )  # kept to find members by name, without bound
            headers.left = _LONGEST
        opened.seek(archive.offset)
        if opened.read(tarfile.BLOCKSIZE) != bytes(
            tarfile.BLOCKSIZE
        ):  # half a header counts as the end
            raise tarfile.ReadError("no end of the archive")


def _tar(part: FileGroup, columns: Columns) -> Iterator[Example]:
    """Reads a shard of WebDataset or img2dataset: members of one key are an image, its `.txt` and its `.json`."""
    (file,), seen = part.files, set[int]()
    with open_location(file.location) as opened:
        try:
            for key, members in groupby(_members(opened), lambda one: one[0]):
                example = _sample(file, key, members, opened)
                again = hash(key) in seen
                seen.add(hash(key))
                yield (
                    replace(example, problem="the shard has its key twice; write it again")
                    if again
                    else example
                )
        except (tarfile.TarError, ValueError, EOFError, RecursionError, OverflowError) as error:
            problem = f"it is no tar archive, or cut off ({error}); copy it again"
            yield Example(id=file.name, origin=file.name, problem=problem)


def _sample(
    file: ListedFile,
    key: str,
    members: Iterable[tuple[str, str, tarfile.TarInfo]],
    opened: BinaryIO,
) -> Example:
    images, details = list[Image](), dict[str, Any]()
    text, problem = None, ""
    for _, suffix, member in members:
        is_image, content = suffix in IMAGE_SUFFIXES, None
        if not is_image and suffix not in (".txt", ".json"):
            continue
        most = _LARGEST if is_image else _LONGEST
        if member.issparse():
            problem = f"{member.name} is stored as a sparse file; pack the shard without --sparse"
            continue
        if member.size > most:
            problem = f"{member.name} has {member.size} bytes; expected at most {most}"
            continue
        if not is_image or is_url(file.location):
            opened.seek(member.offset_data)
            content = opened.read(member.size)
        try:
            if is_image:
                name, piece = f"{file.name}/{member.name}", (member.offset_data, member.size)
                images.append(
                    Image(
                        name=name,
                        location=file.location,
                        piece=piece,
                        version=file.version,
                        content=content,
                    )
                )
            elif suffix == ".txt":
                text = (content or b"").decode()
            else:
                parsed = json.loads(content or b"")
                details = parsed if isinstance(parsed, dict) else {"json": parsed}
        except (ValueError, RecursionError) as error:
            problem = f"{member.name} cannot be read ({error})"
    caption = details.get("caption") if text is None else text
    return Example(
        id=key,
        images=tuple(images),
        texts=_stripped([caption if isinstance(caption, str) else ""]),
        fields=details,
        origin=f"{key} in {file.name}",
        problem=problem or ("" if images else "there is no image of this key"),
    )


def _texts(part: FileGroup, columns: Columns) -> Iterator[Example]:
    (file,) = part.files
    for number, line in enumerate(_lines(file), start=1):
        if line.strip():
            texts, problem = (
                ((line.strip(),), "") if len(line) <= _LONGEST else ((), _too_long(_LONGEST))
            )
            origin = f"{file.name} line {number}"
            yield Example(id=f"{file.name}/{number}", texts=texts, origin=origin, problem=problem)


def _captions(part: FileGroup, columns: Columns) -> Iterator[Example]:
    """Reads lines "image TAB caption" or "image,caption", with or without a header."""
    (file,), separator = part.files, ""
    for number, line in enumerate(map(str.strip, _lines(file)), start=1):
        separator = separator or ("\t" if "\t" in line else ",")
        name, _, caption = line.partition(separator)
        if not line or (number == 1 and columns_named([name], IMAGES.names)):
            continue
        if (
            len(caption) > 1 and caption[0] == caption[-1] == '"'
        ):  # as CSV writers quote one with commas
            caption = caption[1:-1].replace('""', '"')
        origin = f"{file.name} line {number}"
        if len(line) > _LONGEST:
            yield Example(id=f"{file.name}/{number}", origin=origin, problem=_too_long(_LONGEST))
        else:
            # Flickr30k numbers the captions of an image: "1000092795.jpg#0".
            image = _named_image(file, re.sub(r"#\d+$", "", name.strip()))
            yield Example(id=image.name, images=(image,), texts=_stripped([caption]), origin=origin)


def _table(part: FileGroup, columns: Columns) -> Iterator[Example]:
    """Yields the rows of a table; of a wrong row the example has the problem, and the next ones follow."""
    (file,) = part.files
    suffix = suffix_of(file.location)
    is_json = ".json" in suffix or ".ndjson" in suffix
    if suffix in (".parquet", ".arrow"):
        rows = _columnar_rows(file)
    else:
        rows = _json_rows(file) if is_json else _csv_rows(file)
    names: tuple[str, ...] = ()
    missing_named = columns.named
    missing = list(columns.required)
    for number, (origin, cells) in enumerate(rows, start=1):
        if isinstance(cells, str):  # a problem
            yield Example(id=f"{file.name}/{number}", origin=origin, problem=cells)
            continue
        if tuple(cells) != names:
            names = tuple(cells)
            roles = roles_of(file, cells, columns)
            missing_named.difference_update(names)
            missing = [column for column in missing if not roles.has(column, names)]
            if (missing_named or missing) and not is_json:  # whose rows all have the same columns
                break
        yield _row(file, number, origin, cells, roles, columns)
    if names and missing_named:
        raise ColumnError(
            f"no row of {file.name} has a column {', '.join(sorted(missing_named))}; it has {listed_names(names)}"
        )
    if names and missing:
        raise ColumnError(missing_column_message(file, missing[0], names, columns.required))


def _row(
    file: ListedFile,
    number: int,
    origin: str,
    cells: Mapping[str, Any],
    roles: ColumnRoles,
    columns: Columns,
) -> Example:
    row_id = f"{file.name}/{number}"
    images = list[Image]()
    try:
        for column in roles.images:
            for cell in _as_list(cells[column]):
                if isinstance(cell, Image):
                    images.append(cell)
                elif text := _text(cell):
                    images.append(_image_in_cell(file, text, f"{file.name}/{column} {number}"))
    except ValueError as error:
        return Example(id=row_id, origin=origin, problem=str(error))
    texts = _stripped(map(_text, _as_list(cells.get(roles.text))))
    if columns.captions_from == "folder" and images:
        texts = _stripped([re.sub(r"[_-]+", " ", PurePosixPath(images[0].name).parent.name)])
    others = [
        cell
        for column, cell in cells.items()
        if column not in roles.images and isinstance(cell, str)
    ]
    if any(len(text) > _LONGEST for text in (*texts, *others)):
        return Example(id=row_id, origin=origin, problem=_too_long(_LONGEST))
    split = _text(cells.get(roles.split)).strip().lower()
    has_file = len(images) == 1 and images[0].is_file
    return Example(
        id=_text(cells.get(roles.id)) or (images[0].name if has_file else row_id),
        images=tuple(images),
        texts=texts,
        fields={
            key: value
            for key, value in cells.items()
            if key not in (*roles.images, roles.text, roles.split)
        },
        split=SPLITS.get(split, split),
        origin=origin,
        problem=f"split is {split!r}; expected one of {', '.join(SPLITS)}"
        if split not in ("", *SPLITS)
        else "",
    )


def _image_in_cell(file: ListedFile, given: str, name: str) -> Image:
    """Returns the image that a cell has as base64, or names."""
    is_data_url = _DATA_URL.match(given)
    encoded = given[is_data_url.end() :] if is_data_url else given
    if is_data_url or (_BASE64.fullmatch(given)):
        try:
            content = base64.b64decode("".join(encoded.split()), validate=True)
        except binascii.Error as error:
            raise ValueError(
                f"the base64 of its image is damaged ({error}); write it again"
            ) from error
        if is_data_url or _IMAGE_HEAD.match(content):
            return Image(
                name=name,
                location=file.location,
                version=file.version,
                content=content,
                is_inline=True,
            )
    return _named_image(file, given)


def _named_image(file: ListedFile, given: str) -> Image:
    """Returns the image that a cell names: by a URL, or from the folder of its table on."""
    if is_url(given):
        return Image(name=given, location=given)
    folder = file.location.partition("?")[0].rpartition("/")[0]
    path = given if given.startswith("/") and not is_url(folder) else posixpath.join(folder, given)
    name = posixpath.normpath(posixpath.join(posixpath.dirname(file.name), given))
    return Image(name=name, location=path if is_url(path) else os.path.normpath(path or given))


def _as_list(cell: object) -> list[Any]:
    return cell if isinstance(cell, list) else [cell]


def _text(cell: object) -> str:
    """Returns the text in a cell; NaN, as pandas writes it, is none."""
    return "" if cell is None or cell != cell else str(cell)


def _stripped(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(filter(None, map(str.strip, texts)))


def _too_long(most: int) -> str:
    return f"it has more than {most} characters"


class _Rows:
    """Lines of a CSV file; those of one row may have so many characters together."""

    def __init__(self, lines: Iterator[str]) -> None:
        self.lines, self.number, self.left = lines, 0, _LONGEST_ROW

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self.lines)
        self.number, self.left = self.number + 1, self.left - len(line)
        if self.left < 0:
            raise csv.Error(_too_long(_LONGEST_ROW))
        return line


def _csv_rows(file: ListedFile) -> Iterator[tuple[str, Any]]:
    lines = _lines(file, _LONGEST_ROW)
    first = next(lines, "")
    if stated := _STATED_DELIMITER.fullmatch(first):
        delimiter, first = stated[1], next(lines, "")
    elif suffix_of(file.location).startswith(".tsv"):
        delimiter = "\t"
    else:
        delimiter = max(",;\t|", key=first.count)
    csv.field_size_limit(max(_LONGEST_ROW, csv.field_size_limit()))  # of all readers of the process
    limited = _Rows(chain([first], lines))
    limited.number = 1 if stated else 0
    reader = csv.DictReader(limited, delimiter=delimiter, strict=True)
    row: Any = reader.fieldnames  # reads the header
    if any("\0" in name for name in row or ()):  # as of UTF-16 without a byte order mark
        raise ColumnError(f"{file.name} has zero characters in its first line; save it as UTF-8")
    if twice := [name for name, count in Counter(row or ()).items() if name and count > 1]:
        raise ColumnError(
            f"{file.name} has the column {twice[0]} twice; give each a name of its own"
        )
    while row is not None:
        origin = f"{file.name} line {limited.number + 1}"
        limited.left = _LONGEST_ROW
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield origin, f"{error}; write it as standard CSV"
            continue
        if row is not None and None in row:
            row = "it has more cells than the header; quote texts that have the delimiter"
        if row is not None:
            yield origin, row


def _json_rows(file: ListedFile) -> Iterator[tuple[str, Any]]:
    """Reads JSON lines, or one list of objects, also as the only value of an object."""
    is_lines = suffix_of(file.location).startswith((".jsonl", ".ndjson")) or _has_objects_in_lines(
        file
    )
    if not is_lines:
        with _decompressed(file) as opened:
            for number, row in enumerate(JsonLists(opened, file.name).items(), start=1):
                yield (
                    f"{file.name} row {number}",
                    row if isinstance(row, dict) else "it is no JSON object",
                )
        return
    for number, line in enumerate(_lines(file, _LONGEST_ROW), start=1):
        if line.strip():
            try:
                row = _too_long(_LONGEST_ROW) if len(line) > _LONGEST_ROW else json.loads(line)
            except (ValueError, RecursionError) as error:
                row = f"it is not valid JSON ({error})"
            yield (
                f"{file.name} line {number}",
                row if isinstance(row, dict | str) else "it is no JSON object",
            )


def _has_objects_in_lines(file: ListedFile) -> bool:
    """Whether a file has an object in its first line and another one after it."""
    with io.BufferedReader(_decompressed(file)) as opened:
        head = opened.peek(_HEAD)[:_HEAD]
    if not head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
        return False
    lines = filter(None, (line.strip() for line in _lines(file, _LONGEST_ROW)))
    return next(lines, "").endswith("}") and next(lines, "").startswith("{")


def _columnar_rows(file: ListedFile) -> Iterator[tuple[str, Any]]:
    """Reads a Parquet or Arrow file a group at a time; cells with image bytes become images, classes their names."""
    table = ColumnFile(file.location)
    classes: dict[str, list[str]] = {}
    with suppress(
        ValueError, KeyError, TypeError, AttributeError, RecursionError
    ):  # notes of `datasets`, if any
        features = json.loads((table.schema.metadata or {})[b"huggingface"])["info"]["features"]
        classes = {
            name: list(one["names"])
            for name, one in features.items()
            if one.get("_type") == "ClassLabel"
        }
    for number, cells in enumerate(
        (cells for batch in table.batches() for cells in batch.to_pylist()), start=1
    ):
        for column, value in cells.items():
            content = cell_bytes(value)
            if content is not None:
                name, cell = f"{file.name}/{column} {number}", (column, number - 1)
                cells[column] = Image(
                    name=name,
                    location=file.location,
                    cell=cell,
                    version=file.version,
                    content=content,
                )
            elif isinstance(value, dict) and "bytes" in value:
                cells[column] = value.get("path")
            elif column in classes and isinstance(value, int) and 0 <= value < len(classes[column]):
                cells[column] = classes[column][value]
        yield f"{file.name} row {number}", cells


def _decompressed(file: ListedFile) -> Any:
    import pyarrow as pa

    opened, suffix = open_location(file.location), suffix_of(file.location).rpartition(".")[2]
    if suffix == "xz":
        return lzma.open(opened)
    kinds = {"gz": "gzip", "bz2": "bz2", "zst": "zstd"}
    return pa.CompressedInputStream(opened, kinds[suffix]) if suffix in kinds else opened


def _lines(file: ListedFile, longest: int = _LONGEST) -> Iterator[str]:
    """Yields the lines of a text file with their ends; of one that is too long, one character too many."""
    opened = io.BufferedReader(_decompressed(file))
    has_mark_of_16_bit = opened.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding, shown = ("utf-16", "UTF-16") if has_mark_of_16_bit else ("utf-8-sig", "UTF-8")
    with io.TextIOWrapper(opened, encoding=encoding, newline="") as text:
        number = 0
        try:
            while line := text.readline(longest + 1):
                number += 1
                yield line
                while len(line) > longest and line[-1] not in "\r\n":
                    line = text.readline(longest + 1)
        except UnicodeError as error:
            raise ValueError(
                f"after line {number} it is not {shown} ({error}); save it as UTF-8"
            ) from error
