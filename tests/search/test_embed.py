"""Vectors of a source are those of the model in every format. Unusable images are named, interrupted runs go on."""

import base64
import json
import shutil
import subprocess
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bridgetower import cli
from bridgetower.data.sets.store import Table
from bridgetower.data.sources import fetch
from bridgetower.data.sources.example import Image as SourceImage
from bridgetower.inference import embed as embed_module
from bridgetower.inference import vector_files
from bridgetower.inference.config import EmbedConfig, SourceConfig
from bridgetower.inference.vector_files import (
    embed_source,
    given_examples,
    quantized,
    write_lock,
)
from helpers.sources import SOURCE_CAPTIONS, SOURCE_NAMES, serve_files

FORMATS = ("jsonl", "parquet", "npy", "lance")
WAYS = ("npy", "lance")  # an export, and the table itself


def read_vectors(out):
    if out.suffix == ".jsonl":
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        return [row.get("image", row.get("id")) for row in rows], np.array(
            [row["embedding"] for row in rows]
        )
    if out.suffix == ".npy":
        names = out.with_suffix(".ids.jsonl").read_text().splitlines()
        return [json.loads(line)["id"] for line in names], np.load(out)
    lance = out.suffix == ".lance"
    table = (
        lancedb.connect(out.parent).open_table(out.stem).to_arrow() if lance else pq.read_table(out)
    )
    return table["id"].to_pylist(), np.array(table["vector"].to_pylist())


def written(out, *, bad=False):
    names = {out.name} | ({"v.ids.jsonl"} if out.suffix == ".npy" else set())
    return names | ({f"{out.name}.errors.jsonl"} if bad else set())


class Bench:
    def __init__(self, folder, predictor):
        self.folder = folder
        self.predictor = predictor

    def __call__(self, source, out="v.parquet", **settings):
        return embed_source(source, self.folder / out, self.predictor, EmbedConfig(**settings))

    def read(self, out="v.parquet"):
        return read_vectors(self.folder / out)

    def check_beside(self, out, *, bad=False):
        inputs = ("", ".png", ".csv", ".txt", ".tar")
        names = {path.name for path in self.folder.iterdir() if path.suffix not in inputs}
        assert names == written(self.folder / out, bad=bad)


@pytest.fixture
def embed(predictor, tmp_path):
    return Bench(tmp_path, predictor)


@pytest.fixture
def expected_vectors(predictor, shapes_folder):
    return predictor.embed_images([shapes_folder / f"{name}.png" for name in SOURCE_NAMES]).numpy()


class TestOutputs:
    @pytest.mark.parametrize(
        ("suffix", "quantize", "off"),
        [
            *((suffix, None, 1e-5) for suffix in FORMATS),
            *(
                ("npy", "float16", 1e-3),
                ("jsonl", "int8", 1),
                ("parquet", "binary", 0),
                ("lance", "binary", 0),
            ),
        ],
    )
    def test_vectors_are_those_of_the_model(
        self, suffix, quantize, off, embed, source_paths, expected_vectors
    ):
        report = embed(source_paths["shards"], f"v.{suffix}", batch_size=2, quantize=quantize)
        assert (report.vectors, report.bad, report.cut, report.report) == (5, 0, 0, None)
        names, vectors = embed.read(f"v.{suffix}")
        assert names == [
            f"shard-{number}.tar/{name}.png"
            for number, name in zip("00011", SOURCE_NAMES, strict=True)
        ]
        difference = np.abs(
            vectors.astype(float) - quantized(expected_vectors, quantize).astype(float)
        )
        assert vectors.shape == quantized(expected_vectors, quantize).shape
        assert difference.max() <= off
        embed.check_beside(f"v.{suffix}")
        if suffix == "lance":
            table = Table(embed.folder / "v.lance")
            assert table.schema.names == ["id", "text", "vector", "crc"]
            assert table.damaged() == []

    def test_texts_and_pairs(self, embed, source_paths, predictor, shapes_folder, tmp_path):
        images = [shapes_folder / f"{name}.png" for name in SOURCE_NAMES]
        for of, vectors in (
            ("texts", predictor.embed_texts(SOURCE_CAPTIONS)),
            ("pairs", predictor.embed_pairs(images, SOURCE_CAPTIONS)),
        ):
            embed(source_paths["bytes.parquet"], of=of)
            table = pq.read_table(tmp_path / "v.parquet")
            assert table["text"].to_pylist() == list(SOURCE_CAPTIONS)
            assert table["id"].to_pylist() == [f"{name}.png" for name in SOURCE_NAMES]
            np.testing.assert_allclose(
                np.array(table["vector"].to_pylist()), vectors.numpy(), atol=1e-5
            )
        metadata = json.loads(pq.read_schema(tmp_path / "v.parquet").metadata[b"bridgetower"])
        assert (metadata["fingerprint"], metadata["of"]) == (predictor.fingerprint, "pairs")

    def test_sources_and_tables_in_a_store(self, store, source_paths, predictor, expected_vectors):
        url = store.upload(source_paths["shards"], "bucket/shards")
        assert embed_source(url, "s3://bucket/v.lance", predictor).vectors == 5
        rows = pa.Table.from_batches(Table("s3://bucket/v.lance").scan(["id", "vector"]))
        assert rows["id"].to_pylist()[3] == "shard-1.tar/03.png"
        np.testing.assert_allclose(
            np.array(rows["vector"].to_pylist()), expected_vectors, atol=1e-5
        )

    def test_images_as_base64(self, embed, shapes_folder, expected_vectors, tmp_path):
        contents = [(shapes_folder / f"{name}.png").read_bytes() for name in SOURCE_NAMES]
        rows = [
            json.dumps({"image": base64.b64encode(content).decode()}) + "\n" for content in contents
        ]
        (tmp_path / "t.jsonl").write_text("".join(rows))
        embed(tmp_path / "t.jsonl")
        names, vectors = embed.read()
        assert names == [f"t.jsonl/{number}" for number in range(1, 6)]
        np.testing.assert_allclose(vectors, expected_vectors, atol=1e-5)

    def test_processes_give_the_same(self, embed, shapes_folder):
        for workers in (0, 2):
            embed(shapes_folder, f"{workers}.npy", num_workers=workers, batch_size=7)
        assert np.array_equal(embed.read("0.npy")[1], embed.read("2.npy")[1])
        assert len(embed.read("2.npy")[1]) == 45

    def test_processes_are_started_for_many_images_only(self, embed, shapes_folder, monkeypatch):
        monkeypatch.setattr(BaseProcess, "start", lambda process: 1 / 0)
        monkeypatch.setattr(embed_module, "MIN_FOR_WORKERS", 46)
        assert embed(shapes_folder).vectors == 45
        monkeypatch.setattr(embed_module, "MIN_FOR_WORKERS", 45)
        with pytest.raises(ZeroDivisionError):
            embed(shapes_folder, "again.npy")


def test_what_quantized_vectors_keep():
    vectors = np.array([[0.5, -0.25, 0, 1], [0, 0, 0, 0]], np.float32)
    assert quantized(vectors, "int8").tolist() == [[64, -32, 0, 127], [0, 0, 0, 0]]
    assert quantized(vectors, "binary").tolist() == [[0b10010000], [0]]
    assert quantized(vectors, "float16").dtype == np.float16
    assert quantized(vectors, None) is vectors


def test_settings_and_places(embed, source_paths):
    for setting in ("max_errors", "num_workers", "commit_seconds", "batch_size", "ray_workers"):
        with pytest.raises(ValueError, match=f"{setting} (is )?-1"):
            SourceConfig(**{setting: -1})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ray_workers 2 would be ignored without ray"):
        SourceConfig(ray_workers=2)
    for out, message in (
        ("\udcff/v.npy", r"udcff/v\.npy' is not UTF-8"),
        ("v.txt", r"'.*v\.txt' has no suffix of"),
    ):
        with pytest.raises(ValueError, match=message):
            embed(source_paths["folder"], out)


class TestBroken:
    @pytest.fixture
    def photos(self, tmp_path):
        folder = tmp_path / "photos"
        folder.mkdir()
        for number in range(6):
            Image.new("RGB", (24, 24), (number * 40, 0, 0)).save(folder / f"{number}.png")
        (folder / "1.png").write_text("not an image")
        (folder / "4.png").write_bytes(b"")
        return folder

    def test_are_left_out_and_named(self, embed, photos, tmp_path):
        report = embed(photos, max_errors=2, batch_size=3)
        assert (report.vectors, report.bad) == (4, 2)
        assert embed.read()[0] == ["0.png", "2.png", "3.png", "5.png"]
        problems = [json.loads(line) for line in Path(str(report.report)).read_text().splitlines()]
        assert [problem["id"] for problem in problems] == ["1.png", "4.png"]
        assert problems[1]["problem"] == "it is empty (0 bytes); fetch the image again"

    @pytest.mark.parametrize("suffix", WAYS)
    def test_more_than_allowed_lose_nothing(self, suffix, embed, photos, encoded_batches, tmp_path):
        out = tmp_path / f"v.{suffix}"
        with pytest.raises(
            ValueError, match=r"2 bad items, allowed are 1 \(max_errors=N allows more\); the 4 v"
        ):
            embed(photos, out.name, max_errors=1)
        assert len(Path(f"{out}.errors.jsonl").read_text().splitlines()) == 2
        assert sum(encoded_batches) == 4
        assert embed(photos, out.name, max_errors=2).bad == 2
        assert (sum(encoded_batches), len(read_vectors(out)[0])) == (4, 4)
        embed.check_beside(out.name, bad=True)
        if suffix == "lance":  # a run that was through
            again = embed(photos, out.name, max_errors=2)
            assert (again.vectors, again.bad, sum(encoded_batches)) == (4, 2, 4)
        for path in photos.iterdir():
            path.write_text("not an image")
        none = tmp_path / f"none.{suffix}"
        with pytest.raises(
            ValueError, match=r"6 bad items.* would have no vectors: '0\.png': it cannot be read"
        ):
            embed(photos, none.name)
        with pytest.raises(
            ValueError,
            match=r"nothing of .*photos could be used: '0\.png': it cannot be read as an",
        ):
            embed(photos, none.name, max_errors=6)
        assert len(Path(f"{none}.errors.jsonl").read_text().splitlines()) == 6
        assert not none.exists()

    def test_what_may_pass_is_read_again(
        self, embed, shapes_folder, encoded_batches, monkeypatch, tmp_path
    ):
        """Of images at URLs one fails for a while: the next run fetches it again, and no other."""
        monkeypatch.setitem(vars(fetch.PATIENT), "pauses", ())
        for number in range(4):
            shutil.copy(shapes_folder / f"0{number}.png", tmp_path / f"{number}.png")
        with serve_files(tmp_path) as url:
            names = [*(f"{url}/{number}.png" for number in range(4)), f"{url}/none.png"]
            (tmp_path / "urls.csv").write_text("url\n" + "".join(f"{name}\n" for name in names))
            whole = SourceImage.read
            read_before = False
            fetched = list[str]()

            def failing(image):
                fetched.append(Path(image.location).name)
                if image.location.endswith("2.png") and not read_before:
                    raise OSError(f"{image.location} cannot be read (503)")
                return whole(image)

            monkeypatch.setattr(SourceImage, "read", failing)
            with pytest.raises(
                ValueError, match=r"2 bad items, allowed are 1 .*2\.png.*cannot be read \(503\)"
            ):
                embed(tmp_path / "urls.csv", max_errors=1)
            read_before = True
            del fetched[:]
            report = embed(tmp_path / "urls.csv", max_errors=1)
        assert (report.vectors, report.bad, fetched) == (4, 1, ["2.png"])
        assert embed.read()[0] == names[:4]

    @pytest.mark.parametrize("suffix", WAYS)
    def test_files_that_a_table_names_are_tried_again(self, suffix, embed, photos, encoded_batches):
        names = [f"{number}.png" for number in range(7)]
        (photos / "list.csv").write_text("\n".join(["image", *names]))
        run = partial(embed, photos / "list.csv", f"v.{suffix}", max_errors=1)
        with pytest.raises(ValueError, match="3 bad items, allowed are 1"):
            run()
        shutil.copy(photos / "0.png", photos / "1.png")
        shutil.copy(photos / "0.png", photos / "6.png")
        del encoded_batches[:]
        report = run()
        assert (report.vectors, report.bad, sum(encoded_batches)) == (6, 1, 2)
        names_read, vectors = embed.read(f"v.{suffix}")
        assert sorted(names_read) == [name for name in names if name != "4.png"]
        first, *same = (vectors[names_read.index(name)] for name in ("0.png", "1.png", "6.png"))
        np.testing.assert_allclose(same, [first, first], atol=1e-5)

    def test_without_what_is_asked_for(self, embed, photos):
        (photos / "0.txt").write_text("black")
        for of in ("texts", "pairs"):
            report = embed(photos, of=of, max_errors=5)
            assert report.vectors == 1
            assert "it has no text" in report.problems[1]
        (photos / "two.csv").write_text("left,right\n0.png,2.png\n")
        with pytest.raises(
            ValueError, match="it has 2 images; expected one: name its column as image_column"
        ):
            embed(photos / "two.csv")
        assert embed(photos / "two.csv", image_column="right").vectors == 1

    def test_texts(self, embed, tmp_path):
        (tmp_path / "texts.txt").write_text("short\n" + "red bar on black " * 9)
        assert embed(tmp_path / "texts.txt").cut == 1
        with pytest.raises(
            ValueError, match=r"1 bad item, .*'texts.txt/2': caption text 0, .*the limit is 24"
        ):
            embed(tmp_path / "texts.txt", truncate=False)
        (tmp_path / "a.jsonl").write_text('{"text": "half \\ud800 a pair"}\n{"text": "red bar"}\n')
        report = embed(tmp_path / "a.jsonl", "w.parquet", max_errors=1)
        assert (report.vectors, report.cut, report.bad) == (1, 0, 1)
        assert str(report.problems[0]).endswith(
            "holds half a surrogate pair; expected valid Unicode"
        )


class TestContinuing:
    @pytest.mark.parametrize("suffix", WAYS)
    def test_after_a_run_that_was_cut_off(
        self, suffix, embed, source_paths, expected_vectors, encoded_batches, read_names, interrupt
    ):
        # within a part, and after it
        for size, unread in (
            (2, ["shard-0.tar", "shard-1.tar"]),
            (3, ["shard-1.tar"]),
        ):
            call = partial(
                embed,
                source_paths["shards"],
                f"v{size}.{suffix}",
                batch_size=size,
                commit_seconds=0,
            )
            interrupt(2, call, Table, "append")
            del encoded_batches[:], read_names[:]
            assert call().vectors == 5
            assert (sum(encoded_batches), read_names) == (5 - size, unread)
            names, vectors = embed.read(f"v{size}.{suffix}")
            assert names == [
                f"shard-{number}.tar/{name}.png"
                for number, name in zip("00011", SOURCE_NAMES, strict=True)
            ]
            np.testing.assert_allclose(vectors, expected_vectors, atol=1e-5)

    @pytest.mark.parametrize("suffix", WAYS)
    def test_a_run_that_had_nothing_yet_may_become_another_one(
        self, suffix, embed, source_paths, tmp_path
    ):
        (tmp_path / "t.csv").write_text("bild,worte\n0.png,a red bar\n")
        with pytest.raises(
            ValueError, match=r"t\.csv has no column of images or texts; it has bild, worte"
        ):
            embed(tmp_path / "t.csv", f"v.{suffix}")
        assert embed(tmp_path / "t.csv", f"v.{suffix}", caption_column="worte").vectors == 1
        embed.check_beside(f"v.{suffix}")

    @pytest.mark.parametrize("suffix", WAYS)
    def test_with_other_settings_or_another_source_is_refused(
        self, suffix, embed, interrupt, tmp_path, monkeypatch
    ):
        source = tmp_path / "texts.txt"
        source.write_text("a red bar\na blue bar\n")
        run = partial(embed, source, f"v.{suffix}", batch_size=1, commit_seconds=0)
        interrupt(2, run, Table, "append")
        message = r"v\..*lance has rows of an unfinished run with another source, model or settings; finish it with"
        for changes in ({"quantize": "int8"}, {"truncate": False}, {"caption_column": "text"}):
            with pytest.raises(ValueError, match=message):
                embed(source, f"v.{suffix}", **changes)
        with monkeypatch.context() as patch:
            patch.setitem(vars(embed.predictor), "fingerprint", "other weights")
            with pytest.raises(ValueError, match=message):
                embed(source, f"v.{suffix}")
        source.write_text("a red circle")
        with pytest.raises(ValueError, match=message):
            embed(source, f"v.{suffix}")

    def test_what_the_same_command_wrote_is_replaced_but_no_other_table(
        self, embed, source_paths, shapes_folder, tmp_path
    ):
        folder = tmp_path / "photos"
        shutil.copytree(source_paths["folder"], folder)
        for suffix in FORMATS:
            shutil.copy(shapes_folder / "20.png", folder / "30.png")
            assert embed(folder, f"v.{suffix}").vectors == 6
            (folder / "30.png").unlink()
            assert embed(folder, f"v.{suffix}").vectors == len(embed.read(f"v.{suffix}")[0]) == 5
        for number, source in enumerate((folder, folder / "03.png")):
            vectors = []
            for shape in (20, 21):
                shutil.copy(shapes_folder / f"{shape}.png", folder / "03.png")
                embed(given_examples([source], [], pairs=False), f"{number}.lance")
                names, vectors_read = embed.read(f"{number}.lance")
                vectors.append(vectors_read[names.index(str(folder / "03.png"))])
            expected = embed.predictor.embed_images(
                [shapes_folder / f"{shape}.png" for shape in (20, 21)]
            ).numpy()
            np.testing.assert_allclose(vectors, expected, atol=1e-5)
        with pytest.raises(FileExistsError, match=r"v\.lance exists; choose another name"):
            embed(folder, "v.lance", quantize="int8")
        lancedb.connect(tmp_path).create_table("other", pa.table({"a": [1]}))
        with pytest.raises(FileExistsError, match=r"other\.lance exists; choose another name"):
            embed(folder, "other.lance")
        assert len(embed.read("v.lance")[0]) == 5

    @pytest.mark.parametrize("suffix", WAYS)
    def test_a_table_that_is_removed_meanwhile(
        self, suffix, embed, source_paths, monkeypatch, tmp_path
    ):
        commits = list[int]()
        add = vector_files._EmbeddingRun.append
        table = tmp_path / ("v.lance" if suffix == "lance" else f".v.{suffix}.lance")

        def removing(run, rows):
            commits.append(len(rows))
            if len(commits) == 2:
                shutil.rmtree(table)
            add(run, rows)

        with monkeypatch.context() as patch:
            patch.setattr(vector_files._EmbeddingRun, "append", removing)
            with pytest.raises(
                FileNotFoundError, match=r"lance was removed while it was written; run"
            ):
                embed(source_paths["folder"], f"v.{suffix}", batch_size=2, commit_seconds=0)
        assert not table.exists()
        assert (
            embed(source_paths["folder"], f"v.{suffix}").vectors
            == len(embed.read(f"v.{suffix}")[0])
            == 5
        )

    @pytest.mark.parametrize("suffix", WAYS)
    def test_after_a_file_that_was_cut_off(
        self, suffix, embed, source_paths, expected_vectors, interrupt, file_limit, tmp_path
    ):
        call = partial(embed, source_paths["shards"], f"v.{suffix}", batch_size=2, commit_seconds=0)
        interrupt(2, call, Table, "append")
        folder = tmp_path / ("v.lance" if suffix == "lance" else f".v.{suffix}.lance")
        (first,) = (folder / "data").iterdir()
        limit = first.stat().st_size - 8
        shutil.rmtree(folder)
        with (
            file_limit(limit),
            pytest.raises(OSError, match=r"cannot be written: .*make room on the disk"),
        ):
            call()
        assert call().vectors == 5
        np.testing.assert_allclose(embed.read(f"v.{suffix}")[1], expected_vectors, atol=1e-5)
        embed.check_beside(f"v.{suffix}")

    def test_two_writers(self, embed, source_paths):
        for out, table in (("v.parquet", ".v.parquet.lance"), ("v.lance", "v.lance")):
            busy = pytest.raises(FileExistsError, match="another process works in")
            with write_lock(embed.folder / table), busy:
                embed(source_paths["folder"], out)
            assert embed(source_paths["folder"], out).vectors == 5

    @pytest.mark.parametrize(("suffix", "kib"), [("lance", 24), ("npy", 8), ("npy", 24)])
    def test_a_full_disk_is_told_in_a_line(self, suffix, kib, predictor, shapes_folder, small_disk):
        out = small_disk(kib) / f"v.{suffix}"
        config = EmbedConfig(batch_size=2, commit_seconds=0)
        with pytest.raises(
            OSError, match=r"v\..*cannot be written: [^/]*(make room on the disk|No space left.*)$"
        ):
            embed_source(shapes_folder, out, predictor, config)
        subprocess.run(["mount", "-o", "remount,size=4m", str(out.parent)], check=True)
        assert (
            embed_source(shapes_folder, out, predictor, config).vectors
            == len(read_vectors(out)[0])
            == 45
        )


class TestCommand:
    def test_a_source_and_a_folder_of_images(self, run, tiny_checkpoint, source_paths, tmp_path):
        folder = source_paths["imagefolder"]
        lines = run("embed", tiny_checkpoint, "--images", folder)
        assert [line["image"] for line in lines] == [
            str(folder / f"{name}.png") for name in SOURCE_NAMES
        ]
        assert [line["image"] for line in run("embed", tiny_checkpoint, folder)] == [
            f"{name}.png" for name in SOURCE_NAMES
        ]
        (report,) = run(
            "embed", tiny_checkpoint, folder, "--out", tmp_path / "v.npy", "--quantize", "int8"
        )
        assert (report["out"], report["vectors"], report["report"]) == (
            str(tmp_path / "v.npy"),
            5,
            None,
        )
        assert np.load(tmp_path / "v.npy").dtype == np.int8
        printed = np.array([line["embedding"] for line in lines], np.float32)
        assert (
            np.abs(quantized(printed, "int8").astype(int) - np.load(tmp_path / "v.npy")).max() <= 1
        )

    def test_errors(self, refused, tiny_checkpoint, source_paths, tmp_path, capsys):
        (tmp_path / "bad.png").write_text("not an image")
        with pytest.raises(SystemExit):
            cli.main(
                [
                    "embed",
                    str(tiny_checkpoint),
                    "--images",
                    str(tmp_path / "bad.png"),
                    str(source_paths["folder"]),
                ]
            )
        printed = capsys.readouterr()
        assert len(printed.out.splitlines()) == 5  # before the error
        assert "the input: 1 bad item, allowed are 0 (--max-errors N allows more)" in printed.err
        for arguments, message in (
            (("nowhere",), "no file or folder nowhere"),
            (
                (source_paths["folder"], "--texts", "a"),
                "--images or --texts are given; expected one",
            ),
            (("--texts", "red bar on black " * 9, "--no-truncate"), "pass --truncate to cut it"),
            ((source_paths["folder"], "--batch-size", 0), "--batch-size 0"),
            ((source_paths["folder"], "--max-errors", -1), "--max-errors -1"),
        ):
            assert message in refused("embed", tiny_checkpoint, *arguments).replace(" is ", " ")
