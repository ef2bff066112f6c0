"""The same images with captions in every kind of source, and videos with subtitles."""

import csv
import io
import json
import shutil
import tarfile
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import av
import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

REFUSALS = []  # statuses of the next answers
SOURCE_NAMES = ("00", "01", "02", "03", "04")
SOURCE_CAPTIONS = (
    "a red bar",
    "a green square",
    "a blue circle",
    "white on black",
    "yellow on grey",
)


def write_sources(images, folder):
    """Writes the first images of a folder as every kind of source. Returns where each is."""
    contents = {f"{name}.png": (images / f"{name}.png").read_bytes() for name in SOURCE_NAMES}
    rows = list(zip(contents, SOURCE_CAPTIONS, strict=True))
    paths = {
        kind: folder / kind
        for kind in ("folder", "shards", "saved", "parquet_folder", "imagefolder")
    }
    for kind in ("folder", "imagefolder"):
        paths[kind].mkdir()
        for name, caption in rows:
            shutil.copy(images / name, paths[kind])
            if kind == "folder":
                (paths[kind] / name).with_suffix(".txt").write_text(caption)
    _write_lines(
        paths["imagefolder"] / "metadata.jsonl", [{"file_name": n, "text": c} for n, c in rows]
    )
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("image", "caption"), *((f"folder/{name}", caption) for name, caption in rows)]
        )
    _write_lines(
        folder / "table.jsonl", [{"id": n, "path": f"folder/{n}", "captions": [c]} for n, c in rows]
    )
    paths["shards"].mkdir()
    write_tar(paths["shards"] / "shard-0.tar", rows[:3], contents)
    write_tar(paths["shards"] / "shard-1.tar", rows[3:], contents)
    cells = {"image_id": list(contents), "captions": [[caption] for caption in SOURCE_CAPTIONS]}
    cells["image"] = [{"bytes": content, "path": None} for content in contents.values()]
    paths["parquet_folder"].mkdir()
    pq.write_table(pa.table(cells), paths["parquet_folder"] / "train-00000-of-00001.parquet")
    plain = {"id": list(contents), "jpg": list(contents.values()), "text": list(SOURCE_CAPTIONS)}
    pq.write_table(pa.table(plain), folder / "bytes.parquet")
    datasets.Dataset.from_dict(cells).save_to_disk(paths["saved"])
    files = {kind: folder / kind for kind in ("table.csv", "table.jsonl", "bytes.parquet")}
    return paths | files


def _write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_tar(path, rows, contents, *, as_json=False):
    """Writes a shard as WebDataset does, or with captions as img2dataset has them too."""
    with tarfile.open(path, "w") as archive:
        for name, caption in rows:
            text = (".json", json.dumps({"caption": caption})) if as_json else (".txt", caption)
            for member, content in (
                (name, contents[name]),
                (f"{Path(name).stem}{text[0]}", text[1].encode()),
            ):
                header = tarfile.TarInfo(member)
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))


class _Handler(SimpleHTTPRequestHandler):
    """Serves files, and pieces of them, which the standard library does not."""

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        if REFUSALS:
            self.send_error(REFUSALS.pop())
            return
        byte_range = self.headers.get("Range")
        path = Path(self.translate_path(self.path))
        if not byte_range or not path.is_file():
            super().do_GET()
            return
        first, last = (int(number) for number in byte_range.removeprefix("bytes=").split("-"))
        content = path.read_bytes()[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serve_files(folder):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


CLIP_COLOURS = ("red", "lime", "blue", "white")
SCENE_SECONDS = 3  # seconds of a colour
CLIP_SIZE = (96, 64)
SUBTITLES = (
    "1\n00:00:00,500 --> 00:00:02,500\nA red <i>square</i>\n\n"
    "2\n00:00:03,500 --> 00:00:05,000\nis {\\an8}followed\nby green\n\n"
    "3\n00:00:06,000 --> 00:00:09,500\nand by blue, née azure\n"
)
SUBTITLE_TEXTS = ["A red square", "is followed by green", "and by blue, née azure"]


def write_clip(
    path,
    *,
    codec="libx264",
    fps=5,
    seconds=12,
    size=CLIP_SIZE,
    subtitles=None,
    keyframes=250,
    begin=0,
    pixels=None,
    still=False,
):
    """Writes a clip, with pixels of a ratio of sides, or of one colour. The container follows from the suffix."""
    options = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *size, "yuv420p", keyframes
        if pixels is not None:
            stream.codec_context.sample_aspect_ratio = pixels
        words = None if subtitles is None else container.add_mux_stream(subtitles[0])
        for number in range(fps * seconds):
            frame = av.VideoFrame.from_image(clip_image(0 if still else number // fps, size))
            frame.pts, frame.time_base = begin * fps + number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        for start, end, content in () if subtitles is None else subtitles[1]:
            packet = av.Packet(content)
            packet.stream, packet.time_base = words, Fraction(1, 1000)
            packet.pts = packet.dts = round(start * 1000)
            packet.duration = round((end - start) * 1000)
            container.mux(packet)
    return path


def clip_image(second, size=CLIP_SIZE):
    image = Image.new("RGB", size, CLIP_COLOURS[second // SCENE_SECONDS % len(CLIP_COLOURS)])
    ImageDraw.Draw(image).text((4, 2), f"second {second}", fill="black")
    return image
