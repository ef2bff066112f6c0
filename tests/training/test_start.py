"""The checkpoint that a run starts from: heads, number format, published towers, and settings that it would ignore."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from bridgetower.checkpoints import read_checkpoint, write_checkpoint
from bridgetower.checkpoints.towers import read_text_tower, read_vision_tower
from bridgetower.model.config import HeadsConfig
from bridgetower.model.extensions import NO_EXTENSIONS, Extensions
from bridgetower.model.presets import TEXT_TOWERS, VISION_TOWERS
from bridgetower.model.towers import VisionTransformer
from bridgetower.processor import Processor
from bridgetower.tasks.table import RECIPES, TASKS
from bridgetower.training.setup import starting_checkpoint, with_named_towers
from helpers.checkpoints import (
    save_openai_clip,
    save_timm_family,
    save_transformers_text,
    save_transformers_vision,
)
from helpers.models import same_tensors
from helpers.shapes import GROUNDS, SHAPE_COLOURS, SHAPES, shapes_run_config

NANO = RECIPES["pretrain-nano"].model
ITC = HeadsConfig(mlm=False, itm=True, itc="tower", itc_size=8)


@pytest.fixture(scope="module")
def pretrained(tiny_checkpoint):
    return read_checkpoint(tiny_checkpoint)


@pytest.fixture
def config(tiny_dataset, tiny_checkpoint):
    return shapes_run_config(tiny_dataset, init=str(tiny_checkpoint))


def without_itc(pretrained, folder):
    tensors = {
        name: tensor
        for name, tensor in pretrained.tensors.items()
        if not name.startswith("itc_head.")
    }
    model = pretrained.config.override({"heads.itc": None, "heads.mlm_layer_norm_eps": 1e-5})
    write_checkpoint(replace(pretrained, config=model, tensors=tensors), folder)
    return str(folder)


def with_heads(config, heads, **changes):
    fusion = replace(config.model.fusion, num_token_types=3 if heads.nlvr2 else 2)
    return replace(config, model=replace(config.model, heads=heads, fusion=fusion), **changes)


class TestHeads:
    def test_missing_ones_start_anew_and_unused_ones_are_left_behind(
        self, config, pretrained, tmp_path, caplog
    ):
        init = without_itc(pretrained, tmp_path / "init")
        with caplog.at_level(logging.INFO):
            start = starting_checkpoint(with_heads(config, ITC, init=init))
        assert start.config.heads == ITC
        start.model()  # exactly the parameters of the config
        for name, tensor in start.tensors.items():
            if not name.startswith("itc_head."):
                assert torch.equal(tensor, pretrained.tensors[name])
        assert "lacks heads that the run needs; they start anew: itc" in caplog.text
        assert "heads that the run does not use are left behind: mlm" in caplog.text
        restarted = starting_checkpoint(replace(config, init=init))
        assert restarted.config.heads.mlm_layer_norm_eps == 1e-5
        assert torch.equal(
            restarted.tensors["mlm_head.dense.weight"], pretrained.tensors["mlm_head.dense.weight"]
        )

    def test_new_ones_are_decided_by_the_seed(self, config, pretrained, tmp_path):
        changed = with_heads(config, ITC, init=without_itc(pretrained, tmp_path / "init"))
        first, again, other = (
            starting_checkpoint(replace(changed, seed=seed)).tensors for seed in (0, 0, 1)
        )
        weight = "itc_head.image.weight"
        assert torch.equal(first[weight], again[weight])
        assert not torch.equal(first[weight], other[weight])
        assert float(first[weight].std()) == pytest.approx(0.02 * (768 / 8) ** 0.5, rel=0.5)
        assert float(first["itc_head.temperature"]) == pytest.approx(0.07)

    def test_a_contrastive_head_keeps_its_kind_where_the_run_has_its_recipe_s(
        self, config, pretrained, tmp_path, caplog
    ):
        fused = HeadsConfig(mlm=True, itm=True, itc="fused", itc_size=6)
        first = starting_checkpoint(with_heads(config, fused))
        first.model()
        assert first.tensors["itc_head.pooled.weight"].shape[0] == 6
        assert "they start anew: itc" in caplog.text  # of another kind than that of the checkpoint
        write_checkpoint(first, tmp_path / "fused")
        recipe = replace(RECIPES["retrieval-coco"], init=str(tmp_path / "fused"), data=config.data)
        caplog.clear()
        start = starting_checkpoint(recipe)
        assert start.config.heads == replace(fused, mlm=False)
        for name, tensor in start.tensors.items():
            assert torch.equal(tensor, first.tensors[name])
        start.model()
        assert "anew" not in caplog.text
        # The other way round: the recipe for fused heads keeps that of towers, with what it reads.
        pooled = pretrained.config.override({"heads.text_pooling": "mean"})
        write_checkpoint(replace(pretrained, config=pooled), tmp_path / "tower")
        large = replace(
            RECIPES["contrastive-large"], init=str(tmp_path / "tower"), data=config.data
        )
        start = starting_checkpoint(large)
        assert (start.config.heads.itc, start.config.heads.text_pooling) == ("tower", "mean")
        assert torch.equal(
            start.tensors["itc_head.image.weight"], pretrained.tensors["itc_head.image.weight"]
        )

    @pytest.mark.parametrize(
        "changes", [{"itc": "tower", "text_pooling": "mean"}, {"itc": "tower", "itc_size": 5}]
    )
    def test_one_that_the_user_sets_starts_anew(self, config, tmp_path, caplog, changes):
        fused = HeadsConfig(itc="fused", itc_size=6)
        write_checkpoint(starting_checkpoint(with_heads(config, fused)), tmp_path / "fused")
        recipe = replace(RECIPES["retrieval-coco"], init=str(tmp_path / "fused"), data=config.data)
        heads = replace(recipe.model.heads, **changes)
        start = starting_checkpoint(replace(recipe, model=replace(recipe.model, heads=heads)))
        assert start.config.heads.itc == "tower"
        assert "they start anew: itc" in caplog.text

    def test_all_heads_of_the_checkpoint_are_kept(self, config, pretrained, caplog):
        recipe = RECIPES["pretrain-nano"]  # whose default architecture is not what the user set
        for run in (config, replace(config, recipe=recipe.recipe, model=recipe.model)):
            start = starting_checkpoint(run)
            assert start.config == pretrained.config
            assert all(
                torch.equal(tensor, pretrained.tensors[name])
                for name, tensor in start.tensors.items()
            )
        assert "heads" not in caplog.text


def test_the_image_size_of_a_recipe_gives_way_where_patches_do_not_divide_it(config, caplog):
    def size(run, recipe):
        start = starting_checkpoint(run, replace(TASKS["pretraining"], fine_tuning=(recipe,)))
        assert start.processor.config.image_size == start.config.vision.image_size
        return start.config.vision.image_size

    recipe = RECIPES["retrieval-coco"]
    run = replace(recipe, init=config.init, data=config.data)
    assert size(run, recipe) == 20
    assert (
        "images have its 20 pixels; its patches of 10 do not divide the recipe's 384" in caplog.text
    )
    fitting = replace(run, image_size=40)
    assert size(fitting, fitting) == size(fitting, recipe) == 40
    with pytest.raises(
        ValueError, match="45 is not a multiple of the patch size 10; set image_size to 40 or 50"
    ):
        size(replace(run, image_size=45), recipe)


class TestDownstreamHeads:
    NLVR2 = HeadsConfig(mlm=False, itm=False, nlvr2=True, hidden_scale=1.5)

    def test_nlvr2_grows_the_token_types(self, config, pretrained):
        start = starting_checkpoint(with_heads(config, self.NLVR2))
        start.model()
        table = pretrained.tensors["token_type_embedding.weight"]
        assert torch.equal(
            start.tensors["token_type_embedding.weight"],
            torch.stack([table[0], table[1], table[1]]),
        )
        assert start.tensors["nlvr2_head.dense.weight"].shape == (24, 32)

    @pytest.mark.parametrize("itm", [True, False])
    def test_ranking_starts_as_the_logit_of_a_match(self, config, pretrained, caplog, itm):
        with caplog.at_level(logging.INFO):
            start = starting_checkpoint(
                with_heads(config, HeadsConfig(mlm=False, itm=itm, rank=True))
            )
        start.model()
        assert "start anew" not in caplog.text
        assert "the head rank starts as the logit of a match of the head itm" in caplog.text
        for kind in ("weight", "bias"):
            assert torch.equal(
                start.tensors[f"rank_head.fc.{kind}"], pretrained.tensors[f"itm_head.fc.{kind}"][1:]
            )

    def test_a_kept_head_keeps_its_width_and_its_answers(self, config, pretrained, tmp_path):
        vqa = HeadsConfig(mlm=False, itm=False, vqa=2, hidden_scale=1.0)
        first = starting_checkpoint(with_heads(config, vqa))
        write_checkpoint(replace(first, labels={"vqa": ("yes", "no")}), tmp_path / "vqa")
        wider = replace(vqa, hidden_scale=2.0)
        start = starting_checkpoint(
            with_heads(config, wider, recipe="shapes", init=str(tmp_path / "vqa"))
        )
        assert start.config.heads == vqa
        assert start.labels == {"vqa": ("yes", "no")}
        assert torch.equal(
            start.tensors["vqa_head.dense.weight"], first.tensors["vqa_head.dense.weight"]
        )
        assert (
            starting_checkpoint(with_heads(config, self.NLVR2, init=str(tmp_path / "vqa"))).labels
            == {}
        )


class TestModel:
    def test_a_setting_that_would_be_ignored(self, config):
        for name, value in (
            ("text.dropout", 0.5),
            ("fusion.layer_norm_eps", 0.5),
            ("heads.itc_size", 7),
        ):
            changed = replace(config, model=config.model.override({name: value}))
            with pytest.raises(
                ValueError, match=rf"^model\.{name} would be ignored: init .* brings its own arch"
            ):
                starting_checkpoint(changed)

    def test_half_precision_becomes_single(self, config, pretrained, tmp_path):
        tensors = {name: tensor.half() for name, tensor in pretrained.tensors.items()}
        write_checkpoint(replace(pretrained, tensors=tensors), tmp_path / "half")
        start = starting_checkpoint(replace(config, init=str(tmp_path / "half"), image_size=40))
        assert {tensor.dtype for tensor in start.tensors.values()} == {torch.float32}


def settings(config):
    return starting_checkpoint(config).processor.config


class TestPreprocessing:
    def test_profile_of_a_new_model(self, config):
        for profile, expected in (
            (None, "official-pretrain"),
            ("official-finetune", "official-finetune"),
        ):
            data = replace(config.data, profile=profile)
            assert settings(replace(config, init=None, data=data)).profile == expected

    def test_profile_of_a_checkpoint(self, config, pretrained, tmp_path):
        """The profile of transformers has settings that the official ones lack."""
        values = replace(
            pretrained.processor.config,
            profile="hf",
            image_size=40,
            shortest_edge=44,
            size_divisor=2,
        )
        processor = Processor(values, pretrained.processor.tokenizer)
        write_checkpoint(replace(pretrained.resized(40), processor=processor), tmp_path / "hf")
        model = config.model.override({"vision.image_size": 40})
        changed = replace(config, init=str(tmp_path / "hf"), model=model)
        assert settings(changed).profile == "hf"
        data = replace(config.data, profile="official-finetune")
        profile = settings(replace(changed, model=config.model, image_size=20, data=data))
        assert (profile.profile, profile.image_size) == ("official-finetune", 20)

    @pytest.mark.parametrize("has_init", [True, False])
    def test_fast_decoding_travels_with_the_model(self, config, has_init):
        run = replace(
            config,
            data=replace(config.data, fast_decode=True),
            init=config.init if has_init else None,
        )
        assert settings(run).fast_decode
        assert not settings(replace(run, data=config.data)).fast_decode


def test_fine_tuning_from_nothing_warns(config, caplog):
    starting_checkpoint(replace(config, init=None))
    assert not caplog.records
    starting_checkpoint(replace(config, init=None, recipe="retrieval-coco"))
    assert (
        "retrieval-coco fine-tunes a pre-trained model, but starts from random weights; give init"
        in caplog.text
    )


def test_with_a_tokenizer_of_another_family(config, tiny_checkpoint, tmp_path):
    """BERT's padding has id 0: the text tower must not count it as a word."""
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    words = [*special, *SHAPE_COLOURS, *GROUNDS, *SHAPES, "on", "a"]
    tokenizer = Tokenizer(
        models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    start = starting_checkpoint(replace(config, init=None, tokenizer=str(tmp_path)))
    assert start.processor.mask_token == "[MASK]"
    assert (start.config.text.vocab_size, start.config.text.pad_token_id) == (len(words), 0)
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / name).write_bytes((tiny_checkpoint / name).read_bytes())
    with pytest.raises(ValueError, match="bare has no tokenizer; convert it with one first"):
        starting_checkpoint(replace(config, init=str(tmp_path / "bare")))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return str(save_openai_clip(tmp_path_factory.mktemp("clip") / "clip.pt").source)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory, tiny_checkpoint):
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("roberta")
    save_transformers_text(folder, "RobertaForMaskedLM", vocab_size=310, max_position_embeddings=40)
    (folder / "tokenizer.json").write_bytes((tiny_checkpoint / "tokenizer.json").read_bytes())
    return str(folder)


class OwnTower(VisionTransformer):
    """A custom tower."""


def with_towers(dataset, **changes):
    run = shapes_run_config(dataset, recipe="pretrain-nano", model=NANO, image_size=40, max_steps=2)
    return replace(run, **changes)


class TestWeights:
    def test_both(self, tiny_dataset, clip_folder, roberta):
        start = starting_checkpoint(with_towers(tiny_dataset, vision=clip_folder, text=roberta))
        start.model()  # exactly the parameters of the config
        vision = read_vision_tower(clip_folder).resized(40)
        text = read_text_tower(roberta)
        for tower, prefix in ((vision, "vision."), (text, "text.")):
            pretrained = {
                name: tensor for name, tensor in start.tensors.items() if name.startswith(prefix)
            }
            assert same_tensors(pretrained, tower.tensors)
        assert start.config.vision == vision.config
        assert start.config.text == replace(text.config, dropout=0.0)
        assert (start.config.fusion, start.config.heads) == (NANO.fusion, NANO.heads)

    def test_the_size_of_a_tower_of_timm_gives_way_to_that_of_the_run(self, tiny_dataset, tmp_path):
        pytest.importorskip("timm")
        save_timm_family(tmp_path, "siglip")
        tower = read_vision_tower(str(tmp_path)).config
        run = with_towers(tiny_dataset, vision=str(tmp_path), image_size=None)
        assert starting_checkpoint(run).config.vision == tower
        run = replace(run, model=NANO.override({"vision.image_size": 30}))
        assert starting_checkpoint(run).config.vision == replace(tower, image_size=30)

    def test_one_alone_with_a_rest_that_the_seed_decides(self, tiny_dataset, clip_folder, roberta):
        runs = [with_towers(tiny_dataset, vision=clip_folder, seed=seed) for seed in (0, 0, 1)]
        seen, again, other = map(starting_checkpoint, runs)
        assert same_tensors(seen.tensors, again.tensors)
        assert torch.equal(
            seen.tensors["vision.post_norm.weight"], other.tensors["vision.post_norm.weight"]
        )
        assert not torch.equal(
            seen.tensors["itm_head.fc.weight"], other.tensors["itm_head.fc.weight"]
        )
        messages = starting_checkpoint(with_towers(tiny_dataset, text=roberta, image_size=None))
        assert seen.config.text == replace(NANO.text, vocab_size=seen.processor.vocab_size)
        assert messages.config.vision == NANO.vision
        assert messages.config.text.vocab_size == 310 > messages.processor.vocab_size
        for start in (seen, messages):
            start.model()


class TestTokenizer:
    def test_comes_with_the_towers(self, tiny_dataset, roberta, tiny_processor, tmp_path):
        processor = starting_checkpoint(
            with_towers(tiny_dataset, text=roberta, image_size=None)
        ).processor
        texts = ["red circle on black"]
        assert torch.equal(processor.texts(texts).input_ids, tiny_processor.texts(texts).input_ids)
        save_transformers_vision(tmp_path, "ViTModel")
        values = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.1, 0.2, 0.3]}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
        settings = starting_checkpoint(
            with_towers(tiny_dataset, vision=str(tmp_path))
        ).processor.config
        assert (settings.image_mean, settings.image_std) == ((0.5, 0.5, 0.5), (0.1, 0.2, 0.3))

    def test_a_tokenizer_for_a_tower_without_one(
        self, tiny_dataset, roberta, tiny_checkpoint, tmp_path
    ):
        changes = {"text": str(tmp_path), "image_size": None}
        save_transformers_text(tmp_path, "RobertaModel", vocab_size=310, max_position_embeddings=40)
        with pytest.raises(
            ValueError,
            match=r"the text tower .* has no tokenizer; give tokenizer, a folder or file",
        ):
            starting_checkpoint(with_towers(tiny_dataset, **changes))
        start = starting_checkpoint(
            with_towers(tiny_dataset, **changes, tokenizer=str(tiny_checkpoint))
        )
        assert start.processor.tokenizer is not None
        changes["text"] = roberta
        with pytest.raises(ValueError, match="which has its own; leave one out"):
            starting_checkpoint(
                with_towers(tiny_dataset, **changes, tokenizer=str(tiny_checkpoint))
            )

    def test_texts_are_cut_where_the_tower_ends(self, tiny_dataset, roberta, caplog):
        limits = {}
        for length in (30, RECIPES["pretrain-nano"].data.max_length):
            run = with_towers(tiny_dataset, text=roberta, image_size=None)
            start = starting_checkpoint(replace(run, data=replace(run.data, max_length=length)))
            limits[length] = start.processor.config.max_length
        assert limits == {30: 30, 40: 38}
        assert (
            "texts are cut at 38 tokens, which the text tower takes, not at the recipe's 40"
            in caplog.text
        )
        with pytest.raises(
            ValueError, match=r"data\.max_length is 39; the text tower takes at most 38 tokens"
        ):
            starting_checkpoint(replace(run, data=replace(run.data, max_length=39)))

    @pytest.mark.parametrize("changes", [{"vocab_size": 50}, {"pad_token_id": 0}])
    def test_a_tokenizer_of_another_tower(self, tiny_dataset, tiny_checkpoint, tmp_path, changes):
        pytest.importorskip("transformers")
        values = {"vocab_size": 310, "max_position_embeddings": 40} | changes
        save_transformers_text(tmp_path, "RobertaModel", **values)
        run = with_towers(
            tiny_dataset, text=str(tmp_path), image_size=None, tokenizer=str(tiny_checkpoint)
        )
        with pytest.raises(
            ValueError,
            match=r"the tokenizer has \d+ ids and pads with 1; the text tower .* give the",
        ):
            starting_checkpoint(run)


class TestNames:
    def test_presets(self, tiny_dataset, caplog):
        run = with_towers(tiny_dataset, vision="clip-b32", text="bert-base", image_size=64)
        config_with_towers = with_named_towers(run, NANO, NO_EXTENSIONS)
        assert config_with_towers.model.vision == replace(VISION_TOWERS["clip-b32"], image_size=64)
        assert config_with_towers.model.text == replace(
            TEXT_TOWERS["bert-base"], dropout=NANO.text.dropout
        )
        assert (
            config_with_towers.model.fusion,
            config_with_towers.vision,
            config_with_towers.text,
        ) == (NANO.fusion, None, None)
        assert "vision clip-b32 is an architecture, which starts from random weights" in caplog.text
        weights = replace(run, vision="clip.pt", text=None)
        assert with_named_towers(weights, NANO, NO_EXTENSIONS) == weights

    def test_a_tower_of_ones_own(self, tiny_dataset):
        extensions = Extensions(vision_towers={"mine": OwnTower})
        run = with_towers(tiny_dataset, vision="mine")
        start = starting_checkpoint(run, extensions=extensions)
        assert isinstance(start.model().vision, OwnTower)
        assert start.config.vision.architecture == "mine"
        with pytest.raises(
            FileNotFoundError,
            match="mine does not exist; expected a file with weights, a folder or",
        ):
            starting_checkpoint(run)

    @pytest.mark.parametrize(
        ("tower", "name", "message"),
        [
            (
                "vision",
                "mine",
                r"vision mine contradicts .*: model\.vision\.architecture 'vit' \(it has 'mine'\)",
            ),
            (
                "vision",
                "vit-b16",
                r"vision vit-b16 contradicts .*: model\.vision\.num_layers 5 \(it has 12\); leave",
            ),
            (
                "text",
                "bert-base",
                r"text bert-base contradicts .*: model\.text\.hidden_size 128 \(it has 768\)",
            ),
            (
                "text",
                "bert-large",
                r"bert-large is a tower's name and a path here; give \./bert-large for the",
            ),
        ],
    )
    def test_contradictions(self, tiny_dataset, tower, name, message, tmp_path, monkeypatch):
        (tmp_path / "bert-large").mkdir()
        monkeypatch.chdir(tmp_path)
        defaults = NANO.override(
            {"vision.architecture": "other", "text.hidden_size": 64, "vision.num_layers": 3}
        )
        run = with_towers(
            tiny_dataset, **{tower: name}, model=NANO.override({"vision.num_layers": 5})
        )
        with pytest.raises(ValueError, match=message):
            with_named_towers(run, defaults, Extensions(vision_towers={"mine": OwnTower}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "y"}, "vision .* with init y, which has its own; leave one out"),
        (
            {"model": "vision.num_layers"},
            r"contradicts the run's settings: model\.vision\.num_layers 6 \(it has 3\)",
        ),
        (
            {"image_size": None},
            "image size 60 is not a multiple of the patch size 8; set image_size to 56 or 64",
        ),
        (
            {"recipe": "pretrain-base"},
            "expected increasing layers between 1 and 3, the depth of the vision tower",
        ),
    ],
)
def test_refused(tiny_dataset, clip_folder, changes, message):
    nano = NANO.override({"vision.num_layers": 6} if "model" in changes else {})
    changes = changes | {"model": RECIPES["pretrain-base"].model if "recipe" in changes else nano}
    with pytest.raises(ValueError, match=message):
        starting_checkpoint(with_towers(tiny_dataset, vision=clip_folder, **changes))


def test_what_the_file_cannot_tell_may_be_set(tiny_dataset, clip_folder):
    model = NANO.override({"vision.activation": "gelu", "text.dropout": 0.3})
    start = starting_checkpoint(with_towers(tiny_dataset, vision=clip_folder, model=model))
    assert (start.config.vision.activation, start.config.text.dropout) == ("gelu", 0.3)
