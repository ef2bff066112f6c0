"""What a source names: images, texts and names, whatever kind it is; blocks; errors."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from unittest.mock import patch

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bridgetower.data import remote
from bridgetower.data.items import Columns, SourceItem, read_blocks, units_of
from bridgetower.data.remote import SILENCE, expanded, is_url, read_url
from sources import CAPTIONS, NAMES, served

KINDS = [
    *("folder", "shards", "saved", "parquet_folder", "imagefolder"),
    *("table.csv", "table.jsonl", "bytes.parquet"),
]


def items(source: str | Path, columns: Columns = Columns(), *, copies: bool = True) -> list[SourceItem]:  # noqa: B008
    blocks = read_blocks(units_of(source), columns, 2, copies=copies)
    return [item for block in blocks for item in block.items]


def contents(found: list[SourceItem]) -> list[bytes]:
    return [item.image.read() for item in found if item.image is not None]


@pytest.fixture
def expected(pictures: Path) -> list[bytes]:
    return [(pictures / f"{name}.png").read_bytes() for name in NAMES]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same(kind: str, places: dict[str, Path], expected: list[bytes]) -> None:
    found = items(places[kind])
    assert contents(found) == expected
    assert [item.texts for item in found] == [(caption,) for caption in CAPTIONS]
    assert len({item.id for item in found}) == 5
    if kind in ("saved", "parquet_folder", "table.jsonl", "bytes.parquet"):  # they have a column of names
        assert [item.id for item in found] == [f"{name}.png" for name in NAMES]


@pytest.mark.parametrize("kind", ["shards/shard-{0..1}.tar", "table.csv", "table.jsonl", "bytes.parquet"])
def test_over_http(kind: str, places: dict[str, Path], expected: list[bytes]) -> None:
    with served(places["folder"].parent) as url:
        blocks = read_blocks(units_of(f"{url}/{kind}"), Columns(), 2)
        found = []
        for block in blocks:  # images in a copy are there until their block is released
            found += contents(list(block.items))
            block.release()
        assert found == expected
        if kind == "bytes.parquet":
            with pytest.raises(ValueError, match="holds images in a table; workers read these only from a disk"):
                items(f"{url}/{kind}", copies=False)
        else:
            assert contents(items(f"{url}/{kind}", copies=False)) == expected


def test_copies_are_removed_with_their_last_block(places: dict[str, Path]) -> None:
    with served(places["shards"]) as url:
        blocks = list(read_blocks(units_of(f"{url}/shard-{{0..1}}.tar"), Columns(), 2))
        copies = [item.image.path for block in blocks for item in block.items if item.image]
        assert [path.exists() for path in copies] == [True] * 5
        blocks[0].release()
        assert copies[0].exists()
        blocks[1].release()
        assert [path.exists() for path in copies] == [False, False, False, True, True]
        blocks[2].release()


def test_in_a_store(places: dict[str, Path], expected: list[bytes]) -> None:
    store = fsspec.filesystem("memory")
    for kind in ("folder", "shards", "parquet_folder"):
        store.put(str(places[kind]), f"/bucket/{kind}", recursive=True)
    try:
        assert contents(items("memory://bucket/folder")) == expected
        assert [item.texts for item in items("memory://bucket/folder", Columns(captions_from="folder"))] == [
            ("folder",)
        ] * 5
        assert [item.texts for item in items("memory://bucket/shards")] == [(caption,) for caption in CAPTIONS]
        assert len(items("memory://bucket/shards/*-0.tar")) == 3
        assert len(items("memory://bucket/parquet_folder")) == 5
        store.put(str(places["shards"] / "shard-0.tar"), "/bucket/more/shard-0.tar")
        found = [item.id for item in items("memory://bucket/*/shard-0.tar")]
        assert found == [f"{folder}/shard-0.tar/0{number}.png" for folder in ("more", "shards") for number in range(3)]
    finally:
        store.rm("/bucket", recursive=True)


def test_tables_of_one_name_in_several_folders(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        cells = {"path": ["x.png", None, "https://host/y.png", "/z.png"], "text": [folder] * 4}
        pq.write_table(pa.table(cells), tmp_path / folder / "0.parquet")
    found = items(tmp_path)
    assert [item.id for item in found[:4]] == ["a/x.png", "a/0.parquet/2", "https://host/y.png", "/z.png"]
    assert [item.id for item in found[4:6]] == ["b/x.png", "b/0.parquet/2"]
    assert [item.image and item.image.path for item in (found[0], found[4])] == [
        tmp_path / "a/x.png",
        tmp_path / "b/x.png",
    ]
    assert found[5].place == "b/0.parquet row 2"
    with served(tmp_path) as url:  # a `*` stands for nothing over HTTP, a range does
        (tmp_path / "0").symlink_to("a")
        (tmp_path / "1").symlink_to("b")
        of_urls = items(f"{url}/{{0..1}}/0.parquet")
    assert [item.id for item in of_urls[:2]] == ["0/x.png", "0/0.parquet/2"]
    assert [item.image and item.image.url for item in (of_urls[0], of_urls[4])] == [f"{url}/0/x.png", f"{url}/1/x.png"]


class TestUrls:
    def test_ranges(self) -> None:
        assert expanded("s3://a/{08..10}-{0..1}.tar") == [
            f"s3://a/{number}-{other}.tar" for number in ("08", "09", "10") for other in (0, 1)
        ]
        assert expanded("https://host/a.csv?x=*") == ["https://host/a.csv?x=*"]

    def test_which_are_some(self) -> None:
        assert [is_url(one) for one in ("https://a", "s3://a/b", "simplecache::s3://a")] == [True] * 3
        assert [is_url(one) for one in ("a/b", "/a", "a:b.png", "C:/a", Path("a"))] == [False] * 5

    def test_errors(self, tmp_path: Path) -> None:
        (tmp_path / "a.bin").write_bytes(b"12345")
        with served(tmp_path) as url:
            assert read_url(f"{url}/a.bin", (1, 3)) == b"234"
            with pytest.raises(ValueError, match=r"a\.bin gives 2 bytes where 3 were asked for"):
                read_url(f"{url}/a.bin", (3, 3))
            with pytest.raises(FileNotFoundError, match=f"no file at {url}/b"):
                read_url(f"{url}/b")
        with (
            patch.object(time, "sleep", side_effect=AssertionError("nobody answers there")),
            pytest.raises(OSError, match=rf"{url}/a\.bin cannot be read \(.*\)$"),
        ):
            read_url(f"{url}/a.bin")
        with pytest.raises(OSError, match="nothing matches memory://none/"):
            expanded("memory://none/*.tar")

    def test_a_server_that_is_busy_is_asked_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(remote, "PAUSES", (0.001,) * 12)
        answers = [503, 429, 200, 404, 503, 503, 503, 503, 503]
        with answering(lambda handler: reply(handler, answers.pop(0))) as url:
            assert read_url(f"{url}/a.bin") == b"content"
            with pytest.raises(FileNotFoundError):
                read_url(f"{url}/a.bin")
            assert len(answers) == 5
            with pytest.raises(OSError, match=r"cannot be read .*503"):
                read_url(f"{url}/a.bin")
            assert answers == []

    def test_a_server_that_says_nothing_is_given_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(SILENCE, "0.5")
        over, asked, started = Event(), [], time.monotonic()
        with answering(lambda handler: asked.append(handler.path) or over.wait(60)) as url:
            for piece in (None, (0, 3)):
                with pytest.raises(OSError, match=r"/a\.bin cannot be read \(.*[Tt]ime"):
                    read_url(f"{url}/a.bin", piece)
            assert time.monotonic() - started < 8
            over.set()
        assert len(asked) == 2


def reply(handler: BaseHTTPRequestHandler, status: int) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", "7")
    handler.end_headers()
    handler.wfile.write(b"content")


@contextmanager
def answering(answer: Callable[[BaseHTTPRequestHandler], object]) -> Iterator[str]:
    """Serves what a function answers; yields the URL."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Says nothing."""

        def do_GET(self) -> None:
            answer(self)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


class TestColumns:
    def test_that_are_named(self, tmp_path: Path) -> None:
        row = {"thumb": "a.png", "image": "b.png", "title": ["one", " "], "text": "two", "sku": 7}
        (tmp_path / "a.jsonl").write_text(json.dumps(row))
        (found,) = items(tmp_path / "a.jsonl", Columns(image="thumb", text="title", id="sku"))
        assert (found.id, found.texts) == ("7", ("one",))
        assert found.image
        assert found.image.path == tmp_path / "a.png"

    def test_urls_where_there_are_no_files(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("url,caption\nhttps://host/a/b.jpg?s=1,one\n")
        (found,) = items(tmp_path / "a.csv")
        assert found.image
        assert (found.id, found.image.url, found.image.file_name) == (
            "https://host/a/b.jpg?s=1",
            "https://host/a/b.jpg?s=1",
            "b.jpg",
        )

    def test_texts_alone(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("one\n\n two \n")
        assert [(item.id, item.texts, item.image) for item in items(tmp_path / "a.txt")] == [
            ("1", ("one",), None),
            ("3", ("two",), None),
        ]
        (tmp_path / "a.csv").write_text("key,text\nx,one\n,two\n")
        assert [(item.id, item.texts) for item in items(tmp_path / "a.csv")] == [("x", ("one",)), ("2", ("two",))]

    def test_an_index_that_pandas_wrote(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text(",caption\n0,one\n")
        assert [(item.id, item.image, item.texts) for item in items(tmp_path / "a.csv")] == [("1", None, ("one",))]

    @pytest.mark.parametrize("kind", ["parquet", "arrow", "ARROW"])
    def test_cells_without_bytes(self, kind: str, tmp_path: Path) -> None:
        kept = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        cells = [
            None,
            {"bytes": None, "path": "a.png"},
            {"bytes": b"1", "path": "b.png"},
            {"bytes": None, "path": None},
        ]
        table = pa.table({"picture": pa.array(cells, kept), "text": list("abcd")})
        if kind == "parquet":
            pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)  # one without any bytes, one with some
        else:
            with pa.ipc.new_file(tmp_path / f"a.{kind}", table.schema) as writer:
                writer.write_table(table)
        nothing, by_path, stored, empty = items(tmp_path / f"a.{kind}")
        assert [(item.id, item.image, item.texts) for item in (nothing, empty)] == [
            ("1", None, ("a",)),
            ("4", None, ("d",)),
        ]
        assert by_path.image
        assert (by_path.id, by_path.image.path) == ("a.png", tmp_path / "a.png")
        assert contents([stored]) == [b"1"]

    def test_rows_of_json_lines_have_columns_of_their_own(self, tmp_path: Path) -> None:
        rows = [{"caption": "a"}, {"image": "0.png", "caption": "b"}, {"path": "1.png", "id": 7}, {"other": 1}, {}]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = items(tmp_path / "a.jsonl")
        assert [(item.id, item.texts) for item in found] == [
            *[("1", ("a",)), ("0.png", ("b",)), ("7", ()), ("4", ()), ("5", ())]
        ]
        assert [item.image and item.image.path.name for item in found] == [None, "0.png", "1.png", None, None]
        assert [item.texts for item in items(tmp_path / "a.jsonl", Columns(text="other"))] == [(), (), (), ("1",), ()]
        with pytest.raises(ValueError, match=r"no row of .*a\.jsonl has a column no, none; give the name of one"):
            items(tmp_path / "a.jsonl", Columns(image="none", id="no"))
        (tmp_path / "a.jsonl").write_text(json.dumps({"other": 1}))
        with pytest.raises(ValueError, match="has no column of images and none of texts; it has other: name one"):
            items(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "x,y\n1,2\n", "has no column of images and none of texts; it has x, y"),
        ("a.csv", "image,img\n1,2\n", r"has several image columns \(image, img\)"),
        ("a.docx", "", r"a\.docx is no source; expected a folder, or a file that ends in \.tar, \.txt"),
        ("a.parquet", "", "is no Parquet file"),
        ("a.arrow", "", "is no Arrow IPC file"),
        ("a.tar", "no archive at all", "is no tar archive"),
    ],
)
def test_what_is_no_source(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        items(tmp_path / name)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        units_of(tmp_path / "none")
    with pytest.raises(ValueError, match="is no table, tar shard or video; the files of a folder cannot be listed"):
        units_of("https://host/photos")


def test_blocks_end_with_their_unit(places: dict[str, Path]) -> None:
    blocks = list(read_blocks(units_of(places["shards"]), Columns(), 2))
    assert [(block.name, len(block.items), block.last) for block in blocks] == [
        ("000000-000000", 2, False),
        ("000000-000001", 1, True),
        ("000001-000000", 2, True),
    ]
    assert len({block.digest() for block in blocks}) == 3
    rest = list(read_blocks(units_of(places["shards"]), Columns(), 2, skip=lambda unit: unit == 0))
    assert [block.digest() for block in rest] == [blocks[2].digest()]
