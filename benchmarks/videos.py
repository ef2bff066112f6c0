"""Time and memory of indexing a video: python benchmarks/videos.py --minutes 10; prints a line of JSON for each way.

A video of 1280x720 pixels at 25 frames a second is generated: another scene every 10 seconds, something moving in it, a
keyframe at least every 250 frames as x264 sets it. It is indexed in a process of its own, by subtitles of 4 seconds, by
scenes and by scenes of a video with a keyframe every 2 seconds, with the base model and random weights. `times_real` is
the length of the video divided by the seconds that `index` took without loading the model; `moments_seconds` of them
went to finding the moments, `peak_mib` is the highest memory of the process, `loaded_mib` that before indexing.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
from memory import save_model

from bridgetower.data.config import Cutting
from bridgetower.data.sources.reader import file_groups
from bridgetower.data.sources.video import moments_of
from bridgetower.inference.predictor import load
from bridgetower.model.presets import BASE, NANO
from bridgetower.search.build import build_index
from search import in_process, resident

WIDTH, HEIGHT, RATE = 1280, 720, 25
SCENE, SUBTITLE = 10, 4  # seconds


def write_video(path: Path, minutes: float, keyframes: int) -> None:
    """Writes a video of smooth grounds, which a bright square crosses."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = (
            WIDTH,
            HEIGHT,
            "yuv420p",
            keyframes,
        )
        for number in range(round(60 * minutes * RATE)):
            if number % (SCENE * RATE) == 0:
                small = av.VideoFrame.from_ndarray(
                    rng.integers(0, 256, (18, 32, 3), dtype=np.uint8), format="rgb24"
                )
                ground = small.reformat(width=WIDTH, height=HEIGHT, format="yuv420p").to_ndarray()
            picture = ground.copy()
            left = 7 * number % (WIDTH - 200)
            picture[200:400, left : left + 200] = 235
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="yuv420p")))
        container.mux(stream.encode())


def write_subtitles(path: Path, minutes: float) -> None:
    """Writes a subtitle after the other."""
    blocks = []
    for start in range(0, round(60 * minutes), SUBTITLE):
        times = (
            f"{at // 3600:02}:{at // 60 % 60:02}:{at % 60:02}.000"
            for at in (start, start + SUBTITLE)
        )
        blocks.append(
            " --> ".join(times)
            + f"\nword{start % 300} word{start % 299} word{start % 298} word{start % 7}\n"
        )
    path.write_text("WEBVTT\n\n" + "\n".join(blocks))


def measure(video: Path, model: Path, out: Path, minutes: float) -> dict[str, Any]:
    """Indexes a video in this process."""
    predictor = load(model, device="cpu")
    loaded, started = resident("VmRSS"), time.perf_counter()
    (part,) = file_groups(video.parent)
    moments, problems = moments_of(part.files[0], part.sidecars.get(part.files[0].name), Cutting())
    assert not problems
    found = time.perf_counter() - started
    report = build_index(video, out, predictor)
    assert report.images == len(moments)
    seconds = found + report.seconds
    return {
        "moments": report.images,
        "seconds": round(seconds, 1),
        "times_real": round(60 * minutes / seconds, 2),
        "moments_seconds": round(found, 1),
        "loaded_mib": loaded,
        "peak_mib": resident("VmHWM"),
    }


def main() -> None:
    """Measures each way in a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=10, help="length of the video (default: 10)"
    )
    parser.add_argument("--quick", action="store_true", help="the nano model: does it run?")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = name  # nothing is known of the videos
        save_model(
            (NANO if given.quick else BASE).override({"heads.itc": "tower"}), folder / "model"
        )
        for way, keyframes in (
            ("subtitles", 250),
            ("scenes", 250),
            ("scenes, keyframe every 2 s", 2 * RATE),
        ):
            video = folder / way / "video.mp4"
            video.parent.mkdir()
            write_video(video, given.minutes, keyframes)
            if way == "subtitles":
                write_subtitles(video.with_suffix(".vtt"), given.minutes)
            row = in_process(
                measure, video, folder / "model", video.with_suffix(".lance"), given.minutes
            )
            print(json.dumps({"by": way, "video_minutes": given.minutes, **row}), flush=True)


if __name__ == "__main__":
    main()
