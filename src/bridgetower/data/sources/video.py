"""Videos through PyAV, local or at URLs: their frames, and moments by what is said and shown."""

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
from bridgetower.data.sources.transcription import SECONDS_OF_REQUEST, transcribed
from bridgetower.processor import MAX_PIXELS

_LONGEST_SIDE = 1280  # pixels of a frame that is kept
_JPEG_QUALITY = 88
_THUMBNAIL = {"width": 32, "height": 32, "format": "rgb24", "interpolation": "AREA"}
_THUMBNAIL_INTERVAL = 0.5  # seconds
_KEYFRAME_INTERVAL = 5.0  # seconds between keyframes up to which they are thumbnails enough
_SEEK_STEPS = (0.0, 5.0, 30.0, float("inf"))  # seconds before a frame where its keyframe is sought
_LONGEST_SILENCE = 10.0  # seconds without a subtitle, beyond which they become moments of their own
_SCENE_DIFFERENCE = 12.0  # mean difference of thumbnails, of 255, beyond which another scene begins
_SHORTEST_SCENE = 1.0  # seconds
_JOINED_SHARE = 0.25  # of the shorter subtitle's time, within which two subtitles begin together
_DEFAULT_CUE = 5.0  # seconds of a subtitle without an end
_LONGEST_CUE = 2000  # characters
_SUBSTATION_MARKS = re.compile(r"\{[^}]*\}")  # of Advanced SubStation
_MICROSECONDS = 1_000_000
_SAMPLE_RATE = 16_000  # samples a second of sound, as models that transcribe take it
_BIT_RATE = 48_000  # bits a second of MP3
_VIDEO_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf"
_BITMAP_CODECS = ("dvb_subtitle", "dvd_subtitle", "hdmv_pgs_subtitle", "xsub")  # of subtitles


@dataclass(frozen=True)
class Moment:
    """A span of a video.

    Attributes:
        start: Seconds.
        end: Seconds; of a subtitle without an end, its start.
        text: What is said; of a subtitle, with the marks of Advanced SubStation.
    """

    start: float
    end: float
    text: str = ""


def moments_of(
    file: ListedFile, subtitles: ListedFile | None, cutting: Cutting
) -> tuple[list[Moment], list[str]]:
    """Returns the moments of a video, and what is wrong with it or its subtitles.

    Raises:
        OSError: The video cannot be read.
        ValueError: It is none, or damaged.
    """
    with open_video(file.location) as video:
        end = video.end()
        if end <= 0:
            raise ValueError(f"{file.location} has no frames that can be read; copy it again")
        problems = list[str]()
        if end < video.duration - 2:
            problems.append(f"it ends after {end:.1f} of {video.duration:.1f} s; copy it again")

        # What is said is in subtitles beside the video, else in it, else transcribed.
        cues, problem = video.cues() if subtitles is None else read_subtitles(subtitles.location)
        if problem:
            problems.append(problem)
        elif cutting.transcribe and not cues:
            sound = video.sound(SECONDS_OF_REQUEST)
            segments = transcribed(sound, cutting.transcribe, cutting.transcribe_model)
            cues = [Moment(*segment) for segment in segments]
        merged = merge_cues(cues)
        spoken = [replace(cue, end=min(cue.end, end)) for cue in merged if cue.start < end]
        if merged and not spoken:
            problems.append(
                f"all its subtitles come after its end, at {end:.1f} s; they are another video's"
            )
        if cutting.every is not None:
            length = max(cutting.every, end / cutting.max_moments)
            return equal_moments(end, length, spoken), problems

        # Scenes are moments where nothing is said for long.
        bounds = [Moment(0.0, 0.0), *spoken, Moment(end, end)]
        silences = [
            (before.end, after.start)
            for before, after in pairwise(bounds)
            if after.start - before.end > _LONGEST_SILENCE or not spoken
        ]
        cuts = scene_cuts(video) if silences else []
    scenes = _scenes(silences, cuts, cutting.max_moments)
    moments = sorted([*spoken, *scenes], key=lambda moment: moment.start)
    return join_neighbours(cutting.max_moments, moments), problems


def _scenes(
    silences: Sequence[tuple[float, float]],
    cuts: Sequence[tuple[float, float]],
    max_scenes: int,
) -> Iterator[Moment]:
    """Yields the scenes of silences between their strongest cuts."""
    cuts_inside = [
        (time, difference)
        for time, difference in cuts
        if any(start + _SHORTEST_SCENE < time < stop - _SHORTEST_SCENE for start, stop in silences)
    ]
    cuts_inside.sort(key=lambda cut: -cut[1])
    strongest = cuts_inside[: max(0, max_scenes - len(silences))]
    for start, stop in silences:
        inside = sorted(time for time, _ in strongest if start < time < stop)
        for first, last in pairwise([start, *inside, stop]):
            yield Moment(first, last)


def merge_cues(cues: Iterable[Moment]) -> list[Moment]:
    """Merges subtitles into spans that follow each other.

    Subtitles that begin together are joined, others end where the next begins, and lines that come again are left out.
    """
    segments: list[Moment] = []
    previous_lines: list[str] = []
    previous_end = 0.0
    for cue in sorted(cues, key=lambda cue: (cue.start, cue.end)):
        start = max(0.0, cue.start)
        end = cue.end if cue.end > cue.start else cue.start + _DEFAULT_CUE
        lines = _lines_of_cue(cue.text)
        if not lines or end <= 0:
            continue
        last = segments[-1] if segments else None

        # Rolling captions show the last lines of the subtitle before again.
        is_next = last is not None and start <= previous_end + 0.1
        num_repeated = 0
        if is_next:
            num_repeated = max(
                count
                for count in range(min(len(previous_lines), len(lines)) + 1)
                if previous_lines[len(previous_lines) - count :] == lines[:count]
            )
        text = " ".join(lines[num_repeated:])
        previous_lines = lines
        previous_end = max(previous_end, end) if is_next else end

        if last is None:
            segments.append(Moment(start, end, text))
        elif is_next and not text:
            segments[-1] = replace(last, end=max(last.end, end))
        elif start - last.start <= _JOINED_SHARE * min(last.end - last.start, end - start):
            segments[-1] = Moment(last.start, max(last.end, end), f"{last.text} {text}")
        else:
            segments[-1] = replace(last, end=min(last.end, start))
            segments.append(Moment(start, end, text))
    return [segment for segment in segments if segment.end > segment.start]


def _lines_of_cue(text: str) -> list[str]:
    """Returns the lines of a subtitle without marks, without needless white space, and without empty ones."""
    plain = _SUBSTATION_MARKS.sub(" ", text[:_LONGEST_CUE])
    lines = plain.replace("\\N", "\n").replace("\\h", " ").split("\n")
    return [" ".join(line.split()) for line in lines if line.strip()]


def scene_cuts(video: Video) -> list[tuple[float, float]]:
    """Returns when another scene begins, and how much it differs from the first frame of the scene before."""
    cuts: list[tuple[float, float]] = []
    first_frame = None
    for time, thumbnail in video.thumbnails():
        frame = thumbnail.astype(np.int16)
        if first_frame is None:
            first_frame = frame
            continue
        difference = float(np.abs(frame - first_frame).mean())
        start = cuts[-1][0] if cuts else 0.0
        if difference > _SCENE_DIFFERENCE and time - start >= _SHORTEST_SCENE:
            cuts.append((time, difference))
            first_frame = frame
    return cuts


def equal_moments(end: float, length: float, spoken: Sequence[Moment]) -> list[Moment]:
    """Returns moments of one length, each with what is said in the middle of it or around."""
    # The tolerance keeps rounding errors from adding a moment.
    count = max(1, round(end / length + 0.5 - 1e-9))
    texts: list[list[str]] = [[] for _ in range(count)]
    for cue in spoken:
        middle = (cue.start + cue.end) / 2
        texts[min(count - 1, int(middle / length))].append(cue.text)
    return [
        Moment(number * length, min(end, (number + 1) * length), " ".join(texts[number]))
        for number in range(count)
        if number * length < end
    ]


def join_neighbours(max_moments: int, moments: Sequence[Moment]) -> list[Moment]:
    """Returns moments, of which neighbours are joined where there are too many."""
    size = max(1, -(-len(moments) // max_moments))
    groups = [moments[start : start + size] for start in range(0, len(moments), size)]
    return [
        Moment(
            group[0].start,
            group[-1].end,
            " ".join(moment.text for moment in group if moment.text),
        )
        for group in groups
    ]


def _open_container(location: str, formats: str, content: bytes | None = None) -> Any:
    """Opens a file, or its content, as one of some formats, none of which names other files."""
    if content is not None:
        file: Any = io.BytesIO(content)
    elif is_url(location):
        file = open_location(location)
    else:
        open_regular(location).close()
        file = location
    with _ffmpeg_errors_of(location):
        options = {"format_whitelist": formats, "protocol_whitelist": "file"}
        return av.open(file, options=options, metadata_errors="replace")


@contextmanager
def _ffmpeg_errors_of(location: str) -> Iterator[None]:
    """Names the file in errors of FFmpeg."""
    try:
        yield
    except av.FFmpegError as error:
        # Of a Matroska file that is cut off, FFmpeg says "Operation not permitted" or "Input/output error".
        is_cut = error.errno in (errno.EPERM, errno.EIO)
        reason = "it is cut off or damaged" if is_cut else error.strerror
        raise ValueError(f"{location} cannot be read ({reason}); copy it again") from error


class Video:
    """A video that is open.

    Attributes:
        location: Path or URL.
        duration: Seconds, as the file says; 0 where it does not.
    """

    def __init__(self, location: str, container: Any) -> None:
        if not container.streams.video:
            raise ValueError(f"{location} has no frames; expected a video")
        self.location = location
        self._container = container
        self._stream = container.streams.video[0]
        if self._stream.codec_context is None:
            raise ValueError(
                f"{location} has frames that FFmpeg cannot decode; convert it, for example to H.264"
            )
        self._stream.thread_type = "AUTO"
        self._check_size(self._stream.width, self._stream.height)
        self._start = (container.start_time or 0) / _MICROSECONDS
        # The duration of a Matroska file is the time of its end.
        self.duration = (container.duration or 0) / _MICROSECONDS
        if "matroska" in container.format.name:
            self.duration = max(0.0, self.duration - self._start)
        self._frame: Any = None  # the last one that was decoded but for one
        self._next_frame: Any = None
        self._frames: Iterator[Any] = iter(())
        self._damage_time: float | None = None  # of the last packet that is damaged
        self._keyframe_time = 0.0
        # Frames up to so many seconds ahead are decoded; for others a keyframe is sought.
        self._reach = 10.0

    def end(self) -> float:
        """Returns the seconds that can be read, fewer than its duration where something is missing."""
        for start in (max(0.0, self.duration - 10), 0.0):
            self._seek(start)
            ends = [
                self._time(packet) + float((packet.duration or 0) * packet.time_base)
                for packet in self._packets(None)
            ]
            if ends:
                return max(ends)
        return 0.0

    def thumbnails(self) -> Iterator[tuple[float, UInt8[np.ndarray, "32 32 3"]]]:
        """Yields small frames with their times: keyframes where they are frequent, else several frames a second."""
        self._seek(0.0)
        keys = [self._time(packet) for packet in self._packets(self._stream) if packet.is_keyframe]
        gaps = [after - before for before, after in pairwise([*keys, self.duration])]
        codec = self._stream.codec_context
        skip_frame = codec.skip_frame
        if gaps and max(gaps) <= _KEYFRAME_INTERVAL:
            codec.skip_frame = "NONKEY"
        self._seek(0.0)
        last_time = -_THUMBNAIL_INTERVAL
        skipped = None
        try:
            for frame in self._decoded():
                time = self._time(frame)
                # A frame that was skipped, but is shown for long, counts.
                if skipped is not None and time >= self._time(skipped) + _THUMBNAIL_INTERVAL:
                    last_time = self._time(skipped)
                    yield last_time, skipped.reformat(**_THUMBNAIL).to_ndarray()
                skipped = frame
                if time >= last_time + _THUMBNAIL_INTERVAL:
                    last_time = time
                    skipped = None
                    yield last_time, frame.reformat(**_THUMBNAIL).to_ndarray()
        finally:
            codec.skip_frame = skip_frame
            self._seek(0.0)

    def cues(self) -> tuple[list[Moment], str | None]:
        """Returns the subtitles in the file, of the first stream that has text, and what is wrong with them."""
        for stream in self._container.streams.subtitles:
            if stream.codec_context and stream.codec_context.name not in _BITMAP_CODECS:
                self._seek(0.0)
                cues = list[Moment]()
                num_bad = _read_cues(self._packets(stream), cues, self._start)
                problem = f"{num_bad} of the subtitles in it cannot be read, as they are not UTF-8"
                return cues, problem if num_bad else None
        return [], None

    def sound(self, seconds: float) -> Iterator[tuple[float, bytes]]:
        """Yields the first sound track as MP3 files of one channel and so many seconds, each with its start."""
        if not self._container.streams.audio:
            return
        stream = self._container.streams.audio[0]
        self._seek(0.0)
        resampler = av.AudioResampler("s16p", "mono", _SAMPLE_RATE)
        writer: _Mp3Writer | None = None
        for packet in self._packets(stream, flush=True):
            try:
                frames = [frame for frame in packet.decode() if frame.pts is not None]
            except av.FFmpegError:
                continue
            for frame in frames:
                time = self._time(frame)
                if writer is not None and time >= writer.start + seconds:
                    yield writer.start, writer.content()
                    writer = None
                if writer is None:
                    writer = _Mp3Writer(time)
                for resampled in resampler.resample(frame):
                    writer.write(resampled)
        if writer is not None:
            yield writer.start, writer.content()

    def jpeg(self, time: float, name: str = "") -> bytes:
        """Returns the last frame that begins at or before a time as JPEG.

        The frame is upright, at most 1280 pixels long, and has a name as comment.

        Raises:
            ValueError: It cannot be decoded, or has too many pixels.
        """
        self._go_to(time)
        is_damaged = (
            self._damage_time is not None and self._keyframe_time <= self._damage_time <= time
        )
        if self._frame is None or is_damaged:
            raise ValueError(f"{self.location} cannot be decoded at {time:.3f} s; copy it again")
        frame = self._frame
        self._check_size(frame.width, frame.height)
        width = frame.width * float(self._stream.sample_aspect_ratio or 1)
        scale = min(1.0, _LONGEST_SIDE / max(width, frame.height))
        pixels = frame.reformat(
            width=max(1, round(width * scale)),
            height=max(1, round(frame.height * scale)),
            format="rgb24",
            interpolation="BICUBIC",
        )
        image = Image.fromarray(pixels.to_ndarray())
        if frame.rotation:
            image = image.rotate(frame.rotation, expand=True)
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=_JPEG_QUALITY, comment=name)
        return stream.getvalue()

    def _go_to(self, time: float) -> None:
        """Decodes up to the last frame that begins at or before a time, from where it is or from a keyframe."""
        before = None if self._frame is None else self._time(self._frame)
        if before is None or not 0 <= time - before <= self._reach:
            for step in _SEEK_STEPS:
                self._seek(time - step)
                self._advance()
                if self._is_next_by(time):
                    break
            # Where keyframes are far from each other, the way back to one is longer than the way on.
            if before is not None and before <= time and self._is_next_by(before):
                self._reach *= 2
        while self._next_frame is not None and (self._frame is None or self._is_next_by(time)):
            self._advance()

    def _is_next_by(self, time: float) -> bool:
        """Returns whether the next frame begins at or before a time."""
        return self._next_frame is not None and self._time(self._next_frame) <= time

    def _advance(self) -> None:
        self._frame = self._next_frame
        self._next_frame = next(self._frames, None)
        if self._frame is not None and self._frame.key_frame:
            self._keyframe_time = self._time(self._frame)

    def _seek(self, time: float) -> None:
        """Goes to a keyframe before a time, or in some formats to one after it."""
        self._frame = None
        self._next_frame = None
        self._damage_time = None
        timestamp = round((self._start + time) * _MICROSECONDS) if time > 0 else -_MICROSECONDS
        try:
            self._container.seek(timestamp)
        except av.FFmpegError:  # the format has no times
            self._container.seek(0, any_frame=True)
        self._frames = self._decoded()

    def _decoded(self) -> Iterator[Any]:
        """Yields frames from here on, and notes the times of packets that are damaged or left out."""
        for packet in self._packets(self._stream, flush=True):
            time = self._damage_time if packet.pts is None else self._time(packet)
            if packet.is_corrupt:
                self._damage_time = time
            try:
                yield from (frame for frame in packet.decode() if frame.pts is not None)
            except av.FFmpegError:
                self._damage_time = time

    def _packets(self, stream: Any, *, flush: bool = False) -> Iterator[Any]:
        """Yields packets up to where the file cannot be read, of a stream or of all."""
        with suppress(av.FFmpegError):
            for packet in self._container.demux(*([] if stream is None else [stream])):
                if packet.pts is not None or flush:
                    yield packet

    def _time(self, timed: Any) -> float:
        return float(timed.pts * timed.time_base) - self._start

    def _check_size(self, width: int, height: int) -> None:
        if width * height > MAX_PIXELS:
            raise ValueError(
                f"{self.location} has frames of {width}x{height} pixels, the limit is {MAX_PIXELS}"
            )


class _Mp3Writer:
    """Writes frames of sound to an MP3 file in memory, which begins at a second of a video."""

    def __init__(self, start: float) -> None:
        self.start = start
        self._buffer = io.BytesIO()
        self._container = av.open(self._buffer, "w", format="mp3")
        self._track: Any = self._container.add_stream(
            "libmp3lame", rate=_SAMPLE_RATE, layout="mono", bit_rate=_BIT_RATE
        )

    def write(self, frame: Any) -> None:
        frame.pts = None
        self._container.mux(self._track.encode(frame))

    def content(self) -> bytes:
        """Ends the file and returns it."""
        self._container.mux(self._track.encode())
        self._container.close()
        return self._buffer.getvalue()


@contextmanager
def open_video(location: str) -> Iterator[Video]:
    with _ffmpeg_errors_of(location), _open_container(location, _VIDEO_FORMATS) as container:
        yield Video(location, container)


def frame_of(location: str, time: float, name: str = "") -> bytes:
    """Returns a frame as JPEG. By its comment, the name, equal frames of different moments are different files."""
    with _ffmpeg_errors_of(location):
        version = "" if is_url(location) else version_of(location)
        return _cached_video(location, version).jpeg(time, name)


@lru_cache(maxsize=2)
def _cached_video(location: str, version: str) -> Video:
    return Video(location, _open_container(location, _VIDEO_FORMATS))


def read_subtitles(location: str) -> tuple[list[Moment], str | None]:
    """Reads a file of subtitles, WebVTT or SubRip, and returns what can be read, and what is wrong."""
    cues = list[Moment]()
    try:
        content = read_location(location, most=2**26)
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            content = content.decode("utf-16", errors="replace").encode()
        with _open_container(location, "webvtt,srt", content) as container:
            num_bad = _read_cues(container.demux(container.streams[0]), cues)
    except (ValueError, OSError) as error:
        return cues, str(error)
    if num_bad:
        return cues, f"{location} has {num_bad} subtitles that are not UTF-8; save it as UTF-8"
    return cues, None if cues else f"{location} has no subtitles; expected WebVTT or SubRip"


def _read_cues(packets: Iterable[Any], cues: list[Moment], video_start: float = 0.0) -> int:
    """Adds the subtitles that can be read, and returns how many packets cannot."""
    num_bad = 0
    for packet in packets:
        if packet.pts is None:
            continue
        start = float(packet.pts * packet.time_base) - video_start
        end = start + max(0.0, float((packet.duration or 0) * packet.time_base))
        try:
            for subtitle in packet.decode():
                cues.append(Moment(start, end, subtitle.dialogue.decode(errors="replace")))
        except av.FFmpegError:
            num_bad += 1
    return num_bad
