"""Peak memory of `bridgetower prepare` over the number of pairs: python benchmarks/prepare_memory.py.

Images with captions are generated once, as files with a CSV table and as COCO's files; each `prepare` is a process of
its own.
"""

import argparse
import csv
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 96  # pixels


def picture(number: int) -> bytes:
    """A JPEG of noise, another for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def caption(number: int) -> str:
    """As long as one of COCO."""
    return f"A picture of noise with the number {number}, of which there is no other."


def write_pictures(folder: Path, count: int) -> list[str]:
    """Writes images and returns their names."""
    folder.mkdir(parents=True)
    names = [f"{number:012d}.jpg" for number in range(count)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(picture(number))
    return names


def table(folder: Path, names: list[str]) -> list[str]:
    """Writes a CSV table and returns the set's name and source as `prepare` takes them."""
    with (folder / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        writer.writerows((f"pictures/{name}", caption(number)) for number, name in enumerate(names))
    return ["pairs", str(folder / "captions.csv")]


def coco(folder: Path, names: list[str]) -> list[str]:
    """Writes Karpathy's file with five captions per image."""
    images = [
        {
            "filepath": "pictures",
            "filename": name,
            "split": "train",
            "sentences": [
                {"raw": caption(5 * number + n), "tokens": caption(5 * number + n).split()} for n in range(5)
            ],
        }
        for number, name in enumerate(names)
    ]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images}))
    return ["coco", "--source", str(folder)]


FORMS: dict[str, Callable[[Path, list[str]], list[str]]] = {"pairs of a table": table, "COCO's files": coco}


def measure(command: list[str]) -> tuple[float, float]:
    """Runs a command; returns its highest resident memory in MiB and its seconds."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss / 1024, time.perf_counter() - start


def main() -> None:
    """Prints a line of JSON per form and number, with the ratio to the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[5_000, 50_000], help="numbers of images")
    counts = parser.parse_args().pairs
    first: dict[str, float] = {}
    for count in counts:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            names = write_pictures(folder / "pictures", count)
            for form, write in FORMS.items():
                out = folder / form.replace(" ", "-")
                peak, seconds = measure(
                    [sys.executable, "-m", "bridgetower", "prepare", *write(folder, names), "--out", str(out)]
                )
                ratio = peak / first.setdefault(form, peak)
                figures = {"form": form, "images": count, "peak_mib": round(peak), "ratio": round(ratio, 2)}
                print(json.dumps({**figures, "seconds": round(seconds, 1)}), flush=True)


if __name__ == "__main__":
    main()
