"""Every command of docs/reproduce.md, in its order, on miniatures of the original files and with narrow towers.

The shell expands the loops of the page. Options that make a run small are appended; the last one of a name counts. What
several processes share out is tested in tests/distributed: here each command runs in this one.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import miniature
import official
import originals
from bridgetower.tasks.table import RECIPES
from pages import commands
from published import timm_vit, transformers_text, transformers_vision

PAGE = Path(__file__).parents[2] / "docs" / "reproduce.md"
WRITERS = {
    "coco": miniature.write_coco,
    "vg": miniature.write_visual_genome,
    "sbu": lambda folder: miniature.write_shards(folder, miniature.links(8)),
    "cc3m": lambda folder: miniature.write_shards(folder, miniature.links(9)),
    "flickr30k": miniature.write_flickr30k,
    "vqav2": miniature.write_vqav2,
    "snli-ve": miniature.write_snli_ve,
    "nlvr2": miniature.write_nlvr2,
    "cifar": originals.write_cifar100,
    "glue": originals.write_glue,
}
SMALL = (
    "--image-size 32 --data.max-length 24 --data.num-workers 0 --precision fp32 --batch-size 6 --micro-batch-size 6 "
    "--evaluate-every 0"
)
NARROW = " ".join(f"--model.fusion.{name} 16" for name in ("hidden-size", "num-heads", "intermediate-size"))


def made_small(command: list[str]) -> list[str]:
    """A command with the options that make its run small."""
    if command[0] != "train":
        return [*command, "--fold-size", "1"] if "--fold-size" in command else command
    recipe = RECIPES[command[1]]
    length = ["--max-epochs", "None", "--max-steps", "1"]
    answers = ["--model.heads.vqa", "3"] if recipe.model.heads.vqa else []
    new = [] if "--init" in command else NARROW.split()
    return [*command, *SMALL.split(), *length, *answers, *new]


def once_per_sweep(page: list[list[str]]) -> list[list[str]]:
    """Of the commands that differ in the number of fusion layers only the last, which has the most."""
    return list({re.sub(r"layers[ -]\d+", "", " ".join(command)): command for command in page}.values())


def write_towers(folder: Path, tokenizer: bytes) -> None:
    """Towers of the published depths under the names that the page has."""
    folder.mkdir()
    for name, depth in (("base-patch16", 12), ("base-patch32", 12), ("large-patch14", 24)):
        transformers_vision(folder / f"clip-vit-{name}", "CLIPVisionModel", num_hidden_layers=depth)
    timm_vit(folder / "deit_base.pth", distilled=True, depth=12)
    timm_vit(folder / "vit_base.pth", depth=12)
    sizes = {"vocab_size": 310, "max_position_embeddings": 40}
    for name, depth in (("roberta-base", 12), ("roberta-large", 24)):
        transformers_text(folder / name, "RobertaForMaskedLM", num_hidden_layers=depth, **sizes)
        (folder / name / "tokenizer.json").write_bytes(tokenizer)
    transformers_text(folder / "bert-base-uncased", "BertForMaskedLM", num_hidden_layers=12, **sizes)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", *map(str, range(279))]
    (folder / "bert-base-uncased" / "vocab.txt").write_text("\n".join(words))


def write_official(folder: Path) -> None:
    """Official checkpoints for each task; the text towers have the published width, whose heads are known."""
    sizes = {"text.hidden_size": 768, "text.num_heads": 12, "text.vocab_size": 310, "text.max_positions": 40}
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
        official.make(values).save(folder / f"BridgeTower_{name}.ckpt")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """A folder with the original files, the towers and the official checkpoints, as the page has them."""
    for package in ("timm", "transformers"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("reproduce")
    for name, write in WRITERS.items():
        write(folder / "originals" / name)
    originals.write_cifar10(folder / "originals" / "cifar")
    write_towers(folder / "towers", (tiny_checkpoint / "tokenizer.json").read_bytes())
    write_official(folder / "checkpoints")
    return folder


@pytest.mark.slow
def test_every_command(run: Callable[..., list[Any]], workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    for command in once_per_sweep(commands(PAGE)):
        printed = run(*made_small(command))
        if command[0] == "train":
            assert json.loads((workplace / printed[0]["run"] / "run.json").read_text())["recipe"] == command[1]
        elif command[0] == "evaluate":
            found = workplace / command[command.index("--out") + 1]
            assert json.loads((found / "metrics.json").read_text())["benchmark"] == command[2]
    assert (workplace / "found" / "vqav2-base" / "submission.json").exists()


def test_every_recipe_of_the_paper_is_on_the_page() -> None:
    named = {command[1] for command in commands(PAGE) if command[0] == "train"}
    ours = {name for name, recipe in RECIPES.items() if recipe.source.startswith("this project")}
    later = {"pretrain-base-itc", "contrastive-large"}  # work of the authors after the paper
    assert set(RECIPES) - ours - named == later
