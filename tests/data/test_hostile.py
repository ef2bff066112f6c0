"""Sources that are made to fill the memory: one line says what is wrong and where, and what follows is read."""

import bz2
import gzip
import lzma
import tarfile
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bridgetower.data import example, fetch, reader
from bridgetower.data.datasets.spec import Originals
from bridgetower.data.reader import read

BOMB = 2**24  # bytes, more than reading may take
DEEP = b"[" * 10**6 + b"]" * 10**6
TOO_LONG = "it has more than 1048576 characters"


def examples(source, most=BOMB):
    """Reads a source and checks that not much of it is held at once."""
    tracemalloc.start()
    try:
        found = []
        for one in read(source):
            found += [one] if len(found) < 1_100 else []
            assert pa.total_allocated_bytes() < most
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()
    return found


def told(source):
    return [(one.place, one.problem or " ".join(one.texts)) for one in examples(source)]


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
        *((f"t.csv{ending}", b"image,caption\na.png,one\nb.png,%s\nc.png,three\n") for ending in COMPRESSED),
        ("t.jsonl", b'{"image": "a.png", "text": "one"}\n{"text": "%s"}\n{"image": "c.png", "text": "three"}\n'),
        ("t.txt.zst", b"one\n%s\nthree\n"),
        ("captions.txt", b"a.png\tone\nb.png\t%s\nc.png\tthree\n"),
    ],
)
def test_lines_and_cells_without_end(name, text, tmp_path):
    (tmp_path / "a.heic").touch()  # a folder of captions has other files
    (tmp_path / name).write_bytes(COMPRESSED[Path(name).suffix if name.count(".") > 1 else ""](text % (b"x" * BOMB)))
    start = 2 if ".csv" in name else 1
    (first, one), (second, problem), (third, three) = told(tmp_path)
    assert (first, second, third) == tuple(f"{name} line {start + number}" for number in range(3))
    assert (one, three) == ("one", "three")
    assert TOO_LONG in problem


def test_a_row_over_lines_without_end(tmp_path):
    row = b'"%s\n",' % (b"x" * 60) * 2**15
    (tmp_path / "t.csv").write_bytes(b"image,caption\na.png,one\n" + row)
    first, second, *_ = examples(tmp_path / "t.csv", most=6 * 2**20)
    assert (first.place, first.problem) == ("t.csv line 2", "")
    assert second.place == "t.csv line 3"
    assert TOO_LONG in second.problem


def test_a_list_in_one_json_object(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "LARGEST_ITEM", 2**22)
    (tmp_path / "t.json.gz").write_bytes(gzip.compress(b'[{"caption": "one"}, {"caption": "' + b"x" * 2 * BOMB, 1))
    first, second = examples(tmp_path / "t.json.gz", most=2 * BOMB)
    assert (first.place, first.texts) == ("t.json.gz row 1", ("one",))
    assert second.place == "t.json.gz"
    assert "a value has more than 4194304 characters" in second.problem


def test_json_that_is_nested_without_end(tmp_path):
    half = DEEP[10**6 - 500_000 : 10**6 + 500_000]
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "one"}\n{"text": ' + half + b'}\n{"text": "three"}\n')
    (_, one), (place, _), (_, three) = told(tmp_path / "t.jsonl")
    assert (one, place, three) == ("one", "t.jsonl line 2", "three")
    (tmp_path / "t.json").write_bytes(b'{"rows": [{"text": "one"}, ' + DEEP + b"]}")
    first, second = told(tmp_path / "t.json")
    assert first == ("t.json row 1", "one")
    assert "t.json is not valid JSON (it is nested too deep)" in second[1]
    originals = Originals(folder=tmp_path, splits=())
    with pytest.raises(ValueError, match=r"t\.json is not valid JSON \(it is nested too deep\); copy it again"):
        list(originals.items(tmp_path / "t.json", "rows"))
    (tmp_path / "t.json").write_bytes(DEEP)
    with pytest.raises(ValueError, match=r"t\.json, line 1 is nested too deep"):
        list(originals.lines(tmp_path / "t.json"))


def member(name, content=b"", kind=tarfile.REGTYPE, size=None):
    info = tarfile.TarInfo(name)
    info.size, info.type = len(content) if size is None else size, kind
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
        (sparse("b.png", 2**40, b"0\n"), "b.png has gaps or 1099511627776 bytes"),
        (sparse("b.png", 9, b"99999999\n" + b"1\n" * 2**15), "a header has more than 65536 bytes"),
        (member("b.png", size=2**33), "b.png has gaps or 8589934592 bytes"),
        (member("b.txt", size=2**33), "b.txt has gaps or 8589934592 bytes"),
        (member("x", kind=tarfile.XHDTYPE, size=2**33), "a header has more than 65536 bytes"),
        (member("x", kind=tarfile.GNUTYPE_LONGNAME, size=2**33), "a header has more than 65536 bytes"),
        (member("x", b"y", tarfile.GNUTYPE_LONGNAME) * 5000, "cut off"),
        (member("b.png", size=-512), "b.png has -512 bytes"),
        (member("x", kind=tarfile.XHDTYPE, size=-512), "a header has more than"),
    ],
)
def test_headers_of_a_shard(content, message, tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "_LONGEST", 2**16)
    with (tmp_path / "s.tar").open("wb") as file:
        file.write(member("a.txt", b"one") + member("a.png", b"?") + content)
        file.truncate(2**34)  # the disk holds no zeros
    place, problem = told(tmp_path / "s.tar")[-1]
    assert place in ("b in s.tar", "s.tar")
    assert message in problem


@pytest.mark.parametrize("key", ["{0}", "a"])
def test_a_shard_of_many_members(key, tmp_path):
    with (tmp_path / "s.tar").open("wb") as file:
        for number in range(1_000):
            file.write(member(f"{key.format(number)}.{number}.png", b"?") + member("x", b"1", tarfile.XGLTYPE))
        file.write(bytes(1024))
    assert len(examples(tmp_path / "s.tar")) == (1_000 if key == "{0}" else 1)


def test_a_long_text_in_all_rows_of_a_parquet_file(tmp_path):
    texts = pa.DictionaryArray.from_arrays(pa.array([0, 1] * 100, pa.int32()), ["one", "x" * (2**20 + 1)])
    pq.write_table(pa.table({"caption": texts}), tmp_path / "t.parquet")
    assert (tmp_path / "t.parquet").stat().st_size < 2**18
    found = told(tmp_path / "t.parquet")
    assert found[:2] == [("t.parquet row 1", "one"), ("t.parquet row 2", TOO_LONG)]
    assert len(found) == 200


def test_a_large_row_group(tmp_path, monkeypatch):
    monkeypatch.setattr(example, "_LARGEST_GROUP", 2**20)
    for size in (2**19, 2**21):
        pq.write_table(pa.table({"caption": ["x" * size]}), tmp_path / "t.parquet", compression="zstd")
        (one,) = examples(tmp_path / "t.parquet")
        assert (size == 2**19) == (one.problem == "")
    assert "has a row group of 2" in one.problem
