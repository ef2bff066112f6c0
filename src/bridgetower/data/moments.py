"""Videos as moments: by what is said, by what is shown, or every few seconds."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from glob import escape
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from bridgetower.data.images import ImageRef
from bridgetower.data.sources import files_in
from bridgetower.extras import install, is_installed, require
from bridgetower.files import cache_folder, unfit_name, write_bytes
from bridgetower.model.plain import AT_LEAST_1, check_numbers

if TYPE_CHECKING:
    from bridgetower.data.frames import Cue, Video

VIDEO_SUFFIXES = frozenset(
    {".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv"}
)
SUBTITLE_SUFFIXES = (".vtt", ".srt")
LARGEST_SUBTITLES = 2**26
"""Bytes of a file of subtitles."""

_LONGEST_CUE = 2000  # characters
_SHOWN_FOR = 5.0  # seconds that a subtitle without an end is shown
_SILENCE = 10.0  # seconds without a subtitle from which on they are moments of their own
_CUT = 12.0  # mean difference of two small frames, of 255, from which on another scene begins
_SHORTEST_WINDOW, _LARGEST_WINDOW = 0.1, 86_400.0  # seconds of moments of one length
_TOGETHER = 0.25  # of the shorter one's time, within which two subtitles begin together
_SHORTEST = 1.0  # seconds of a scene
_MISSING = 2.0  # seconds that a whole video may end before the end that the file names
_MARKS = re.compile(r"\{[^}]*\}")
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}([-_][A-Za-z0-9]+)*(\.(forced|sdh))?", re.ASCII)  # en, zh-Hans, en.sdh
_VERSION = 4  # of how moments are found; those in the cache are of it

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Moment:
    """A part of a video.

    Attributes:
        start: Seconds from the start of the video.
        end: Likewise.
        text: What is said.
    """

    start: float
    end: float
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Cutting:
    """How videos are cut into moments.

    Attributes:
        every: Seconds of each moment; None: the subtitles', and scenes where there are none.
        max_moments: Of one video.
    """

    every: float | None = None
    max_moments: int = 1000

    def __post_init__(self) -> None:
        """Checks the numbers."""
        check_numbers(self, every=(_SHORTEST_WINDOW, _LARGEST_WINDOW), max_moments=AT_LEAST_1)


def subtitles_of(video: Path) -> Path | None:
    """Returns the file of subtitles beside a video, `NAME.vtt`, `NAME.srt` or `NAME.LANGUAGE.vtt`; None without one."""
    exact = [video.with_suffix(suffix) for suffix in SUBTITLE_SUFFIXES]
    others = [path for path in video.parent.glob(f"{escape(video.stem)}.*") if _is_in_a_language(path, video)]
    found = [path for path in (*exact, *sorted(others)) if path.is_file()]
    if len(found) > 1:
        logger.warning("%s has %d files of subtitles; %s is read", video, len(found), found[0])
    return found[0] if found else None


def _is_in_a_language(path: Path, video: Path) -> bool:
    """Whether a file is `NAME.LANGUAGE.vtt` of a video, and not `NAME.vtt` of another one beside it."""
    language = path.stem[len(video.stem) + 1 :]
    if path.suffix not in SUBTITLE_SUFFIXES or not _LANGUAGE.fullmatch(language):
        return False
    return not any(one.suffix.lower() in VIDEO_SUFFIXES for one in path.parent.glob(f"{escape(path.stem)}.*"))


def readable_videos(folder: Path) -> list[Path]:
    """Returns the videos in a folder and those below, from there on; none, with a warning, without PyAV."""
    found = list(files_in(folder, VIDEO_SUFFIXES))
    if found and not is_installed("av"):
        message = "%s has %d videos, which cannot be read; to read them, run in the project's folder: %s"
        logger.warning(message, folder, len(found), install("video"))
        return []
    return found


def images_of_video(path: Path, name: str, cutting: Cutting) -> tuple[list[tuple[ImageRef, str]], str | None]:
    """Returns the frame in the middle of each moment with what is said, and what is wrong with the video.

    Args:
        path: The file.
        name: Of the video; those of its moments have their times as a media fragment, `NAME#t=START,END`.
        cutting: How it is cut.
    """
    if problem := unfit_name(name):
        return [], problem
    require("video")
    try:
        moments, problems = moments_of(path, cutting)
    except (OSError, ValueError) as error:
        return [], str(error)
    found = []
    for one in moments:
        times = f"{name}#t={one.start:.3f},{one.end:.3f}"
        place = (one.start, one.end)
        found.append((ImageRef(path=path, name=times, file_name=path.name, moment=place), one.text))
    return found, "; ".join(problems) or None


def moments_of(video: Path, cutting: Cutting) -> tuple[list[Moment], list[str]]:
    """Returns the moments of a video in order, and what is wrong with it or its subtitles.

    They are kept in the cache of the package as long as the files stay as they are.
    """
    subtitles = subtitles_of(video)
    files = [
        (os.path.realpath(path), path.stat().st_size, path.stat().st_mtime_ns) for path in (video, subtitles) if path
    ]
    key = hashlib.sha256(json.dumps([_VERSION, files, asdict(cutting)]).encode()).hexdigest()
    cached = cache_folder() / "moments" / f"{key}.json"
    if cached.is_file():
        check, _, content = cached.read_bytes().partition(b"\n")
        if check == f"{zlib.crc32(content):08x}".encode():
            kept = json.loads(content)
            return [Moment(*values) for values in kept["moments"]], kept["problems"]
        logger.warning("%s is damaged; the moments of %s are found again", cached, video)
    moments, problems = _found(video, subtitles, cutting)
    kept = {"moments": [[one.start, one.end, one.text] for one in moments], "problems": problems}
    content = json.dumps(kept).encode()
    write_bytes(cached, f"{zlib.crc32(content):08x}\n".encode() + content)
    return moments, problems


def _found(path: Path, subtitles: Path | None, cutting: Cutting) -> tuple[list[Moment], list[str]]:
    from bridgetower.data.frames import opened_video

    problems = []
    with opened_video(path) as video:
        end = video.end()
        if end <= 0:
            raise ValueError(f"{path} has no pictures that can be read; copy it again")
        if end < video.duration - _MISSING:
            problems.append(f"it ends after {end:.1f} of {video.duration:.1f} s; copy it again")
        cues, problem = _cues_of(video, subtitles)
        problems += [problem] if problem else []
        said = merged(cues)
        segments = [replace(one, end=min(one.end, end)) for one in said if one.start < end]
        if said and not segments:
            problems.append(f"all its subtitles come after its end, at {end:.1f} s; they are another video's")
        if cutting.every is not None:
            return windows(end, max(cutting.every, end / cutting.max_moments), segments), problems
        gaps = list(silences(segments, end))
        scenes = scenes_in(gaps, cuts_of(video), cutting.max_moments) if gaps else []
    return at_most(cutting.max_moments, sorted([*segments, *scenes], key=lambda one: one.start)), problems


def _cues_of(video: Video, subtitles: Path | None) -> tuple[list[Cue], str | None]:
    """Returns the subtitles beside a video or in it, and what is wrong with them."""
    from bridgetower.data.frames import read_subtitles

    if subtitles is None:
        return video.cues()
    size = subtitles.stat().st_size
    if size > LARGEST_SUBTITLES:
        return [], f"{subtitles} has {size} bytes; expected subtitles of at most {LARGEST_SUBTITLES}"
    return read_subtitles(subtitles)


def merged(cues: Iterable[Cue]) -> list[Moment]:
    """Returns what is said as segments that follow each other.

    Subtitles that begin together are one segment. Of others that overlap, the first ends where the next
    begins. Lines that a subtitle repeats from the one before, as rolling captions do, are left out.
    """
    segments: list[Moment] = []
    shown: list[str] = []  # lines of the subtitle before
    until = 0.0  # which it was shown
    for cue in sorted(cues, key=lambda one: (one.start, one.end)):
        start, end = max(0.0, cue.start), cue.end if cue.end > cue.start else cue.start + _SHOWN_FOR
        text = _MARKS.sub(" ", cue.text[:_LONGEST_CUE]).replace("\\N", "\n").replace("\\h", " ")
        lines = [line for line in (" ".join(line.split()) for line in text.split("\n")) if line]
        if not lines or end <= 0:
            continue
        last = segments[-1] if segments else None
        follows = last is not None and start <= until + 0.1
        new = lines[_num_repeated(shown, lines) if follows else 0 :]
        if last is not None and follows and not new:
            segments[-1] = replace(last, end=max(last.end, end))
        elif last is not None and start - last.start <= _TOGETHER * min(last.end - last.start, end - start):
            segments[-1] = Moment(last.start, max(last.end, end), f"{last.text} {' '.join(new)}")
        else:
            if last is not None:
                segments[-1] = replace(last, end=min(last.end, start))
            segments.append(Moment(start, end, " ".join(new)))
        shown, until = lines, max(until, end) if follows else end
    return [one for one in segments if one.end > one.start]


def _num_repeated(before: Sequence[str], lines: Sequence[str]) -> int:
    """Returns how many lines at the start are those at the end of what was shown before."""
    return next((n for n in range(min(len(before), len(lines)), 0, -1) if before[-n:] == lines[:n]), 0)


def silences(segments: Sequence[Moment], end: float) -> Iterator[tuple[float, float]]:
    """Yields the times in which nothing is said for long; the whole video if nothing is said at all."""
    starts = [0.0, *(one.end for one in segments)]
    ends = [*(one.start for one in segments), end]
    for start, stop in zip(starts, ends, strict=True):
        if stop - start > _SILENCE or not segments:
            yield start, stop


def cuts_of(video: Video) -> list[tuple[float, float]]:
    """Returns when another scene begins, and by how much it differs from what was shown when the last one began."""
    import numpy as np

    cuts: list[tuple[float, float]] = []
    before = None
    for time, small in video.thumbnails():
        frame = small.astype(np.int16)
        difference = 0.0 if before is None else float(np.abs(frame - before).mean())
        if before is None or (difference > _CUT and time - (cuts[-1][0] if cuts else 0.0) >= _SHORTEST):
            cuts += [(time, difference)] if before is not None else []
            before = frame
    return cuts


def scenes_in(gaps: Sequence[tuple[float, float]], cuts: Sequence[tuple[float, float]], most: int) -> list[Moment]:
    """Returns the scenes in some parts of a video; of more than enough cuts the strongest."""
    within = [(start + _SHORTEST, end - _SHORTEST) for start, end in gaps]
    inside = [cut for cut in cuts if any(start < cut[0] < end for start, end in within)]
    strongest = sorted(inside, key=lambda cut: -cut[1])[: max(0, most - len(gaps))]
    found = []
    for start, end in gaps:
        times = [start, *sorted(time for time, _ in strongest if start < time < end), end]
        found += [Moment(*part) for part in pairwise(times)]
    return found


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
    return [Moment(part[0].start, part[-1].end, " ".join(one.text for one in part if one.text)) for part in parts]
