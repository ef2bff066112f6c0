"""Every command of research/paper.sh, in its order, on miniatures of the original files and with narrow towers."""

import csv
import json
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from shell_commands import commands

from bridgetower import cli
from bridgetower.cli.options import custom_task
from bridgetower.tasks.table import RECIPES
from helpers.checkpoints import (
    make_official,
    save_timm_vit,
    save_transformers_text,
    save_transformers_vision,
)
from helpers.published_sets import (
    FREQUENT_ANSWERS,
    captioned_links,
    write_cifar10,
    write_cifar100,
    write_coco,
    write_flickr30k,
    write_glue,
    write_nlvr2,
    write_shards,
    write_snli_ve,
    write_visual_genome,
    write_vqav2,
)

ROOT = Path(__file__).parents[2]
custom_task(f"{ROOT}/examples/single_tower.py:RTE")
example: Any = sys.modules[f"{ROOT}/examples/single_tower.py"]
SCRIPT = ROOT / "research" / "paper.sh"
WRITERS = {
    "coco": write_coco,
    "vg": write_visual_genome,
    "sbu": lambda folder: write_shards(folder, captioned_links(8)),
    "cc3m": lambda folder: write_shards(folder, captioned_links(9)),
    "flickr30k": write_flickr30k,
    "vqav2": write_vqav2,
    "snli-ve": write_snli_ve,
    "nlvr2": write_nlvr2,
    "cifar": write_cifar100,
    "glue": write_glue,
}
SMALL = (
    "--image-size 32 --data.max-length 24 --data.num-workers 0 --precision fp32 --batch-size 6 --micro-batch-size 6 "
    "--evaluate-every 0"
)
NARROW = " ".join(
    f"--model.fusion.{name} 16" for name in ("hidden-size", "num-heads", "intermediate-size")
)


def made_small(command: list[str]) -> list[str]:
    """A command with the options that make its run small."""
    if command[0] != "train":
        return [*command, "--fold-size", "1"] if "--fold-size" in command else command
    length = ["--max-epochs", "None", "--max-steps", "1"]
    new = [] if "--init" in command else NARROW.split()
    return [*command, *SMALL.split(), *length, *new]


def kind_of(command: list[str]) -> tuple[str, ...]:
    """The same for commands that differ in the values of options alone, or are of a kind in test_single_tower.py."""
    if command[0] not in ("train", "evaluate") or "checkpoints/" in command[1]:
        return tuple(command)
    split = command[command.index("--split") + 1] if "--split" in command else ""
    name = command[1 + (command[0] == "evaluate")]
    name = "glue" if name in example.GLUE else name.rstrip("0123456789")
    return (
        command[0],
        name,
        split,
        *(argument for argument in command if argument.startswith("--")),
    )


def write_towers(folder: Path, tokenizer: bytes) -> None:
    """Towers of the published depths under the names that the script has."""
    folder.mkdir()
    for name, depth in (("base-patch16", 12), ("base-patch32", 12), ("large-patch14", 24)):
        save_transformers_vision(
            folder / f"clip-vit-{name}", "CLIPVisionModel", num_hidden_layers=depth
        )
    save_timm_vit(folder / "deit_base.pth", distilled=True, depth=12)
    save_timm_vit(folder / "vit_base.pth", depth=12)
    sizes = {"vocab_size": 310, "max_position_embeddings": 40}
    for name, depth in (("roberta-base", 12), ("roberta-large", 24)):
        save_transformers_text(
            folder / name, "RobertaForMaskedLM", num_hidden_layers=depth, **sizes
        )
        (folder / name / "tokenizer.json").write_bytes(tokenizer)
    save_transformers_text(
        folder / "bert-base-uncased", "BertForMaskedLM", num_hidden_layers=12, **sizes
    )
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"abcdefghijklmnopqrstuvwxyz",
        *map(str, range(279)),
    ]
    (folder / "bert-base-uncased" / "vocab.txt").write_text("\n".join(words))


def write_official(folder: Path) -> None:
    """Official checkpoints for each task. The text towers have the published width, whose heads are known."""
    sizes = {
        "text.hidden_size": 768,
        "text.num_heads": 12,
        "text.vocab_size": 310,
        "text.max_positions": 40,
    }
    for name, heads in {
        "pt_base": {},
        "ftfpt_base_vqav2": {"vqa": 3},
        "ftfpt_base_snlive": {"snli_ve": True},
        "ftfpt_base_nlvr2": {"nlvr2": True},
        "ftfpt_base_irtr_itm_itc_f30k": {"itc": "tower"},
        "ftfpt_base_irtr_itm_itc_coco": {"itc": "tower"},
    }.items():
        types = {"fusion.num_token_types": 3} if "nlvr2" in heads else {}
        values = {**sizes, **types, **{f"heads.{head}": value for head, value in heads.items()}}
        make_official(values).save(folder / f"BridgeTower_{name}.ckpt")


@pytest.fixture(scope="module")
def originals_folder(tmp_path_factory, tiny_checkpoint):
    """A folder with the original files, the towers and the official checkpoints, as the script has them."""
    for package in ("timm", "transformers"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("reproduce")
    for name, write in WRITERS.items():
        write(folder / "originals" / name)
    write_cifar10(folder / "originals" / "cifar")
    (folder / "examples").symlink_to(ROOT / "examples")
    write_towers(folder / "towers", (tiny_checkpoint / "tokenizer.json").read_bytes())
    write_official(folder / "checkpoints")
    return folder


@pytest.fixture(scope="module")
def reports(originals_folder):
    """What each command prints, by what it writes."""
    reports: dict[str, dict[str, Any]] = {}
    ran = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(originals_folder)
        for command in commands(SCRIPT):
            is_new = kind_of(command) not in ran
            ran.add(kind_of(command))
            if command[0] == "examples/single_tower.py":
                example.main(command[1:])
                continue
            with pytest.MonkeyPatch.context() as unless_new, redirect_stdout(StringIO()) as printed:
                if not is_new:
                    unless_new.setattr("bridgetower.training.run.train", lambda *_, **__: {})
                if is_new or command[0] == "train":
                    cli.main(made_small(command))
            if is_new:
                path = command[command.index("--out") + 1] if "--out" in command else command[2]
                reports[path] = json.loads(printed.getvalue())
        yield reports


@pytest.mark.slow
def test_runs_and_reports_are_of_what_was_asked_for(reports, originals_folder):
    expected = {
        command[command.index("--out") + 1]: command
        for command in commands(SCRIPT)
        if "--out" in command
    }
    for path, report in reports.items():
        if path.startswith("runs/"):
            assert (
                json.loads((originals_folder / path / "run.json").read_text())["recipe"]
                == expected[path][1]
            )
        elif path.startswith("found/"):
            assert json.loads((originals_folder / path / "metrics.json").read_text()) == report
            assert report["benchmark"] == expected[path][2]
    trained = {
        json.loads(path.read_text())["recipe"] for path in originals_folder.glob("runs/*/run.json")
    }
    parsed = {command[1] for command in expected.values() if command[0] == "train"} - trained
    assert parsed == {"cifar100", *example.GLUE} - {"cola"}


@pytest.mark.slow
def test_an_evaluation_gives_the_figures_of_the_training(reports):
    figures = {
        "snli-ve": ("snli-ve-validation", "accuracy"),
        "nlvr2": ("nlvr2-validation", "accuracy"),
    }
    figures["cola"] = ("cola", example.GLUE["cola"].metrics[0])
    for run, (report, figure) in figures.items():
        assert reports[f"found/{report}"][figure] == pytest.approx(
            reports[f"runs/{run}"][figure]
        ), run


@pytest.mark.slow
def test_submissions(reports, originals_folder):
    answers = json.loads(
        (originals_folder / "found" / "vqav2-base" / "submission.json").read_text()
    )
    assert (
        len(answers)
        == len({row["question_id"] for row in answers})
        == reports["found/vqav2-base"]["num_questions"]
    )
    assert {row["answer"] for row in answers} <= set(FREQUENT_ANSWERS)
    with (originals_folder / "found" / "nlvr2-test1" / "submission.csv").open() as file:
        judged = list(csv.reader(file))
    assert [name for name, _ in judged] == [
        f"test1-{n}-0-{sentence}" for n in (0, 10, 20) for sentence in (0, 1)
    ]
    assert {label for _, label in judged} <= {"True", "False"}


def test_every_recipe_of_the_paper_is_in_the_script():
    recipes = {command[1] for command in commands(SCRIPT) if command[0] == "train"}
    ours = {name for name, recipe in RECIPES.items() if recipe.source.startswith("this project")}
    later = {"pretrain-base-itc", "contrastive-large"}  # work of the authors after the paper
    assert set(RECIPES) - ours - recipes == later
