"""An official `.ckpt` with the heads of several tasks serves each of them: used, converted, and trained further."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import bridgetower
from bridgetower.checkpoints import convert, read_checkpoint
from bridgetower.data.config import DataConfig
from bridgetower.files import write_json
from bridgetower.model.config import HeadsConfig
from bridgetower.tasks.entries import SnliVeConfig, VqaConfig
from bridgetower.tasks.run_config import RunConfig
from bridgetower.training.run import train
from bridgetower.training.setup import starting_checkpoint
from golden import case
from helpers.sets import ANSWERS, write_entry_set

WORDS = [
    "<s>",
    "<pad>",
    "</s>",
    "<unk>",
    "<mask>",
    "what",
    "colour",
    "is",
    "it",
    "red",
    "one",
    "of",
    "them",
]


@pytest.fixture(scope="module")
def bert_tokenizer(tmp_path_factory):
    bert_tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    bert_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    bert_tokenizer.add_special_tokens(WORDS[:5])
    bert_tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    folder = tmp_path_factory.mktemp("tokenizer")
    bert_tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def num_answers():
    return int(case("c_vqa").meta["config"]["vqav2_label_size"])


@pytest.fixture(scope="module")
def answer_names(tmp_path_factory):
    path = tmp_path_factory.mktemp("answers") / "answers.json"
    names = [*ANSWERS, *(f"answer {number}" for number in range(num_answers()))]
    path.write_text(json.dumps(names[: num_answers()]))
    return path


@pytest.fixture(scope="module")
def converted_task(bert_tokenizer, answer_names, tmp_path_factory):
    recorded = case("c_vqa")
    target = tmp_path_factory.mktemp("converted") / "model"
    files = {"tokenizer": bert_tokenizer, "answers": answer_names, "overrides": recorded.overrides}
    convert(read_checkpoint(recorded.path("checkpoint.ckpt"), **files), target, "bridgetower")
    return target


def test_the_file_itself_answers_and_judges(bert_tokenizer, answer_names):
    recorded = case("c_vqa")
    picture = Image.new("RGB", (32, 32), "red")
    files = {"tokenizer": bert_tokenizer, "answers": answer_names, "overrides": recorded.overrides}
    model = bridgetower.load(recorded.path("checkpoint.ckpt"), **files, device="cpu")
    assert len(model.answer(picture, "what colour is it", top=2 * num_answers())) == num_answers()
    labels = {choice.label for choice in model.entail(picture, "it is red")}
    assert labels == {"contradiction", "neutral", "entailment"}
    with pytest.raises(ValueError, match=r"this model has no nlvr2 head \(it has vqa, snli_ve\)"):
        model.reason(picture, picture, "one of them is red")


def test_each_task_goes_on_with_its_head(converted_task, tmp_path, caplog, answer_names):
    checkpoint = read_checkpoint(converted_task)
    runs = {
        "vqa_head": (VqaConfig(), HeadsConfig(mlm=False, itm=False, vqa=num_answers()), "vqa"),
        "snli_ve_head": (
            SnliVeConfig(),
            HeadsConfig(mlm=False, itm=False, snli_ve=True),
            "snli-ve",
        ),
    }
    for head, (task, heads, kind) in runs.items():
        folder = write_entry_set(tmp_path / kind, kind)
        if kind == "vqa":
            write_json(folder / "answers.json", list(json.loads(answer_names.read_text())))
        config = RunConfig(
            task=task,
            select_by=task.metrics[0],
            model=replace(checkpoint.config, heads=heads),
            init=str(converted_task),
            data=DataConfig(folders=(str(folder),), max_length=checkpoint.config.text.max_length),
            batch_size=4,
            max_steps=1,
        )
        caplog.clear()
        with caplog.at_level(logging.INFO):
            start = starting_checkpoint(config)
        other = "snli_ve" if head == "vqa_head" else "vqa"
        assert f"heads that the run does not use are left behind: {other}" in caplog.text
        assert "start anew" not in caplog.text
        head_names = {name for name in start.tensors if name.split(".")[0].endswith("_head")}
        assert head_names == {name for name in checkpoint.tensors if name.startswith(f"{head}.")}
        assert all(
            torch.equal(start.tensors[name], checkpoint.tensors[name]) for name in head_names
        )
        assert config.select_by in train(config, tmp_path / f"run-{kind}", progress=False)
