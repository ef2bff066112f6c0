"""Videos through PyAV, local or at URLs: their moments by what is said and shown, and their frames."""

from __future__ import annotations

import codecs
import errno
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from bridgetower.data.config import Cutting
from bridgetower.data.sources.fetch import (
    ListedFile,
    is_url,
    open_location,
    open_regular,
    read_location,
    version_of,
)
from bridgetower.data.sources.transcription import transcribed
from bridgetower.processor import MAX_PIXELS

_LONGEST_SIDE = 1280  # of a frame that is kept, in pixels
_THUMBNAIL = 32  # width and height of the small frames that are compared
_SILENCE = 10.0  # seconds without a subtitle from which on they are moments of their own
_CUT = 12.0  # mean difference of two small frames, of 255, from which on another scene begins
_TOGETHER = 0.25  # of the shorter one's time, within which two subtitles begin together
_SHORTEST = 1.0  # seconds of a scene
_MARKS = re.compile(r"\{[^}]*\}")
_COMPARED_EVERY = 0.5  # seconds between two frames that are compared
_MICROSECONDS = 1_000_000
_RATE = 16_000  # samples a second of sound, as models that transcribe take it
_VIDEOS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf"
_BITMAPS = frozenset(
    {"dvb_subtitle", "dvd_subtitle", "hdmv_pgs_subtitle", "xsub"}
)  # codecs of subtitles without text


@dataclass(frozen=True)
class Moment:
    """A part of a video: its seconds, and what is said, of a subtitle with the marks of Advanced SubStation."""

    start: float
    end: float  # of a subtitle the start itself where the file does not say how long it is shown
    text: str = ""


def moments_of(
    file: ListedFile, subtitles: ListedFile | None, cutting: Cutting
) -> tuple[list[Moment], list[str]]:
    """Returns the moments of a video, and what is wrong with it or its subtitles."""
    problems = []
    with opened_video(file.location) as video:
        end = video.end()
        if end <= 0:
            raise ValueError(f"{file.location} has no frames that can be read; copy it again")
        if end < video.duration - 2:
            problems.append(f"it ends after {end:.1f} of {video.duration:.1f} s; copy it again")
        cues, problem = video.cues() if subtitles is None else read_subtitles(subtitles.location)
        problems += [problem] if problem else []
        if cutting.transcribe and not cues and not problem:
            cues = [
                Moment(*one)
                for one in transcribed(video, cutting.transcribe, cutting.transcribe_model)
            ]
        said = merged(cues)
        segments = [replace(one, end=min(one.end, end)) for one in said if one.start < end]
        if said and not segments:
            problems.append(
                f"all its subtitles come after its end, at {end:.1f} s; they are another video's"
            )
        if cutting.every is not None:
            return windows(end, max(cutting.every, end / cutting.max_moments), segments), problems
        starts, ends = (
            [0.0, *(one.end for one in segments)],
            [*(one.start for one in segments), end],
        )
        found = list(zip(starts, ends, strict=True))
        gaps = [(start, stop) for start, stop in found if stop - start > _SILENCE or not segments]
        cuts = cuts_of(video) if gaps else []
    inside = [
        cut
        for cut in cuts
        if any(start + _SHORTEST < cut[0] < stop - _SHORTEST for start, stop in gaps)
    ]
    strongest = sorted(inside, key=lambda cut: -cut[1])[: max(0, cutting.max_moments - len(gaps))]
    for start, stop in gaps:
        times = [start, *sorted(time for time, _ in strongest if start < time < stop), stop]
        segments += [Moment(*part) for part in pairwise(times)]
    return at_most(cutting.max_moments, sorted(segments, key=lambda one: one.start)), problems


def merged(cues: Iterable[Moment]) -> list[Moment]:
    """Joins subtitles that begin together, ends others where the next begins, and leaves lines out that come again."""
    segments: list[Moment] = []
    shown: list[str] = []  # lines of the subtitle before
    until = 0.0  # which it was shown
    for cue in sorted(cues, key=lambda one: (one.start, one.end)):
        start, end = max(0.0, cue.start), cue.end if cue.end > cue.start else cue.start + 5.0
        text = _MARKS.sub(" ", cue.text[:2000]).replace("\\N", "\n").replace("\\h", " ")
        lines = list(filter(None, (" ".join(line.split()) for line in text.split("\n"))))
        if not lines or end <= 0:
            continue
        last = segments[-1] if segments else None
        follows = last is not None and start <= until + 0.1
        fit = range(min(len(shown), len(lines)), 0, -1) if follows else ()
        new = lines[next((count for count in fit if shown[-count:] == lines[:count]), 0) :]
        if last is not None and follows and not new:
            segments[-1] = replace(last, end=max(last.end, end))
        elif last is not None and start - last.start <= _TOGETHER * min(
            last.end - last.start, end - start
        ):
            segments[-1] = Moment(last.start, max(last.end, end), f"{last.text} {' '.join(new)}")
        else:
            if last is not None:
                segments[-1] = replace(last, end=min(last.end, start))
            segments.append(Moment(start, end, " ".join(new)))
        shown, until = lines, max(until, end) if follows else end
    return [one for one in segments if one.end > one.start]


def cuts_of(video: Video) -> list[tuple[float, float]]:
    """Returns when another scene begins, and by how much it differs from what was shown when the last one began."""
    cuts: list[tuple[float, float]] = []
    before = None
    for time, small in video.thumbnails():
        frame = small.astype(np.int16)
        difference = 0.0 if before is None else float(np.abs(frame - before).mean())
        if before is None or (
            difference > _CUT and time - (cuts[-1][0] if cuts else 0.0) >= _SHORTEST
        ):
            cuts += [(time, difference)] if before is not None else []
            before = frame
    return cuts


def windows(end: float, every: float, segments: Sequence[Moment]) -> list[Moment]:
    """Returns moments of one length, each with what is said in the middle of it or around."""
    count = max(1, round(end / every + 0.5 - 1e-9))
    texts: list[list[str]] = [[] for _ in range(count)]
    for one in segments:
        texts[min(count - 1, int((one.start + one.end) / 2 / every))].append(one.text)
    return [
        Moment(number * every, min(end, (number + 1) * every), " ".join(said))
        for number, said in enumerate(texts)
        if number * every < end
    ]


def at_most(most: int, moments: Sequence[Moment]) -> list[Moment]:
    """Returns moments; where there are more than that many, neighbours are joined."""
    size = -(-len(moments) // most)
    parts = [moments[start : start + size] for start in range(0, len(moments), max(1, size))]
    return [
        Moment(part[0].start, part[-1].end, " ".join(one.text for one in part if one.text))
        for part in parts
    ]


def _opened(location: str, formats: str, content: bytes | None = None) -> Any:
    """Opens a file, or its content, as one of some formats, none of which names other files."""
    if content is not None:
        opened: Any = io.BytesIO(content)
    elif is_url(location):
        opened = open_location(location)
    else:
        open_regular(location).close()
        opened = location
    with _named(location):
        options = {"format_whitelist": formats, "protocol_whitelist": "file"}
        return av.open(opened, options=options, metadata_errors="replace")


@contextmanager
def _named(location: str) -> Iterator[None]:
    """Names the file in errors of FFmpeg."""
    try:
        yield
    except av.FFmpegError as error:
        # Of a Matroska file that is cut off, FFmpeg says "Operation not permitted" or "Input/output error".
        reason = (
            "it is cut off or damaged"
            if error.errno in (errno.EPERM, errno.EIO)
            else error.strerror
        )
        raise ValueError(f"{location} cannot be read ({reason}); copy it again") from error


class Video:
    """A video that is open; its duration is what the file says, 0 where it does not."""

    def __init__(self, location: str, container: Any) -> None:
        if not container.streams.video:
            raise ValueError(f"{location} has no frames; expected a video")
        self.location, self._container = location, container
        self._stream = container.streams.video[0]
        if self._stream.codec_context is None:
            raise ValueError(
                f"{location} has frames that FFmpeg cannot decode; convert it, for example to H.264"
            )
        self._stream.thread_type = "AUTO"
        self._check_size(self._stream.width, self._stream.height)
        self._first = (container.start_time or 0) / _MICROSECONDS
        before = (
            self._first if "matroska" in container.format.name else 0.0
        )  # there it is the time of the end
        self.duration = max(0.0, (container.duration or 0) / _MICROSECONDS - before)
        self._shown: Any = None
        self._ahead: Any = None
        self._frames: Iterator[Any] = iter(())
        self._failed: float | None = None  # time of the last packet that is damaged
        self._key = 0.0  # time of the last keyframe
        self._reach = 10.0  # seconds to a later frame up to which frames are decoded; else a keyframe is sought

    def end(self) -> float:
        """Returns how far it can be read, in seconds; less than its duration where a part is missing."""
        for start in (max(0.0, self.duration - 10), 0.0):
            self._go_to(start)
            if ends := [
                self._time(packet) + float((packet.duration or 0) * packet.time_base)
                for packet in self._packets(None)
            ]:
                return max(ends)
        return 0.0

    def thumbnails(self) -> Iterator[tuple[float, UInt8[np.ndarray, "32 32 3"]]]:
        """Yields small frames with their times: the keyframes where they come often, else several in a second."""
        self._go_to(0.0)
        keys = [self._time(packet) for packet in self._packets(self._stream) if packet.is_keyframe]
        gaps = [after - before for before, after in pairwise([*keys, self.duration])]
        codec = self._stream.codec_context
        before, last = codec.skip_frame, -_COMPARED_EVERY
        codec.skip_frame = "NONKEY" if gaps and max(gaps) <= 5.0 else "DEFAULT"  # seconds
        self._go_to(0.0)
        size = {
            "width": _THUMBNAIL,
            "height": _THUMBNAIL,
            "format": "rgb24",
            "interpolation": "AREA",
        }
        try:
            skipped = None
            for frame in self._decoded():
                if (
                    skipped is not None
                    and self._time(frame) >= self._time(skipped) + _COMPARED_EVERY
                ):
                    last = self._time(skipped)  # it is shown for long
                    yield last, skipped.reformat(**size).to_ndarray()
                skipped = frame
                if self._time(frame) >= last + _COMPARED_EVERY:
                    last, skipped = self._time(frame), None
                    yield last, frame.reformat(**size).to_ndarray()
        finally:
            codec.skip_frame = before
            self._go_to(0.0)

    def cues(self) -> tuple[list[Moment], str | None]:
        """Returns the subtitles in the file, of the first stream that has text, and what is wrong with them."""
        with_text = (one for one in self._container.streams.subtitles if one.codec_context)
        stream = next((one for one in with_text if one.codec_context.name not in _BITMAPS), None)
        cues: list[Moment] = []
        self._go_to(0.0)
        num_bad = 0 if stream is None else _read_cues(self._packets(stream), cues, self._first)
        return (
            cues,
            f"{num_bad} of the subtitles in it cannot be read, as they are not UTF-8"
            if num_bad
            else None,
        )

    def sound(self, seconds: float) -> Iterator[tuple[float, bytes]]:
        """Yields parts of the first sound track as MP3 of one channel, each with the second at which it begins."""
        if not self._container.streams.audio:
            return
        stream = self._container.streams.audio[0]
        self._go_to(0.0)
        resampler = av.AudioResampler("s16p", "mono", _RATE)
        writer: Any = None
        track: Any = None
        start, buffer = 0.0, io.BytesIO()

        def written() -> bytes:
            writer.mux(track.encode())
            writer.close()
            return buffer.getvalue()

        for packet in self._packets(stream, flush=True):
            try:
                frames = [(self._time(one), one) for one in packet.decode() if one.pts is not None]
            except av.FFmpegError:
                continue
            for time, frame in frames:
                if writer is not None and time >= start + seconds:
                    yield start, written()
                    writer = None
                if writer is None:
                    start, buffer = time, io.BytesIO()
                    writer = av.open(buffer, "w", format="mp3")
                    track = writer.add_stream(
                        "libmp3lame", rate=_RATE, layout="mono", bit_rate=48_000
                    )
                for one in resampler.resample(frame):
                    one.pts = None
                    writer.mux(track.encode(one))
        if writer is not None:
            yield start, written()

    def jpeg(self, time: float, name: str = "") -> bytes:
        """Returns the last frame that begins at or before a time, upright, at most 1280 pixels long, with a comment."""
        before = None if self._shown is None else self._time(self._shown)
        if before is None or not 0 <= time - before <= self._reach:
            for back in (0.0, 5.0, 30.0, float("inf")):  # seconds before it where a keyframe may be
                self._go_to(time - back)
                self._advance()
                if self._ahead is not None and self._time(self._ahead) <= time:
                    break
            if (
                before is not None
                and self._ahead is not None
                and self._time(self._ahead) <= before <= time
            ):
                self._reach *= 2  # keyframes are far from each other
        while self._ahead is not None and (self._shown is None or self._time(self._ahead) <= time):
            self._advance()
        if self._shown is None or (self._failed is not None and self._key <= self._failed <= time):
            raise ValueError(f"{self.location} cannot be decoded at {time:.3f} s; copy it again")
        frame = self._shown
        self._check_size(frame.width, frame.height)
        width = frame.width * float(self._stream.sample_aspect_ratio or 1)
        scale = min(1.0, _LONGEST_SIDE / max(width, frame.height))
        size = {
            "width": max(1, round(width * scale)),
            "height": max(1, round(frame.height * scale)),
        }
        image = Image.fromarray(
            frame.reformat(**size, format="rgb24", interpolation="BICUBIC").to_ndarray()
        )
        if frame.rotation:
            image = image.rotate(frame.rotation, expand=True)
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=88, comment=name)
        return stream.getvalue()

    def _advance(self) -> None:
        self._shown, self._ahead = self._ahead, next(self._frames, None)
        if self._shown is not None and self._shown.key_frame:
            self._key = self._time(self._shown)

    def _go_to(self, time: float) -> None:
        """Goes to a keyframe before a time; in some formats it may be one after it."""
        self._shown = self._ahead = self._failed = None
        timestamp = round((self._first + time) * _MICROSECONDS) if time > 0 else -_MICROSECONDS
        try:
            self._container.seek(timestamp)
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
        with suppress(av.FFmpegError):
            for packet in self._container.demux(*([stream] if stream is not None else [])):
                if packet.pts is not None or flush:
                    yield packet

    def _time(self, timed: Any) -> float:
        return float(timed.pts * timed.time_base) - self._first

    def _check_size(self, width: int, height: int) -> None:
        if width * height > MAX_PIXELS:
            raise ValueError(
                f"{self.location} has frames of {width}x{height} pixels, the limit is {MAX_PIXELS}"
            )


@contextmanager
def opened_video(location: str) -> Iterator[Video]:
    with _named(location), _opened(location, _VIDEOS) as container:
        yield Video(location, container)


def frame_of(location: str, time: float, name: str = "") -> bytes:
    """Returns a frame as JPEG; by its comment, `name`, equal frames of different moments are different files."""
    with _named(location):
        return _kept(location, "" if is_url(location) else version_of(location)).jpeg(time, name)


@lru_cache(maxsize=2)
def _kept(location: str, version: str) -> Video:
    return Video(location, _opened(location, _VIDEOS))


def read_subtitles(location: str) -> tuple[list[Moment], str | None]:
    """Reads a file of subtitles, WebVTT or SubRip: what can be read, and what is wrong with the rest."""
    cues: list[Moment] = []
    try:
        content = read_location(location, most=2**26)
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            content = content.decode("utf-16", errors="replace").encode()
        with _opened(location, "webvtt,srt", content) as container:
            num_bad = _read_cues(container.demux(container.streams[0]), cues)
    except (ValueError, OSError) as error:
        return cues, str(error)
    if num_bad:
        return cues, f"{location} has {num_bad} subtitles that are not UTF-8; save it as UTF-8"
    return cues, None if cues else f"{location} has no subtitles; expected WebVTT or SubRip"


def _read_cues(packets: Iterable[Any], cues: list[Moment], first: float = 0.0) -> int:
    """Adds what can be read, and returns how many cannot."""
    num_bad = 0
    for packet in packets:
        if packet.pts is not None:
            start = float(packet.pts * packet.time_base) - first
            end = start + max(0.0, float((packet.duration or 0) * packet.time_base))
            try:
                cues += [
                    Moment(start, end, shown.dialogue.decode(errors="replace"))
                    for shown in packet.decode()
                ]
            except av.FFmpegError:
                num_bad += 1
    return num_bad
