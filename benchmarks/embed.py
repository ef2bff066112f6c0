"""Rate and memory of `bridgetower embed` and `score`: python benchmarks/embed.py; prints tables and lines of JSON.

`memory`: how far the memory of a process rises while it embeds 10,000 and 100,000 tiny images, out of a Parquet file
with their bytes. `scores`: the same while it scores each with a caption. `files`: bytes of the table of a run over so
many files with a text each, and of its vectors alone. `workers`: images a second in one process and on a Ray cluster of
this machine with one and two workers, between the first commit and the last, so without loading and starting.
"""

import argparse
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from memory import save_model
from PIL import Image

from bridgetower.data.sets.store import Table
from bridgetower.inference.config import EmbedConfig, ScoreConfig
from bridgetower.inference.vector_files import embed_source
from bridgetower.model.config import (
    FusionConfig,
    HeadsConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
)
from search import Row, alone, photo, show

PARTS = ["memory", "scores", "files", "workers"]
GROUP = 1000  # rows of a row group


def model(side: int, width: int, layers: int, *, itm: bool = False) -> ModelConfig:
    """A model of random weights, for images of so many pixels."""
    shape: dict[str, Any] = {
        "hidden_size": width,
        "num_layers": layers,
        "num_heads": width // 32,
        "intermediate_size": 4 * width,
    }
    return ModelConfig(
        vision=VisionConfig(image_size=side, patch_size=16, **shape),
        text=TextConfig(vocab_size=1000, max_positions=44, **shape),
        fusion=replace(FusionConfig(**shape), num_layers=2),
        heads=HeadsConfig(itc="tower", itc_size=256, itm=itm),
    )


def write_images(path: Path, count: int, picture: Callable[[int], Image.Image]) -> None:
    """Writes a Parquet file of JPEG images with captions."""
    schema = pa.schema({"id": pa.int64(), "image": pa.binary(), "caption": pa.string()})
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, count, GROUP):
            numbers = range(start, min(start + GROUP, count))
            images, captions = (
                [_jpeg(picture(n)) for n in numbers],
                [f"picture {n}" for n in numbers],
            )
            writer.write_table(
                pa.table({"id": numbers, "image": images, "caption": captions}, schema)
            )


def _jpeg(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "JPEG")
    return stream.getvalue()


def _tiny(number: int) -> Image.Image:
    return Image.new("RGB", (32, 32), (number % 256, number // 256 % 256, 128))


def memory(counts: list[int], config: EmbedConfig | ScoreConfig) -> Iterator[Row]:
    """Embeds, or scores, more and more tiny images, each time in a process of its own."""
    with tempfile.TemporaryDirectory() as place:
        save_model(model(32, 32, 2, itm=True), Path(place) / "model")
        for count in counts:
            write_images(Path(place) / "images.parquet", count, _tiny)
            yield {"images": count, **alone(_embedded, Path(place), config)}


def _embedded(place: Path, config: EmbedConfig | ScoreConfig) -> Row:
    report = embed_source(
        place / "images.parquet", place / f"{config.of}.parquet", place / "model", config
    )
    return {"images_per_s": round(report.vectors / report.seconds)}


def files(counts: list[int]) -> Iterator[Row]:
    """Embeds more and more files with one text each."""
    for count in counts:
        with tempfile.TemporaryDirectory() as place:
            save_model(model(32, 32, 2), Path(place) / "model")
            (Path(place) / "texts").mkdir()
            for number in range(count):
                (Path(place) / "texts" / f"{number:06}.txt").write_text("red")
            yield {"files": count, **alone(_of_files, Path(place))}


def _of_files(place: Path) -> Row:
    report = embed_source(
        place / "texts", place / "v.lance", place / "model", EmbedConfig(batch_size=64)
    )
    size = sum(path.stat().st_size for path in (place / "v.lance").rglob("*") if path.is_file())
    vectors = sum(batch["vector"].nbytes for batch in Table(place / "v.lance").scan(["vector"]))
    return {"bytes": size, "of_vectors": vectors, "seconds": round(report.seconds, 1)}


def workers(count: int) -> Iterator[Row]:
    """Embeds photos of 640 x 480 in one process, and with one and two workers."""
    with tempfile.TemporaryDirectory() as place:
        save_model(model(224, 384, 6), Path(place) / "model")
        (Path(place) / "images").mkdir()
        for start in range(0, count, 50):  # a part for a worker
            write_images(
                Path(place) / "images" / f"{start:06}.parquet", min(50, count - start), photo
            )
        for number in (0, 1, 2):
            name = f"Ray, {number} workers" if number else "one process"
            yield {"where": name, "images": count, **alone(_rate, Path(place), number)}


def _rate(place: Path, number: int) -> Row:
    ray = ("local", number) if number else (None, None)
    config = EmbedConfig(
        batch_size=16, num_workers=0, commit_seconds=0, ray=ray[0], ray_workers=ray[1]
    )
    times: list[tuple[float, int]] = []
    append = Table.append

    def timed(table: Table, rows: pa.Table) -> None:
        append(table, rows)
        times.append((time.perf_counter(), len(rows)))

    Table.append = timed  # type: ignore[method-assign, assignment]
    embed_source(place / "images", place / f"{number}.npy", place / "model", config)
    seconds = times[-1][0] - times[0][0]
    return {"images_per_s": round(sum(rows for _, rows in times[1:]) / seconds, 1)}


def main() -> None:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument(
        "--counts", nargs="+", type=int, default=[10_000, 100_000], help="of `memory` and `scores`"
    )
    parser.add_argument("--files", nargs="+", type=int, default=[1000, 10_000], help="of `files`")
    parser.add_argument("--photos", type=int, default=400, help="of `workers`")
    given = parser.parse_args()
    for part, config in (("memory", EmbedConfig), ("scores", ScoreConfig)):
        if part in given.parts:
            show(part, memory(given.counts, config(batch_size=64, num_workers=0)))
    if "files" in given.parts:
        show("files", files(given.files))
    if "workers" in given.parts:
        show("workers", workers(given.photos))


if __name__ == "__main__":
    main()
