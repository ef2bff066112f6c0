"""How well the demo's model finds images that no training saw: python benchmarks/foreign_images.py FOLDER.

FOLDER has PNG files, each with a text file of the same name whose first line describes it. Tux Paint's stamps are such:

    apt-get download tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default_*.deb stamps
    python benchmarks/foreign_images.py stamps/usr/share/tuxpaint/stamps

Of images with the same description the first by path is taken, and of these 200 by a hash of the path. They are indexed
with the model that `make demo` leaves, and searched by their descriptions. Prints a line of JSON for each stage.
"""

import argparse
import hashlib
import json
import shutil
import tempfile
from pathlib import Path

from bridgetower.predictor import load
from bridgetower.search.build import build_index
from bridgetower.search.config import IndexConfig
from bridgetower.search.searcher import RERANK, Searcher
from bridgetower_demo.folder import FOLDER, trained_model

KS = (1, 10)


def described(folder: Path, count: int) -> dict[Path, str]:
    """Returns images of a folder with their descriptions, each of which belongs to one image."""
    first: dict[str, Path] = {}
    for image in sorted(folder.rglob("*.png")):
        text = image.with_suffix(".txt")
        if text.exists():
            lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
            first.setdefault(lines[0].strip() if lines else "", image)
    first.pop("", None)
    images = {image: caption for caption, image in first.items()}
    return {image: images[image] for image in sorted(images, key=lambda image: _rank(image, folder))[:count]}


def _rank(image: Path, folder: Path) -> str:
    return hashlib.sha256(image.relative_to(folder).as_posix().encode()).hexdigest()


def ranks(searcher: Searcher, captions: dict[str, str], rerank: int) -> list[int]:
    """Returns the place of each image among the hits for its own description."""
    places = []
    for path, caption in captions.items():
        hits = searcher.search(caption, top=len(captions), rerank=rerank, truncate=True)
        places.append([hit.path for hit in hits].index(path) + 1)
    return places


def main() -> None:
    """Indexes and searches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, default=trained_model(FOLDER))
    parser.add_argument("--count", type=int, default=200)
    options = parser.parse_args()
    chosen = described(options.folder, options.count)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "images"
        root.mkdir()
        captions = {f"{number}.png": caption for number, caption in enumerate(chosen.values())}
        for name, image in zip(captions, chosen, strict=True):
            shutil.copy(image, root / name)
        predictor = load(options.model, device="cpu")
        build_index(root, Path(place) / "index.lance", predictor, IndexConfig(num_workers=0), progress=False)
        searcher = Searcher(Path(place) / "index.lance", predictor)
        for stage, rerank in (("nearest vectors", 0), (f"{RERANK} reranked", RERANK)):
            if rerank == 0 or predictor.model.itm_head is not None:
                places = ranks(searcher, captions, rerank)
                show(stage, {k: sum(rank <= k for rank in places) / len(places) for k in KS}, len(places))
        show("chance", {k: min(1, k / len(captions)) for k in KS}, len(captions))


def show(stage: str, recalls: dict[int, float], images: int) -> None:
    """Prints a line."""
    print(json.dumps({"stage": stage, "images": images, **{f"recall_at_{k}": recalls[k] for k in KS}}))


if __name__ == "__main__":
    main()
