"""The one reader: every kind of source gives the same examples, and what cannot be used is named and skipped."""

import bz2
import gzip
import io
import json
import lzma
import os
import shutil
import socket
import tarfile
import time
import tracemalloc
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bridgetower.data.sets.datasets.spec import Originals
from bridgetower.data.sources import fetch, json_lists, shards, tables
from bridgetower.data.sources.columns import Columns
from bridgetower.data.sources.reader import file_groups, read, read_group
from helpers.sets import png_of_shade
from helpers.sources import (
    REFUSALS,
    SOURCE_CAPTIONS,
    SOURCE_NAMES,
    serve_files,
    write_sources,
    write_tar,
)

CONTENTS = {f"{name}.png": png_of_shade(50 * number) for number, name in enumerate(SOURCE_NAMES)}
KINDS = (
    "folder",
    "imagefolder",
    "table.csv",
    "table.jsonl",
    "shards",
    "parquet_folder",
    "saved",
    "bytes.parquet",
)
MORE_KINDS = (
    "captions",
    "semicolons.csv",
    "tabs.tsv",
    "table.csv.gz",
    "table.json",
    "img2dataset.tar",
)


def write_png_files(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (folder / f"{name}.png").write_bytes(png_of_shade(number))


@pytest.fixture(scope="module")
def sources_by_kind(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    for folder in ("images", "captions"):
        (root / folder).mkdir()
        for name, content in CONTENTS.items():
            (root / folder / name).write_bytes(content)
    rows = list(zip(CONTENTS, SOURCE_CAPTIONS, strict=True))
    lines = [f'{name}#0\t"{text}"' for name, text in rows]
    (root / "captions" / "captions.txt").write_text("\n".join(["image\tcaption", *lines]))
    for name, delimiter in (("semicolons.csv", ";"), ("tabs.tsv", "\t")):
        cells = [("image", "caption"), *((f"images/{file}", f'"{text}"') for file, text in rows)]
        (root / name).write_text("\n".join(map(delimiter.join, cells)))
    sources_by_kind = write_sources(root / "images", root)
    write_tar(root / "img2dataset.tar", rows, CONTENTS, as_json=True)
    (root / "table.csv.gz").write_bytes(gzip.compress((root / "table.csv").read_bytes()))
    listed = [{"file_name": f"images/{name}", "caption": [text]} for name, text in rows]
    (root / "table.json").write_text(json.dumps({"info": "x", "rows": listed}))
    return sources_by_kind | {kind: root / kind for kind in MORE_KINDS}


@pytest.mark.parametrize("kind", [*KINDS, *MORE_KINDS])
def test_every_kind_of_source_has_the_same_images_and_captions(kind, sources_by_kind):
    captions_by_image = {}
    for example in read(sources_by_kind[kind]):
        assert not example.problem
        (image,) = example.images
        captions_by_image[image.read()] = example.texts
        # from its place, as an index reads it later
        assert replace(image, content=None).read() == image.read()
    assert captions_by_image == {
        content: (text,) for content, text in zip(CONTENTS.values(), SOURCE_CAPTIONS, strict=True)
    }
    group_examples = [
        example
        for group in file_groups(sources_by_kind[kind])
        for example in read_group(group, Columns())
    ]
    assert group_examples == list(read(sources_by_kind[kind]))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "one\n two\n\n"),
        ("captions.txt", 'a.png,one\na.png#1,"two"\n'),
        ("t.jsonl", '{"image": "a.png", "text": ["one", " two ", ""]}'),
    ],
)
def test_several_captions_of_an_image(name, content, tmp_path):
    write_png_files(tmp_path, "a")
    (tmp_path / name).write_text(content)
    examples = list(read(tmp_path if name.endswith(".txt") else tmp_path / name))
    assert [text for example in examples for text in example.texts] == ["one", "two"]
    assert {image.read() for example in examples for image in example.images} == {png_of_shade(0)}


@pytest.mark.parametrize("saved", [False, True])
def test_splits_and_classes_are_those_of_the_source(saved, tmp_path):
    cells = {
        "image": [{"bytes": png_of_shade(n), "path": None} for n in range(4)],
        "label": [0, 1, 1, 0],
    }
    made = datasets.Dataset.from_dict(cells).cast_column("image", datasets.Image())
    made = made.cast_column("label", datasets.ClassLabel(names=["cat", "dog"]))
    if saved:
        datasets.DatasetDict({"train": made}).save_to_disk(str(tmp_path))
    else:
        (tmp_path / "README.md").write_text("---\n")
        made.to_parquet(str(tmp_path / "data" / "train-00000-of-00001.parquet"))
    labels = [(example.split, example.fields["label"]) for example in read(tmp_path)]
    assert labels == [("train", name) for name in ("cat", "dog", "dog", "cat")]


def test_class_folders_with_splits(tmp_path):
    for split in ("train", "val", "test"):
        for name in ("cat", "big_dog"):
            write_png_files(tmp_path / split / name, "a")
    labels = {(example.split, example.fields["label"]) for example in read(tmp_path)}
    assert labels == {
        (split, name) for split in ("train", "validation", "test") for name in ("cat", "big_dog")
    }
    by_folder = read(tmp_path, Columns(captions_from="folder"))
    assert {example.texts for example in by_folder} == {("cat",), ("big dog",)}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "t.csv",
            "image,caption,split\na.png,one,train\nb.png,x,nowhere\nc.png,a,b,c\nd.png,two,dev\n",
            [(2, "train", ("one",)), (3, None, ()), (4, None, ()), (5, "validation", ("two",))],
        ),
        (
            "t.jsonl",
            '{"image": "a.png"}\n{broken\n[1]\n\n{"image": "b.png", "caption": NaN}\n',
            [(1, "", ()), (2, None, ()), (3, None, ()), (5, "", ())],
        ),
    ],
)
def test_bad_rows_are_named_by_line_and_the_next_ones_are_read(name, content, expected, tmp_path):
    (tmp_path / name).write_text(content)
    results = [
        (example.origin, None, ())
        if example.problem
        else (example.origin, example.split, example.texts)
        for example in read(tmp_path / name)
    ]
    assert results == [(f"{name} line {line}", split, texts) for line, split, texts in expected]


def test_pairs_of_images(tmp_path):
    write_png_files(tmp_path, "a", "b")
    (tmp_path / "t.csv").write_text("left,right,text\na.png,b.png,both\n")
    (tmp_path / "u.csv").write_text("first,second,text\na.png,b.png,both\n")
    for examples in (
        read(tmp_path / "t.csv"),
        read(tmp_path / "u.csv", Columns(image="first,second")),
    ):
        assert [[image.read() for image in example.images] for example in examples] == [
            [png_of_shade(0), png_of_shade(1)]
        ]


def test_answers_that_may_pass_are_asked_for_again(tmp_path, monkeypatch):
    monkeypatch.setitem(vars(fetch.PATIENT), "pauses", (0.001,) * 2)
    (tmp_path / "a.txt").write_text("content")
    with serve_files(tmp_path) as url:
        for status in (408, 425, 429, 500):
            REFUSALS[:] = [status] * 2
            assert fetch.read_location(f"{url}/a.txt") == b"content"
        REFUSALS[:] = [403] * 2
        with pytest.raises(OSError, match=r"a\.txt cannot be read \(403"):
            fetch.read_location(f"{url}/a.txt")
    assert REFUSALS.pop() == 403  # it is not asked again


@pytest.fixture
def pauses(monkeypatch):
    """The pauses before further requests, which are not waited for."""
    durations = []
    monkeypatch.setattr(fetch.time, "sleep", durations.append)
    return durations


def test_a_host_that_refuses_is_left_soon_by_who_waits_and_tried_for_half_a_minute_in_a_job(pauses):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/a.png"
    # seconds, at worst
    assert fetch.BRIEF.trying + fetch.BRIEF.pauses[-1] + fetch.BRIEF.connecting < 10
    for patience, most in ((fetch.BRIEF, (0.25, 1)), (fetch.PATIENT, (0.5, 1, 2, 4, 8, 16))):
        pauses.clear()
        with pytest.raises(OSError, match=r"/a\.png cannot be read"):
            fetch.read_location(url, patience=patience)
        assert len(pauses) == len(most)
        assert all(limit / 2 <= pause <= limit for pause, limit in zip(pauses, most, strict=True))


def test_a_host_that_says_nothing_is_asked_again_only_while_there_is_time(pauses, monkeypatch):
    monkeypatch.setitem(vars(fetch.BRIEF), "silence", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/a.png"
        for trying, times in ((0.1, 0), (60.0, 2)):
            monkeypatch.setitem(vars(fetch.BRIEF), "trying", trying)
            with pytest.raises(OSError, match=r"/a\.png cannot be read \(.*[Tt]imeout"):
                fetch.read_location(url, patience=fetch.BRIEF)
            assert len(pauses) == times


def test_a_file_that_is_slow_but_goes_on_arrives_whole(monkeypatch):
    monkeypatch.setitem(vars(fetch.BRIEF), "trying", 0.1)

    class Slow(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "3")
            self.end_headers()
            for _ in range(3):
                time.sleep(0.1)
                self.wfile.write(b"x")

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.png"
        assert fetch.read_location(url, patience=fetch.BRIEF) == b"x" * 3
        server.shutdown()


@pytest.mark.parametrize("announced", [{"Accept-Ranges": "bytes"}, {"Accept-Ranges": "none"}, {}])
def test_a_server_without_ranges_is_read_as_a_whole(announced):
    """A file is read whole from a server without ranges, whatever its headers say."""
    content = bytes(range(12))

    class Whole(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            length = {"Content-Length": str(len(content))} if announced else {}
            for name, value in (announced | length).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Whole) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        with fetch.open_location(f"http://127.0.0.1:{server.server_port}/a.bin") as opened:
            opened.seek(5)
            assert opened.read(4) == content[5:9]
            opened.seek(0)
            assert opened.read() == content
        server.shutdown()


def test_files_of_a_url_are_listed_by_a_pattern_too(tmp_path):
    for name in ("b.png", "a.png", ".c.png", "d.txt"):
        (tmp_path / name).touch()
    for source, names in (
        (tmp_path.as_uri(), ["a.png", "b.png", "d.txt"]),
        (f"{tmp_path.as_uri()}/*.png", ["a.png", "b.png"]),
    ):
        assert [file.name for file in fetch.list_files(source)] == names
        assert [file.location for file in fetch.list_files(source)] == [
            f"{tmp_path.as_uri()}/{name}" for name in names
        ]
    (alone,) = fetch.list_files("http://127.0.0.1:9/folder/a.csv?key=b")  # which is not asked for
    assert (alone.location, alone.name) == ("http://127.0.0.1:9/folder/a.csv?key=b", "a.csv")
    with pytest.raises(FileNotFoundError, match=r"nothing matches file://.*\*\.tar"):
        list(fetch.list_files(f"{tmp_path.as_uri()}/*.tar"))


@pytest.mark.parametrize(
    ("location", "suffix"),
    [
        ("https://host/a.b.CSV.gz?x=.png", ".csv.gz"),
        ("a.b.c.json.zst", ".json.zst"),
        ("a.b.png", ".png"),
        ("a.gz", ".gz"),
        ("a", ""),
    ],
)
def test_endings_of_compressed_files_have_two_parts(location, suffix):
    assert fetch.suffix_of(location) == suffix


@pytest.mark.parametrize("buffer", [1, 3, 2**22])
class TestJsonLists:
    @pytest.mark.parametrize(
        ("content", "key", "items"),
        [
            ('[1, 22.5, 1e+5, -0.25e-2, {"a": []}]', None, [1, 22.5, 1e5, -0.0025, {"a": []}]),
            ("[]", None, []),
            (' {"info": {"x": [9]}, "rows": [true]} ', None, [True]),
            ('{"a": [1], "b": ["\\u00e4", 2]}', "b", ["ä", 2]),
        ],
    )
    def test_items(self, content, key, items, buffer, monkeypatch):
        monkeypatch.setattr(json_lists, "_BUFFER", buffer)
        assert (
            list(json_lists.JsonLists(io.BytesIO(content.encode()), "a.json").items(key)) == items
        )

    @pytest.mark.parametrize(
        ("content", "key", "message"),
        [
            ('{"a": [1], "b": [2]}', None, "has 2 lists of rows"),
            ('{"a": 1}', None, "has 0 lists of rows"),
            ('{"a": [1]}', "b", "has no b list"),
            ("[1] 2", None, "something follows it"),
            ("[1, 2", None, "not valid JSON"),
            ("[1 2]", None, "'2' where one of ,] is expected"),
            ("7", None, "'7' where one of { is expected"),
            (f'["{"x" * 33}"]', None, "a value has more than 32 characters"),
        ],
    )
    def test_what_is_no_list(self, content, key, message, buffer, monkeypatch):
        monkeypatch.setattr(json_lists, "_BUFFER", buffer)
        monkeypatch.setattr(json_lists, "LARGEST_ITEM", 32)
        with pytest.raises(ValueError, match=f"a.json .*{message}"):
            list(json_lists.JsonLists(io.BytesIO(content.encode()), "a.json").items(key))


def test_limits_of_what_is_read(tmp_path, monkeypatch):
    """A file that is too long is refused, not cut, and one that ends too soon is not taken for whole."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"0123456789")
    with serve_files(tmp_path) as url:
        for name in (str(path), f"{url}/a.bin"):
            assert fetch.read_location(name, most=10) == b"0123456789"
            assert fetch.read_location(name, (7, 3), most=3) == b"789"
            with pytest.raises(ValueError, match=r"a\.bin has .*(10|more than 9) bytes"):
                fetch.read_location(name, most=9)
            with pytest.raises(
                ValueError, match=r"a\.bin has a part of 4 bytes; expected at most 3"
            ):
                fetch.read_location(name, (0, 4), most=3)
        monkeypatch.setattr(fetch, "_BUFFER", 5)  # so that a part ends where the limit is
        with pytest.raises(ValueError, match=r"a\.bin has more than 5 bytes"):
            fetch.read_location(f"{url}/a.bin", most=5)
    with pytest.raises(
        ValueError, match=r"a\.bin ends in the middle of what is read of it; copy it again"
    ):
        fetch.read_location(str(path), (7, 4))


def test_what_is_skipped_is_counted_and_what_cannot_be_read_has_a_problem(
    tmp_path, caplog, monkeypatch
):
    write_png_files(tmp_path, "a", ".hidden")
    write_png_files(tmp_path / "shut", "b")
    for name in ("x.raw", "y.raw", "z.psd"):
        (tmp_path / name).write_bytes(b"?")
    (tmp_path / "main.ts").write_text("export const x = 1")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "circle").symlink_to(tmp_path)
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("shut"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    examples = list(read(tmp_path))
    assert [example.id for example in examples if not example.problem] == ["a.png"]
    problems = {example.id: example.problem for example in examples if example.problem}
    assert problems.keys() == {"pipe.png", "gone.png", "loop.png", "shut"}
    assert (problems["shut"], problems["loop.png"]) == (
        "Permission denied",
        "Too many levels of symbolic links",
    )
    assert all(skipped in caplog.text for skipped in ("2 .raw", "1 .psd", "1 .ts"))


def test_captions_through_a_link_out_of_the_folder_are_refused(tmp_path):
    write_png_files(tmp_path / "photos", "a")
    (tmp_path / "secret.txt").write_text("a secret")
    (tmp_path / "photos" / "a.txt").symlink_to(tmp_path / "secret.txt")
    (example,) = read(tmp_path / "photos")
    assert "link" in example.problem
    assert example.texts == ()


@pytest.mark.parametrize("cut", [100, 600, 1024, 3000])
def test_a_shard_that_is_cut_off_has_a_problem(cut, sources_by_kind, tmp_path):
    shard = shutil.copy(sources_by_kind["shards"] / "shard-0.tar", tmp_path)
    os.truncate(shard, cut)
    assert [*read(shard)][-1].problem


def test_a_key_that_comes_again_has_a_problem(tmp_path):
    write_tar(
        tmp_path / "s.tar",
        [(f"{name}.png", "x") for name in "aba"],
        {"a.png": png_of_shade(0), "b.png": png_of_shade(1)},
    )
    assert [bool(example.problem) for example in read(tmp_path / "s.tar")] == [False, False, True]


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("x.parquet", b"PAR1 no", "no Parquet or Arrow file"),
        ("x.csv", "image\nä".encode("latin-1"), "after line 1 it is not UTF-8"),
        ("x.json", b"[1,", "not valid JSON"),
        (
            "x.csv.gz",
            gzip.compress(b"image\na.png\n" * 9, mtime=0)[:-9],
            "the rest of it is not read",
        ),
        ("x.csv.bz2", b"BZh91AY&SY" + b"?" * 99, "the rest of it is not read"),
        ("x.csv.zst", b"(\xb5/\xfd" + b"?" * 99, "the rest of it is not read"),
        ("x.csv.xz", b"\xfd7zXZ" + b"?" * 99, "the rest of it is not read"),
    ],
)
def test_a_file_that_cannot_be_read_on_is_one_bad_row(name, content, error, tmp_path):
    (tmp_path / name).write_bytes(content)
    last = list(read(tmp_path / name))[-1]
    assert last.origin == name
    assert error in last.problem


@pytest.mark.parametrize(
    ("name", "message"),
    [("a\0b", "zero character"), ("\ud800", "not UTF-8"), ("x" * 2000, "more than 1020 bytes")],
)
def test_a_name_that_no_file_has(name, message, tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"image": f"{name}.png", "caption": "a"}))
    (example,) = first_examples(tmp_path / "t.jsonl")
    for call in (example.images[0].read, lambda: first_examples(name)):
        with pytest.raises(ValueError, match=f"{message}.*; give another path$"):
            call()


def test_a_source_that_is_none(sources_by_kind, tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        read(tmp_path / "none")
    (tmp_path / "x.raw").touch()
    with pytest.raises(ValueError, match="nothing that can be read"):
        read(tmp_path / "x.raw")
    with pytest.raises(ValueError, match=r"no row of table\.jsonl has a column quote"):
        list(read(sources_by_kind["table.jsonl"], Columns(text="quote")))


def test_row_groups_are_read_one_at_a_time(tmp_path):
    table = pa.table({"image": list(CONTENTS.values()), "caption": list(SOURCE_CAPTIONS)})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=1)
    examples = list(read(tmp_path / "t.parquet"))
    assert [replace(example.images[0], content=None).read() for example in examples] == list(
        CONTENTS.values()
    )


BOMB = 2**24  # bytes, more than reading may take
DEEP = b"[" * 10**6 + b"]" * 10**6
TOO_LONG = "it has more than 1048576 characters"


def first_examples(source, most=BOMB):
    """Reads a source and checks that not much of it is held at once."""
    tracemalloc.start()
    try:
        examples_read = []
        for example in read(source):
            examples_read += [example] if len(examples_read) < 1_100 else []
            assert pa.total_allocated_bytes() < most
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()
    return examples_read


def told(source):
    return [
        (example.origin, example.problem or " ".join(example.texts))
        for example in first_examples(source)
    ]


COMPRESSED = {
    "": bytes,
    ".gz": lambda content: gzip.compress(content, 1),
    ".bz2": lambda content: bz2.compress(content, 1),
    ".xz": lambda content: lzma.compress(content, preset=0),
    ".zst": lambda content: pa.compress(content, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(
            (f"t.csv{ending}", b"image,caption\na.png,one\nb.png,%s\nc.png,three\n")
            for ending in COMPRESSED
        ),
        (
            "t.jsonl",
            b'{"image": "a.png", "text": "one"}\n{"text": "%s"}\n{"image": "c.png", "text": "three"}\n',
        ),
        ("t.txt.zst", b"one\n%s\nthree\n"),
        ("captions.txt", b"a.png\tone\nb.png\t%s\nc.png\tthree\n"),
    ],
)
def test_lines_and_cells_without_end(name, text, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_ROW_LENGTH", 2**20)
    (tmp_path / "a.raw").touch()  # a folder of captions has other files
    (tmp_path / name).write_bytes(
        COMPRESSED[Path(name).suffix if name.count(".") > 1 else ""](text % (b"x" * BOMB))
    )
    start = 2 if ".csv" in name else 1
    (first, first_text), (second, problem), (third, three) = told(tmp_path)
    assert (first, second, third) == tuple(f"{name} line {start + number}" for number in range(3))
    assert (first_text, three) == ("one", "three")
    assert TOO_LONG in problem


def test_a_row_over_lines_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_ROW_LENGTH", 2**20)
    row = b'"%s\n",' % (b"x" * 60) * 2**15
    (tmp_path / "t.csv").write_bytes(b"image,caption\na.png,one\n" + row)
    first, second, *_ = first_examples(tmp_path / "t.csv", most=6 * 2**20)
    assert (first.origin, first.problem) == ("t.csv line 2", "")
    assert second.origin == "t.csv line 3"
    assert TOO_LONG in second.problem


def test_a_list_in_one_json_object(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lists, "LARGEST_ITEM", 2**22)
    (tmp_path / "t.json.gz").write_bytes(
        gzip.compress(b'[{"caption": "one"}, {"caption": "' + b"x" * 2 * BOMB, 1)
    )
    first, second = first_examples(tmp_path / "t.json.gz", most=2 * BOMB)
    assert (first.origin, first.texts) == ("t.json.gz row 1", ("one",))
    assert second.origin == "t.json.gz"
    assert "a value has more than 4194304 characters" in second.problem


def test_json_that_is_nested_without_end(tmp_path):
    half = DEEP[10**6 - 500_000 : 10**6 + 500_000]
    (tmp_path / "t.jsonl").write_bytes(
        b'{"text": "one"}\n{"text": ' + half + b'}\n{"text": "three"}\n'
    )
    (_, first_text), (origin, _), (_, three) = told(tmp_path / "t.jsonl")
    assert (first_text, origin, three) == ("one", "t.jsonl line 2", "three")
    (tmp_path / "t.json").write_bytes(b'{"rows": [{"text": "one"}, ' + DEEP + b"]}")
    first, second = told(tmp_path / "t.json")
    assert first == ("t.json row 1", "one")
    assert "t.json is not valid JSON (it is nested too deep)" in second[1]
    originals = Originals(folder=tmp_path, splits=())
    with pytest.raises(
        ValueError, match=r"t\.json is not valid JSON \(it is nested too deep\); copy it again"
    ):
        list(originals.items(tmp_path / "t.json", "rows"))
    (tmp_path / "t.json").write_bytes(DEEP)
    with pytest.raises(ValueError, match=r"t\.json, line 1 is nested too deep"):
        list(originals.lines(tmp_path / "t.json"))


def member(name, content=b"", kind=tarfile.REGTYPE, size=None):
    info = tarfile.TarInfo(name)
    info.size = len(content) if size is None else size
    info.type = kind
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def sparse(name, size, table):
    """A member with gaps, of which the table says where there is content."""
    settings = {"major": "1", "minor": "0", "name": name, "realsize": str(size)}
    records = b""
    for key, value in settings.items():
        record = f" GNU.sparse.{key}={value}\n".encode()
        records += str(len(record) + 2).encode() + record
    return member("x", records, tarfile.XHDTYPE) + member(name, table)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            sparse("b.png", 9, b"1\n0\n9\n".ljust(512, b"\0") + b"123456789"),
            "b.png is stored as a sparse file",
        ),
        (sparse("b.png", 2**40, b"0\n"), "b.png is stored as a sparse file"),
        (sparse("b.png", 9, b"99999999\n" + b"1\n" * 2**15), "a header has more than 65536 bytes"),
        (member("b.png", size=2**33), "b.png has 8589934592 bytes"),
        (member("b.txt", size=2**33), "b.txt has 8589934592 bytes"),
        (member("x", kind=tarfile.XHDTYPE, size=2**33), "a header has more than 65536 bytes"),
        (
            member("x", kind=tarfile.GNUTYPE_LONGNAME, size=2**33),
            "a header has more than 65536 bytes",
        ),
        (member("x", b"y", tarfile.GNUTYPE_LONGNAME) * 5000, "cut off"),
        (member("b.png", size=-512), "b.png has -512 bytes"),
        (member("x", kind=tarfile.XHDTYPE, size=-512), "a header has more than"),
    ],
)
def test_headers_of_a_shard(content, message, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_LARGEST_HEADER", 2**16)
    with (tmp_path / "s.tar").open("wb") as file:
        file.write(member("a.txt", b"one") + member("a.png", b"?") + content)
        file.truncate(2**34)  # the disk holds no zeros
    origin, problem = told(tmp_path / "s.tar")[-1]
    assert origin in ("b in s.tar", "s.tar")
    assert message in problem


@pytest.mark.parametrize("key", ["{0}", "a"])
def test_a_shard_of_many_members(key, tmp_path):
    with (tmp_path / "s.tar").open("wb") as file:
        for number in range(1_000):
            file.write(
                member(f"{key.format(number)}.{number}.png", b"?")
                + member("x", b"1", tarfile.XGLTYPE)
            )
        file.write(bytes(1024))
    assert len(first_examples(tmp_path / "s.tar")) == (1_000 if key == "{0}" else 1)


def test_a_long_text_in_all_rows_of_a_parquet_file(tmp_path):
    texts = pa.DictionaryArray.from_arrays(
        pa.array([0, 1] * 100, pa.int32()), ["one", "x" * (2**20 + 1)]
    )
    pq.write_table(pa.table({"caption": texts}), tmp_path / "t.parquet")
    assert (tmp_path / "t.parquet").stat().st_size < 2**18
    results = told(tmp_path / "t.parquet")
    assert results[:2] == [("t.parquet row 1", "one"), ("t.parquet row 2", TOO_LONG)]
    assert len(results) == 200


def test_a_large_row_group(tmp_path, monkeypatch):
    monkeypatch.setattr("bridgetower.data.sources.column_files._LARGEST_GROUP", 2**20)
    for size in (2**19, 2**21):
        pq.write_table(
            pa.table({"caption": ["x" * size]}), tmp_path / "t.parquet", compression="zstd"
        )
        (example,) = first_examples(tmp_path / "t.parquet")
        assert (size == 2**19) == (example.problem == "")
    assert "has a row group of 2" in example.problem
