"""Text files, perhaps compressed: their lines, and the texts and captions in them."""

from __future__ import annotations

import codecs
import io
import lzma
import re
from collections.abc import Iterator
from typing import Any

from bridgetower.data.sources.columns import IMAGES, Columns, columns_named
from bridgetower.data.sources.example import Example, FileGroup, named_image, nonempty_texts
from bridgetower.data.sources.fetch import ListedFile, open_location, suffix_of

MAX_TEXT_LENGTH = 2**20  # characters

_CODECS = {"gz": "gzip", "bz2": "bz2", "zst": "zstd"}  # of pyarrow


def open_decompressed(location: str) -> Any:
    import pyarrow as pa

    file = open_location(location)
    suffix = suffix_of(location).rpartition(".")[2]
    if suffix == "xz":
        return lzma.open(file)
    codec = _CODECS.get(suffix)
    return pa.CompressedInputStream(file, codec) if codec else file


def lines_of(file: ListedFile, max_length: int = MAX_TEXT_LENGTH) -> Iterator[str]:
    """Yields the lines of a text file with their ends. A line that is too long is cut one character after the limit."""
    stream = io.BufferedReader(open_decompressed(file.location))
    is_utf16 = stream.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    codec = "utf-16" if is_utf16 else "utf-8-sig"
    number = 0
    with io.TextIOWrapper(stream, encoding=codec, newline="") as text:
        try:
            while line := text.readline(max_length + 1):
                number += 1
                yield line
                while len(line) > max_length and line[-1] not in "\r\n":
                    line = text.readline(max_length + 1)
        except UnicodeError as error:
            encoding = "UTF-16" if is_utf16 else "UTF-8"
            raise ValueError(
                f"after line {number} it is not {encoding} ({error}); save it as UTF-8"
            ) from error


def length_problem(limit: int) -> str:
    return f"it has more than {limit} characters"


def read_texts(group: FileGroup, columns: Columns) -> Iterator[Example]:
    """Yields a text for each line of a file."""
    (file,) = group.files
    for number, line in enumerate(lines_of(file), start=1):
        if not line.strip():
            continue
        is_long = len(line) > MAX_TEXT_LENGTH
        yield Example(
            id=f"{file.name}/{number}",
            texts=() if is_long else (line.strip(),),
            origin=f"{file.name} line {number}",
            problem=length_problem(MAX_TEXT_LENGTH) if is_long else "",
        )


def read_captions(group: FileGroup, columns: Columns) -> Iterator[Example]:
    """Reads lines "image TAB caption" or "image,caption", with or without a header."""
    (file,) = group.files
    separator = ""
    for number, line in enumerate(map(str.strip, lines_of(file)), start=1):
        separator = separator or ("\t" if "\t" in line else ",")
        name, _, caption = line.partition(separator)
        if not line or (number == 1 and columns_named([name], IMAGES.names)):
            continue
        origin = f"{file.name} line {number}"
        if len(line) > MAX_TEXT_LENGTH:
            problem = length_problem(MAX_TEXT_LENGTH)
            yield Example(id=f"{file.name}/{number}", origin=origin, problem=problem)
            continue
        # CSV writers quote a caption with commas.
        if len(caption) > 1 and caption[0] == caption[-1] == '"':
            caption = caption[1:-1].replace('""', '"')
        # Flickr30k numbers the captions of an image: "1000092795.jpg#0".
        image = named_image(file, re.sub(r"#\d+$", "", name.strip()))
        texts = nonempty_texts([caption])
        yield Example(id=image.name, images=(image,), texts=texts, origin=origin)
