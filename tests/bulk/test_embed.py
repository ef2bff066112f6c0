"""Vectors of a source: as the model gives them, in every format; broken items; runs that were cut off."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bridgetower.bulk import embedding, run
from bridgetower.bulk.config import EmbedConfig
from bridgetower.bulk.outputs import Output
from bridgetower.bulk.quantize import quantized
from bridgetower.bulk.run import EmbedReport, embed_source
from bridgetower.data import images, remote
from bridgetower.predictor import Predictor
from kills import Killing
from sources import CAPTIONS, NAMES, served

FORMATS = ("jsonl", "parquet", "npy", "lance")


def read(out: Path) -> tuple[list[str], np.ndarray]:
    """Names and vectors of an output."""
    if out.suffix == ".jsonl":
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        return [row.get("image", row.get("id")) for row in rows], np.array([row["embedding"] for row in rows])
    if out.suffix == ".npy":
        names = out.with_suffix(".ids.jsonl").read_text().splitlines()
        return [json.loads(line)["id"] for line in names], np.load(out)
    if out.suffix == ".lance":
        table = lancedb.connect(out.parent).open_table(out.stem).to_arrow().sort_by("block")
    else:
        table = pq.read_table(out)
    return table["id"].to_pylist(), np.array(table["vector"].to_pylist())


@pytest.fixture
def embed(predictor: Predictor, tmp_path: Path) -> Callable[..., EmbedReport]:
    def call(source: Path, out: str = "vectors.parquet", **settings: Any) -> EmbedReport:
        return embed_source(source, tmp_path / out, predictor, EmbedConfig(**settings))

    return call


@pytest.fixture
def expected(predictor: Predictor, pictures: Path) -> np.ndarray:
    return predictor.embed_images([pictures / f"{name}.png" for name in NAMES]).numpy()


@pytest.fixture(scope="module")
def killing() -> Killing:
    return Killing()


Embed = Callable[..., EmbedReport]


@pytest.fixture
def encoded(predictor: Predictor) -> Iterator[list[int]]:
    """How many images went through the image tower, a number per batch."""
    batches: list[int] = []
    hook = predictor.model.vision.patch_embedding.register_forward_hook(
        lambda module, inputs, output: batches.append(len(inputs[0]))
    )
    yield batches
    hook.remove()


class TestFormats:
    @pytest.mark.parametrize("suffix", FORMATS)
    def test_vectors_are_those_of_the_model(
        self, suffix: str, embed: Embed, places: dict[str, Path], expected: np.ndarray, tmp_path: Path
    ) -> None:
        report = embed(places["shards"], f"v.{suffix}", block_size=2, batch_size=2)
        assert (report.vectors, report.bad, report.cut, report.report) == (5, 0, 0, None)
        names, vectors = read(tmp_path / f"v.{suffix}")
        assert names == [f"shard-{number}.tar/{name}.png" for number, name in zip("00011", NAMES, strict=True)]
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
        beside = {"v.npy": ["v.ids.jsonl", "v.npy"]}.get(f"v.{suffix}", [f"v.{suffix}"])
        assert sorted(path.name for path in tmp_path.iterdir()) == beside

    @pytest.mark.parametrize("suffix", FORMATS)
    @pytest.mark.parametrize("kind", ["float16", "int8", "binary"])
    def test_fewer_bytes(
        self, suffix: str, kind: Any, embed: Embed, places: dict[str, Path], expected: np.ndarray, tmp_path: Path
    ) -> None:
        embed(places["folder"], f"v.{suffix}", quantize=kind)
        vectors = read(tmp_path / f"v.{suffix}")[1]
        difference = np.abs(vectors.astype(float) - quantized(expected, kind).astype(float))
        assert difference.max() <= {"float16": 1e-3, "int8": 1, "binary": 0}[kind]

    def test_texts_and_pairs(
        self, embed: Embed, places: dict[str, Path], predictor: Predictor, pictures: Path, tmp_path: Path
    ) -> None:
        images = [pictures / f"{name}.png" for name in NAMES]
        for of, vectors in (
            ("texts", predictor.embed_texts(CAPTIONS)),
            ("pairs", predictor.embed_pairs(images, CAPTIONS)),
        ):
            embed(places["bytes.parquet"], of=of)
            table = pq.read_table(tmp_path / "vectors.parquet")
            assert table["text"].to_pylist() == list(CAPTIONS)
            assert table["id"].to_pylist() == [f"{name}.png" for name in NAMES]
            np.testing.assert_allclose(np.array(table["vector"].to_pylist()), vectors.numpy(), atol=1e-5)
        about = json.loads(pq.read_schema(tmp_path / "vectors.parquet").metadata[b"bridgetower"])
        assert (about["fingerprint"], about["of"]) == (predictor.fingerprint, "pairs")

    def test_a_list_of_texts(self, embed: Embed, predictor: Predictor, tmp_path: Path) -> None:
        (tmp_path / "texts.txt").write_text("\n".join(CAPTIONS))
        assert embed(tmp_path / "texts.txt").vectors == 5
        np.testing.assert_allclose(
            read(tmp_path / "vectors.parquet")[1], predictor.embed_texts(CAPTIONS).numpy(), atol=1e-5
        )

    def test_processes_give_the_same(self, embed: Embed, pictures: Path, tmp_path: Path) -> None:
        for workers in (0, 2):
            embed(pictures, f"{workers}.npy", num_workers=workers, batch_size=7, block_size=20)
        assert np.array_equal(np.load(tmp_path / "0.npy"), np.load(tmp_path / "2.npy"))
        assert len(np.load(tmp_path / "2.npy")) == 45

    @pytest.mark.parametrize("enough", [45, 46])
    def test_processes_are_started_for_many_images_only(
        self, enough: int, embed: Embed, pictures: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        started: list[BaseProcess] = []
        monkeypatch.setattr(BaseProcess, "start", lambda process: started.append(process) or 1 / 0)
        monkeypatch.setattr(run, "MIN_FOR_WORKERS", enough)
        monkeypatch.setattr(embedding, "MIN_FOR_WORKERS", enough)
        with pytest.raises(ZeroDivisionError) if enough == 45 else nullcontext():
            embed(pictures, block_size=20)
        assert len(started) == (enough == 45)


class TestQuantized:
    def test_what_is_kept(self) -> None:
        vectors = np.array([[0.5, -0.25, 0, 1], [0, 0, 0, 0]], np.float32)
        assert quantized(vectors, "int8").tolist() == [[64, -32, 0, 127], [0, 0, 0, 0]]
        assert quantized(vectors, "binary").tolist() == [[0b10010000], [0]]
        assert quantized(vectors, "float16").dtype == np.float16
        assert quantized(vectors, None) is vectors


class TestBroken:
    @pytest.fixture
    def photos(self, tmp_path: Path) -> Path:
        folder = tmp_path / "photos"
        folder.mkdir()
        for number in range(6):
            Image.new("RGB", (24, 24), (number * 40, 0, 0)).save(folder / f"{number}.png")
        (folder / "1.png").write_text("not an image")
        (folder / "4.png").write_bytes(b"")
        return folder

    def test_are_left_out_and_named(self, embed: Embed, photos: Path, tmp_path: Path) -> None:
        report = embed(photos, max_errors=2, block_size=3)
        assert (report.vectors, report.bad) == (4, 2)
        assert read(tmp_path / "vectors.parquet")[0] == ["0.png", "2.png", "3.png", "5.png"]
        named = [json.loads(line) for line in Path(str(report.report)).read_text().splitlines()]
        assert [one["id"] for one in named] == ["1.png", "4.png"]
        assert named[1]["problem"] == "it is empty (0 bytes); fetch the image again"

    def test_a_text_that_is_not_valid_unicode(self, embed: Embed, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "half \\ud800 a pair"}\n{"text": "red bar"}\n')
        report = embed(tmp_path / "a.jsonl", max_errors=1)
        assert (report.vectors, report.cut, report.bad) == (1, 0, 1)
        assert str(report.problems[0]).endswith("holds half a surrogate pair; expected valid Unicode")

    def test_more_than_allowed_are_an_error_after_the_others_are_written(
        self, embed: Embed, photos: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(ValueError, match=r"2 bad items, allowed are 1 \(max_errors=N allows more\); the 4 v"):
            embed(photos, max_errors=1)
        assert len(read(tmp_path / "vectors.parquet")[0]) == 4
        assert (tmp_path / "vectors.parquet.errors.jsonl").is_file()
        for number in (1, 4):
            (photos / f"{number}.png").unlink()
        assert embed(photos, quantize="int8").report is None  # other settings do not wait for the run that failed
        assert not (tmp_path / "vectors.parquet.errors.jsonl").exists()

    @pytest.mark.parametrize("suffix", FORMATS)
    def test_nothing_that_can_be_used(self, suffix: str, embed: Embed, photos: Path, tmp_path: Path) -> None:
        for path in photos.iterdir():
            path.write_text("not an image")
        with pytest.raises(ValueError, match=r"6 bad items.* would have no vectors: '0\.png': it cannot be read"):
            embed(photos, f"v.{suffix}")
        with pytest.raises(
            ValueError, match=r"nothing of .*photos could be used: '0\.png': it cannot be read as an image"
        ):
            embed(photos, f"v.{suffix}", max_errors=6)
        assert len((tmp_path / f"v.{suffix}.errors.jsonl").read_text().splitlines()) == 6
        assert not (tmp_path / f"v.{suffix}").exists()

    @pytest.mark.parametrize("suffix", FORMATS)
    def test_the_advice_to_allow_more_goes_on_with_what_is_there(
        self, suffix: str, embed: Embed, photos: Path, encoded: list[int], tmp_path: Path
    ) -> None:
        with pytest.raises(ValueError, match="2 bad items, allowed are 0"):
            embed(photos, f"v.{suffix}")
        assert sum(encoded) == 4
        assert embed(photos, f"v.{suffix}", max_errors=2).bad == 2
        assert (sum(encoded), len(read(tmp_path / f"v.{suffix}")[0])) == (4, 4)
        assert not (tmp_path / f"v.{suffix}.parts").exists()

    def test_what_may_pass_is_read_again(
        self, embed: Embed, pictures: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """Of images at URLs one fails for a while: the next run fetches its block again, and no other."""
        monkeypatch.setattr(remote, "PAUSES", ())
        for number in range(4):
            shutil.copy(pictures / f"0{number}.png", tmp_path / f"{number}.png")
        with served(tmp_path) as url:
            names = [*(f"{url}/{number}.png" for number in range(4)), f"{url}/none.png"]
            (tmp_path / "urls.csv").write_text("url\n" + "".join(f"{name}\n" for name in names))
            read_url, read_before, fetched = images.read_url, False, list[str]()

            def failing(url: str, *piece: Any) -> bytes:
                fetched.append(Path(url).name)
                if url.endswith("2.png") and not read_before:
                    raise OSError(f"{url} cannot be read (503)")
                return read_url(url, *piece)

            monkeypatch.setattr(images, "read_url", failing)
            with pytest.raises(ValueError, match=r"2 bad items, allowed are 1 .*2\.png cannot be read \(503\)"):
                embed(tmp_path / "urls.csv", max_errors=1, block_size=2)
            read_before = True
            del fetched[:]
            report = embed(tmp_path / "urls.csv", max_errors=1, block_size=2)
        assert (report.vectors, report.bad, fetched) == (4, 1, ["2.png", "3.png"])
        assert read(tmp_path / "vectors.parquet")[0] == names[:4]

    @pytest.mark.parametrize(("of", "problem"), [("texts", "it has no text"), ("pairs", "it has no text")])
    def test_without_what_is_asked_for(self, of: str, problem: str, embed: Embed, photos: Path, tmp_path: Path) -> None:
        (photos / "0.txt").write_text("black")
        report = embed(photos, of=of, max_errors=5)
        assert report.vectors == 1
        assert problem in report.problems[1]

    def test_long_texts(self, embed: Embed, tmp_path: Path) -> None:
        (tmp_path / "texts.txt").write_text("short\n" + "red bar on black " * 9)
        assert embed(tmp_path / "texts.txt").cut == 1
        with pytest.raises(ValueError, match=r"1 bad item, .*'2': caption text 0, .*the limit is 24"):
            embed(tmp_path / "texts.txt", truncate=False)


class TestContinuing:
    @pytest.mark.parametrize("suffix", FORMATS)
    def test_after_a_run_that_was_cut_off(
        self,
        suffix: str,
        embed: Embed,
        places: dict[str, Path],
        expected: np.ndarray,
        encoded: list[int],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        write = Output.write

        def failing(output: Output, block: Any) -> None:
            if block.name == "000001-000000":
                raise KeyboardInterrupt
            write(output, block)

        monkeypatch.setattr(Output, "write", failing)
        with pytest.raises(KeyboardInterrupt):
            embed(places["shards"], f"v.{suffix}", block_size=2)
        monkeypatch.undo()
        del encoded[:]
        report = embed(places["shards"], f"v.{suffix}", block_size=2)
        assert encoded == [2]
        assert report.vectors == 5
        np.testing.assert_allclose(read(tmp_path / f"v.{suffix}")[1], expected, atol=1e-5)

    def test_with_other_settings_or_a_table_that_changed_is_refused(
        self, embed: Embed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        source = tmp_path / "texts.txt"
        source.write_text("a red bar")
        monkeypatch.setattr(Output, "finish", lambda output: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            embed(source)
        with pytest.raises(ValueError, match=r"vectors\.parquet\.parts has parts of other vectors"):
            embed(source, quantize="int8")
        source.write_text("a red circle")
        with pytest.raises(ValueError, match=r"vectors\.parquet\.parts has parts of other vectors"):
            embed(source)

    @pytest.mark.parametrize(("source", "suffix"), [*(("photos", suffix) for suffix in FORMATS), ("photos.csv", "npy")])
    def test_a_block_whose_images_changed_is_done_again(
        self,
        source: str,
        suffix: str,
        embed: Embed,
        pictures: Path,
        predictor: Predictor,
        encoded: list[int],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        folder = tmp_path / "photos"
        folder.mkdir()
        for number in range(8):
            shutil.copy(pictures / f"0{number}.png", folder / f"{number}.png")
        (folder / "1.png").write_text("not an image")
        (tmp_path / "photos.csv").write_text("image\n" + "".join(f"photos/{number}.png\n" for number in range(8)))
        monkeypatch.setattr(Output, "finish", lambda output: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            embed(tmp_path / source, f"v.{suffix}", block_size=2)
        monkeypatch.undo()
        shutil.copy(pictures / "10.png", folder / "0.png")
        shutil.copy(pictures / "01.png", folder / "1.png")
        for number in (4, 5):  # a block without vectors
            (folder / f"{number}.png").write_text("not an image")
        del encoded[:]
        report = embed(tmp_path / source, f"v.{suffix}", block_size=2, max_errors=2)
        assert (report.vectors, report.bad, encoded) == (6, 2, [2])
        names, vectors = read(tmp_path / f"v.{suffix}")
        assert [Path(name).stem for name in names] == ["0", "1", "2", "3", "6", "7"]
        expected = predictor.embed_images([folder / f"{Path(name).stem}.png" for name in names])
        np.testing.assert_allclose(vectors, expected.numpy(), atol=1e-5)

    def test_a_file_that_changes_while_it_is_read_is_read_again(
        self, embed: Embed, pictures: Path, predictor: Predictor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        folder, write = tmp_path / "photos", Output.write
        folder.mkdir()
        shutil.copy(pictures / "00.png", folder)

        def late(output: Output, block: Any) -> None:
            shutil.copy(pictures / "01.png", folder / "00.png")
            write(output, block)
            raise KeyboardInterrupt

        monkeypatch.setattr(Output, "write", late)
        with pytest.raises(KeyboardInterrupt):
            embed(folder)
        monkeypatch.undo()
        embed(folder)
        expected = predictor.embed_images([pictures / "01.png"]).numpy()
        np.testing.assert_allclose(read(tmp_path / "vectors.parquet")[1], expected, atol=1e-5)

    def test_images_that_are_gone(
        self, embed: Embed, pictures: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        folder = tmp_path / "photos"
        folder.mkdir()
        for number in range(6):
            shutil.copy(pictures / f"0{number}.png", folder / f"{number}.png")
        monkeypatch.setattr(Output, "finish", lambda output: 1 / 0)
        for suffix in FORMATS:
            with pytest.raises(ZeroDivisionError):
                embed(folder, f"v.{suffix}", block_size=2)
        monkeypatch.undo()
        for number in (0, 4, 5):
            (folder / f"{number}.png").unlink()
        for suffix in FORMATS:
            assert embed(folder, f"v.{suffix}", block_size=2).vectors == 3
            assert read(tmp_path / f"v.{suffix}")[0] == ["1.png", "2.png", "3.png"]

    def test_a_table_of_the_same_name_in_another_store_is_refused(
        self, predictor: Predictor, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(Output, "finish", lambda output: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                embed_source(places["folder"], f"file://{tmp_path}/one/v.lance", predictor)
        with pytest.raises(ValueError, match=r"^v\.lance\.parts has parts of other vectors"):
            embed_source(places["folder"], f"file://{tmp_path}/two/v.lance", predictor)
        assert embed_source(places["folder"], f"file://{tmp_path}/one/v.lance", predictor).vectors == 5
        assert len(read(tmp_path / "one" / "v.lance")[0]) == 5

    def test_what_the_same_command_wrote_is_replaced_but_no_other_table(
        self, embed: Embed, places: dict[str, Path], pictures: Path, tmp_path: Path
    ) -> None:
        folder = tmp_path / "photos"
        shutil.copytree(places["folder"], folder)
        for suffix in FORMATS:
            shutil.copy(pictures / "20.png", folder / "30.png")
            assert embed(folder, f"v.{suffix}", block_size=2).vectors == 6
            (folder / "30.png").unlink()
            assert embed(folder, f"v.{suffix}", block_size=2).vectors == len(read(tmp_path / f"v.{suffix}")[0]) == 5
        with pytest.raises(FileExistsError, match=r"v\.lance exists; choose another name"):
            embed(folder, "v.lance", quantize="int8")
        assert len(read(tmp_path / "v.lance")[0]) == 5

    def test_a_table_that_is_removed_meanwhile(
        self, embed: Embed, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        write = Output.write

        def removing(output: Output, block: Any) -> None:
            if block.name.endswith("000001"):
                shutil.rmtree(tmp_path / "v.lance")
            write(output, block)

        with monkeypatch.context() as patch:
            patch.setattr(Output, "write", removing)
            with pytest.raises(FileNotFoundError, match=r"v\.lance was removed while it was written; run"):
                embed(places["folder"], "v.lance", block_size=2)
        assert not (tmp_path / "v.lance").exists()
        assert embed(places["folder"], "v.lance", block_size=2).vectors == len(read(tmp_path / "v.lance")[0]) == 5

    @pytest.mark.parametrize("kib", [8, 16, 24, 40])
    def test_a_full_disk_is_told_in_a_line(
        self, kib: int, predictor: Predictor, pictures: Path, small_disk: Callable[[int], Path], tmp_path: Path
    ) -> None:
        out = small_disk(kib) / "v.lance"
        (tmp_path / "link.lance.parts").mkdir()
        (out.parent / "v.lance.parts").symlink_to(tmp_path / "link.lance.parts")
        with pytest.raises(OSError, match=r"v\.lance cannot be written: [^/]*; make room on the disk$"):
            embed_source(pictures, out, predictor, EmbedConfig(block_size=2))
        subprocess.run(["mount", "-o", "remount,size=4m", str(out.parent)], check=True)
        assert embed_source(pictures, out, predictor, EmbedConfig(block_size=2)).vectors == len(read(out)[0]) == 45


class TestKilled:
    """Runs that end before any change of a file, and the same call again."""

    @pytest.fixture
    def source(self, pictures: Path, tmp_path: Path) -> Path:
        """Two images and a broken one."""
        folder = tmp_path / "photos"
        folder.mkdir()
        for name in ("00.png", "01.png"):
            shutil.copy(pictures / name, folder)
        (folder / "02.png").write_text("not an image")
        return folder

    @pytest.mark.parametrize("suffix", ["jsonl", "npy", "lance"])
    def test_at_any_moment(
        self,
        suffix: str,
        killing: Killing,
        embed: Embed,
        source: Path,
        expected: np.ndarray,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the machine goes on
        out, moment = tmp_path / "out" / f"v.{suffix}", 0
        call = partial(embed, source, f"out/{out.name}", max_errors=1)
        while killing(moment := moment + 1, call):
            assert call().bad == 1
            names, vectors = read(out)
            assert names == ["00.png", "01.png"]
            np.testing.assert_allclose(vectors, expected[:2], atol=1e-5)
            beside = {out.name, f"{out.name}.errors.jsonl"} | ({"v.ids.jsonl"} if suffix == "npy" else set())
            assert {path.name for path in out.parent.iterdir()} == beside
            shutil.rmtree(out.parent)
        assert moment > 30

    def test_a_table_of_another_run_stays(
        self, killing: Killing, embed: Embed, source: Path, places: dict[str, Path], tmp_path: Path
    ) -> None:
        embed(places["folder"], "v.lance")
        moment = 0

        def call() -> None:
            with pytest.raises(FileExistsError, match=r"v\.lance exists; choose another name"):
                embed(source, "v.lance")

        while killing(moment := moment + 1, call):
            call()
            assert len(read(tmp_path / "v.lance")[0]) == 5
        assert moment > 3
        assert not (tmp_path / "v.lance.parts").exists()

    def test_parts_of_which_no_plan_is_left(
        self, embed: Embed, source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(Output, "finish", lambda output: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            embed(source)
        monkeypatch.undo()
        (tmp_path / "vectors.parquet.parts" / "plan.json").unlink()
        embed(source, quantize="int8", max_errors=1)
        assert pq.read_schema(tmp_path / "vectors.parquet").field("vector").type.value_type == pa.int8()


def test_other_suffixes_are_refused(embed: Embed, places: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"'.*v\.txt' has no suffix of vectors; expected one of \.jsonl, \.parquet"):
        embed(places["folder"], "v.txt")


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_place_that_is_not_utf8_is_refused(suffix: str, embed: Embed, places: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=rf"the name '.*\\udcff/v\.{suffix}' is not UTF-8; rename the file"):
        embed(places["folder"], f"\udcff/v.{suffix}")


class TestCommand:
    def test_a_source_and_a_folder_of_images(
        self, run: Callable[..., list[Any]], tiny_checkpoint: Path, places: dict[str, Path], tmp_path: Path
    ) -> None:
        folder = places["imagefolder"]
        lines = run("embed", tiny_checkpoint, "--images", folder)
        assert [line["image"] for line in lines] == [str(folder / f"{name}.png") for name in NAMES]
        assert [line["image"] for line in run("embed", tiny_checkpoint, folder)] == [f"{name}.png" for name in NAMES]
        (report,) = run("embed", tiny_checkpoint, folder, "--out", tmp_path / "v.npy", "--quantize", "int8")
        assert (report["out"], report["vectors"], report["report"]) == (str(tmp_path / "v.npy"), 5, None)
        assert np.load(tmp_path / "v.npy").dtype == np.int8
        printed = np.array([line["embedding"] for line in lines], np.float32)
        assert np.abs(quantized(printed, "int8").astype(int) - np.load(tmp_path / "v.npy")).max() <= 1

    def test_good_lines_are_printed_before_an_error(
        self,
        tiny_checkpoint: Path,
        places: dict[str, Path],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        from bridgetower import cli

        (tmp_path / "bad.png").write_text("not an image")
        with pytest.raises(SystemExit):
            cli.main(["embed", str(tiny_checkpoint), "--images", str(tmp_path / "bad.png"), str(places["folder"])])
        printed = capsys.readouterr()
        assert len(printed.out.splitlines()) == 5
        assert "the input: 1 bad item, allowed are 0 (--max-errors N allows more)" in printed.err

    def test_errors(self, refused: Callable[..., str], tiny_checkpoint: Path, places: dict[str, Path]) -> None:
        command = ("embed", tiny_checkpoint)
        assert "no file or folder nowhere" in refused(*command, "nowhere")
        assert "--images or --texts are given; expected one" in refused(*command, places["folder"], "--texts", "a")
        assert "no suffix of vectors" in refused(*command, places["folder"], "--out", "v")
        too_long = refused(*command, "--texts", "red bar on black " * 9, "--no-truncate")
        assert "pass --truncate to cut it" in too_long
        for option, given in (("--batch-size", 0), ("--block-size", 0), ("--max-errors", -1)):
            assert f"{option} {given}" in refused(*command, places["folder"], option, given).replace(" is ", " ")
