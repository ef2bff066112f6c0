"""Videos through PyAV: how far they can be read, their subtitles, small and full frames; nothing else imports it."""

from __future__ import annotations

import codecs
import errno
import io
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from bridgetower.processor import MAX_PIXELS

MAX_SIDE = 1280
"""Longest side of a frame that is kept, in pixels."""

THUMBNAIL = 32
"""Width and height of the small frames that are compared, in pixels."""

_QUALITY = 88  # of a JPEG
_TO_END = 10.0  # seconds at the end of a video that are read to see whether it is whole
_KEYFRAMES_EVERY = 5.0  # seconds: where they come as often, no other frames are compared
_COMPARED_EVERY = 0.5  # seconds between two frames that are compared
_REACH = 10.0  # seconds to a later frame up to which frames are decoded instead of going to the nearest keyframe
_BACK = (0.0, 5.0, 30.0, float("inf"))  # seconds before a frame where a keyframe is looked for
_OPENED = 2  # videos that a process keeps open
_MICROSECONDS = 1_000_000
_VIDEOS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf"
_SUBTITLES = "webvtt,srt"
_BITMAPS = frozenset({"dvb_subtitle", "dvd_subtitle", "hdmv_pgs_subtitle", "xsub"})  # codecs of subtitles without text


@dataclass(frozen=True)
class Cue:
    """A subtitle as it is shown.

    Attributes:
        start: Seconds from the start of the video.
        end: Likewise; the start itself where the file does not say how long it is shown.
        text: Lines, with the marks of Advanced SubStation, to which every format is converted.
    """

    start: float
    end: float
    text: str


def _opened(path: Path, formats: str, content: bytes | None = None) -> Any:
    """Opens a file, or its content, as one of some formats, none of which names other files."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is no file; remove it")
    with _named(path):
        options = {"format_whitelist": formats, "protocol_whitelist": "file"}
        opened = str(path) if content is None else io.BytesIO(content)
        return av.open(opened, options=options, metadata_errors="replace")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Names the file in errors of FFmpeg."""
    try:
        yield
    except av.FFmpegError as error:
        # Of a Matroska file that is cut off, FFmpeg says "Operation not permitted" or "Input/output error".
        reason = "it is cut off or damaged" if error.errno in (errno.EPERM, errno.EIO) else error.strerror
        raise ValueError(f"{path} cannot be read ({reason}); copy it again") from error


class Video:
    """A video that is open.

    Attributes:
        path: The file.
        duration: In seconds, as the file says; 0 where it does not.
    """

    def __init__(self, path: Path, container: Any) -> None:
        """Looks at the streams."""
        if not container.streams.video:
            raise ValueError(f"{path} has no pictures; expected a video")
        self.path, self._container = path, container
        self._stream = container.streams.video[0]
        if self._stream.codec_context is None:
            raise ValueError(f"{path} has pictures that FFmpeg cannot decode; convert it, for example to H.264")
        self._stream.thread_type = "AUTO"
        self._check_size(self._stream.width, self._stream.height)
        self._first = (container.start_time or 0) / _MICROSECONDS
        before = self._first if "matroska" in container.format.name else 0.0  # there it is the time of the end
        self.duration = max(0.0, (container.duration or 0) / _MICROSECONDS - before)
        self._shown: Any = None
        self._ahead: Any = None
        self._frames: Iterator[Any] = iter(())
        self._failed: float | None = None  # time of the last packet that is damaged
        self._key = 0.0  # time of the last keyframe
        self._reach = _REACH

    def end(self) -> float:
        """Returns how far it can be read, in seconds; less than its duration where a part is missing."""
        for start in (max(0.0, self.duration - _TO_END), 0.0):
            self._go_to(start)
            ends = [self._time(packet) + self._length(packet) for packet in self._packets(None)]
            if ends:
                return max(ends)
        return 0.0

    def thumbnails(self) -> Iterator[tuple[float, UInt8[np.ndarray, "32 32 3"]]]:
        """Yields small frames with their times: the keyframes where they come often, else several in a second."""
        self._go_to(0.0)
        keys = [self._time(packet) for packet in self._packets(self._stream) if packet.is_keyframe]
        gaps = [after - before for before, after in pairwise([*keys, self.duration])]
        codec = self._stream.codec_context
        before, last = codec.skip_frame, -_COMPARED_EVERY
        codec.skip_frame = "NONKEY" if gaps and max(gaps) <= _KEYFRAMES_EVERY else "DEFAULT"
        self._go_to(0.0)
        try:
            skipped = None
            for frame in self._decoded():
                if skipped is not None and self._time(frame) >= self._time(skipped) + _COMPARED_EVERY:
                    last = self._time(skipped)  # it is shown for long
                    yield last, self._small(skipped)
                skipped = frame
                if self._time(frame) >= last + _COMPARED_EVERY:
                    last, skipped = self._time(frame), None
                    yield last, self._small(frame)
        finally:
            codec.skip_frame = before
            self._go_to(0.0)

    def _small(self, frame: Any) -> UInt8[np.ndarray, "32 32 3"]:
        small: np.ndarray = frame.reformat(
            width=THUMBNAIL, height=THUMBNAIL, format="rgb24", interpolation="AREA"
        ).to_ndarray()
        return small

    def cues(self) -> tuple[list[Cue], str | None]:
        """Returns the subtitles in the file, of the first stream that has text, and what is wrong with them."""
        streams = [
            one
            for one in self._container.streams.subtitles
            if one.codec_context and one.codec_context.name not in _BITMAPS
        ]
        if not streams:
            return [], None
        self._go_to(0.0)
        cues: list[Cue] = []
        num_bad = 0
        for packet in self._packets(streams[0]):
            try:
                cues += _cues_in(packet, self._time(packet))
            except av.FFmpegError:
                num_bad += 1
        return cues, f"{num_bad} of the subtitles in it cannot be read, as they are not UTF-8" if num_bad else None

    def jpeg(self, time: float, name: str = "") -> bytes:
        """Returns the frame shown at a time, upright, at most `MAX_SIDE` pixels long, with a name as comment."""
        frame = self._at(time)
        self._check_size(frame.width, frame.height)
        width = frame.width * float(self._stream.sample_aspect_ratio or 1)
        scale = min(1.0, MAX_SIDE / max(width, frame.height))
        size = {"width": max(1, round(width * scale)), "height": max(1, round(frame.height * scale))}
        image = Image.fromarray(frame.reformat(**size, format="rgb24", interpolation="BICUBIC").to_ndarray())
        if frame.rotation:
            image = image.rotate(frame.rotation, expand=True)
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=_QUALITY, comment=name)
        return stream.getvalue()

    def _at(self, time: float) -> Any:
        """Returns the last frame that begins at or before a time; later ones are reached by decoding on."""
        before = None if self._shown is None else self._time(self._shown)
        if before is None or not 0 <= time - before <= self._reach:
            for back in _BACK:
                self._go_to(time - back)
                self._advance()
                if self._ahead is not None and self._time(self._ahead) <= time:
                    break
            if before is not None and self._ahead is not None and self._time(self._ahead) <= before <= time:
                self._reach *= 2  # keyframes are far from each other
        while self._ahead is not None and (self._shown is None or self._time(self._ahead) <= time):
            self._advance()
        if self._shown is None or (self._failed is not None and self._key <= self._failed <= time):
            raise ValueError(f"{self.path} cannot be decoded at {time:.3f} s; copy it again")
        return self._shown

    def _advance(self) -> None:
        self._shown, self._ahead = self._ahead, next(self._frames, None)
        if self._shown is not None and self._shown.key_frame:
            self._key = self._time(self._shown)

    def _go_to(self, time: float) -> None:
        """Goes to a keyframe before a time; in some formats it may be one after it."""
        self._shown = self._ahead = self._failed = None
        place = round((self._first + time) * _MICROSECONDS) if time > 0 else -_MICROSECONDS
        try:
            self._container.seek(place)
        except av.FFmpegError:  # the format knows no places
            self._container.seek(0, any_frame=True)
        self._frames = self._decoded()

    def _decoded(self) -> Iterator[Any]:
        """Yields frames from here on; times of packets that are damaged or left out are noted."""
        for packet in self._packets(self._stream, flush=True):
            if packet.is_corrupt and packet.pts is not None:
                self._failed = self._time(packet)
            try:
                yield from (frame for frame in packet.decode() if frame.pts is not None)
            except av.FFmpegError:
                self._failed = self._time(packet) if packet.pts is not None else self._failed

    def _packets(self, stream: Any, *, flush: bool = False) -> Iterator[Any]:
        """Yields packets up to where the file cannot be read, of a stream or of all."""
        packets = self._container.demux(*([stream] if stream is not None else []))
        while True:
            try:
                packet = next(packets, None)
            except av.FFmpegError:
                return
            if packet is None:
                return
            if packet.pts is not None or flush:
                yield packet

    def _time(self, timed: Any) -> float:
        return float(timed.pts * timed.time_base) - self._first

    def _length(self, timed: Any) -> float:
        return float((timed.duration or 0) * timed.time_base)

    def _check_size(self, width: int, height: int) -> None:
        if width * height > MAX_PIXELS:
            raise ValueError(f"{self.path} has frames of {width}x{height} pixels, the limit is {MAX_PIXELS}")


@contextmanager
def opened_video(path: Path) -> Iterator[Video]:
    """Opens a video."""
    with _named(path), _opened(path, _VIDEOS) as container:
        yield Video(path, container)


def frame_of(path: Path, time: float, name: str = "") -> bytes:
    """Returns a frame as JPEG; the file stays open for the next ones.

    Args:
        path: The video.
        time: Seconds from its start.
        name: What the comment of the JPEG says, so that equal frames of different moments are different files.
    """
    status = path.stat()
    with _named(path):
        return _kept(path, status.st_size, status.st_mtime_ns).jpeg(time, name)


@lru_cache(maxsize=_OPENED)
def _kept(path: Path, size: int, written: int) -> Video:
    return Video(path, _opened(path, _VIDEOS))


def read_subtitles(path: Path) -> tuple[list[Cue], str | None]:
    """Reads a file of subtitles, WebVTT or SubRip: what can be read, and what is wrong with the rest."""
    cues: list[Cue] = []
    num_bad = 0
    try:
        content = path.read_bytes() if path.is_file() else b""
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            content = content.decode("utf-16", errors="replace").encode()
        with _opened(path, _SUBTITLES, content) as container:
            for packet in container.demux(container.streams[0]):
                try:
                    cues += [] if packet.pts is None else _cues_in(packet, float(packet.pts * packet.time_base))
                except av.FFmpegError:
                    num_bad += 1
    except ValueError as error:
        return cues, str(error)
    if num_bad:
        return cues, f"{path} has {num_bad} subtitles that are not UTF-8; save it as UTF-8"
    return cues, None if cues else f"{path} has no subtitles; expected WebVTT or SubRip"


def _cues_in(packet: Any, start: float) -> list[Cue]:
    end = start + max(0.0, float((packet.duration or 0) * packet.time_base))
    return [Cue(start, end, shown.dialogue.decode(errors="replace")) for shown in packet.decode()]
