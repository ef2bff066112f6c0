"""Every benchmark starts and computes the right numbers. `make nightly` runs them at their smallest sizes."""

import importlib
import json
import math
import re
import runpy
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from bridgetower.data.batches.captions import CaptionImages
from bridgetower.data.config import DataConfig
from bridgetower.files import read_json
from bridgetower.inference.predictor import load
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.hidden_states import hidden_states
from bridgetower.model.layers import on_meta
from bridgetower.model.presets import LARGE, NANO, meter
from bridgetower_demo.costs import flops_by_part, parameters_by_part
from bridgetower_demo.recipes import RECIPES
from helpers.shapes import write_shape_pictures

ROOT = Path(__file__).parents[2]
FOLDERS = [ROOT / "benchmarks", ROOT / "research", ROOT / "tests/stress"]
SCRIPTS = {
    path.name: path
    for folder in FOLDERS
    for path in sorted(folder.glob("*.py"))
    if "ArgumentParser" in path.read_text()
}
HELP = """
import os, runpy, sys
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    sys.path[0] = os.path.dirname(script)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        assert not ended.code
"""


@pytest.fixture
def benchmark(monkeypatch):
    for folder in FOLDERS:
        monkeypatch.syspath_prepend(folder)
    return importlib.import_module


@pytest.fixture
def run_script(forked):
    def call(name, *arguments, **options):
        given_options = [
            f"--{option.replace('_', '-')}={value}" for option, value in options.items()
        ]
        command = [forked / "python", SCRIPTS[name], *map(str, arguments), *given_options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    return call


def test_each_says_what_it_takes(forked):
    for package in ("av", "schemathesis", "transformers"):
        pytest.importorskip(package)
    command = [forked / "python", "-c", HELP, *SCRIPTS.values()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("show this help message") == len(SCRIPTS) > 15


class Sums:
    """Sums of attention over positions, by loops, of one layer with two heads."""

    def __init__(self):
        self.entropy = [0.0, 0.0]
        self.distance = [0.0, 0.0]
        self.divergence = 0.0
        self.positions = self.measured = 0

    def add(self, weights, positions, prefix):
        """Adds the weights of one pair [heads, queries, keys]. Places are those of keys after a prefix."""
        for query in range(weights.shape[1]):
            rows = weights[:, query].double()
            self.positions += 1
            self.entropy = [
                total - float((row * row.log()).sum())
                for total, row in zip(self.entropy, rows, strict=True)
            ]
            self.divergence += float(((rows[0] - rows[1]) * (rows[0] / rows[1]).log()).sum()) / 2
            if positions is not None and query >= prefix:
                self.measured += 1
                far = [math.dist(positions[query - prefix], position) for position in positions]
                for head, row in enumerate(rows):
                    shares = (row[prefix:] / row[prefix:].sum()).tolist()
                    self.distance[head] += sum(
                        share * value for share, value in zip(shares, far, strict=True)
                    )


def test_attention_is_a_mean_over_pairs_and_positions(benchmark, tiny_checkpoint, tiny_dataset):
    predictor = load(tiny_checkpoint, device="cpu")
    images = CaptionImages(DataConfig(folders=(str(tiny_dataset),)), "test", predictor.processor)
    model = predictor.model
    size = predictor.model.config.vision.patch_size
    side = range(model.config.vision.image_size // size)
    grid = [(float(size * row), float(size * column)) for row in side for column in side]
    sums = {kind: Sums() for kind in ("image self", "text self", "image to text", "text to image")}
    for image in range(len(images)):
        texts = images.processor.texts([images.captions([image])[0][0]], truncate=True)
        pixels = images.pixel_values([image])
        assert isinstance(pixels, torch.Tensor)
        with torch.no_grad():
            states = hidden_states(
                model, pixels, texts.input_ids, layers={"fusion": [2]}, attentions=True
            ).attentions
        line = [(float(token),) for token in range(texts.input_ids.shape[1])]
        for kind, sum_ in sums.items():
            sum_.add(
                states[kind][2][0],
                {"image self": grid, "text self": line}.get(kind),
                kind == "image self",
            )  # type: ignore[index]
    for batch_size in (1, 4):
        statistics = benchmark("attention").attention_statistics(
            model, images, batch_size=batch_size
        )
        for kind, total in sums.items():
            layer = statistics[kind][1]
            assert layer.entropy == pytest.approx(
                [value / total.positions for value in total.entropy], rel=1e-4
            )
            assert layer.divergence == pytest.approx(
                total.divergence / total.positions, rel=1e-3, abs=1e-7
            )
            distance = (
                [value / total.measured for value in total.distance] if total.measured else None
            )
            assert layer.distance == (
                distance if distance is None else pytest.approx(distance, rel=1e-4)
            )


@pytest.mark.parametrize("processes", [1, 8])
def test_the_memory_of_a_training(benchmark, processes):
    with on_meta():
        model = BridgeTower(LARGE)
    total = 4 * sum(weight.numel() for weight in model.parameters())
    memory = benchmark("costs").memory_plan(model, processes)
    assert memory["ddp"] == {"weights": total, "gradients": total, "optimiser": 2 * total}
    assert memory["fsdp"]["weights"] == pytest.approx(total / processes, rel=0.01)
    whole = memory["fsdp"]["whole"]
    assert whole == 0 if processes == 1 else total / 10 < whole < total / 2


def test_bridges_are_measured_with_the_recipe_of_the_demo(benchmark):
    model = benchmark("bridges").model
    assert model(6) == RECIPES["scenes-vqa-deep"].model != model(4)


def test_tables_of_the_page_are_made_of_what_was_measured():
    filled = runpy.run_path(str(ROOT / "docs/tables.py"))["filled"]
    page = (ROOT / "docs/benchmarks.md").read_text()
    assert filled(page) == page
    changed = re.sub(r"\d\.\d\d \(\d\S+/\S+\)", "1.00 (1/1)", page, count=1)
    assert filled(changed) == page != changed


@pytest.mark.nightly
class TestSmallest:
    def test_attention(self, run_script, tiny_checkpoint, tiny_dataset, tmp_path):
        run_script(
            "attention.py",
            f"one={tiny_checkpoint}",
            tiny_checkpoint,
            data=tiny_dataset,
            count=999,
            out=tmp_path,
        )
        report = read_json(tmp_path / "attention.json")
        assert (report["count"], len(report["models"])) == (9, 2)
        assert report["models"]["one"] == report["models"][str(tiny_checkpoint)]
        assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")

    def test_explained(self, run_script, tiny_checkpoint, tmp_path):
        source = write_shape_pictures(tmp_path)
        rows = [
            json.loads(line)
            for line in run_script("explained.py", tiny_checkpoint, source, count=3).splitlines()
        ]
        assert {row["covered"] for row in rows} == {0.1, 0.25, 0.5}
        assert [len(rows), len({row["order"] for row in rows})] == [12, 4]

    def test_opea(self, run_script):
        rows = [
            json.loads(line)
            for line in run_script("opea.py", "--quick", seconds=2, clients=2).splitlines()
        ]
        assert [row["kind"] for row in rows] == ["texts", "pairs", "mixed"]
        assert max(row["largest_difference"] for row in rows) < 1e-4
        assert min(row["theirs_per_second"] for row in rows) > 0

    def test_costs(self, run_script):
        costs = json.loads(
            run_script("costs.py", "--json", preset="nano", text_length=9, repeats=1)
        )["costs"]
        for name, config in (("bridgetower", NANO), ("meter", meter(NANO))):
            network = BridgeTower(config).eval()
            assert costs[name]["parameters"] == parameters_by_part(network)
            assert costs[name]["flops"] == flops_by_part(network, 9)
            assert costs[name]["milliseconds"].keys() == costs[name]["flops"].keys()

    def test_scenes(self, run_script, tmp_path):
        sizes = {
            "steps": 2,
            "batch_size": 4,
            "num_train": 32,
            "num_validation": 4,
            "num_test": 8,
            "seeds": 1,
        }
        printed = run_script("scenes.py", "nlvr2", out=tmp_path, **sizes)
        arms = read_json(tmp_path / "results.json")["arms"]
        assert set(arms) == {"BridgeTower", "METER", "METER with LayerNorms"}
        for arm in arms.values():
            assert set(arm["test"]) == {"both", "one", "more", "sum", "overall"}
            assert arm["test"]["overall"]["number"] == 8
            assert list(arm["curve"]) == ["1", "2"]
        assert printed.count("\n| ") == 5  # a line for each topic

    def test_bridges_keep_finished_runs(self, run_script, tmp_path):
        """The arms that two experiments share are trained once. The second call trains nothing."""
        results = tmp_path / "bridges.json"
        work = tmp_path / "work"
        sizes = {
            "steps": 2,
            "every": 1,
            "batch_size": 4,
            "num_train": 32,
            "num_validation": 4,
            "seeds": 1,
        }
        first = run_script("bridges.py", "depth-2", work=work, results=results, **sizes)
        assert [list(run["curve"]) for run in read_json(results).values()] == 3 * [["1", "2"]]
        (work / "data").rename(work / "gone")
        assert run_script("bridges.py", "depth-2", work=work, results=results, **sizes) == first
        assert Image.open(work / "depth-2" / "curves.png").width > 500

    def test_faults(self, run_script, tmp_path):
        printed = run_script(
            "faults.py",
            "--jobs",
            "prepare",
            "train",
            kills=4,
            images=60,
            out=tmp_path / "faults.json",
        )
        report = read_json(tmp_path / "faults.json")
        for row in report["kills"]:
            assert (row["kills"], row["resumed"], row["beyond"], row["errors"]) == (2, 2, 0, [])
            assert row["equal"] == row["ends"] > 0
        assert len(report["faults"]) == 6
        for row in report["faults"]:
            expected = (
                ("done and refused", "done and done")
                if row["fault"] == "two writers"
                else ("refused",)
            )
            assert row["seen"].startswith("not run") or (row["seen"] in expected and row["equal"])
        assert printed.count("\n| ") == 2 + 3 + 1 + 6

    def test_gpu_without_one(self, run_script, tmp_path):
        run_script(
            "gpu.py",
            "--tiny",
            device="cpu",
            pairs=4,
            repeats=1,
            workers=1,
            images=20,
            json=tmp_path / "rows.json",
        )
        rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
        assert len(rows) == 4 + 2 + 2 + 1 + 2
        assert all(row["pairs_per_second"] > 0 for row in rows)
        assert all(0 < row["waiting"] < 1 for row in rows[-2:])

    def test_abuse_of_a_server(self, run_script, tmp_path):
        # on any machine
        options = {
            "minutes": 0.1,
            "growth": 2,
            "rounds": 1,
            "beside": 0.05,
            "delay": "inf",
        }
        run_script("serving_abuse.py", **options, json=tmp_path / "abuse.json")
        report = read_json(tmp_path / "abuse.json")
        assert report["problems"] == []
        assert report["valid_answered"] > 20
        kinds = {key.rpartition(" ")[0] for key in report["statuses"]}
        assert kinds >= {
            "valid",
            "malformed",
            "broken_json",
            "no_http",
            "oversized",
            "abandoned",
            "visit",
            "made_up",
        }

    def test_serving(self, run_script, tmp_path):
        run_script(
            "serving.py",
            kinds="texts",
            clients=8,
            seconds=0.5,
            rounds=1,
            json=tmp_path / "rows.json",
        )
        rows = json.loads((tmp_path / "rows.json").read_text())
        assert [row["way"] for row in rows] == ["one at a time", "--max-batch 1", "batches"]
        assert all(0 < row["p50_ms"] <= row["p99_ms"] for row in rows)

    def test_side_by_side(self, run_script, tmp_path):
        """All engines are measured but those that need an export, which have tests of their own."""
        measures = (
            "forward-fp32",
            "forward-bf16",
            "batch-fp32",
            "rerank",
            "retrieval",
            "step",
            "step-itc",
            "nano",
        )
        files = {
            "json": tmp_path / "rows.json",
            "plot": tmp_path / "growth.png",
            "cache": tmp_path / "cache",
        }
        run_script(
            "run.py", "--quick", "--only", *measures, "startup", "memory", **files, threads=1
        )
        assert files["plot"].read_bytes().startswith(b"\x89PNG")
        rows = json.loads(files["json"].read_text())
        exact = [
            ("itm forward, fp32",),
            ("rerank",),
            ("nothing shared",),
            ("training step", "fp32"),
        ]
        limits = {**dict.fromkeys(exact, 1e-5), ("bf16, batch",): 0.02, ("nano",): 0.02}
        for words, limit in limits.items():
            differences = [
                row["max_diff"] for row in rows if all(word in row["name"] for word in words)
            ]
            assert differences
            assert max(differences) < limit, words
        for row in rows:
            assert row["ours_s"] > 0
            if row["peer_s"] is not None:
                assert row["ratio"] == pytest.approx(row["peer_s"] / row["ours_s"])
            assert row["reached"] == (
                None if row["target"] is None else row["ratio"] >= row["target"]
            )
        assert {"load", "first vector of a text", "serve, until it is ready"} <= {
            row["name"] for row in rows
        }

    def test_decoding(self, run_script, tiny_checkpoint):
        printed = run_script(
            "decoding.py",
            images=1,
            decoded=4,
            repeats=1,
            workers=0,
            prepared=40,
            model=tiny_checkpoint,
        )
        rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
        assert [
            row["largest_off"] for row in rows if row.get("way") in ("in full", "torchvision")
        ] == 4 * [0]
        assert all(
            row["read_per_byte"] == pytest.approx(1, abs=0.1)
            for row in rows
            if "read_per_byte" in row
        )
        assert [row["cosine"] for row in rows if "cosine" in row] > [0.99]

    def test_videos(self, run_script):
        rows = [
            json.loads(line)
            for line in run_script("videos.py", "--quick", minutes=0.2).splitlines()
        ]
        # of 12 seconds: subtitles of 4, scenes of 10
        assert [row["moments"] for row in rows] == [
            3,
            2,
            2,
        ]
        assert all(row["peak_mib"] > row["loaded_mib"] for row in rows)

    def test_memory(self, run_script):
        printed = run_script("memory.py", models="nano", images=9, batches=64)
        rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
        assert [row["benchmark"] for row in rows] == [
            "load",
            "retrieval",
            "retrieval",
            *3 * ["step"],
        ]
        assert all(row["mib"] > 0 for row in rows)
