"""The same images with captions in every kind of source that they can come from."""

import csv
import io
import json
import shutil
import tarfile
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

REFUSALS = []  # statuses of the next answers
NAMES = ("00", "01", "02", "03", "04")
CAPTIONS = ("a red bar", "a green square", "a blue circle", "white on black", "yellow on grey")


def write_sources(images, folder):
    """Writes the first images of a folder as every kind of source; returns where each is."""
    contents = {f"{name}.png": (images / f"{name}.png").read_bytes() for name in NAMES}
    rows = list(zip(contents, CAPTIONS, strict=True))
    places = {
        kind: folder / kind
        for kind in ("folder", "shards", "saved", "parquet_folder", "imagefolder")
    }
    for kind in ("folder", "imagefolder"):
        places[kind].mkdir()
        for name, caption in rows:
            shutil.copy(images / name, places[kind])
            if kind == "folder":
                (places[kind] / name).with_suffix(".txt").write_text(caption)
    _write_lines(
        places["imagefolder"] / "metadata.jsonl", [{"file_name": n, "text": c} for n, c in rows]
    )
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("image", "caption"), *((f"folder/{name}", caption) for name, caption in rows)]
        )
    _write_lines(
        folder / "table.jsonl", [{"id": n, "path": f"folder/{n}", "captions": [c]} for n, c in rows]
    )
    places["shards"].mkdir()
    write_tar(places["shards"] / "shard-0.tar", rows[:3], contents)
    write_tar(places["shards"] / "shard-1.tar", rows[3:], contents)
    cells = {"image_id": list(contents), "captions": [[caption] for caption in CAPTIONS]}
    cells["image"] = [{"bytes": content, "path": None} for content in contents.values()]
    places["parquet_folder"].mkdir()
    pq.write_table(pa.table(cells), places["parquet_folder"] / "train-00000-of-00001.parquet")
    plain = {"id": list(contents), "jpg": list(contents.values()), "text": list(CAPTIONS)}
    pq.write_table(pa.table(plain), folder / "bytes.parquet")
    datasets.Dataset.from_dict(cells).save_to_disk(places["saved"])
    files = {kind: folder / kind for kind in ("table.csv", "table.jsonl", "bytes.parquet")}
    return places | files


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
        asked = self.headers.get("Range")
        path = Path(self.translate_path(self.path))
        if not asked or not path.is_file():
            super().do_GET()
            return
        first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
        content = path.read_bytes()[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def served(folder):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
