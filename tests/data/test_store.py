"""Lance tables: rows by number, checksums, versions, and errors of one line."""

import multiprocessing
import pickle
import re
import shutil
import subprocess
import zlib
from pathlib import Path

import lancedb
import numpy as np
import pyarrow as pa
import pytest

from bridgetower.data.sets.store import CRC, Table, crcs_of, split_uri

IMAGES = pa.schema([("name", pa.string()), ("image", pa.large_binary())])


def numbered_rows(start, count, size=500):
    draw = np.random.default_rng(start)
    contents = [draw.bytes(size) for _ in range(count)]
    return pa.table(
        {
            "name": [str(start + n) for n in range(count)],
            "image": pa.array(contents, pa.large_binary()),
        }
    )


@pytest.fixture
def new_table(tmp_path):
    made = Table.create(tmp_path / "images.lance", IMAGES, checked="image")
    for start in range(0, 300, 100):
        made.append(numbered_rows(start, 100))
    return made


def test_rows_come_in_the_order_of_their_numbers(new_table):
    numbers = [299, 0, 150, 0, 101]
    rows_read = new_table.take(numbers, ["name", "image"])
    assert rows_read["name"].to_pylist() == [str(number) for number in numbers]
    expected = pa.concat_tables(numbered_rows(start, 100) for start in range(0, 300, 100))
    assert rows_read["image"].to_pylist() == expected.take(numbers)["image"].to_pylist()
    assert new_table.column(CRC).tolist() == [
        zlib.crc32(image) for image in expected["image"].to_pylist()
    ]


def test_a_reader_stays_at_its_version(new_table):
    reader = pickle.loads(pickle.dumps(new_table))
    new_table.append(numbered_rows(300, 5))
    assert (len(reader), len(new_table)) == (300, 305)
    with pytest.raises(OSError, match="row 304"):
        reader.take([304], ["name"])
    assert Table(new_table.uri).take([304], ["name"])["name"].to_pylist() == ["304"]


def test_what_was_read_before_rows_were_added_is_not_compared_with_them(new_table):
    assert len(new_table.crcs()) == 300
    new_table.append(numbered_rows(300, 5))
    assert (
        new_table.take([304], ["image"])["image"].to_pylist()
        == numbered_rows(300, 5)["image"].to_pylist()[4:]
    )
    assert new_table.crcs().tolist() == new_table.column(CRC).tolist()


@pytest.mark.parametrize("kind", ["bytes", "texts", "vectors"])
def test_checksums_are_those_of_zlib(kind):
    draw = np.random.default_rng(0)
    if kind == "vectors":
        values = draw.normal(size=(7, 5)).astype(np.float32)
        column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 5)
        expected = [zlib.crc32(row.tobytes()) for row in values]
    else:
        contents = [b"", b"a", "déjà vu".encode()]
        column = pa.array([c.decode() for c in contents] if kind == "texts" else contents)
        expected = [zlib.crc32(content) for content in contents]
    assert crcs_of(pa.chunked_array([column])).tolist() == expected
    if kind != "vectors":
        assert crcs_of(pa.array([None, "a"], column.type)).tolist() == [0, zlib.crc32(b"a")]


def test_every_flipped_bit_is_noticed_when_its_row_is_read(new_table):
    draw = np.random.default_rng(1)
    files = sorted(Path(new_table.uri, "data").glob("*.lance"))
    for trial in range(20):
        file = files[trial % len(files)]
        whole = file.read_bytes()
        damaged = bytearray(whole)
        # of the images, which come first
        damaged[draw.integers(0, 40_000)] ^= 1 << draw.integers(0, 8)
        file.write_bytes(damaged)
        with pytest.raises(OSError, match=re.escape(new_table.uri)) as error:
            Table(new_table.uri).take(range(300), ["image"])
        assert "\n" not in str(error.value)
        file.write_bytes(whole)
    assert Table(new_table.uri).damaged() == []
    content = bytearray(files[0].read_bytes())
    content[10_000] ^= 1
    files[0].write_bytes(content)
    (row,) = Table(new_table.uri).damaged()
    with pytest.raises(OSError, match=f"row {row} of .* is damaged"):
        Table(new_table.uri).take(range(300), ["image"])


class TestFilesThatAreCutOff:
    """By a full disk: Lance commits a file whose last bytes could not be written."""

    def size_of_a_commit(self, table):
        return max(path.stat().st_size for path in Path(table.uri, "data").iterdir())

    @pytest.mark.parametrize("missing", [1, 8, 300])
    def test_rows_are_refused_and_made_again(self, missing, new_table, file_limit):
        limit = self.size_of_a_commit(new_table) - missing
        with (
            file_limit(limit),
            pytest.raises(OSError, match=r"cannot be written: .*make room on the disk"),
        ):
            new_table.append(numbered_rows(300, 100))
        again = Table(new_table.uri)
        again.recover()
        assert len(again) == 300
        again.append(numbered_rows(300, 100))
        assert again.take([399], ["name"])["name"].to_pylist() == ["399"]
        assert Table(new_table.uri).damaged() == []

    def test_an_earlier_one_is_found(self, new_table, file_limit, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(Table, "check_end", lambda _: None)  # as if killed before
            with file_limit(self.size_of_a_commit(new_table) - 8):
                new_table.append(numbered_rows(300, 100))
        new_table.append(numbered_rows(400, 1))
        new_table.recover()
        assert new_table.take(range(len(new_table)), ["name"])["name"].to_pylist() == [
            str(number) for number in range(300)
        ]

    def test_joining_loses_nothing(self, new_table, file_limit, tmp_path):
        shutil.copytree(new_table.uri, tmp_path / "copy.lance")
        joined = Table(tmp_path / "copy.lance")
        joined.compact()
        (file,) = Path(joined.uri, "data").iterdir()
        with (
            file_limit(file.stat().st_size - 8),
            pytest.raises(OSError, match=r"cannot be written: .*make room"),
        ):
            new_table.compact()
        again = Table(new_table.uri)
        again.recover()
        again.compact()
        assert again.damaged() == []
        assert again.column(CRC).tolist() == joined.column(CRC).tolist()
        assert len(list(Path(new_table.uri, "data").iterdir())) == 1

    def test_a_table_of_somebody_else_stays(self, tmp_path):
        other = lancedb.connect(tmp_path).create_table("other", pa.table({"a": [1]}))
        other.add(pa.table({"a": [2]}))
        Table(tmp_path / "other.lance").recover()
        assert Table(tmp_path / "other.lance").version == other.version


WRITER = """
import sys
import numpy as np, pyarrow as pa
from bridgetower.data.sets.store import Table
for start in range(int(sys.argv[2]), 100000, 50):
    draw = np.random.default_rng(start)
    images = pa.array([draw.bytes(500) for _ in range(50)], pa.large_binary())
    Table(sys.argv[1]).append(pa.table({"name": [str(start + n) for n in range(50)], "image": images}))
    print(start, flush=True)
"""


def test_killed_writers_leave_whole_commits(tmp_path, forked):
    """Two at a time, which lose nothing of each other."""
    table_path = tmp_path / "images.lance"
    starts = (0, 100_000 - 500)
    Table.create(table_path, IMAGES, checked="image")
    writers = [
        subprocess.Popen(
            [forked / "python", "-c", WRITER, table_path, str(start)], stdout=subprocess.PIPE
        )
        for start in starts
    ]
    for writer in writers:
        assert writer.stdout
        for _ in range(4):
            writer.stdout.readline()
    for writer in writers:
        writer.kill()
        writer.wait()
    table = Table(table_path)
    assert len(table) % 50 == 0
    assert table.damaged() == []
    names = table.take(range(len(table)), ["name"])["name"].to_pylist()
    assert {str(start + n) for start in starts for n in range(200)} <= set(names)
    assert len(set(names)) == len(names)


def test_a_worker_that_is_spawned_reads_the_same(new_table):
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        assert pool.apply(new_table.take, ([5, 250], ["name"]))["name"].to_pylist() == ["5", "250"]


@pytest.mark.parametrize("name", ["photos", ".lance", "a b.lance", "s3://bucket/ü.lance"])
def test_what_is_no_name(name):
    with pytest.raises(ValueError, match="is no name for a table"):
        split_uri(name)


def test_names():
    cases = {"a.lance": (".", "a"), "/a.lance": ("/", "a"), "s3://b/c/d.lance": ("s3://b/c", "d")}
    assert {uri: split_uri(uri) for uri in cases} == cases


def test_a_table_that_is_not_there_or_removed_meanwhile(new_table, tmp_path):
    with pytest.raises(FileNotFoundError, match="no table"):
        Table(tmp_path / "no" / "no.lance")
    assert not Table.exists(tmp_path / "no" / "no.lance")
    assert not (tmp_path / "no").exists()
    shutil.rmtree(new_table.uri)
    with pytest.raises(OSError, match="cannot be read") as error:
        new_table.take([0], ["image"])
    assert "\n" not in str(error.value)
    assert ".rs:" not in str(error.value)
