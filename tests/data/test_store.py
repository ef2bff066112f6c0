"""Lance tables: rows by number, checksums, versions, and errors of one line."""

import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from bridgetower.data.store import CRC, Table, crcs_of, split_uri

IMAGES = pa.schema([("name", pa.string()), ("image", pa.large_binary())])


def rows(start: int, count: int, size: int = 500) -> pa.Table:
    draw = np.random.default_rng(start)
    contents = [draw.bytes(size) for _ in range(count)]
    return pa.table({"name": [str(start + n) for n in range(count)], "image": pa.array(contents, pa.large_binary())})


@pytest.fixture
def table(tmp_path: Path) -> Table:
    made = Table.create(tmp_path / "images.lance", IMAGES, checked="image")
    for start in range(0, 300, 100):
        made.append(rows(start, 100))
    return made


def test_rows_come_in_the_order_of_their_numbers(table: Table) -> None:
    numbers = [299, 0, 150, 0, 101]
    found = table.take(numbers, ["name", "image"])
    assert found["name"].to_pylist() == [str(number) for number in numbers]
    expected = pa.concat_tables(rows(start, 100) for start in range(0, 300, 100))
    assert found["image"].to_pylist() == expected.take(numbers)["image"].to_pylist()


def test_a_reader_stays_at_its_version(table: Table) -> None:
    reader = pickle.loads(pickle.dumps(table))
    table.append(rows(300, 5))
    assert (len(reader), len(table)) == (300, 305)
    with pytest.raises(OSError, match="row 304"):
        reader.take([304], ["name"])
    assert Table(table.uri).take([304], ["name"])["name"].to_pylist() == ["304"]


@pytest.mark.parametrize("kind", ["bytes", "texts", "vectors"])
def test_checksums_are_those_of_zlib(kind: str) -> None:
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


def test_every_flipped_bit_is_noticed_when_its_row_is_read(table: Table) -> None:
    draw = np.random.default_rng(1)
    files = sorted(Path(table.uri, "data").glob("*.lance"))
    for trial in range(20):
        file = files[trial % len(files)]
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[draw.integers(0, 40_000)] ^= 1 << draw.integers(0, 8)  # of the images, which come first
        file.write_bytes(damaged)
        with pytest.raises(OSError, match=re.escape(table.uri)) as error:
            Table(table.uri).take(range(300), ["image"])
        assert "\n" not in str(error.value)
        file.write_bytes(whole)
    assert Table(table.uri).damaged() == []


def test_damaged_rows_are_named(table: Table) -> None:
    file = sorted(Path(table.uri, "data").glob("*.lance"))[0]
    content = bytearray(file.read_bytes())
    content[10_000] ^= 1
    file.write_bytes(content)
    wrong = Table(table.uri).damaged()
    assert len(wrong) == 1
    with pytest.raises(OSError, match=f"row {wrong[0]} of .* is damaged"):
        Table(table.uri).take(range(300), ["image"])


def test_a_killed_writer_leaves_whole_commits(tmp_path: Path) -> None:
    place = tmp_path / "images.lance"
    Table.create(place, IMAGES, checked="image")
    code = (
        "import sys; from tests_rows import rows; from bridgetower.data.store import Table\n"
        "table = Table(sys.argv[1])\n"
        "for start in range(0, 100000, 50):\n    table.append(rows(start, 50)); print(start, flush=True)"
    )
    (tmp_path / "tests_rows.py").write_text(
        "import numpy as np, pyarrow as pa\n\ndef rows(start, count, size=500):\n"
        "    draw = np.random.default_rng(start)\n"
        "    contents = [draw.bytes(size) for _ in range(count)]\n"
        "    names = [str(start + n) for n in range(count)]\n"
        "    return pa.table({'name': names, 'image': pa.array(contents, pa.large_binary())})\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(place)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    )
    assert writer.stdout
    done = [int(writer.stdout.readline()) for _ in range(5)][-1]
    writer.kill()
    writer.wait()
    table = Table(place)
    assert len(table) >= done + 50
    assert len(table) % 50 == 0
    assert table.damaged() == []
    assert table.take([done + 49], ["name"])["name"].to_pylist() == [str(done + 49)]


def _append(place: str, start: int) -> None:
    table = Table(place)
    for number in range(5):
        table.append(rows(start + 10 * number, 10))


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    place = str(tmp_path / "images.lance")
    Table.create(place, IMAGES, checked="image")
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append, args=(place, 1000 * number)) for number in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    names = [name for batch in Table(place).scan(["name"]) for name in batch["name"].to_pylist()]
    assert sorted(names, key=int) == [str(1000 * number + n) for number in range(2) for n in range(50)]


def test_workers_that_are_spawned_read_the_same(table: Table) -> None:
    with multiprocessing.get_context("forkserver").Pool(2) as pool:
        found = pool.map(_names, [(table, [5, 250]), (table, [0])])
    assert found == [["5", "250"], ["0"]]


def _names(task: tuple[Table, list[int]]) -> list[str]:
    return task[0].take(task[1], ["name"])["name"].to_pylist()


class TestErrors:
    @pytest.mark.parametrize("name", ["photos", ".lance", "a b.lance", "s3://bucket/ü.lance"])
    def test_names(self, name: str) -> None:
        with pytest.raises(ValueError, match="is no name for a table"):
            split_uri(name)

    @pytest.mark.parametrize(
        ("uri", "expected"),
        [("a.lance", (".", "a")), ("/a.lance", ("/", "a")), ("s3://b/c/d.lance", ("s3://b/c", "d"))],
    )
    def test_places(self, uri: str, expected: tuple[str, str]) -> None:
        assert split_uri(uri) == expected

    def test_no_table(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no table"):
            Table(tmp_path / "no.lance")
        assert not Table.exists(tmp_path / "no.lance")
        assert list(tmp_path.iterdir()) == []

    def test_table_removed_meanwhile(self, table: Table) -> None:
        shutil.rmtree(table.uri)
        with pytest.raises(OSError, match="cannot be read") as error:
            table.take([0], ["image"])
        assert "\n" not in str(error.value)
        assert ".rs:" not in str(error.value)

    def test_columns_of_numbers(self, table: Table) -> None:
        assert table.column(CRC).dtype == np.uint32
        assert len(table.column(CRC)) == 300
