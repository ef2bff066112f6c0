"""transformers' BridgeTower: its folders give its numbers and gradients here, and go back to it without a change."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import huggingface as hf
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import (
    AutoModel,
    AutoProcessor,
    BridgeTowerConfig,
    BridgeTowerModel,
    PreTrainedModel,
)

from bridgetower import hidden_states
from bridgetower.checkpoints import Checkpoint, convert, read_checkpoint
from bridgetower.checkpoints.huggingface import _import_config, _Sections
from bridgetower.checkpoints.keymap import TensorSource, import_tensors
from bridgetower.inference import predictor
from bridgetower.model.layers import DotProductAttention
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.objectives.losses import itc_loss
from bridgetower.objectives.pretraining import PretrainingTask
from bridgetower.processor import Processor, ProcessorConfig, train_tokenizer
from helpers.models import max_difference, random_caption_batch, same_tensors

ATOL = 1e-5
ALL = [("backbone", name) for name in hf.VARIANTS]
ASKED = os.environ.get("BRIDGETOWER_NETWORK_TESTS") == "1"
NETWORK = pytest.mark.skipif(not ASKED, reason="BRIDGETOWER_NETWORK_TESTS=1 loads it from the hub")
PUBLISHED = [
    pytest.param((f"BridgeTower/bridgetower-{name}", kind), marks=NETWORK)
    for name, kinds in (
        ("base", "backbone"),
        ("base-itm-mlm", "mlm itm"),
        ("large-itm-mlm-itc", "mlm itm itc"),
    )
    for kind in kinds.split()
]
# of the other settings only the head for words reads some
HEADS = [(kind, "plain") for kind in ("itm", "itc")]
HEADS += [
    ("mlm", name)
    for name in ("three eps", "gelu_new", "relu", "separate norms, deeper image tower")
]


@dataclass(frozen=True)
class HuggingFaceCase:
    kind: str
    theirs: PreTrainedModel
    folder: Path
    checkpoint: Checkpoint

    def batch(self, image_size=None):
        return hf.inputs(self.theirs, image_size)

    @torch.no_grad()
    def largest_difference(self, checkpoint=None):
        model = (checkpoint or self.checkpoint).model()
        batch = self.batch()
        return largest_difference(
            hf.our_outputs(model, batch), hf.their_outputs(self.theirs, batch)
        )


def largest_difference(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max(max_difference(ours[name], theirs[name]) for name in ours)


def recompute_case(folder, kind, changes):
    theirs = hf.random_model(kind, changes)
    theirs.save_pretrained(folder)
    return HuggingFaceCase(kind, theirs, folder, read_checkpoint(folder))


@pytest.fixture(
    scope="module", params=[*ALL, *HEADS], ids=lambda pair: "-".join(pair).replace(" ", "_")
)
def huggingface_case(request, tmp_path_factory):
    kind, variant = request.param
    return recompute_case(tmp_path_factory.mktemp("hf"), kind, hf.VARIANTS[variant])


def test_settings_that_a_config_lacks_are_those_of_transformers():
    configs = [
        _import_config("config", _Sections.of("config", values), {})
        for values in ({}, BridgeTowerConfig().to_dict())
    ]
    assert configs[0] == configs[1]


class TestEveryKind:
    def test_outputs(self, huggingface_case):
        assert huggingface_case.largest_difference() < ATOL

    def test_gradients(self, huggingface_case):
        huggingface_case.theirs.zero_grad()
        model = huggingface_case.checkpoint.model()
        batch = huggingface_case.batch()
        hf.backpropagate(hf.their_outputs(huggingface_case.theirs, batch), batch)
        hf.backpropagate(hf.our_outputs(model, batch), batch)
        theirs = hf.their_gradients(huggingface_case.theirs)
        ours = hf.our_gradients(huggingface_case.checkpoint, model)
        assert ours.keys() == theirs.keys(), "the same parameters were reached"
        assert [
            name for name in ours if max_difference(ours[name], theirs[name]) > limit(theirs[name])
        ] == []
        assert [
            name
            for name in huggingface_case.theirs.state_dict()
            if name not in theirs and not is_unread(huggingface_case, name)
        ] == []

    def test_tensors_and_settings_come_back(self, huggingface_case, tmp_path):
        convert(huggingface_case.checkpoint, tmp_path / "back", "hf")
        assert same_tensors(
            hf.reload(tmp_path / "back", huggingface_case.kind).state_dict(),
            huggingface_case.theirs.state_dict(),
        )
        back, start = (
            BridgeTowerConfig.from_pretrained(path).to_dict()
            for path in (tmp_path / "back", huggingface_case.folder)
        )
        # Nothing reads the top level's number of heads, and the number format is told by the weights.
        ignored = {"num_attention_heads", "dtype", "_name_or_path"}
        assert {
            name for name in start.keys() | back.keys() if back.get(name) != start.get(name)
        } - ignored == set()


@pytest.mark.parametrize("name", hf.RENAMED)
def test_other_names_of_the_same_model(tmp_path, name):
    case = recompute_case(tmp_path / "hf", "mlm", hf.RENAMED[name])
    assert case.largest_difference() < ATOL
    convert(case.checkpoint, tmp_path / "back", "hf")
    with torch.no_grad():
        models = (hf.reload(tmp_path / "back", "mlm"), case.theirs)
        back, start = (hf.their_outputs(model, case.batch())["logits"] for model in models)
    assert max_difference(back, start) < ATOL


def test_both_dropouts_are_drawn_where_transformers_draws_them(tmp_path):
    model = recompute_case(
        tmp_path / "hf", "backbone", hf.VARIANTS["two dropouts"]
    ).checkpoint.model()
    for layer in (*model.text.layers, *model.fusion.text_layers, *model.fusion.image_layers):
        drawn = {
            name: module.p if isinstance(module, torch.nn.Dropout) else module.dropout
            for name, module in layer.named_modules()
            if isinstance(module, torch.nn.Dropout | DotProductAttention)
        }
        assert drawn == {name: 0.2 if name == "dropout" else 0.3 for name in drawn}
        assert len(drawn) == (2 if layer in model.text.layers else 3)


@pytest.mark.parametrize("variant", ["plain", "every layer has a bridge", "one fusion layer"])
def test_hidden_states_and_attentions(tmp_path, variant):
    theirs = hf.random_model("backbone", hf.VARIANTS[variant])
    theirs.save_pretrained(tmp_path)
    theirs.set_attn_implementation("eager")  # forms the weights
    batch = hf.inputs(theirs)
    with torch.no_grad():
        ours = hidden_states(read_checkpoint(tmp_path).model(), **batch, attentions=True)
        output = theirs(**batch, output_hidden_states=True, output_attentions=True)
    text, image, fused = output.hidden_states
    image = [hidden.transpose(0, 1) for hidden in image]
    fused_text, fused_image = zip(*fused, strict=True)
    text_weights, image_weights = zip(*output.attentions, strict=True)
    assert max_difference(ours.pooled, output.pooler_output) < ATOL
    for actual, expected, first in (
        (ours.text, text, 0),
        (ours.vision, image, 0),
        (ours.fused_text, fused_text, 1),
        (ours.fused_image, fused_image, 1),
        (ours.attentions["text self"], text_weights, 1),
        (ours.attentions["image self"], image_weights, 1),
    ):
        assert len(actual) == len(expected)
        assert (
            max(
                max_difference(actual[number], hidden)
                for number, hidden in enumerate(expected, first)
            )
            < ATOL
        )
    assert max_difference(ours.vision[0], image[1]) > 0.01, "control: another layer"


def limit(gradient):
    """Returns how far a gradient may be off. A scalar's is a sum over positions and features that mostly cancel."""
    return ATOL * max(1, float(gradient.abs().max())) * (4 if gradient.numel() == 1 else 1)


def is_unread(case, name):
    depth = case.checkpoint.config.vision.num_layers
    last = case.checkpoint.config.fusion.num_layers - 1
    unread_names = [
        "text_model.pooler.",
        "ln_separate.",
        *(f"resblocks.{number}." for number in range(depth, 10)),
    ]
    if case.kind == "mlm":
        unread_names += [
            f"cross_modal_image_layers.{last}.",
            "cross_modal_image_pooler.",
            "cross_modal_text_pooler.",
        ]
    return any(unread_name in name for unread_name in unread_names)


@pytest.mark.parametrize("kind", hf.KINDS)
def test_round_trip_through_our_own_folder_in_half_precision(tmp_path, kind):
    """What only transformers keeps (a pooler, norms and layers that are never read) comes along."""
    theirs = hf.random_model(kind, hf.VARIANTS["separate norms, deeper image tower"]).half()
    theirs.save_pretrained(tmp_path / "hf")
    convert(read_checkpoint(tmp_path / "hf"), tmp_path / "ours", "bridgetower")
    convert(read_checkpoint(tmp_path / "ours"), tmp_path / "back", "hf")
    back = hf.reload(tmp_path / "back", kind).state_dict()
    start = theirs.state_dict()
    assert {value.dtype for value in back.values()} == {torch.float16}
    assert same_tensors(back, start)


def test_contrastive_loss_is_that_of_transformers(tmp_path):
    case = recompute_case(tmp_path, "itc", {})
    batch = random_caption_batch(range(6), (7, 4, 5, 7, 2, 6), case.checkpoint.config)
    inputs = {
        name: getattr(batch, name) for name in ("pixel_values", "input_ids", "attention_mask")
    }
    theirs = case.theirs(**inputs, return_loss=True).loss
    theirs.backward()
    value = theirs.item()
    gradients = hf.their_gradients(case.theirs)
    model = case.checkpoint.model()
    task = PretrainingTask(model, PretrainingConfig(phases=(Phase(mlm=0, itm=0, itc=1),)))
    loss = task(batch).total
    loss.backward()
    assert loss.item() == pytest.approx(value, abs=ATOL)
    ours = hf.our_gradients(case.checkpoint, model)
    assert ours.keys() == gradients.keys()
    assert {"itc_cross_modal_head.fc.weight", "logit_scale"} < ours.keys()
    assert [
        name
        for name in ours
        if max_difference(ours[name], gradients[name]) > limit(gradients[name])
    ] == []
    with torch.no_grad():  # control: images and texts alone, or pairs in another place
        embeds = task.features(batch).embeds
        scale = model.head("itc").logit_scale()
        images, texts, pairs = embeds
        permutations = (images, texts), (texts, images, pairs), (images, pairs, texts)
        losses = [
            itc_loss(embeds_in_order, batch.image_index, scale).item()
            for embeds_in_order in (embeds, *permutations)
        ]
    assert losses[0] == pytest.approx(value, abs=ATOL)
    assert all(abs(loss - value) > 100 * ATOL for loss in losses[1:])


class TestControls:
    @pytest.fixture(scope="class")
    @classmethod
    def huggingface_case(cls, tmp_path_factory):
        return recompute_case(tmp_path_factory.mktemp("hf"), "mlm", hf.VARIANTS["three eps"])

    def test_another_setting(self, huggingface_case):
        prefixes = ("vision.", "text.", "fusion.", "fusion.bridge_", "heads.mlm_")
        for field, value in (
            *((f"{prefix}layer_norm_eps", 1e-12) for prefix in prefixes),
            ("vision.activation", "gelu"),
        ):
            wrong = replace(
                huggingface_case.checkpoint,
                config=huggingface_case.checkpoint.config.override({field: value}),
            )
            assert huggingface_case.largest_difference(wrong) > 10 * ATOL, field

    def test_the_first_two_of_query_key_and_value_swapped(self, huggingface_case):
        for prefix in (
            "text_layers.0.self_attention.qkv.weight",
            "image_layers.0.cross_attention.key_value.bias",
        ):
            name = f"fusion.{prefix}"
            (source,) = hf.table(
                huggingface_case.checkpoint, {name: huggingface_case.checkpoint.tensors[name]}
            ).values()
            first, second, *remaining = source.names
            wrong = import_tensors(
                {name: TensorSource((second, first, *remaining))},
                huggingface_case.theirs.state_dict(),
            )
            swapped = replace(
                huggingface_case.checkpoint, tensors=huggingface_case.checkpoint.tensors | wrong
            )
            assert huggingface_case.largest_difference(swapped) > 10 * ATOL, name

    def test_a_forgotten_mask(self, huggingface_case):
        batch = huggingface_case.batch()
        everything = batch | {"attention_mask": torch.ones_like(batch["attention_mask"])}
        with torch.no_grad():
            ours = hf.our_outputs(huggingface_case.checkpoint.model(), everything)["logits"][1, :4]
            theirs = hf.their_outputs(huggingface_case.theirs, batch)["logits"][1, :4]
        assert max_difference(ours, theirs) > 10 * ATOL

    def test_gradients_of_another_model(self, huggingface_case):
        model = huggingface_case.checkpoint.model()
        other = hf.random_model("mlm", hf.VARIANTS["three eps"], seed=5)
        hf.backpropagate(
            hf.their_outputs(other, huggingface_case.batch()), huggingface_case.batch()
        )
        hf.backpropagate(hf.our_outputs(model, huggingface_case.batch()), huggingface_case.batch())
        theirs = hf.their_gradients(other)
        ours = hf.our_gradients(huggingface_case.checkpoint, model)
        assert max(max_difference(ours[name], theirs[name]) for name in ours) > 0.1

    def test_a_forgotten_mapping_of_any_parameter(self, huggingface_case):
        start = huggingface_case.checkpoint.tensors
        for prefix in (
            "pre_norm.bias",
            "post_norm.weight",
            "embedding_norm.weight",
            "token_type_embedding.weight",
        ):
            name = next(name for name in start if name.endswith(prefix))
            default = (
                torch.zeros_like(start[name])
                if "norm.weight" not in name
                else torch.ones_like(start[name])
            )
            wrong = replace(huggingface_case.checkpoint, tensors=start | {name: default})
            assert huggingface_case.largest_difference(wrong) > 10 * ATOL, name


@torch.no_grad()
def test_other_image_sizes(tmp_path):
    """Positions are interpolated to other grids. 64 x 16 has as many patches as 32 x 32."""
    case = recompute_case(tmp_path / "hf", "backbone", {})
    model = case.checkpoint.model()
    generator = torch.Generator().manual_seed(3)
    for size in ((48, 48), (16, 16), (32, 64), (64, 16)):
        batch = case.batch() | {"pixel_values": torch.randn(2, 3, *size, generator=generator)}
        theirs = hf.their_outputs(case.theirs, batch, interpolate_pos_encoding=True)
        assert largest_difference(hf.our_outputs(model, batch), theirs) < ATOL, size


@torch.no_grad()
def test_a_resized_checkpoint(tmp_path):
    case = recompute_case(
        tmp_path / "hf", "backbone", {"vision.patch_size": 14, "vision.image_size": 28}
    )
    resized = case.checkpoint.resized(42)
    ours = hf.our_outputs(resized.model(), case.batch(42))
    assert (
        largest_difference(
            ours,
            hf.their_outputs(case.theirs, case.batch(42), interpolate_pos_encoding=True),
        )
        < ATOL
    )
    convert(resized, tmp_path / "resized", "hf")
    assert (
        largest_difference(
            ours,
            hf.their_outputs(hf.reload(tmp_path / "resized", "backbone"), case.batch(42)),
        )
        < ATOL
    )


@pytest.mark.parametrize("kind", ["backbone", "itm"])
def test_a_written_folder_needs_no_code_of_this_package(tmp_path, kind):
    case = recompute_case(tmp_path / "start", kind, {})
    convert(case.checkpoint, tmp_path / "hf", "hf")
    model = AutoModel.from_pretrained(tmp_path / "hf", trust_remote_code=False)
    assert type(model) is BridgeTowerModel
    start = getattr(case.theirs, "bridgetower", case.theirs)
    assert same_tensors(model.state_dict(), start.state_dict())
    card = ModelCard.load(tmp_path / "hf" / "README.md")
    assert (card.data.library_name, "AutoModel.from_pretrained" in card.text) == (
        "transformers",
        True,
    )


class TestWithPreprocessing:
    TEXTS = ("a dog runs on the grass", "two red boats", "a <mask> sleeps")

    @pytest.fixture(
        scope="class", params=[*((None, kind) for kind in hf.KINDS), *PUBLISHED], ids=str
    )
    @classmethod
    def loaded(cls, request, tmp_path_factory):
        source, kind = request.param
        if source is None:
            source = tmp_path_factory.mktemp("hf")
            hf.random_model(kind, {"text.vocab_size": 300}).save_pretrained(source)
            tokenizer = train_tokenizer(
                [text for text in cls.TEXTS for _ in range(3)], vocab_size=300
            )
            config = ProcessorConfig(profile="hf", image_size=32, max_length=18, patch_size=16)
            Processor(config, tokenizer).save_huggingface(source)
        theirs = hf.KINDS[kind].from_pretrained(source).eval()
        processor = AutoProcessor.from_pretrained(source)
        encoded = processor(cls.images(), list(cls.TEXTS), padding=True, return_tensors="pt")
        batch = {name: encoded[name] for name in ("pixel_values", "input_ids", "attention_mask")}
        with torch.no_grad():
            return predictor.load(source, device="cpu"), hf.their_outputs(theirs, batch)

    @staticmethod
    def images():
        rng = np.random.default_rng(0)
        shapes = [(50, 70), (32, 32), (60, 41)]
        return [
            Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes
        ]

    def test_predictions(self, loaded):
        model, theirs = loaded
        images = self.images()
        texts = list(self.TEXTS)
        if "pooled" in theirs:
            expected = torch.nn.functional.normalize(theirs["pooled"], dim=-1)
            assert max_difference(model.embed_pairs(images, texts), expected) < ATOL
        elif "pair" in theirs:
            assert max_difference(model.embed_images(images), theirs["image"]) < ATOL
            assert max_difference(model.embed_texts(texts), theirs["text"]) < ATOL
            assert max_difference(model.embed_pairs(images, texts), theirs["pair"]) < ATOL
        elif theirs["logits"].ndim == 2:
            assert (
                max_difference(model.match(images, texts), theirs["logits"].softmax(dim=-1)[:, 1])
                < ATOL
            )
        else:
            position = (
                model.processor.texts([texts[2]])
                .input_ids[0]
                .tolist()
                .index(model.processor.mask_token_id)
            )
            best = theirs["logits"][2, position].softmax(dim=-1).topk(3)
            (words,) = model.fill_mask(images[2], texts[2], top=3)
            assert (
                max_difference(torch.tensor([word.probability for word in words]), best.values)
                < ATOL
            )
