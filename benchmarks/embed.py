"""Rate and memory of `bridgetower embed`: python benchmarks/embed.py; prints tables and lines of JSON.

`memory`: how far the memory of a process rises while it embeds 10,000 and 100,000 tiny images, out of a Parquet file
with their bytes. `workers`: images a second in one process and on a Ray cluster of this machine with one and two
workers, between the first block that is written and the last, so without loading and starting.
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
from inference_memory import save_model
from PIL import Image

from bridgetower.bulk.config import EmbedConfig
from bridgetower.bulk.embedding import EmbeddedBlock
from bridgetower.bulk.outputs import Output
from bridgetower.bulk.run import embed_source
from bridgetower.model.config import FusionConfig, HeadsConfig, ModelConfig
from bridgetower.model.tower_config import TextConfig, VisionConfig
from search import Row, _alone, _photo, show

PARTS = ["memory", "workers"]
GROUP = 1000  # rows of a row group


def model(side: int, width: int, layers: int) -> ModelConfig:
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
        heads=HeadsConfig(itc="tower", itc_size=256),
    )


def write_images(path: Path, count: int, picture: Callable[[int], Image.Image]) -> None:
    """Writes a Parquet file of JPEG images."""
    schema = pa.schema({"id": pa.int64(), "image": pa.binary()})
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, count, GROUP):
            numbers = range(start, min(start + GROUP, count))
            writer.write_table(pa.table({"id": numbers, "image": [_jpeg(picture(n)) for n in numbers]}, schema))


def _jpeg(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "JPEG")
    return stream.getvalue()


def _tiny(number: int) -> Image.Image:
    return Image.new("RGB", (32, 32), (number % 256, number // 256 % 256, 128))


def memory(counts: list[int]) -> Iterator[Row]:
    """Embeds more and more tiny images, each time in a process of its own."""
    with tempfile.TemporaryDirectory() as place:
        save_model(model(32, 32, 2), Path(place) / "model")
        for count in counts:
            write_images(Path(place) / "images.parquet", count, _tiny)
            yield {"images": count, **_alone(_embedded, Path(place))}


def _embedded(place: Path) -> Row:
    config = EmbedConfig(batch_size=64, num_workers=0)
    report = embed_source(place / "images.parquet", place / "vectors.parquet", place / "model", config)
    return {"images_per_s": round(report.vectors / report.seconds)}


def workers(count: int) -> Iterator[Row]:
    """Embeds photos of 640 x 480 in one process, and with one and two workers."""
    with tempfile.TemporaryDirectory() as place:
        save_model(model(224, 384, 6), Path(place) / "model")
        write_images(Path(place) / "images.parquet", count, _photo)
        for number in (0, 1, 2):
            name = f"Ray, {number} workers" if number else "one process"
            yield {"where": name, "images": count, **_alone(_rate, Path(place), number)}


def _rate(place: Path, number: int) -> Row:
    ray = ("local", number) if number else (None, None)
    config = EmbedConfig(batch_size=16, block_size=16, num_workers=0, ray=ray[0], ray_workers=ray[1])
    times: list[tuple[float, int]] = []
    write = Output.write

    def timed(output: Output, block: EmbeddedBlock) -> None:
        write(output, block)
        times.append((time.perf_counter(), len(block.rows)))

    Output.write = timed  # type: ignore[method-assign, assignment]
    embed_source(place / "images.parquet", place / f"{number}.npy", place / "model", config)
    seconds = times[-1][0] - times[0][0]
    return {"images_per_s": round(sum(rows for _, rows in times[1:]) / seconds, 1)}


def main() -> None:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--counts", nargs="+", type=int, default=[10_000, 100_000], help="of `memory`")
    parser.add_argument("--photos", type=int, default=400, help="of `workers`")
    given = parser.parse_args()
    if "memory" in given.parts:
        show("memory", list(memory(given.counts)))
    if "workers" in given.parts:
        show("workers", list(workers(given.photos)))


if __name__ == "__main__":
    main()
