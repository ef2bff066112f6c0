"""Every fine-tuning task by the commands: a prepared set, two steps of its recipe, an evaluation, a submission."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import miniature
import miniature_arrow
import originals
from bridgetower import cli
from bridgetower.data.prepared_set import read_info
from bridgetower.data.single_tower import GLUE
from bridgetower.tasks.single_tower import GLUE_METRICS
from bridgetower.tasks.table import RECIPES as ALL_RECIPES

SMALL = ("--image-size", 20, "--data.max-length", 24, "--data.num-workers", 0, "--precision", "fp32")
STEPS = ("--batch-size", 6, "--micro-batch-size", 3, "--max-epochs", 1, "--log-every", 1, "--evaluate-every", 0)
FEW = ("--max-epochs", "None", "--max-steps", 2)
FEWEST = ("--batch-size", 2, "--micro-batch-size", 1)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """VQAv2, VG-QA, SNLI-VE and NLVR2, prepared from miniatures of their original files."""
    folder = tmp_path_factory.mktemp("published")
    writers = {
        "vqav2": miniature.write_vqav2,
        "vgqa": miniature.write_visual_genome,
        "snli-ve": miniature.write_snli_ve,
        "nlvr2": miniature.write_nlvr2,
    }
    for name, write in writers.items():
        write(folder / "originals" / name)
    miniature.write_coco(folder / "originals" / "vgqa")
    splits = {"nlvr2": ("--splits", "train", "validation", "test1", "test2")}
    splits["vgqa"] = ("--answers", str(folder / "vqav2"))
    for name in writers:
        source = ("--source", str(folder / "originals" / name))
        cli.main(["prepare", name, *source, "--out", str(folder / name), *splits.get(name, ())])
    return {name: folder / name for name in writers}


@pytest.fixture(scope="module")
def original_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    originals.write_cifar10(folder)
    originals.write_cifar100(folder)
    return originals.write_glue(folder)


class Work:
    """What the commands make of a recipe: a trained model, and what evaluations of it print and leave."""

    def __init__(self, run: Callable[..., list[Any]], checkpoint: Path, folder: Path) -> None:
        self.run, self.checkpoint, self.folder = run, checkpoint, folder

    def train(self, recipe: str, data: Path, *options: object) -> dict[str, Any]:
        train = ["train", recipe, "--init", self.checkpoint, "--data.folders", data, "--out", self.folder / "run"]
        (metrics,) = self.run(*train, *SMALL, *STEPS, *options)
        lines = [json.loads(line) for line in (self.folder / "run" / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if line["kind"] == "train"][:2] == [1, 2]
        return metrics

    def evaluate(self, benchmark: str, data: Path, split: str, *options: object) -> tuple[dict[str, Any], list[str]]:
        """The report, and the names of the files beside `metrics.json`."""
        out = self.folder / f"{split}{len(options)}"
        command = ["evaluate", self.folder / "run" / "last", benchmark, "--data", data, "--split", split, "--out", out]
        (report,) = self.run(*command, *options)
        assert json.loads((out / "metrics.json").read_text()) == report
        assert (report["benchmark"], report["split"]) == (benchmark, split)
        return report, sorted(path.name for path in out.iterdir() if path.name != "metrics.json")

    def lines(self, split: str, file: str) -> list[str]:
        return (self.folder / f"{split}0" / file).read_text().splitlines()


@pytest.fixture
def work(run: Callable[..., list[Any]], tiny_checkpoint: Path, tmp_path: Path, sets: dict[str, Path]) -> Work:
    return Work(run, tiny_checkpoint, tmp_path)


@pytest.mark.parametrize("recipe", ["vqav2-base", "vqav2-base-no-pretraining"])
def test_vqav2(work: Work, sets: dict[str, Path], recipe: str) -> None:
    trained = work.train(recipe, sets["vqav2"], "--model.heads.vqa", 3, "--data.train-only", sets["vgqa"])
    report, files = work.evaluate("vqav2", sets["vqav2"], "validation")
    assert report["vqa_score"] == pytest.approx(trained["vqa_score"])
    assert (report["num_questions"], report["protocol"]) == (20, "standard")
    paper, _ = work.evaluate("vqav2", sets["vqav2"], "validation", "--protocol", "paper")
    assert (paper["num_questions"], paper["protocol"]) == (15, "paper")
    assert paper["vqa_score"] == pytest.approx(report["vqa_score"] * 20 / 15, abs=1e-4)
    for split in ("test", "test-dev"):
        report, files = work.evaluate("vqav2", sets["vqav2"], split)
        assert files == ["predictions.jsonl", "submission.json"]
        assert "vqa_score" not in report
        rows = json.loads("".join(work.lines(split, "submission.json")))
        assert sorted(row["question_id"] for row in rows) == [1000 * n + place for n in (1, 2, 3) for place in range(4)]
        assert {row["answer"] for row in rows} <= set(miniature.ANSWERS)


def test_vqav2_as_in_the_paper(work: Work, sets: dict[str, Path]) -> None:
    splits = ("--data.train-splits", "train", "validation", "--task.protocol", "paper")
    trained = work.train("vqav2-base", sets["vqav2"], "--model.heads.vqa", 3, *splits)
    report, _ = work.evaluate("vqav2", sets["vqav2"], "validation", "--protocol", "paper")
    assert report["vqa_score"] == pytest.approx(trained["vqa_score"])


def test_snli_ve(work: Work, sets: dict[str, Path]) -> None:
    trained = work.train("snli-ve", sets["snli-ve"], "--batch-size", 4, "--micro-batch-size", 2)
    report, files = work.evaluate("snli-ve", sets["snli-ve"], "validation")
    assert report["accuracy"] == pytest.approx(trained["accuracy"])
    report, files = work.evaluate("snli-ve", sets["snli-ve"], "test")
    assert (report["num_statements"], files) == (10, ["predictions.jsonl"])


def test_nlvr2(work: Work, sets: dict[str, Path]) -> None:
    trained = work.train("nlvr2", sets["nlvr2"], "--batch-size", 3, "--micro-batch-size", 3)
    report, _ = work.evaluate("nlvr2", sets["nlvr2"], "validation")
    metrics = ("accuracy", "consistency")
    assert [report[name] for name in metrics] == pytest.approx([trained[name] for name in metrics])
    for split, has_labels in (("test1", True), ("test2", False)):
        report, files = work.evaluate("nlvr2", sets["nlvr2"], split)
        assert ("accuracy" in report) is has_labels
        assert files == ["predictions.jsonl", "submission.csv"]
        rows = [line.split(",") for line in work.lines(split, "submission.csv")]
        assert [name for name, _ in rows] == [f"{split}-{n}-0-{sentence}" for n in (0, 10, 20) for sentence in (0, 1)]
        assert {label for _, label in rows} <= {"True", "False"}


@pytest.mark.parametrize(
    ("recipe", "stage"),
    [
        ("retrieval-flickr30k", "two_stage"),
        ("retrieval-coco", "two_stage"),
        ("retrieval-flickr30k-ranking", "one_stage"),
    ],
)
def test_retrieval(
    run: Callable[..., list[Any]], tiny_checkpoint: Path, tmp_path: Path, recipe: str, stage: str
) -> None:
    name = "coco" if recipe == "retrieval-coco" else "flickr30k"
    {"coco": miniature.write_coco, "flickr30k": miniature.write_flickr30k}[name](tmp_path / "originals")
    run("prepare", name, "--source", tmp_path / "originals", "--out", tmp_path / "set")
    train = ["train", recipe, "--init", tiny_checkpoint, "--data.folders", tmp_path / "set", "--out", tmp_path / "run"]
    (trained,) = run(*train, *SMALL, *STEPS)
    evaluate = ["evaluate", tmp_path / "run" / "last", "retrieval", "--data", tmp_path / "set"]
    (report,) = run(*evaluate, "--split", "validation", "--candidates", ALL_RECIPES[recipe].evaluation.candidates)
    assert report["rsum"] == pytest.approx(trained["rsum"])
    (report,) = run(*evaluate, "--protocol", "paper", "--max-captions", 5, "--out", tmp_path / "test")
    assert report["rsum"] == report[f"{stage}_rsum"]
    assert json.loads((tmp_path / "test" / "metrics.json").read_text()) == report


@pytest.mark.parametrize(
    ("recipe", "benchmark", "figure", "submission"),
    [
        ("cifar10", "cifar10", "accuracy", None),
        ("cifar100", "cifar100", "accuracy", None),
        *((f"glue-{name}", name, metrics[0], f"{GLUE[name].folder}.tsv") for name, metrics in GLUE_METRICS.items()),
    ],
)
def test_single_towers(
    run: Callable[..., list[Any]],
    tiny_checkpoint: Path,
    original_sets: Path,
    tmp_path: Path,
    recipe: str,
    benchmark: str,
    figure: str,
    submission: str | None,
) -> None:
    train = ["train", recipe, "--init", tiny_checkpoint, "--data.folders", original_sets, "--out", tmp_path / "run"]
    (trained,) = run(*train, *SMALL, *STEPS)
    evaluate = ["evaluate", tmp_path / "run" / "last", benchmark, "--data", original_sets]
    (report,) = run(*evaluate, "--split", "validation", "--out", tmp_path / "validation")
    assert report[figure] == pytest.approx(trained[figure])
    run(*evaluate, "--split", "test", "--out", tmp_path / "test")
    files = {path.name for path in (tmp_path / "test").iterdir()}
    expected = submission if benchmark != "mnli" else "MNLI-m.tsv"
    assert files == {"metrics.json", "predictions.jsonl", *([expected] if expected else [])}


def pretrain(run: Callable[..., list[Any]], checkpoint: Path, data: Path, folder: Path) -> None:
    """Two steps on a set, and retrieval on a split that it has."""
    split = "validation" if "validation" in read_info(data).splits else "train"
    train = ["train", "pretrain-base", "--init", checkpoint, "--data.folders", data, "--out", folder / "run"]
    run(
        *train,
        *SMALL,
        *STEPS,
        *FEW,
        "--batch-size",
        2,
        "--micro-batch-size",
        2,
        "--data.captions",
        "one",
        "--data.validation-split",
        split,
    )
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2]
    evaluate = ["evaluate", folder / "run" / "last", "retrieval", "--data", data, "--split", split]
    (report,) = run(*evaluate, "--out", folder / "found")
    assert json.loads((folder / "found" / "metrics.json").read_text()) == report


@pytest.mark.parametrize("name", ["coco", "flickr30k", "vg"])
def test_pretraining(run: Callable[..., list[Any]], tiny_checkpoint: Path, tmp_path: Path, name: str) -> None:
    getattr(miniature, "write_visual_genome" if name == "vg" else f"write_{name}")(tmp_path / "originals")
    run("prepare", name, "--source", tmp_path / "originals", "--out", tmp_path / "set")
    pretrain(run, tiny_checkpoint, tmp_path / "set", tmp_path)


@pytest.fixture(scope="module")
def arrow_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every set that the official code reads from Arrow files, prepared from them."""
    folder = tmp_path_factory.mktemp("arrow")
    for name in ("coco", "flickr30k", "cc3m", "sbu", "vg", "vqav2", "vgqa", "snli_ve", "nlvr2"):
        getattr(miniature_arrow, f"write_{name}_arrow")(folder / "arrows")
    cli.main(["prepare", "arrow", "--source", str(folder / "arrows"), "--out", str(folder / "sets")])
    return folder / "sets"


class TestArrow:
    @pytest.mark.parametrize("name", ["coco", "flickr30k", "cc3m", "sbu", "vg"])
    def test_captions(
        self, run: Callable[..., list[Any]], tiny_checkpoint: Path, arrow_sets: Path, tmp_path: Path, name: str
    ) -> None:
        pretrain(run, tiny_checkpoint, arrow_sets / name, tmp_path)

    def test_vqav2(self, work: Work, arrow_sets: Path) -> None:
        further = ("--data.train-only", arrow_sets / "vgqa", arrow_sets / "vgqa-coco", "--model.heads.vqa", 4)
        work.train("vqav2-base", arrow_sets / "vqav2", *further, *FEW, *FEWEST)
        work.evaluate("vqav2", arrow_sets / "vqav2", "validation")
        _, files = work.evaluate("vqav2", arrow_sets / "vqav2", "test")
        assert files == ["predictions.jsonl", "submission.json"]

    @pytest.mark.parametrize(("name", "test"), [("snli-ve", "test"), ("nlvr2", "test1")])
    def test_statements(self, work: Work, arrow_sets: Path, name: str, test: str) -> None:
        work.train(name, arrow_sets / name, *FEW, *FEWEST)
        for split in ("validation", test):
            report, _ = work.evaluate(name, arrow_sets / name, split)
            assert 0 <= report["accuracy"] <= 1
