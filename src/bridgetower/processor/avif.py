"""What an AVIF file holds, whatever its header says of its size."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import count

_CODED = b"av01"
_METADATA = (b"Exif", b"mime")  # of no use: orientation is a property of the image in AVIF

_SEQUENCE_HEADER, _FRAME_HEADER, _FRAME, _REDUNDANT_FRAME_HEADER = 1, 3, 6, 7

_MANY = 2**16  # more boxes, items or AV1 units than this have no use in a still image

_Range = tuple[int, int]


def still(content: bytes, max_pixels: int) -> bytes:
    """Returns an AVIF file that decoders take for a still image without EXIF and XMP: the first one of an animation.

    Decoders believe the AV1 stream inside and not the file's header, so the size is read there.
    """
    try:
        marked, pixels = _still(content)
    except (IndexError, struct.error) as error:
        raise ValueError(f"AVIF boxes end early: {error}") from error
    if pixels > max_pixels:
        raise ValueError(f"the AV1 frames in it may have {pixels} pixels, the limit is {max_pixels}")
    return marked


def _still(content: bytes) -> tuple[bytes, int]:
    meta = _only(content, b"meta", (0, len(content)))
    inside = (meta[0] + 4, meta[1])
    marked = bytearray(content)
    marked[8:12] = b"avif"  # the major brand decides between still image and animation
    coded = set()
    for number, position in _items(content, _only(content, b"iinf", inside)):
        kind = content[position : position + 4]
        if kind == _CODED:
            coded.add(number)
        elif kind in _METADATA:
            marked[position : position + 4] = b"skip"
    data = [start for kind, start, _ in _boxes(content, inside) if kind == b"idat"]
    pixels = total = 0
    for number, in_data, start, length in _locations(content, _only(content, b"iloc", inside)):
        if number in coded:
            start += data[0] if in_data else 0
            total += length
            if not 0 < total <= len(content):
                raise ValueError("the images in an AVIF file have more bytes than the file")
            pixels += _decoded_pixels(content[start : start + length])
    return bytes(marked), pixels


def _boxes(content: bytes, inside: _Range) -> Iterator[tuple[bytes, int, int]]:
    """Yields the kind of each box with the range of what is in it."""
    start, end = inside
    for number in count():
        if start >= end:
            return
        if number > _MANY:
            raise ValueError(f"an AVIF file has more than {_MANY} boxes in one")
        size, kind = struct.unpack_from(">I4s", content, start)
        head = 8
        if size == 1:
            (size,), head = struct.unpack_from(">Q", content, start + 8), 16
        size = size or end - start
        if not head <= size <= end - start:
            raise ValueError(f"an AVIF box has {size} bytes where {end - start} are left")
        yield kind, start + head, start + size
        start += size


def _only(content: bytes, wanted: bytes, inside: _Range) -> _Range:
    found = [(start, end) for kind, start, end in _boxes(content, inside) if kind == wanted]
    if len(found) != 1:
        raise ValueError(f"an AVIF file has {len(found)} boxes {wanted.decode()}; expected 1")
    return found[0]


def _items(content: bytes, table: _Range) -> Iterator[tuple[int, int]]:
    """Yields the number of each item with the position of its kind, which has four bytes."""
    for kind, start, _ in _boxes(content, (table[0] + (8 if content[table[0]] else 6), table[1])):
        if kind != b"infe" or content[start] not in (2, 3):
            raise ValueError("the list of items of an AVIF file has an unknown entry")
        layout = ">H" if content[start] == 2 else ">I"
        yield struct.unpack_from(layout, content, start + 4)[0], start + 6 + struct.calcsize(layout)


def _locations(content: bytes, table: _Range) -> Iterator[tuple[int, bool, int, int]]:
    """Yields the number of each item, whether it is in box `idat`, its offset there or in the file, and its length."""
    position, version = table[0] + 4, content[table[0]]

    def number(size: int) -> int:
        nonlocal position
        position += size
        if position > table[1]:
            raise ValueError("the table of places in an AVIF file ends early")
        return int.from_bytes(content[position - size : position])

    sizes = number(2)
    offset, length, base, index = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
    wide = 4 if version == 2 else 2
    items = number(wide)
    if items > _MANY:
        raise ValueError(f"an AVIF file has {items} items; expected at most {_MANY}")
    for _ in range(items):
        item = number(wide)
        method = number(2) & 15 if version else 0
        number(2)
        start = number(base)
        if number(2) != 1 or method > 1:
            raise ValueError("the data of an AVIF image is in parts or elsewhere; expected it in one part of the file")
        number(index if version else 0)
        yield item, method == 1, start + number(offset), number(length)


def _decoded_pixels(stream: bytes) -> int:
    """Returns how many pixels all frames of an AV1 stream have together, at most."""
    position = frames = area = 0
    for number in count():
        if position >= len(stream):
            break
        if number > _MANY:
            raise ValueError(f"an AVIF image has more than {_MANY} AV1 units")
        header = stream[position]
        kind, extended, sized = header >> 3 & 15, header >> 2 & 1, header >> 1 & 1
        position += 1 + extended
        size = len(stream) - position
        if sized:
            size, position = _leb128(stream, position)
        if kind == _SEQUENCE_HEADER:
            area = max(area, _largest_frame(stream[position : position + size]))
        frames += kind in (_FRAME_HEADER, _FRAME, _REDUNDANT_FRAME_HEADER)
        position += size
    return frames * area


def _leb128(stream: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 56, 7):
        byte = stream[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            break
    return value, position


def _largest_frame(header: bytes) -> int:
    """Returns how many pixels a frame under an AV1 sequence header can have."""
    bits, position = int.from_bytes(header), 8 * len(header)

    def take(count: int) -> int:
        nonlocal position
        position -= count
        if position < 0:
            raise ValueError("an AV1 sequence header ends early")
        return bits >> position & (1 << count) - 1

    take(4)  # profile, still
    reduced = take(1)
    if reduced:
        take(5)
    else:
        if take(1):
            raise ValueError("an AVIF image has AV1 timing, which only videos have")
        delays = take(1)
        for _ in range(take(5) + 1):
            take(12)
            if take(5) > 7:
                take(1)
            if delays and take(1):
                take(4)
    width_bits, height_bits = take(4) + 1, take(4) + 1
    if reduced:
        return (take(width_bits) + 1) * (take(height_bits) + 1)
    return 1 << width_bits + height_bits  # each frame may have a size of its own
