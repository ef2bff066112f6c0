"""What a text is best compared with in videos: python research/against.py --model MODEL --data SETS; JSON lines.

A video is made of the images of prepared sets: each is shown for 4 seconds, with a subtitle. What is asked is the first
caption of an image, what is said is the second one, in other words. In one video the subtitle is about the image that
is shown, in the other about another image of the set, as talks often are. Each row has the recall at 1, 5 and 10 of the
moment that is asked for, by what the text is compared with (`--against`), without matching:

* `shown and said`: subtitles are about the image; the moment that shows it and tells of it;
* `said`: subtitles are about another image; the moment in which the asked image is told of;
* `shown`: in the same video, the moment that shows the asked image;
* `mixed`: as the first one, but half of the images are in a video of their own in which nothing is said.

`mean` is the mean of the three recalls, over all questions: what the default of `--against` goes by.
"""

import argparse
import io
import json
import os
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from bridgetower.data.batches.captions import CaptionImages
from bridgetower.data.config import DataConfig
from bridgetower.inference.predictor import Predictor, load
from bridgetower.search.build import build_index
from bridgetower.search.config import Against
from bridgetower.search.searcher import Searcher

SECONDS, RATE, SIDE = 4, 2, 224
KS = (1, 5, 10)
Moments = Sequence[tuple[bytes, str]]


def write_video(path: Path, moments: Moments) -> None:
    """Writes each image with its subtitle, one after the other."""
    blocks = []
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "12"})
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for number, (content, words) in enumerate(moments):
            image = Image.open(io.BytesIO(content)).convert("RGBA").resize((SIDE, SIDE))
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert(
                "RGB"
            )
            for place in range(SECONDS * RATE):
                frame = av.VideoFrame.from_ndarray(np.asarray(image), format="rgb24")
                frame.pts, frame.time_base = number * SECONDS * RATE + place, Fraction(1, RATE)
                container.mux(stream.encode(frame))
            start = number * SECONDS
            times = (
                f"{at // 3600:02}:{at // 60 % 60:02}:{at % 60:02}.000"
                for at in (start, start + SECONDS - 1)
            )
            blocks += [f"{' --> '.join(times)}\n{words}\n"] if words else []
        container.mux(stream.encode())
    path.with_suffix(".vtt").write_text("WEBVTT\n\n" + "\n".join(blocks))


def recalls(
    searcher: Searcher,
    texts: Sequence[str],
    moments: Sequence[tuple[str, int]],
    against: Against | None,
) -> dict[str, float]:
    """Returns the recalls of texts, each of which has its moment: the name of a video and a number."""
    ranks = []
    for text, (video, number) in zip(texts, moments, strict=True):
        hits = searcher.search(text, top=max(KS), rerank=0, against=against, truncate=True)
        # scenes begin with a frame
        near = [abs((hit.start or 0.0) - number * SECONDS) < 1 for hit in hits]
        ranks.append(
            [one and hit.path.startswith(video) for one, hit in zip(near, hits, strict=True)]
        )
    return {f"r{k}": float(np.mean([any(found[:k]) for found in ranks])) for k in KS}


def measure(
    predictor: Predictor, contents: Sequence[bytes], asked: Sequence[str], said: Sequence[str]
) -> None:
    """Prints a row for each question and each way to compare, then the means."""
    own = list(range(len(contents)))
    shift = len(own) // 2  # the sets have like images beside each other
    others = [(number + shift) % len(own) for number in own]
    questions = {
        "shown and said": (own, own),
        "said": (others, [others.index(number) for number in own]),
        "shown": (others, own),
        "mixed": (own, own),
    }
    means: dict[str, list[float]] = {}
    for question, (told, moments) in questions.items():
        with tempfile.TemporaryDirectory() as name:
            os.environ["XDG_CACHE_HOME"] = name
            folder, half = Path(name) / "videos", len(own) // 2 if question == "mixed" else len(own)
            folder.mkdir()
            shown = [(contents[number], said[told[number]]) for number in own]
            write_video(folder / "talk.mp4", shown[:half])
            places = [("talk", number) for number in moments[:half]]
            if question == "mixed":
                write_video(folder / "silent.mp4", shown[half:])
                (folder / "silent.vtt").unlink()
                places += [("silent", number - half) for number in moments[half:]]
            build_index(folder, Path(name) / "videos.lance", predictor)
            searcher = Searcher(Path(name) / "videos.lance", predictor)
            assert len(searcher.index) == len(own) or question == "mixed"
            ways: tuple[Against | None, ...] = (None, "images", "captions", "words", "hybrid")
            for against in (*ways, "pairs") if predictor.model.compares_pairs else ways:
                row = recalls(searcher, asked, places, against)
                way = against or "default"
                means.setdefault(way, []).extend(row.values())
                print(
                    json.dumps({"question": question, "against": way, "moments": len(own), **row}),
                    flush=True,
                )
    print(
        json.dumps({"mean": {against: float(np.mean(values)) for against, values in means.items()}})
    )


def main() -> None:
    """Measures a model on the images of sets that have two captions or more, each with captions of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--data", nargs="+", required=True, help="prepared sets of images with captions"
    )
    parser.add_argument("--split", default="test")
    parser.add_argument("--count", type=int, default=200, help="images at most (default: 200)")
    given = parser.parse_args()
    predictor = load(given.model)
    images = CaptionImages(DataConfig(folders=tuple(given.data)), given.split, predictor.processor)
    owners = images.owners().tolist()
    every = images.all_captions()
    usable = [
        number
        for number, captions in enumerate(every)
        if owners[number] == number and len(captions) > 1
    ]
    chosen = usable[:: max(1, len(usable) // given.count)][: given.count]
    captions = [every[number] for number in chosen]
    asked, said = ([row[place] for row in captions] for place in (0, 1))
    measure(predictor, images.contents(chosen), asked, said)


if __name__ == "__main__":
    main()
