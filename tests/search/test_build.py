"""Bringing an index up to date: what is embedded, what is not, and what broken files and other models do."""

import errno
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lancedb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from bridgetower.checkpoints import read_checkpoint, write_checkpoint
from bridgetower.data.example import Example
from bridgetower.data.example import Image as SourceImage
from bridgetower.data.reader import Columns, Part, read
from bridgetower.predictor import Predictor, load
from bridgetower.search import build as build_module
from bridgetower.search.build import IndexReport, build_index
from bridgetower.search.embed import decode
from bridgetower.search.index import Index, write_lock
from bridgetower.search.searcher import Searcher
from sources import CAPTIONS, served
from sources import NAMES as NAMES_OF

Build = Callable[..., IndexReport]
NAMES = ["00.png", "01.png", "02.png", "03.png", "sub/04.png", "sub/05.png"]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "photos.lance"


def rows(out: Path) -> dict[str, dict[str, Any]]:
    table = lancedb.connect(out.parent).open_table(out.stem).to_arrow()
    return {row["path"]: row for row in table.to_pylist()}


def captions(out: Path) -> dict[str, list[str]]:
    return {path: row["captions"] for path, row in rows(out).items()}


def counts(report: IndexReport) -> tuple[int, ...]:
    return report.images, report.added, report.changed, report.removed


def check_vectors(out: Path, predictor: Predictor, files: dict[str, Path]) -> None:
    for name, file in files.items():
        expected = predictor.embed_images(file)[0]
        torch.testing.assert_close(torch.tensor(rows(out)[name]["image_vector"]), expected, atol=1e-5, rtol=0)


class TestContent:
    def test_rows_are_what_the_model_says(self, build: Build, photos: Path, predictor: Predictor, out: Path) -> None:
        given = {"01.png": ["a red bar"], "sub/04.png": ["a green square", "a bar", "red on black"]}
        for name, texts in given.items():
            (photos / name).with_suffix(".txt").write_text("\n".join(texts))
        report = build(batch_size=4)
        assert (counts(report), report.bad) == ((6, 6, 0, 0), ())
        found = rows(out)
        assert sorted(found) == NAMES
        check_vectors(out, predictor, {name: photos / name for name in NAMES})
        for name, row in found.items():
            file, texts = photos / name, given.get(name, [])
            assert (row["width"], row["height"], row["size"]) == (24, 24, file.stat().st_size)
            assert row["captions"] == texts
            of_texts, of_pairs = (torch.tensor(row[column]) for column in ("text_vectors", "pair_vectors"))
            if texts:
                torch.testing.assert_close(of_texts, predictor.embed_texts(texts), atol=1e-5, rtol=0)
                pairs = predictor.embed_pairs([file] * len(texts), texts)
                torch.testing.assert_close(of_pairs, pairs, atol=1e-5, rtol=0)
            assert len(of_texts) == len(of_pairs) == len(texts)

    def test_a_table_and_captions_from_folders(self, build: Build, photos: Path, out: Path) -> None:
        (photos / "list.jsonl").write_text('{"path": "sub/05.png", "captions": ["one", "two"]}\n')
        assert counts(build(photos / "list.jsonl")) == (1, 1, 0, 0)
        assert captions(out) == {"sub/05.png": ["one", "two"]}
        assert counts(build(captions_from="folder")) == (6, 5, 1, 0)
        assert captions(out)["sub/05.png"] == ["sub"]

    def test_captions_that_are_too_long(self, build: Build, photos: Path, out: Path) -> None:
        (photos / "00.txt").write_text("red bar on black " * 9)
        report = build(max_errors=1, truncate=False)
        assert counts(report) == (5, 5, 0, 0)
        assert "the limit is 24" in report.bad[0]
        report = build()
        assert (counts(report), report.cut) == ((6, 1, 0, 0), 1)
        assert len(rows(out)["00.png"]["text_vectors"]) == 1


class TestSources:
    """Images in shards and tables and at URLs are found, opened again, and left alone while nothing changes."""

    @pytest.mark.parametrize("kind", ["shards", "bytes.parquet"])
    def test_as_in_a_folder(
        self, kind: str, build: Build, places: dict[str, Path], predictor: Predictor, out: Path, encoded: list[int]
    ) -> None:
        assert counts(build(places[kind])) == (5, 5, 0, 0)
        del encoded[:]
        assert counts(build(places[kind])) == (5, 0, 0, 0)
        assert encoded == []
        searcher, files = Searcher(out, predictor), [places["folder"] / f"{name}.png" for name in NAMES_OF]
        expected = predictor.match(files, "a green square", all_pairs=True)[:, 0].tolist()
        hits = {hit.captions[0]: hit for hit in searcher.search("a green square")}
        found = {caption: hit.score for caption, hit in hits.items()}
        assert found == pytest.approx(dict(zip(CAPTIONS, expected, strict=True)), abs=1e-5)
        assert searcher.index.content(hits[CAPTIONS[0]]) == files[0].read_bytes()

    def test_at_urls(self, build: Build, places: dict[str, Path], predictor: Predictor, out: Path) -> None:
        image, shards = places["folder"] / "03.png", out.with_name("shards.lance")
        with served(places["folder"].parent) as url:
            lines = "".join(f"{url}/folder/{name}.png\n" for name in (*NAMES_OF, "none"))
            (out.parent / "urls.csv").write_text("url\n" + lines)
            report = build(out.parent / "urls.csv", max_errors=1)
            missing = f"'{url}/folder/none.png': no file at {url}/folder/none.png"
            assert (counts(report), report.bad) == ((5, 5, 0, 0), (missing,))
            assert build(out.parent / "urls.csv", max_errors=1).added == 0
            searcher = Searcher(out, predictor)
            (hit,) = searcher.search(image=image, top=1)
            assert hit.file == hit.path == f"{url}/folder/03.png"
            assert searcher.index.content(hit) == image.read_bytes()
            assert len(searcher.search("a bar")) == 5
            with pytest.raises(ValueError, match="is at a URL, which is not fetched because an index names it"):
                searcher.index.content(hit, fetch=False)
            assert counts(build_index(f"{url}/shards/shard-{{0..1}}.tar", shards, predictor)) == (5, 5, 0, 0)
            searcher = Searcher(shards, predictor)
            (hit,) = searcher.search(image=image, top=1)
            assert (hit.path, searcher.index.content(hit)) == ("shard-1.tar/03.png", image.read_bytes())
        with pytest.raises(ValueError, match=r"is of the images in .*, not of .*; choose another name"):
            build_index(places["folder"], shards, predictor)

    def test_tables_of_one_name(self, build: Build, photos: Path, predictor: Predictor, out: Path) -> None:
        for split, number in (("test", 0), ("train", 1)):
            (out.parent / "hf" / split).mkdir(parents=True)
            cells = {"image": [(photos / f"{number:02}.png").read_bytes()], "text": [CAPTIONS[number]]}
            pq.write_table(pa.table(cells), out.parent / "hf" / split / "0.parquet")
        expected = {"test/0.parquet/1": [CAPTIONS[0]], "train/0.parquet/1": [CAPTIONS[1]]}
        assert counts(build(out.parent / "hf")) == (2, 2, 0, 0)
        assert captions(out) == expected
        # What an index has under other names is replaced.
        table = lancedb.connect(out.parent).open_table("photos")
        table.update(where="path LIKE 'test/%'", values={"path": "0.parquet/1", "version": ""})
        assert counts(build(out.parent / "hf")) == (2, 1, 0, 1)
        assert captions(out) == expected
        check_vectors(out, predictor, {path: photos / f"{n:02}.png" for n, path in enumerate(sorted(expected))})

    def test_ids_that_come_twice(self, build: Build, photos: Path, out: Path) -> None:
        first, second = ((photos / f"{number:02}.png").read_bytes() for number in (0, 1))
        cells = {"id": [1, 1, 1], "image": [first, second, first], "text": ["one", "two", "three"]}
        pq.write_table(pa.table(cells), out.parent / "a.parquet")
        report = build(out.parent / "a.parquet", max_errors=1)
        assert (counts(report), captions(out)) == ((1, 1, 0, 0), {"1": ["one", "three"]})
        assert "a.parquet row 2: '1' already names another image, that of a.parquet row 1" in report.bad[0]
        apart = {"id": [1, 2, 1], "image": [first, second, second]}  # not after each other
        pq.write_table(pa.table(apart), out.parent / "a.parquet")
        for _ in range(2):
            (bad,) = build(out.parent / "a.parquet", max_errors=1).bad
            assert "row 3: '1' already names another image; give each" in bad
        assert sorted(rows(out)) == ["1", "2"]

    def test_several_sources_with_absolute_paths(self, photos: Path, predictor: Predictor, out: Path) -> None:
        tables = [out.parent / folder / "t.csv" for folder in "ab"]
        for number, table in enumerate(tables):
            table.parent.mkdir()
            table.write_text(f"image\n{photos}/{number:02}.png\n")
        build_index(tables, out, predictor)
        hits = Searcher(out, predictor).search("red", rerank=2)
        assert sorted(str(hit.file) for hit in hits) == [f"{photos}/00.png", f"{photos}/01.png"]

    def test_rows_without_an_image(self, build: Build, photos: Path, out: Path) -> None:
        (photos / "a.jsonl").write_text('{"text": "a"}\n{"path": "00.png"}\n{"path": "01.png", "text": "b"}\n')
        report = build(photos / "a.jsonl", max_errors=1)
        assert report.bad == ("a.jsonl line 1 has no image; `index` takes images, `embed` texts too",)
        assert captions(out) == {"00.png": [], "01.png": ["b"]}
        (photos / "a.txt").write_text("one")
        with pytest.raises(ValueError, match=r"names no image; nothing was removed: .* line 1 has no image"):
            build(photos / "a.txt", max_errors=1)

    def test_captions_of_one_image_in_rows_far_from_each_other(
        self, build: Build, photos: Path, encoded: list[int], out: Path
    ) -> None:
        lines = "image,caption\n00.png,a\n00.png,b\n01.png,c\nsub/04.png,d\n00.png,e\n01.png,f\n"
        (photos / "list.csv").write_text(lines)
        assert counts(build(photos / "list.csv")) == (3, 3, 0, 0)
        assert captions(out) == {"00.png": ["a", "b", "e"], "01.png": ["c", "f"], "sub/04.png": ["d"]}
        del encoded[:]
        assert (counts(build(photos / "list.csv")), encoded) == ((3, 0, 0, 0), [])


class TestUpdate:
    def test_only_what_is_new_or_changed_is_embedded(
        self, build: Build, encoded: list[int], photos: Path, predictor: Predictor, out: Path
    ) -> None:
        build()
        version = lancedb.connect(out.parent).open_table("photos").version
        del encoded[:]
        assert (counts(build()), encoded) == ((6, 0, 0, 0), [])
        assert lancedb.connect(out.parent).open_table("photos").version == version
        Image.new("RGB", (30, 40), "red").save(photos / "00.png")
        Image.new("RGB", (10, 40), "blue").save(photos / "new.png")
        (photos / "01.png").unlink()
        assert (counts(build()), encoded) == ((6, 1, 1, 1), [2])
        assert sorted(rows(out)) == sorted({*NAMES, "new.png"} - {"01.png"})
        assert (rows(out)["00.png"]["width"], rows(out)["00.png"]["height"]) == (30, 40)
        check_vectors(out, predictor, {name: photos / name for name in ("00.png", "new.png")})
        (photos / "02.txt").write_text("a caption")
        assert (build().changed, captions(out)["02.png"]) == (1, ["a caption"])

    def test_a_change_of_the_same_size(self, build: Build, photos: Path, predictor: Predictor, out: Path) -> None:
        for name, colour, added, changed in (("a", "red", 7, 0), ("a", "blue", 0, 1), ("b", "green", 1, 0)):
            Image.new("RGB", (8, 8), colour).save(photos / f"{name}.bmp")
            report = build()
            assert (report.added, report.changed, report.reused) == (added, changed, 0)
        check_vectors(out, predictor, {name: photos / name for name in ("a.bmp", "b.bmp")})

    def test_content_that_the_index_has_is_not_embedded_again(
        self, build: Build, encoded: list[int], photos: Path, out: Path
    ) -> None:
        (photos / "01.txt").write_text("a caption")
        build()
        before = rows(out)
        del encoded[:]
        (photos / "sub" / "04.png").rename(photos / "x")  # two that swap names, and their folder moves
        (photos / "sub" / "05.png").rename(photos / "sub" / "04.png")
        (photos / "x").rename(photos / "sub" / "05.png")
        (photos / "sub").rename(photos / "moved")
        (photos / "00.png").rename(photos / "renamed.png")
        shutil.copy(photos / "02.png", photos / "copy.png")
        os.utime(photos / "03.png", (1, 1))
        report = build()
        assert (encoded, counts(report), report.reused) == ([], (7, 4, 1, 3), 5)
        found = rows(out)
        names = {"moved/04.png": "sub/05.png", "moved/05.png": "sub/04.png", "renamed.png": "00.png"}
        names |= {"copy.png": "02.png"} | {name: name for name in ("01.png", "02.png", "03.png")}
        assert found.keys() == names.keys()
        for name, earlier in names.items():
            same = ("digest", "size", "width", "captions", "image_vector", "text_vectors", "pair_vectors")
            assert [found[name][one] for one in same] == [before[earlier][one] for one in same]
            assert round(found[name]["mtime"].timestamp() * 1e6) == (photos / name).stat().st_mtime_ns // 1000
        assert counts(build()) == (7, 0, 0, 0)
        (photos / "01.png").rename(photos / "other.png")  # with no caption now, which is part of the vectors
        assert (build().reused, encoded) == (0, [1])

    def test_images_in_a_shard_that_moves(self, build: Build, photos: Path, predictor: Predictor, out: Path) -> None:
        with tarfile.open(photos / "a.tar", "w") as archive:
            archive.add(photos / "00.png", "00.png")
        build(photos / "a.tar")
        (photos / "a.tar").rename(photos / "b.tar")
        report = build(photos / "b.tar")
        assert (counts(report), report.reused) == ((1, 1, 0, 1), 1)
        (hit,) = Searcher(out, predictor).search("red", top=1, rerank=1)
        assert Searcher(out, predictor).index.content(hit) == (photos / "00.png").read_bytes()

    def test_a_source_that_is_empty_deletes_nothing(self, photos: Path, predictor: Predictor, out: Path) -> None:
        others = out.parent / "others"
        others.mkdir()
        (photos / "00.png").rename(others / "00.png")
        assert counts(build_index([photos, others], out, predictor)) == (6, 6, 0, 0)
        (others / "00.png").unlink()
        with pytest.raises(ValueError, match="others has nothing that can be read; expected images"):
            build_index([photos, others], out, predictor)
        assert len(Index(out)) == 6

    @pytest.mark.parametrize(("seconds", "kept"), [(0.0, 3), (1000.0, 0)])
    def test_what_was_embedded_is_written_every_few_seconds(
        self, seconds: float, kept: int, build: Build, monkeypatch: pytest.MonkeyPatch, out: Path
    ) -> None:
        make, made = build_module.row_of, list[str]()

        def killed(one: Any, columns: Any) -> Any:
            made.append(one.example.id)
            if len(made) > 3:
                patch.setattr(Index, "upsert", lambda index, rows: None)
                raise KeyboardInterrupt
            return make(one, columns)

        with monkeypatch.context() as patch:
            patch.setattr(build_module, "row_of", killed)
            with pytest.raises(KeyboardInterrupt):
                build(batch_size=1, commit_seconds=seconds)
        assert len(Index(out)) == kept
        assert counts(build()) == (6, 6 - kept, 0, 0)

    def test_groups_on_request(self, build: Build, photos: Path, out: Path) -> None:
        for ann in (False, True):
            build(ann=ann)
            assert Index(out).has_ann_index == ann
        (photos / "00.png").unlink()
        build()
        assert Index(out).has_ann_index

    def test_by_uri(self, photos: Path, predictor: Predictor, tmp_path: Path) -> None:
        uri = f"file://{tmp_path}/in/a/store.lance"  # stands for s3:// and the like, which take the same way
        assert build_index(photos, uri, predictor).added == 6
        (photos / "00.png").unlink()
        assert counts(build_index(photos, uri, predictor)) == (5, 0, 0, 1)
        assert Index(uri).root == photos
        assert len(Index(tmp_path / "in" / "a" / "store.lance")) == 5


class TestParts:
    """Files with many images in them are read only if they changed, or were not read to their end."""

    @pytest.fixture
    def read(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Names of the files that are read."""
        names, read_part = list[str](), build_module.read_part

        def noting(part: Part, columns: Columns) -> Any:
            names.append(part.files[0].name)
            return read_part(part, columns)

        monkeypatch.setattr(build_module, "read_part", noting)
        return names

    @pytest.mark.parametrize(("kind", "last"), [("shards", "shard-1.tar"), ("bytes.parquet", ""), ("saved", None)])
    def test_unchanged_ones_are_not_read(
        self, kind: str, last: str | None, build: Build, places: dict[str, Path], read: list[str], out: Path
    ) -> None:
        source = out.parent / kind
        (shutil.copytree if places[kind].is_dir() else shutil.copy)(places[kind], source)
        assert counts(build(source)) == (5, 5, 0, 0)
        assert len(read) == len(set(read)) > 0
        assert sum(row["part_size"] for row in rows(out).values()) == 5
        del read[:]
        assert (counts(build(source)), read) == ((5, 0, 0, 0), [])
        if last is not None:
            os.utime(source / last, (1, 1)) if last else os.utime(source, (1, 1))
            for _ in range(2):
                build(source)
                assert read == [last or kind]

    def test_a_run_that_ended_within_one(
        self,
        build: Build,
        shapes_folder: Path,
        read: list[str],
        encoded: list[int],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        def write(name: str, numbers: range) -> None:
            with tarfile.open(tmp_path / "tars" / name, "w") as archive:
                for number in numbers:
                    archive.add(shapes_folder / f"{number:02}.png", f"{number:02}.png")

        def run() -> tuple[IndexReport, list[str]]:
            del read[:]
            return build(tmp_path / "tars"), [*read]

        (tmp_path / "tars").mkdir()
        write("a.tar", range(5))
        write("b.tar", range(5, 9))
        make, made = build_module.row_of, list[str]()

        def killed(one: Any, columns: Any) -> Any:
            made.append(one.example.id)
            if len(made) == 8:
                raise KeyboardInterrupt
            return make(one, columns)

        with monkeypatch.context() as patch:
            patch.setattr(build_module, "row_of", killed)
            with pytest.raises(KeyboardInterrupt):
                build(tmp_path / "tars", batch_size=1, commit_seconds=0)
        del encoded[:]
        report, names = run()
        assert (counts(report), names, sum(encoded)) == ((9, 2, 0, 0), ["b.tar"], 2)
        report, names = run()
        assert (counts(report), names) == ((9, 0, 0, 0), [])
        write("b.tar", range(5, 12))  # three more behind the others
        report, names = run()
        assert (report.images, report.added, report.reused, names) == (12, 3, 4, ["b.tar"])
        write("b.tar", range(5, 7))
        assert counts(run()[0]) == (7, 0, 2, 5)
        report, names = run()
        assert (counts(report), names) == ((7, 0, 0, 0), [])

    def test_one_with_something_bad_is_read_again(
        self, build: Build, shapes_folder: Path, read: list[str], tmp_path: Path
    ) -> None:
        contents = [(shapes_folder / "00.png").read_bytes(), b"not an image", (shapes_folder / "01.png").read_bytes()]
        pq.write_table(pa.table({"id": list("abc"), "image": contents}), tmp_path / "a.parquet")
        first, again = (build(tmp_path / "a.parquet", max_errors=1) for _ in range(2))
        assert (first.bad, counts(again), len(read)) == (again.bad, (2, 0, 0, 0), 2)


class TestUnreadableFolders:
    """A folder that cannot be read for a moment, as on a network disk, takes nothing out of an index."""

    @pytest.fixture
    def failing(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
        """Makes a folder fail, for a super-user too."""
        scan, stat = os.scandir, Path.stat

        def call(folder: Path) -> None:
            def scandir(path: Any = ".") -> Any:
                if Path(path) == folder:
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
                return scan(path)

            def status(path: Path, **options: Any) -> os.stat_result:
                if folder in path.parents:
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
                return stat(path, **options)

            monkeypatch.setattr(os, "scandir", scandir)
            monkeypatch.setattr(Path, "stat", status)

        return call

    def test_its_images_stay(self, build: Build, photos: Path, failing: Callable[[Path], None], out: Path) -> None:
        build()
        (photos / "00.png").unlink()
        failing(photos / "sub")
        with pytest.raises(ValueError, match=r"1 bad item, allowed are 0.*'sub': Stale file handle"):
            build()
        assert sorted(rows(out)) == NAMES[1:]
        report = build(max_errors=1)
        assert (report.bad, counts(report)) == (("'sub': Stale file handle",), (5, 0, 0, 0))
        failing(photos)
        with pytest.raises(ValueError, match="Stale file handle"):
            build()
        assert len(rows(out)) == 5

    def test_among_several_sources(
        self, photos: Path, predictor: Predictor, failing: Callable[[Path], None], out: Path
    ) -> None:
        others = out.parent / "others"
        others.mkdir()
        shutil.copy(photos / "00.png", others / "00.png")
        build_index([photos, others], out, predictor)
        failing(photos / "sub")
        with pytest.raises(ValueError, match="'photos/sub': Stale file handle"):
            build_index([photos, others], out, predictor)
        assert len(Index(out)) == 7

    def test_files_that_a_table_names(
        self, build: Build, photos: Path, failing: Callable[[Path], None], out: Path
    ) -> None:
        (photos / "list.csv").write_text("image\n" + "".join(f"{name}\n" for name in NAMES))
        build(photos / "list.csv")
        (photos / "00.png").unlink()
        failing(photos / "sub")
        report = build(photos / "list.csv", max_errors=3)
        assert (len(report.bad), report.removed) == (3, 1)
        assert sorted(rows(out)) == NAMES[1:]


class TestFiles:
    """What an index has of files, and what is said of those that cannot be used."""

    def test_a_folder_with_all_in_it(self, build: Build, photos: Path, out: Path) -> None:
        (photos / "sub" / "04.txt").write_text("a red bar\n\n  on black \n")
        os.mkfifo(photos / "pipe.jpg")
        (photos / "link.png").symlink_to("nowhere.png")
        for name in (" a.png", "a\n.png", "caf\udce9.png"):
            (photos / name).write_bytes((photos / "00.png").read_bytes())
        report, found = build(max_errors=9), rows(out)
        assert sorted(found) == sorted([" a.png", "a\n.png", *NAMES])
        name = r"the name 'caf\udce9.png' is not UTF-8; rename the file"
        expected = ["'pipe.jpg': it is no regular file", "'link.png': No such file or directory", name]
        assert all(any(message in bad for bad in report.bad) for message in expected)
        assert len(report.bad) == 3
        status, row = (photos / "sub" / "04.png").stat(), found["sub/04.png"]
        assert (row["size"], row["captions"], row["place"]) == (status.st_size, ["a red bar", "on black"], "")
        assert round(row["mtime"].timestamp() * 1e6) == status.st_mtime_ns // 1000

    def test_names_of_any_kind(self, build: Build, photos: Path, predictor: Predictor, out: Path) -> None:
        folder = photos.rename(out.parent / "caf\udce9")
        for number, name in enumerate((" a.png", "it's\n.png", "\tü.png")):
            (folder / f"{number:02}.png").rename(folder / name)
        assert [counts(build(folder)) for _ in range(2)] == [(6, 6, 0, 0), (6, 0, 0, 0)]
        hits = Searcher(out, predictor).search("red")
        assert all(Path(hit.file).is_file() for hit in hits)
        for hit in hits[1:]:
            Path(hit.file).unlink()
        assert counts(build(folder)) == (1, 0, 0, 5)

    def test_a_table(self, build: Build, photos: Path, out: Path) -> None:
        cells = ("00.png", "1"), ("sub/../00.png", " 2 "), ("sub/04.png", ""), ("no.png", "3"), ("0\0.png", "4")
        lines = [json.dumps({"image": image, "caption": caption}) for image, caption in cells]
        (photos / "list.jsonl").write_text("\n".join(lines))
        report = build(photos / "list.jsonl", max_errors=9)
        assert captions(out) == {"00.png": ["1", "2"], "sub/04.png": []}
        messages = (
            "no file 'no.png' (No such file or directory)",
            r"'0\x00.png' has a zero character, which no",
        )
        assert all(any(message in bad for bad in report.bad) for message in messages)

    @pytest.mark.parametrize(("second", "year"), [(2**40, 9999), (-(2**40), 1)])
    def test_times_outside_of_the_calendar(self, second: int, year: int, predictor: Predictor, out: Path) -> None:
        with TemporaryDirectory(dir="/dev/shm") as folder:  # a tmpfs: ext4 has no such times
            Image.new("RGB", (4, 4), "red").save(Path(folder) / "00.png")
            os.utime(Path(folder) / "00.png", (second, second))
            build_index(folder, out, predictor)
            assert build_index(folder, out, predictor).changed == 0
        (time,) = lancedb.connect(out.parent).open_table("photos").to_arrow()["mtime"].cast("int64").to_pylist()
        assert abs(time / 31_556_952_000_000 + 1970 - year) < 2

    def test_broken_ones_come_back_with_the_reason(self, photos: Path, predictor: Predictor) -> None:
        whole = (photos / "00.png").read_bytes()
        (photos / "00.png").write_bytes(whole[: len(whole) // 2])
        (photos / "01.png").write_bytes(b"")
        (photos / "02.png").write_text("not an image")
        Image.new("1", (20_000, 20_000)).save(photos / "03.png")  # 50 kB that would be 1.2 GB
        gone = Example(id="gone", images=(SourceImage(name="gone.png", place=str(photos / "gone.png")),))
        found, pixels = decode(predictor.processor, True, [*read(photos), gone])
        reasons = ("cut off", "empty", "cannot be read as an image", "limit")
        for one, reason in zip(found, reasons, strict=False):
            assert one.problem.startswith("it ")
            assert reason in one.problem
            assert str(photos) not in one.problem
        assert [one.example.id for one in found if one.width] == ["sub/04.png", "sub/05.png"]
        assert (len(pixels), found[-1].may_pass) == (2, False)
        assert "no image file at " in found[-1].problem

    def test_are_named_and_left_out_as_far_as_allowed(self, build: Build, photos: Path) -> None:
        build()
        (photos / "00.png").write_text("not an image")
        (photos / "01.png").unlink()
        (photos / "01.png").symlink_to("nowhere")
        with (photos / "02.png").open("r+b") as file:
            file.truncate(2**36)
        report = build(max_errors=3)
        assert counts(report) == (3, 0, 0, 3)
        assert report.bad[0] == "'01.png': No such file or directory"
        assert report.bad[1].startswith("'00.png': it cannot be read as an image")
        assert report.bad[2].startswith("'02.png': it has 68719476736 bytes; expected at most")
        assert build(max_errors=3).bad == report.bad

    def test_more_than_allowed_are_an_error_once_the_others_are_in(self, build: Build, photos: Path, out: Path) -> None:
        for number in range(12):
            (photos / f"bad{number}.jpg").write_text("not an image")
        with pytest.raises(
            ValueError,
            match=r"12 bad items, allowed are 11 \(max_errors=N .*the other 6 are in .*'bad0\.jpg': it.* and 2 more$",
        ):
            build(max_errors=11)
        assert sorted(rows(out)) == NAMES


class TestRefusals:
    def test_another_model(self, build: Build, photos: Path, tiny_checkpoint: Path, out: Path) -> None:
        build()
        other, before = load(tiny_checkpoint, image_size=40, device="cpu"), rows(out)
        fingerprint = Index(out).info.fingerprint
        with pytest.raises(ValueError, match=rf"made with model {fingerprint}.*is {other.fingerprint}; use that model"):
            build_index(photos, out, other)
        assert rows(out) == before

    def test_another_folder(self, build: Build, photos: Path, out: Path) -> None:
        build()
        with pytest.raises(ValueError, match=r"is of the images in .*photos, not of .*sub; choose another name"):
            build(photos / "sub")
        assert sorted(rows(out)) == NAMES

    def test_a_model_without_contrastive_head(self, photos: Path, tiny_checkpoint: Path, out: Path) -> None:
        write_checkpoint(read_checkpoint(tiny_checkpoint).without_itc(), out.parent / "model")
        with pytest.raises(ValueError, match="no contrastive"):
            build_index(photos, out, out.parent / "model")
        assert not out.exists()

    def test_an_index_that_another_process_writes(self, build: Build, out: Path) -> None:
        with write_lock(out), pytest.raises(FileExistsError, match="another process works in"):
            build()
