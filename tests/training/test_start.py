"""The checkpoint that a run starts from: its heads, its number format, and settings that it would ignore."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import shapes
from bridgetower.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from bridgetower.model.config import HeadsConfig
from bridgetower.processor import Processor, ProcessorConfig
from bridgetower.tasks.run_config import RunConfig
from bridgetower.tasks.table import RECIPES
from bridgetower.training.start import starting_checkpoint

ITC = HeadsConfig(mlm=False, itm=True, itc="tower", itc_size=8)


@pytest.fixture(scope="module")
def there(tiny_checkpoint: Path) -> Checkpoint:
    """What the runs start from: all heads."""
    return read_checkpoint(tiny_checkpoint)


@pytest.fixture
def config(tiny_dataset: Path, tiny_checkpoint: Path) -> RunConfig:
    return shapes.run_config(tiny_dataset, init=str(tiny_checkpoint))


def without_itc(there: Checkpoint, folder: Path) -> str:
    """Writes the checkpoint as one with MLM and ITM heads only, as the published pre-training checkpoints are."""
    tensors = {name: tensor for name, tensor in there.tensors.items() if not name.startswith("itc_head.")}
    model = there.config.override({"heads.itc": None, "heads.mlm_layer_norm_eps": 1e-5})
    write_checkpoint(replace(there, config=model, tensors=tensors), folder)
    return str(folder)


def with_heads(config: RunConfig, heads: HeadsConfig, **changes: Any) -> RunConfig:
    fusion = replace(config.model.fusion, num_token_types=3 if heads.nlvr2 else 2)
    return replace(config, model=replace(config.model, heads=heads, fusion=fusion), **changes)


class TestHeads:
    def test_missing_ones_start_anew_and_unused_ones_are_left_behind(
        self, config: RunConfig, there: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        init = without_itc(there, tmp_path / "init")
        with caplog.at_level(logging.INFO):
            start = starting_checkpoint(with_heads(config, ITC, init=init))
        assert start.config.heads == ITC
        start.model()  # exactly the parameters of the config
        for name, tensor in start.tensors.items():
            if not name.startswith("itc_head."):
                assert torch.equal(tensor, there.tensors[name])
        assert "lacks heads that the run needs; they start anew: itc" in caplog.text
        assert "heads that the run does not use are left behind: mlm" in caplog.text
        kept = starting_checkpoint(replace(config, init=init))
        assert kept.config.heads.mlm_layer_norm_eps == 1e-5
        assert torch.equal(kept.tensors["mlm_head.dense.weight"], there.tensors["mlm_head.dense.weight"])

    def test_new_ones_are_decided_by_the_seed(self, config: RunConfig, there: Checkpoint, tmp_path: Path) -> None:
        changed = with_heads(config, ITC, init=without_itc(there, tmp_path / "init"))
        first, again, other = (starting_checkpoint(replace(changed, seed=seed)).tensors for seed in (0, 0, 1))
        weight = "itc_head.image.weight"
        assert torch.equal(first[weight], again[weight])
        assert not torch.equal(first[weight], other[weight])
        assert float(first[weight].std()) == pytest.approx(0.02 * (768 / 8) ** 0.5, rel=0.5)
        assert float(first["itc_head.temperature"]) == pytest.approx(0.07)

    def test_a_contrastive_head_keeps_its_kind_where_the_run_has_that_of_its_recipe(
        self, config: RunConfig, there: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        fused = HeadsConfig(mlm=True, itm=True, itc="fused", itc_size=6)
        first = starting_checkpoint(with_heads(config, fused))
        first.model()
        assert first.tensors["itc_head.pooled.weight"].shape[0] == 6
        assert "they start anew: itc" in caplog.text  # of another kind than that of the checkpoint
        write_checkpoint(first, tmp_path / "fused")
        recipe = replace(RECIPES["retrieval-coco"], init=str(tmp_path / "fused"), data=config.data, image_size=None)
        caplog.clear()
        start = starting_checkpoint(recipe)
        assert start.config.heads == replace(fused, mlm=False)
        for name, tensor in start.tensors.items():
            assert torch.equal(tensor, first.tensors[name])
        start.model()
        assert "anew" not in caplog.text
        # The other way round: the recipe for fused heads keeps that of towers, with what it reads.
        pooled = there.config.override({"heads.text_pooling": "mean"})
        write_checkpoint(replace(there, config=pooled), tmp_path / "tower")
        large = replace(RECIPES["contrastive-large"], init=str(tmp_path / "tower"), data=config.data)
        start = starting_checkpoint(large)
        assert (start.config.heads.itc, start.config.heads.text_pooling) == ("tower", "mean")
        assert torch.equal(start.tensors["itc_head.image.weight"], there.tensors["itc_head.image.weight"])

    @pytest.mark.parametrize("changes", [{"itc": "tower", "text_pooling": "mean"}, {"itc": "tower", "itc_size": 5}])
    def test_one_that_the_user_sets_starts_anew(
        self, config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any]
    ) -> None:
        fused = HeadsConfig(itc="fused", itc_size=6)
        write_checkpoint(starting_checkpoint(with_heads(config, fused)), tmp_path / "fused")
        recipe = replace(RECIPES["retrieval-coco"], init=str(tmp_path / "fused"), data=config.data, image_size=None)
        heads = replace(recipe.model.heads, **changes)
        start = starting_checkpoint(replace(recipe, model=replace(recipe.model, heads=heads)))
        assert start.config.heads.itc == "tower"
        assert "they start anew: itc" in caplog.text

    def test_all_heads_of_the_checkpoint_are_kept(
        self, config: RunConfig, there: Checkpoint, caplog: pytest.LogCaptureFixture
    ) -> None:
        recipe = RECIPES["pretrain-nano"]  # whose default architecture is not what the user set
        for run in (config, replace(config, recipe=recipe.recipe, model=recipe.model)):
            start = starting_checkpoint(run)
            assert start.config == there.config
            assert all(torch.equal(tensor, there.tensors[name]) for name, tensor in start.tensors.items())
        assert "heads" not in caplog.text


class TestDownstreamHeads:
    NLVR2 = HeadsConfig(mlm=False, itm=False, nlvr2=True, hidden_scale=1.5)

    def test_nlvr2_grows_the_token_types(self, config: RunConfig, there: Checkpoint) -> None:
        start = starting_checkpoint(with_heads(config, self.NLVR2))
        start.model()
        table = there.tensors["token_type_embedding.weight"]
        assert torch.equal(start.tensors["token_type_embedding.weight"], torch.stack([table[0], table[1], table[1]]))
        assert start.tensors["nlvr2_head.dense.weight"].shape == (24, 32)

    @pytest.mark.parametrize("itm", [True, False])
    def test_ranking_starts_as_the_logit_of_a_match(
        self, config: RunConfig, there: Checkpoint, caplog: pytest.LogCaptureFixture, itm: bool
    ) -> None:
        with caplog.at_level(logging.INFO):
            start = starting_checkpoint(with_heads(config, HeadsConfig(mlm=False, itm=itm, rank=True)))
        start.model()
        assert "start anew" not in caplog.text
        assert "the head rank starts as the logit of a match of the head itm" in caplog.text
        for kind in ("weight", "bias"):
            assert torch.equal(start.tensors[f"rank_head.fc.{kind}"], there.tensors[f"itm_head.fc.{kind}"][1:])

    def test_a_kept_head_keeps_its_width_and_its_answers(
        self, config: RunConfig, there: Checkpoint, tmp_path: Path
    ) -> None:
        vqa = HeadsConfig(mlm=False, itm=False, vqa=2, hidden_scale=1.0)
        first = starting_checkpoint(with_heads(config, vqa))
        write_checkpoint(replace(first, labels={"vqa": ("yes", "no")}), tmp_path / "vqa")
        wider = replace(vqa, hidden_scale=2.0)
        start = starting_checkpoint(with_heads(config, wider, recipe="shapes", init=str(tmp_path / "vqa")))
        assert start.config.heads == vqa
        assert start.labels == {"vqa": ("yes", "no")}
        assert torch.equal(start.tensors["vqa_head.dense.weight"], first.tensors["vqa_head.dense.weight"])
        assert starting_checkpoint(with_heads(config, self.NLVR2, init=str(tmp_path / "vqa"))).labels == {}


class TestModel:
    @pytest.mark.parametrize(
        ("name", "value"), [("text.dropout", 0.5), ("fusion.layer_norm_eps", 0.5), ("heads.itc_size", 7)]
    )
    def test_a_setting_that_would_be_ignored(self, config: RunConfig, name: str, value: float) -> None:
        changed = replace(config, model=config.model.override({name: value}))
        with pytest.raises(ValueError, match=rf"^model\.{name} would be ignored: init .* brings its own architecture"):
            starting_checkpoint(changed)

    def test_half_precision_becomes_single(self, config: RunConfig, there: Checkpoint, tmp_path: Path) -> None:
        tensors = {name: tensor.half() for name, tensor in there.tensors.items()}
        write_checkpoint(replace(there, tensors=tensors), tmp_path / "half")
        start = starting_checkpoint(replace(config, init=str(tmp_path / "half"), image_size=40))
        assert {tensor.dtype for tensor in start.tensors.values()} == {torch.float32}


class TestProfile:
    def test_of_a_new_model(self, config: RunConfig) -> None:
        for profile, expected in ((None, "official-pretrain"), ("official-finetune", "official-finetune")):
            data = replace(config.data, profile=profile)
            assert profile_of(starting_checkpoint(replace(config, init=None, data=data))) == expected

    def test_of_a_checkpoint(self, config: RunConfig, there: Checkpoint, tmp_path: Path) -> None:
        """The profile of transformers has settings that the official ones lack."""
        assert there.processor is not None
        values = replace(there.processor.config, profile="hf", image_size=40, shortest_edge=44, size_divisor=2)
        processor = replace_config(there, values)
        write_checkpoint(replace(there.resized(40), processor=processor), tmp_path / "hf")
        model = config.model.override({"vision.image_size": 40})
        changed = replace(config, init=str(tmp_path / "hf"), model=model)
        assert profile_of(starting_checkpoint(changed)) == "hf"
        changed = replace(
            changed, model=config.model, image_size=20, data=replace(config.data, profile="official-finetune")
        )
        start = starting_checkpoint(changed)
        assert profile_of(start) == "official-finetune"
        assert start.processor is not None
        assert start.processor.config.image_size == 20


def test_fine_tuning_from_nothing_warns(config: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    starting_checkpoint(replace(config, init=None))
    assert not caplog.records
    starting_checkpoint(replace(config, init=None, recipe="retrieval-coco"))
    assert "retrieval-coco fine-tunes a pre-trained model, but starts from random weights; give init" in caplog.text


def profile_of(checkpoint: Checkpoint) -> str:
    assert checkpoint.processor is not None
    return checkpoint.processor.config.profile


def replace_config(checkpoint: Checkpoint, values: ProcessorConfig) -> Processor:
    assert checkpoint.processor is not None
    return Processor(values, checkpoint.processor.tokenizer)


@pytest.mark.parametrize("has_init", [True, False])
def test_fast_decoding_travels_with_the_model(config: RunConfig, has_init: bool) -> None:
    run = replace(config, data=replace(config.data, fast_decode=True), init=config.init if has_init else None)
    for start, expected in ((run, True), (replace(run, data=config.data), False)):
        processor = starting_checkpoint(start).processor
        assert processor is not None
        assert processor.config.fast_decode is expected


def test_with_a_tokenizer_of_another_family(config: RunConfig, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """BERT's padding has id 0: the text tower must not count it as a word."""
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    words = [*special, *shapes.COLOURS, *shapes.GROUNDS, *shapes.SHAPES, "on", "a"]
    tokenizer = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    start = starting_checkpoint(replace(config, init=None, tokenizer=str(tmp_path)))
    assert start.processor is not None
    assert start.processor.mask_token == "[MASK]"
    assert (start.config.text.vocab_size, start.config.text.pad_token_id) == (len(words), 0)
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / name).write_bytes((tiny_checkpoint / name).read_bytes())
    with pytest.raises(ValueError, match="bare has no tokenizer; convert it with one first"):
        starting_checkpoint(replace(config, init=str(tmp_path / "bare")))
