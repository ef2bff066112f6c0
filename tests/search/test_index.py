"""The table on disk: what it says of itself, what is written, replaced, copied and deleted."""

import hashlib
import json
import os
import re
import shutil
import zlib
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import lancedb
import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants

from bridgetower.data.sets.store import Table
from bridgetower.inference.vector_files import write_lock
from bridgetower.search import index as index_module
from bridgetower.search.checksums import CHECKED, CRCS
from bridgetower.search.duplicates import near_duplicates
from bridgetower.search.index import Index, IndexInfo, portable, resolved
from bridgetower.search.indexed import Indexed, read_indexed
from bridgetower.search.memory import Memory

CONTENT = b"0123456789"


def about(root, **changes):
    return IndexInfo(
        **{"fingerprint": "f", "model": "m", "root": str(root), "image_width": 3, "pair_width": 5}
        | changes
    )


@pytest.fixture
def make_index(tmp_path):
    def call(uri="photos.lance"):
        return Index.create(
            tmp_path / uri, about(tmp_path, fingerprint="f" * 16, model="owner/name@1a")
        )

    return call


def row(path, *, captions=(), value=1.0, **changes):
    return {
        "path": path,
        **{
            "size": 10,
            "mtime": 1_700_000_000_123_456,
            "version": "",
            "part_size": 0,
            "location": "",
        },
        **{"captions": list(captions), "digest": f"digest of {path}", "width": 30, "height": 20},
        "image_vector": np.full(3, value, np.float32),
        "text_vectors": np.arange(3 * len(captions), dtype=np.float32).reshape(-1, 3),
        "pair_vectors": np.full((len(captions), 5), value, np.float32),
        **changes,
    }


def index_content(index):
    location = Path(index.uri).parent
    name = Path(index.uri).stem
    return {
        entry["path"]: entry
        for entry in lancedb.connect(location).open_table(name).to_arrow().to_pylist()
    }


def test_spoken_moments_are_those_of_the_table_that_is_there(make_index):
    index = make_index()
    other = make_index("other.lance")
    moment = {"start": 0.0, "end": 1.0}
    index.upsert([row("a", **moment), row("b", **moment)])
    other.upsert([row("c", captions=["words"], **moment), row("d", **moment)])
    assert index.num_spoken == 0
    shutil.rmtree(index.uri)
    shutil.move(other.uri, index.uri)
    assert index.num_spoken == 1


def test_says_what_it_is_of(make_index, tmp_path):
    index = make_index()
    assert (len(index), index.info.fingerprint, index.model, index.root) == (
        0,
        "f" * 16,
        "owner/name@1a",
        tmp_path,
    )
    index.upsert([row("a.png")])
    shutil.move(index.uri, tmp_path / "elsewhere.lance")
    moved = Index(tmp_path / "elsewhere.lance")
    assert (len(moved), moved.info) == (1, index.info)
    assert Index(moved.uri, root=tmp_path / "b").root == tmp_path / "b"
    moved.check_model("f" * 16, "mine")
    with pytest.raises(
        ValueError,
        match=r"made with model f{16} \(owner/name@1a\), but mine is 0{16}; use that model",
    ):
        moved.check_model("0" * 16, "mine")


def test_no_model_is_downloaded_for_an_index(make_index, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    index = make_index()
    with pytest.raises(
        FileNotFoundError,
        match=r"owner/name@1a of the hub, which is not on this machine; give it as",
    ):
        index.model_or(None)
    assert index.model_or("owner/name") == "owner/name"
    downloaded = tmp_path / "hub" / "models--owner--name"
    (downloaded / "snapshots" / "1a").mkdir(parents=True)
    (downloaded / "refs").mkdir()
    (downloaded / "refs" / "1a").write_text("1a")
    assert index.model_or(None) == "owner/name@1a"


def test_a_table_with_other_columns_is_no_index(make_index):
    index = make_index()
    index.upsert([row("a.png", captions=["one"])])
    location = Path(index.uri).parent
    stem = Path(index.uri).stem
    whole = lancedb.connect(location).open_table(stem).to_arrow()
    vectors = pa.array([[1.0]], pa.list_(pa.float64()))
    for changed in (
        whole.drop(["path"]).append_column("path", pa.array([None], pa.string())),
        whole.drop(["image_vector"]).append_column("image_vector", vectors),
        whole.drop(["digest"]),
        whole.append_column("further", pa.array([0])),
    ):
        lancedb.connect(location).create_table(stem, changed, mode="overwrite")
        with pytest.raises(
            ValueError, match=r"photos\.lance has other columns than an index; choose another name"
        ):
            Index(index.uri)


def test_rows_are_written_replaced_and_found(make_index):
    index = make_index()
    index.upsert([row("a.png", captions=["one", "two"]), row("b'.png", digest="x' OR 'a' = 'a")])
    rows = index_content(index)
    assert rows["a.png"]["captions"] == ["one", "two"]
    assert rows["a.png"]["text_vectors"] == [[0, 1, 2], [3, 4, 5]]
    assert rows["a.png"]["pair_vectors"] == [[1] * 5] * 2
    assert (rows["b'.png"]["text_vectors"], rows["b'.png"]["image_vector"]) == ([], [1, 1, 1])
    assert str(rows["b'.png"]["mtime"]) == "2023-11-14 22:13:20.123456+00:00"
    assert rows["a.png"]["crc"] == zlib.crc32(np.ones(3, np.float32).tobytes())
    index.upsert([row(name) for name in ('c".png', "d\\.png", "e%.png")])
    (entry,) = index.with_digest('digest of c".png')
    assert (entry.path, entry.size, entry.width, entry.height, list(entry.captions)) == (
        'c".png',
        10,
        30,
        20,
        [],
    )
    assert [entry.path for entry in index.with_digest("x' OR 'a' = 'a")] == ["b'.png"]
    assert index.with_digest("' OR '1' = '1") == index.with_digest("") == []
    index.upsert([row("a.png", value=9), row("new.png", value=8)])
    index.remove(["d\\.png", "e%.png", "nothing.png"])
    values = {path: entry["image_vector"][0] for path, entry in index_content(index).items()}  # type: ignore[index]
    assert values == {"a.png": 9, "b'.png": 1, 'c".png': 1, "new.png": 8}
    index.upsert([row(f"copy-{number}.png", digest="digest of a.png") for number in range(20)])
    assert len(index.with_digest("digest of a.png")) == 8  # copies are told of, but not all


def test_digests_and_paths_get_an_index_from_some_rows_on(make_index, monkeypatch):
    monkeypatch.setattr(index_module, "_MIN_ROWS_FOR_KEYS", 20)
    index = make_index()

    def indexed():
        index.optimize()
        return sorted(lookup.columns for lookup in index._table.list_indices())

    index.upsert([row(f"{number:02}.png", value=number) for number in range(1, 20)])
    assert indexed() == [["captions"]]
    index.upsert([row("20.png", value=20)])
    assert indexed() == [["captions"], ["digest"], ["path"]]
    for condition in ("digest = 'a'", "path IN ('a', 'b')"):
        assert "ScalarIndexQuery" in index._table.search().where(condition).explain_plan()
    # beside what the index knows
    index.upsert([row("20.png", value=3, digest="new"), row("21.png")])
    index.remove(["01.png"])
    assert [entry.path for entry in index.with_digest("new")] == ["20.png"]
    assert index.with_digest("digest of 20.png") == index.rows(["01.png"]) == []
    assert len(index.rows(["02.png", "20.png", "21.png"])) == 3
    index.upsert([row(f"{number}.png") for number in (22, 23)])
    index.optimize()
    assert {
        index._table.index_stats(name).num_unindexed_rows for name in ("path_idx", "digest_idx")
    } == {0}


def test_what_is_tidied_gets_its_lookups_in_the_same_run(make_index, monkeypatch):
    monkeypatch.setattr(index_module, "_MIN_ROWS_FOR_KEYS", 20)
    index = make_index()
    for number in range(21):
        index.upsert([row(f"{number}.png")])
    index.optimize()
    index.create_ann_index()
    assert sorted(lookup.columns for lookup in index._table.list_indices()) == [
        ["captions"],
        ["digest"],
        ["image_vector"],
        ["path"],
    ]
    assert len(Index(index.uri).paths()) == 21


def test_examples_come_from_all_over_the_index(make_index):
    index = make_index()
    assert index.examples(12) == []
    index.upsert([row(f"{number:03}.png", captions=[f"{number}"]) for number in range(100)])
    examples = index.examples(4)
    assert [entry.path for entry in examples] == ["012.png", "037.png", "062.png", "087.png"]
    assert [list(entry.captions) for entry in examples] == [["12"], ["37"], ["62"], ["87"]]
    assert len(index.examples(1000)) == 100


def test_vectors_are_reused_of_the_same_content_with_the_same_captions(make_index):
    index = make_index()
    moment = {"start": 0.0, "end": 1.0}
    index.upsert(
        [
            row("two.png", digest="d", captions=["one", "two"], value=2),
            row("one.png", digest="d", captions=["one"], value=3),
            row("talk.mp4#t=0,1", digest="d", captions=["one", "three"], **moment),
            row("other.png", digest="e", captions=["six"]),
        ]
    )
    captions_of_rows = [["one", "two"], ["one"], ["two", "one"], ["one", "three"], ["six"], []]
    new = [
        row(f"new{number}.png", digest="d", captions=captions)
        for number, captions in enumerate(captions_of_rows)
    ]
    for new_row in new:
        for name in ("image_vector", "text_vectors", "pair_vectors", "width", "height"):
            del new_row[name]
    assert index.reuse(new) == {"new0.png", "new1.png"}
    rows = index_content(index)
    assert len(rows) == 6
    for path, value, captions in (
        ("new0.png", 2, captions_of_rows[0]),
        ("new1.png", 3, captions_of_rows[1]),
    ):
        assert (rows[path]["image_vector"], rows[path]["captions"]) == ([value] * 3, captions)
        assert rows[path]["pair_vectors"] == [[value] * 5] * len(captions)
        assert (rows[path]["width"], rows[path]["height"]) == (30, 20)
    assert index.reuse([]) == set()


def test_what_ties_is_in_the_order_of_paths(make_index, monkeypatch):
    index = make_index()
    moment = {"start": 0.0, "end": 1.0}
    index.upsert([row(f"{number}.png", captions=["one flag"]) for number in (3, 1, 4, 0, 2)])
    index.upsert(
        [row("better.png", captions=["one flag", "a flag"], image_vector=np.array([1, 2, 3.0]))]
    )
    paths = [f"{number}.png" for number in range(5)]
    query = torch.tensor([1.0, 2.0, 3.0])
    for fewest in (10_000, 1):
        monkeypatch.setattr(index_module, "_MIN_ROWS_IN_MEMORY", fewest)
        for _ in range(3):
            assert [hit.path for hit in index.nearest(query, 6)] == ["better.png", *paths]
        paths_found = [hit.path for hit in index.containing("flag", query, 6)]
        assert paths_found in (["better.png", *paths], [*paths, "better.png"])
    index.upsert([row(f"{number}.mp4", captions=["one"], **moment) for number in (1, 0)])
    paths_found = [(hit.against, hit.path) for hit in index.nearest(query, 9, against=None)]
    images = [("images", path) for path in ["better.png", *paths]]
    assert paths_found == [*images, ("captions", "0.mp4"), ("captions", "1.mp4")]


def test_more_paths_than_one_condition_has(make_index, monkeypatch):
    monkeypatch.setattr(index_module, "_MAX_PATHS", 3)
    index = make_index()
    index.upsert([row(f"{number}.png", value=1 + number) for number in range(8)])
    paths = [f"{number}.png" for number in range(7)]
    assert sorted(row["path"] for row in index.rows(paths)) == paths
    index.remove(paths)
    assert index.paths() == ["7.png"]


def test_is_tidied_once_more_than_a_tenth_or_twenty_pieces_changed(make_index):
    index = make_index()

    def tidied(num_replaced=0):
        before = Index(index.uri)._table.version
        index.optimize(num_replaced)
        return Index(index.uri)._table.version > before

    index.upsert([row(f"{number}.png") for number in range(300)])
    assert [tidied(), tidied()] == [True, False]  # words were outside the full-text index
    index.upsert([row(f"{number}.png", value=2) for number in range(30)])
    assert [tidied(), tidied(30), tidied(31)] == [False, False, True]
    index.upsert([row(f"{number}.png", value=3) for number in range(31)])
    assert tidied()
    for number in range(300, 320):
        if index._table.stats()["fragment_stats"]["num_fragments"] == 20:
            break
        index.upsert([row(f"{number}.png")])
    assert not tidied()
    index.upsert([row("320.png")])
    assert tidied()


def test_tidies_many_small_pieces(make_index):
    index = make_index()

    def pieces():
        return len(list((Path(index.uri) / "data").iterdir()))

    for number in range(30):
        index.upsert([row(f"{number}.png")])
    before = pieces()
    index.optimize()
    assert pieces() > before  # the old ones are kept for those who read them now
    assert len(Index(index.uri)) == 30
    untouched = pieces()
    index.optimize()
    assert pieces() == untouched


class TestDamage:
    """No row that is not as it was written is searched or shown."""

    QUERY = torch.tensor([2.0, 1.0, -1.0])
    PAIR = torch.tensor([1.0, 2.0, 0.0, -1.0, 1.0])

    @pytest.fixture
    def index(self, make_index):
        index = make_index()
        rng = np.random.default_rng(0)
        rows = []
        for number in range(24):
            moment = {"start": number + 0.25, "end": number + 0.75} if number % 6 == 0 else {}
            location = json.dumps({"file": f"shard-{number}.tar", "piece": [number, 10]})
            vectors = {
                name: rng.standard_normal(shape).astype(np.float32)
                for name, shape in (
                    ("image_vector", 3),
                    ("text_vectors", (2, 3)),
                    ("pair_vectors", (2, 5)),
                )
            }
            captions = [f"red flag {number}", f"another caption {number}"]
            fields = {
                "size": 70_000 + number,
                "digest": f"{number * 7919:064x}",
                "mtime": 10**15 + number * 10**9,
            }
            rows.append(
                row(
                    f"photos/{number:03}.png",
                    captions=captions,
                    location=location,
                    **fields,
                    **moment,
                    **vectors,
                )
            )
        index.upsert(rows)
        return index

    def answers(self, index):
        """All that is read of an index, in memory too where it is large enough."""
        hits = [
            index.nearest(self.QUERY, 5, against=against)
            for against in ("images", "captions", None)
        ]
        hits += [
            index.nearest(self.PAIR, 5, against="pairs"),
            index.nearest(self.QUERY, 5, where="size > 70010"),
        ]
        hits += [index.nearest(self.QUERY, 5) for _ in range(2)]
        hits += [
            index.containing("red", self.QUERY, 30),
            near_duplicates(index, 0.9),
            index.examples(9),
        ]
        hits += [index.with_digest(f"{number * 7919:064x}") for number in (0, 11)]
        return hits

    def problem(self, index, expected):
        """Returns why the index cannot be read. The text is empty if it answers as before."""
        try:
            answers = self.answers(Index(index.uri))
        except OSError as error:
            return str(error)
        assert answers == expected
        return ""

    def overwrite(self, index, path, column, value):
        rows = index._table.search().where(f"path = '{path}'").to_arrow()
        changed = rows.set_column(
            rows.schema.get_field_index(column),
            rows.field(column),
            pa.array([value], rows.field(column).type),
        )
        index._table.merge_insert("path").when_matched_update_all().execute(changed)

    @pytest.mark.parametrize("fewest", [10_000, 10])
    @pytest.mark.parametrize("column", [*CHECKED[:-1], *CRCS])
    def test_a_flipped_bit_is_named_or_without_effect(
        self, index, column, fewest, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(index_module, "_MIN_ROWS_IN_MEMORY", fewest)
        expected = self.answers(index)
        (file,) = (Path(index.uri) / "data").iterdir()
        whole = file.read_bytes()
        numbers = (0, 18) if column in ("start", "end") else (0, 23)
        entries = {entry["path"]: entry for entry in index._table.to_arrow().to_pylist()}
        assert len(entries) == 24
        num_named = 0
        for number in numbers:
            value = entries[f"photos/{number:03}.png"][column]
            stored = stored_as(column, value)
            at = whole.find(stored)
            if at < 0:  # small numbers are packed
                continue
            for location in (at, at + len(stored) // 2):
                damaged = bytearray(whole)
                damaged[location] ^= 1
                file.write_bytes(damaged)
                problem = self.problem(index, expected)
                assert re.search(
                    r"^$|photos\.lance (has a damaged row, that of '|cannot be read: )", problem
                )
                num_named += "damaged row" in problem
        packed = {"width", "height"}
        # of which those of hits are checked
        of_hits = {"text_vectors", "pair_vectors"} if fewest == 10 else set()
        assert num_named > 0 or column in packed | of_hits

    def test_rows_that_only_the_lookup_of_words_has(self, index, monkeypatch):
        monkeypatch.setattr(index_module, "_MIN_ROWS_IN_MEMORY", 10)
        for _ in range(2):
            index.nearest(self.QUERY, 5)
        memory = index._in_memory()
        monkeypatch.setattr(memory, "_ids", np.zeros_like(memory._ids))
        with pytest.raises(OSError, match=r"photos\.lance cannot be read: .*make the index again"):
            index.containing("red", self.QUERY, 30)

    @pytest.mark.parametrize("column", [*CHECKED[:-1], *CRCS])
    def test_what_is_found_is_checked_where_not_all_of_it_was(self, index, column, monkeypatch):
        """In a large index, and after all rows were."""
        changed = {
            **{
                "path": "'b'",
                "size": "1",
                "mtime": "timestamp '2024-01-01'",
                "digest": "'d'",
                "width": "1",
            },
            **{
                "height": "1",
                "captions": "['red flag']",
                "location": "''",
                "start": "1.5",
                "end": "9.5",
            },
        }
        vectors = {
            "image_vector": [2.0, 1, -1],
            "text_vectors": [[2.0, 1, -1]],
            "pair_vectors": [[1.0, 2, 0, -1, 1]],
        }
        ways = {"text_vectors": ("captions", self.QUERY), "pair_vectors": ("pairs", self.PAIR)}
        against, query = ways.get(column, ("images", self.QUERY))
        monkeypatch.setattr(index_module, "_MIN_ROWS_IN_MEMORY", 0)
        best = index.nearest(query, 1, against=against)[0].path
        if column in changed:
            index._table.update(where=f"path = '{best}'", values_sql={column: changed[column]})
        else:
            self.overwrite(index, best, column, vectors[column])
        with pytest.raises(
            OSError,
            match=r"photos\.lance has a damaged row, that of '.*'; make the index again, or",
        ):
            Index(index.uri).nearest(query, 1, against=against)
        if column in changed:
            for use in (
                lambda opened: opened.containing("red", self.QUERY, 30),
                lambda opened: opened.examples(24),
            ):
                with pytest.raises(OSError, match="has a damaged row"):
                    use(Index(index.uri))

    def test_vectors_that_only_others_read_are_no_obstacle(self, index):
        self.overwrite(index, "photos/003.png", "pair_vectors", [[1.0, 2, 0, -1, 1]])
        assert len(index.nearest(self.QUERY, 30)) == len(index.examples(30)) == 24
        with pytest.raises(OSError, match=r"has a damaged row, that of 'photos/003\.png'"):
            index.nearest(-self.PAIR, 1, against="pairs")

    def test_versions_of_files_may_change(self, index):
        index.set_versions([{"path": "photos/003.png", "version": "new", "part_size": 3}])
        assert index_content(index)["photos/003.png"]["version"] == "new"
        assert len(index.nearest(self.QUERY, 30)) == 24

    def test_crcs_are_those_of_the_written_values(self, make_index):
        """As `docs/search.md` has them. A change makes all older indexes damaged."""
        index = make_index()
        index.upsert([row("a.png", captions=["one", "two"], start=1.5, end=2.0), row("b.png")])
        entry = index_content(index)["a.png"]
        other = index_content(index)["b.png"]
        image = zlib.crc32(np.ones(3, np.float32).tobytes())
        times = [str(int(np.float64(value).view(np.int64))) for value in (1.5, 2.0)]
        numbers = ["10", "1700000000123456", "digest of a.png", "30", "20"]
        values = ["a.png", *numbers, "one\x1etwo", "", *times, str(image), "2"]
        assert entry["crc"] == image
        assert entry["row_crc"] == zlib.crc32("\x1f".join(values).encode())
        vectors = np.arange(6, dtype=np.float32).tobytes()
        assert entry["text_crc"] == zlib.crc32(vectors, entry["row_crc"])
        assert entry["pair_crc"] == zlib.crc32(np.ones(10, np.float32).tobytes(), entry["row_crc"])
        values = [
            "b.png",
            *numbers[:2],
            "digest of b.png",
            *numbers[3:],
            "",
            "",
            "",
            "",
            str(image),
            "0",
        ]
        assert other["row_crc"] == zlib.crc32("\x1f".join(values).encode())
        assert other["text_crc"] == other["pair_crc"] == other["row_crc"]


def stored_as(column, value):
    """The bytes by which a value is found in a data file."""
    if column in ("size", "width", "height"):
        return np.array(value, np.int64 if column == "size" else np.int32).tobytes()
    if column == "mtime":
        return np.int64(round(value.timestamp() * 1e6)).tobytes()
    if column in ("start", "end"):
        return np.float64(value).tobytes()
    if column == "captions":
        return value[1].encode()
    return value.encode() if isinstance(value, str) else np.array(value, np.float32).tobytes()


class TestInMemory:
    """From the second search on vectors in memory give what the table gives, and never those of another version."""

    QUERY = torch.tensor([2.0, 1.0, -1.0])

    @pytest.fixture
    def index(self, make_index, monkeypatch):
        monkeypatch.setattr(index_module, "_MIN_ROWS_IN_MEMORY", 20)
        index = make_index()
        vectors = F.normalize(torch.randn(60, 3, generator=torch.Generator().manual_seed(0)), dim=1)
        for start in range(0, 60, 20):
            numbers = range(start, start + 20)
            index.upsert(
                [
                    row(f"{n:03}", captions=["one"], image_vector=3 * vectors[n].numpy())
                    for n in numbers
                ]
            )
        index.remove([f"{number:03}" for number in range(3, 50, 7)])
        index.upsert([row("030", image_vector=vectors[0].numpy())])
        return index

    def test_gives_what_the_table_gives(self, index, monkeypatch):
        expected = index.nearest(self.QUERY, 100)
        actual = index.nearest(self.QUERY, 100)
        assert index._version.memory is not None
        assert [hit.path for hit in actual] == [hit.path for hit in expected]
        assert [hit.cosine for hit in actual] == pytest.approx(
            [hit.cosine for hit in expected], abs=1e-6
        )
        zeros = {"cosine": 0.0, "rank_score": 0.0}
        assert [replace(hit, **zeros) for hit in actual] == [
            replace(hit, **zeros) for hit in expected
        ]
        assert [hit.path for hit in index.nearest(self.QUERY, 7)] == [
            hit.path for hit in expected[:7]
        ]
        index.create_ann_index()
        for _ in range(3):
            assert [hit.path for hit in index.nearest(self.QUERY, 7, exact=True)] == [
                hit.path for hit in expected[:7]
            ]
        # bytes of all vectors but one
        monkeypatch.setattr(index_module, "_MAX_BYTES_IN_MEMORY", 4 * 3 * len(index) - 1)
        large = Index(index.uri)
        for _ in range(2):
            assert large.nearest(self.QUERY, 1, exact=True)[0].path == expected[0].path
        assert large._version.memory is None

    @pytest.mark.parametrize("width", [1, 17, 40, 256])
    @pytest.mark.parametrize("spread", [10.0, 0.3, 0.003, 0.0])
    @pytest.mark.parametrize("has_operator", [True, False], ids=["int8", "plain"])
    def test_finds_the_nearest_of_all(self, tmp_path, monkeypatch, width, spread, has_operator):
        """Vectors in all directions, around one, too close to each other for int8, and equal."""
        if not has_operator:
            monkeypatch.delattr(torch, "_weight_int8pack_mm")
        rng = np.random.default_rng(0)
        vectors = (1 + spread * rng.standard_normal((3001, width))).astype(np.float32)
        vectors[:, 0] *= 5  # then int8 is coarser for the others
        columns = {
            "digest": pa.array([f"{n:04}" for n in range(3001)]),
            "captions": pa.array([["one"]] * 3001),
        }
        columns["image_vector"] = pa.FixedSizeListArray.from_arrays(vectors.ravel(), width)
        lancedb.connect(tmp_path).create_table("any", pa.table(columns))
        table = Table(tmp_path / "any.lance")
        batches = table.scan(["digest", "captions", "_rowid", "image_vector"])
        memory = Memory(
            table, (pa.Table.from_batches([batch]) for batch in batches), "image_vector"
        )
        exact = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float64)
        for query in (vectors[7], -vectors[7], rng.standard_normal(width).astype(np.float32)):
            cosines = exact @ query / np.linalg.norm(query)
            for count in (1, 10, 300, 3001, 5000):
                hits = memory.nearest(torch.from_numpy(query), count)
                best = np.sort(cosines)[::-1][:count]
                np.testing.assert_allclose([1 - hit["_distance"] for hit in hits], best, atol=1e-6)
                np.testing.assert_allclose(
                    [cosines[int(hit["digest"])] for hit in hits], best, atol=1e-6
                )
                assert len({hit["digest"] for hit in hits}) == len(best)

    def test_follows_the_table(self, index):
        for _ in range(3):
            best = [index.nearest(self.QUERY, 1)[0].path for _ in range(3)]
            assert len(set(best)) == 1
            index.remove(best)
        assert len(index.nearest(self.QUERY, 100)) == len(index)

    def test_a_table_made_anew(self, index, make_index):
        other = make_index("other.lance")
        rows = [
            row(f"{number:03}", image_vector=(-self.QUERY + number).numpy()) for number in range(60)
        ]
        for _ in range(index._table.version - 3):
            other.upsert(rows[:1])
        other.upsert(rows)
        assert other._table.version == index._table.version
        hits = index.nearest(self.QUERY, 1)
        assert index.nearest(self.QUERY, 1)[0].path == hits[0].path
        shutil.rmtree(index.uri)
        shutil.move(other.uri, index.uri)
        expected = Index(index.uri).nearest(self.QUERY, 1)
        assert expected[0].path != hits[0].path
        for _ in range(3):
            assert [hit.path for hit in index.nearest(self.QUERY, 1)] == [
                hit.path for hit in expected
            ]

    def test_copies_do_not_push_out_a_better_one(self, index):
        query = torch.tensor([1.0, 0.0, 0.1])
        copied = np.eye(3, dtype=np.float32)[0]
        index.upsert([row(f"copy {number}", image_vector=copied) for number in range(30)])
        index.upsert([row("better", image_vector=query.numpy())])
        for _ in range(3):
            paths = [hit.path for hit in index.nearest(query, 5)]
            assert (len(paths), paths[0], {path[:5] for path in paths[1:]}) == (
                5,
                "better",
                {"copy "},
            )

    def test_rows_and_vectors_are_of_one_version(self, index, monkeypatch):
        first, second, third = index.nearest(self.QUERY, 3)
        product = torch._weight_int8pack_mm

        def slow(uri, *, version=None):
            if version is not None:  # while the rows of a version are read
                index.remove([first.path])
                index.upsert([row("new", image_vector=self.QUERY.numpy())])
                index.optimize(num_replaced=20)
            return Table(uri, version=version)

        monkeypatch.setattr(index_module, "Table", slow)
        assert [hit.path for hit in index.nearest(self.QUERY, 3)] == [
            first.path,
            second.path,
            third.path,
        ]
        monkeypatch.setattr(index_module, "Table", Table)
        for _ in range(2):
            assert [hit.path for hit in index.nearest(self.QUERY, 2)] == ["new", second.path]

        def slow_product(*arguments):
            index.remove(["new"])
            return product(*arguments)

        monkeypatch.setattr(torch, "_weight_int8pack_mm", slow_product)
        assert [hit.path for hit in index.nearest(self.QUERY, 2)] == ["new", second.path]
        monkeypatch.setattr(torch, "_weight_int8pack_mm", product)
        for _ in range(2):
            assert [hit.path for hit in index.nearest(self.QUERY, 2)] == [second.path, third.path]

    @pytest.mark.parametrize("turned", [False, True])
    def test_finds_words_and_digests_as_the_table_does(self, index, monkeypatch, turned):
        captions = ["one", "two ones", "three", "four fives"]
        index.upsert(
            [
                row(f"{n:03}", captions=[captions[n % 4]], digest=f"digest {n % 7}")
                for n in range(30)
            ]
        )
        digests = [
            "",
            "digest 0",
            "digest 6",
            "digest 60",
            "digest of 050",
            "x' OR 'a' = 'a",
            "\udc80",
            "\U0001f600",
        ]

        def answers():
            words = [
                index.containing(text, self.QUERY, 12) for text in ("one", "two", "five", "nothing")
            ]
            return words, [
                [entry.path for entry in index.with_digest(digest)] for digest in digests[:6]
            ]

        expected = answers()
        if turned:  # after some changes the ids of rows within Lance do not ascend
            batches = index_module._scan_table
            monkeypatch.setattr(
                index_module, "_scan_table", lambda *arguments: reversed(list(batches(*arguments)))
            )
        assert [len(paths) for paths in expected[1]] == [0, 5, 4, 0, 1, 0]
        for _ in range(2):
            index.nearest(self.QUERY, 1)
        assert index._version.memory is not None
        words, paths = answers()
        for hits, expected_hits in zip(words, expected[0], strict=True):
            assert [replace(hit, cosine=0.0) for hit in hits] == [
                replace(hit, cosine=0.0) for hit in expected_hits
            ]
            assert [hit.cosine for hit in hits] == pytest.approx(
                [hit.cosine for hit in expected_hits], abs=1e-6
            )
        assert [sorted(group) for group in paths] == [sorted(group) for group in expected[1]]
        assert index.with_digest(digests[6]) == index.with_digest(digests[7]) == []
        index.upsert([row(f"copy {n}", digest="digest 6") for n in range(20)])
        index.optimize(num_replaced=20)
        for _ in range(2):
            index.nearest(self.QUERY, 1)
        assert len({entry.path for entry in index.with_digest("digest 6")}) == 8


class TestApproximate:
    @pytest.fixture
    def vectors(self):
        return F.normalize(torch.randn(400, 3, generator=torch.Generator().manual_seed(0)), dim=1)

    @pytest.fixture
    def index(self, make_index, vectors):
        index = make_index()
        index.upsert(
            [
                row(f"{number:03}", image_vector=vector.numpy())
                for number, vector in enumerate(vectors)
            ]
        )
        return index

    def test_finds_nearly_the_same(self, index, vectors):
        def found(exact):
            return [
                [hit.path for hit in index.nearest(vector, 10, exact=exact)]
                for vector in vectors[:40]
            ]

        expected = [
            [f"{number:03}" for number in near]
            for near in (vectors[:40] @ vectors.T).topk(10).indices
        ]
        assert not index.has_ann_index
        assert found(exact=False) == expected
        index.create_ann_index()
        assert index.has_ann_index
        assert Index(index.uri).has_ann_index
        assert found(exact=True) == expected
        hits = [
            len(set(actual) & set(other))
            for actual, other in zip(found(exact=False), expected, strict=True)
        ]
        assert sum(hits) / 400 > 0.9

    @pytest.mark.parametrize(("problem", "least"), [("far", 0.65), ("close", 0.67)])
    def test_finds_most_where_that_is_hard(self, tmp_path, problem, least):
        """Vectors that are all far from each other need enough groups, those that are close exact cosines."""
        source = torch.Generator().manual_seed(0)
        vectors = torch.randn(4000, 64, generator=source)
        if problem == "close":
            centre = torch.randn(64, generator=source)
            vectors = torch.cat([centre + 0.03 * vectors[:2000], -centre[None]])
        index = Index.create(tmp_path / "hard.lance", about(tmp_path, image_width=64))
        index.upsert(
            [
                row(f"{number:04}", image_vector=vector.numpy())
                for number, vector in enumerate(vectors)
            ]
        )
        index.create_ann_index()
        queries = vectors[:100]
        expected = (
            (F.normalize(queries, dim=1) @ F.normalize(vectors, dim=1).T).topk(10).indices.tolist()
        )
        actual = [{int(hit.path) for hit in index.nearest(query, 10)} for query in queries]
        recall = (
            sum(len(paths & {*other}) for paths, other in zip(actual, expected, strict=True)) / 1000
        )
        assert recall > least

    def test_goes_on_with_what_is_written_later(self, index):
        index.create_ann_index()
        new = torch.tensor([1.0, 0.0, 0.0])
        index.upsert([row("new", image_vector=new.numpy())])
        assert index.nearest(new, 1)[0].path == "new"
        index.upsert([row(f"more{number}", image_vector=new.numpy()) for number in range(100)])
        assert index._table.index_stats("image_vector_idx").num_unindexed_rows == 101
        index.optimize()
        assert index._table.index_stats("image_vector_idx").num_unindexed_rows == 0
        index.remove(["new"])
        hits = index.nearest(new, 100)
        assert {hit.path for hit in hits} == {f"more{number}" for number in range(100)}
        assert index.has_ann_index

    def test_finds_as_many_as_there_are(self, index, vectors, make_index):
        index.create_ann_index()
        for vector in vectors[:5]:
            assert len(index.nearest(vector, 10, where="path LIKE '%00'")) == 4
            assert len(index.nearest(vector, 390)) == 390
            assert len(index.nearest(vector, 2**70)) == 400
        for count in (1, 300):  # copies of one image
            copies = make_index(f"{count}.lance")
            copies.upsert([row(f"{number}.png") for number in range(count)])
            copies.create_ann_index()
            assert len(copies.nearest(torch.ones(3), 10)) == min(10, count)


def test_another_reader_sees_what_is_written(make_index, monkeypatch):
    index = make_index()
    reader = Index(index.uri)
    index.upsert([row("a.png")])
    monkeypatch.setattr(index_module, "_REFRESH_SECONDS", 0)
    assert len(reader) == 1


class TestVectorsThatAreNoNumbers:
    def test_are_not_written(self, make_index):
        index = make_index()
        for name, value in (
            ("image_vector", np.nan),
            ("text_vectors", np.inf),
            ("pair_vectors", -np.inf),
        ):
            bad = row("b.png", captions=["one"])
            bad[name].flat[1] = value
            with pytest.raises(
                ValueError, match=r"'b\.png' has a vector with NaN or infinite values"
            ):
                index.upsert([row("a.png"), bad])
        with pytest.raises(
            ValueError, match=r"'b\.png' has a vector of zeros, which nothing finds"
        ):
            index.upsert([row("a.png"), row("b.png", value=0.0)])
        assert len(index) == 0

    def test_are_noticed_by_a_search(self, make_index, monkeypatch):
        index = make_index()
        index.upsert([row("a.png"), row("b.png")])
        monkeypatch.setattr(np, "isfinite", np.isreal)
        index.upsert([row("c.png", value=float("nan"))])
        assert index.nearest(torch.ones(3), 2)[0].path == "a.png"
        for exact in (False, True):
            with pytest.raises(
                OSError, match=r"has vectors with NaN, which no search finds; make the index again"
            ):
                index.nearest(torch.ones(3), 3, exact=exact)


def test_a_store_that_refuses_is_told_in_a_line(monkeypatch):
    body = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        keys = {"ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "DEFAULT_REGION": "us-east-1"}
        for name, value in (
            keys | {"ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}
        ).items():
            monkeypatch.setenv(f"AWS_{name}", value)
        uri = "s3://bucket/photos.lance"
        with pytest.raises(
            OSError, match=rf"^{uri} cannot be read: the store answers 403: Access Denied$"
        ):
            Index(uri)
        server.shutdown()


def test_a_full_disk_changes_nothing(small_disk):
    disk = small_disk(200)
    index = Index.create(disk / "photos.lance", about(disk))
    index.upsert([row("a.png")])
    (disk / "filler").write_bytes(bytes(100_000))
    with pytest.raises(OSError, match=r"photos\.lance cannot be written: .*make room on the disk$"):
        index.upsert([row(f"{number:0500}.png") for number in range(2000)])
    assert Index(index.uri).paths() == ["a.png"]


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.upsert([row(f"{number}.png") for number in range(50, 150)]),
        lambda index: index.set_versions([{"path": "1.png", "version": "2", "part_size": 1}]),
        lambda index: index.optimize(num_replaced=1000),
    ],
    ids=["upsert", "set_versions", "optimize"],
)
def test_a_file_that_a_full_disk_cut_off_is_taken_back(change, make_index, file_limit, tmp_path):
    index = make_index()
    index.upsert([row(f"{number}.png") for number in range(100)])
    index.upsert([row("100.png")])
    whole = Index(shutil.copytree(index.uri, tmp_path / "whole.lance"))
    written = {file.name for file in Path(whole.uri, "data").iterdir()}
    change(whole)
    (size,) = (
        file.stat().st_size
        for file in Path(whole.uri, "data").iterdir()
        if file.name not in written
    )
    with (
        file_limit(size - 8),
        pytest.raises(OSError, match=r"photos\.lance cannot be written: .*make room on the disk"),
    ):
        change(index)
    assert sorted(Index(index.uri).paths()) == sorted(f"{number}.png" for number in range(101))
    change(index)
    assert sorted(Index(index.uri).paths()) == sorted(whole.paths())


def test_damaged_files_are_named_without_the_sources_of_a_library(make_index):
    index = make_index()
    index.upsert([row("a.png")])
    for file in Path(index.uri).glob("data/*"):
        file.write_bytes(file.read_bytes()[:50])
    damaged = Index(index.uri)
    uses = [
        *(damaged.paths, lambda: damaged.examples(1), lambda: damaged.with_digest("0" * 64)),
        *(
            lambda: damaged.nearest(torch.ones(3), 1),
            lambda: damaged.nearest(torch.ones(3), 1, where="width > 0"),
        ),
    ]
    for use in uses:
        with pytest.raises(
            OSError, match=r"photos\.lance cannot be read: [^/]*; make the index again$"
        ):
            use()


def test_a_row_with_a_damaged_place_is_no_fault_of_the_condition(make_index):
    index = make_index()
    for location in ("{", "[]", '{"file": 5}'):
        index.upsert([row("a.png", location=location)])
        for where in (None, "width > 0"):
            with pytest.raises(OSError, match=r"photos\.lance cannot be read: .*"):
                index.nearest(torch.ones(3), 1, where=where)


def test_times_that_python_does_not_have_are_no_obstacle(make_index):
    index = make_index()
    times = [253_402_300_800_000_000, -62_135_596_800_000_001, 2**63 - 1]
    index.upsert([row(f"{number}.png", mtime=time) for number, time in enumerate(times)])
    assert len(index.nearest(torch.ones(3), 3)) == 3
    assert len(index.examples(3)) == 3
    (entry,) = index.with_digest("digest of 1.png")
    assert entry.path == "1.png"
    (batch,) = index.scan(["mtime"])
    assert batch["mtime"].cast(pa.int64()).to_pylist() == times


def test_refuses_what_is_no_index(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no index at .*photos\.lance; make one with bridgetower index"
    ):
        Index(tmp_path / "photos.lance")
    assert list(tmp_path.iterdir()) == []
    with write_lock(tmp_path / "photos.lance"):  # where a run was killed before it wrote anything
        assert not Table.exists(tmp_path / "photos.lance")
    lancedb.connect(tmp_path).create_table("other", pa.table({"a": np.arange(3)}))
    with pytest.raises(ValueError, match=r"other\.lance is no index of this release"):
        Index(tmp_path / "other.lance")
    newer = pa.schema(
        [pa.field("path", pa.string())], metadata={"bridgetower": json.dumps({"version": 99})}
    )
    lancedb.connect(tmp_path).create_table("newer", schema=newer)
    with pytest.raises(ValueError, match="is no index of this release"):
        Index(tmp_path / "newer.lance")
    (tmp_path / "damaged.lance" / "_versions").mkdir(parents=True)
    (tmp_path / "damaged.lance" / "_versions" / "1.manifest").write_bytes(b"nonsense")
    with pytest.raises(OSError, match=r"damaged\.lance cannot be read: "):
        Index(tmp_path / "damaged.lance")


def test_what_lies_beside_moves_along(tmp_path):
    index = tmp_path / "a" / "b.lance"
    moved = tmp_path / "c" / "b.lance"
    beside = tmp_path / "a" / "photos" / "2024"
    elsewhere = tmp_path / "photos"
    assert resolved(moved, portable(index, beside)) == str(tmp_path / "c" / "photos" / "2024")
    assert resolved(moved, portable(index, index.parent)) == str(moved.parent)
    assert resolved(moved, portable(index, elsewhere)) == str(elsewhere)
    assert resolved("s3://bucket/b.lance", portable("s3://bucket/b.lance", beside)) == str(beside)
    assert resolved(moved, "owner/model@1a2b") == "owner/model@1a2b"


class TestPlacesOfOthers:
    """An index may be from someone else: no location in it makes a process wait, read devices or more than it says."""

    @pytest.fixture
    def read(self, tmp_path):
        (tmp_path / "shard.tar").write_bytes(CONTENT)
        os.mkfifo(tmp_path / "pipe")

        def call(location, size):
            digest = hashlib.sha256(CONTENT[2:5]).hexdigest()
            fields = {
                "digest": digest,
                "path": "a.png",
                "size": size,
                "location": json.dumps(location),
            }
            image = Indexed(width=1, height=1, captions=(), **fields)
            return read_indexed(image.file_in(tmp_path), image)

        return call

    @pytest.mark.parametrize(
        ("location", "message"),
        [
            ({"file": 5}, "as the location of 'a.png'; make the index again"),
            ({"url": ["a"]}, "as the location of"),
            *(
                ({"file": "shard.tar", "piece": at}, "as the location of")
                for at in ([0, -1], [-3, 3], [0, True], 3)
            ),
            *(
                ({"file": "shard.tar", "cell": at}, "as the location of")
                for at in (["image", -1], [0, 0])
            ),
            ({"file": "shard.tar", "piece": [0, 2**40]}, f"3 bytes, and {2**40} as the length"),
            ({"file": "shard.tar", "piece": [0, 3]}, "has changed since"),
            ({"file": "shard.tar", "piece": [2**40, 3]}, "ends in the middle"),
            *(
                ({"file": file, "piece": [0, 3]}, "is no regular file")
                for file in ("pipe", "/dev/zero")
            ),
            ({"file": "pipe", "cell": ["image", 0]}, "is no regular file"),
        ],
    )
    def test_refused(self, read, location, message):
        with pytest.raises(ValueError, match=message):
            read(location, 3)
        assert read({"file": "shard.tar", "piece": [2, 3]}, 3) == CONTENT[2:5]
        with pytest.raises(ValueError, match="expected at most"):  # more than an image
            read({"file": "shard.tar", "piece": [0, 2**40]}, 2**40)
