"""Heads against their formulas, what they read of towers, and the embeddings that the model makes with them."""

import math
import re
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F

from bridgetower.checkpoints import Checkpoint, convert, read_checkpoint, write_checkpoint
from bridgetower.engines.parts import ExportedPart
from bridgetower.model.config import HeadsConfig
from bridgetower.model.heads import (
    HEADS,
    ClassifierHead,
    FusedItcHead,
    ItcHead,
    LinearHead,
    MlmHead,
    RankHead,
)
from helpers.models import (
    build_model,
    changed_config,
    in_float64,
    max_difference,
    random_images,
    random_texts,
)
from helpers.models import normal_float64 as random

ATOL = 1e-10
NONE = changed_config(heads__mlm=False, heads__itm=False, heads__itc=None)


@pytest.mark.parametrize("shape", [(2, 5), (7,), (0,)], ids=str)
def test_mlm(shape):
    head = in_float64(MlmHead(16, 50, 1e-3))
    hidden = random(*shape, 16)
    middle = F.layer_norm(
        F.gelu(head.dense(hidden)), (16,), head.norm.weight, head.norm.bias, eps=1e-3
    )
    expected = middle @ head.decoder.weight.T + head.decoder.bias
    assert torch.allclose(head(hidden), expected, rtol=0, atol=ATOL)


def test_the_decoder_of_masked_words_is_not_tied():
    model = build_model(changed_config(fusion__hidden_size=32, fusion__num_heads=4))
    assert model.mlm_head.decoder.weight.shape == model.text.word_embedding.weight.shape
    assert model.mlm_head.decoder.weight.data_ptr() != model.text.word_embedding.weight.data_ptr()


def test_itm_and_rank():
    pooled = random(3, 32)
    itm = in_float64(LinearHead(32, 2))
    rank = in_float64(RankHead(32))
    assert max_difference(itm(pooled), pooled @ itm.fc.weight.T + itm.fc.bias) < ATOL
    assert max_difference(rank(pooled), pooled @ rank.fc.weight[0] + rank.fc.bias) < ATOL


class TestClassifier:
    def test_formula(self):
        head = in_float64(ClassifierHead(32, 20, 7))
        pooled = random(3, 32)
        middle = F.layer_norm(head.dense(pooled), (20,), head.norm.weight, head.norm.bias, eps=1e-5)
        assert (
            max_difference(head(pooled), F.gelu(middle) @ head.decoder.weight.T + head.decoder.bias)
            < ATOL
        )

    def test_dropout_in_training_only(self):
        head = in_float64(ClassifierHead(32, 20, 7, dropout=0.5))
        pooled = random(3, 32)
        assert torch.equal(head(pooled), head(pooled))
        torch.manual_seed(0)
        assert not torch.equal(head.train()(pooled), head(pooled))

    @pytest.mark.parametrize(("scale", "hidden"), [(1.0, 32), (1.5, 48), (2.0, 64)])
    def test_widths_follow_the_config(self, scale, hidden):
        changes = {
            "heads__vqa": 9,
            "heads__snli_ve": True,
            "heads__nlvr2": True,
            "fusion__num_token_types": 3,
        }
        model = build_model(changed_config(**changes, heads__hidden_scale=scale))
        for head, pooled, classes in (
            (model.vqa_head, 32, 9),
            (model.snli_ve_head, 32, 3),
            (model.nlvr2_head, 64, 2),
        ):
            assert head.dense.weight.shape == (hidden, pooled)
            assert head.decoder.weight.shape == (classes, hidden)
        assert [
            head.dropout.p for head in (model.vqa_head, model.snli_ve_head, model.nlvr2_head)
        ] == [0.0, 0.0, 0.1]


class TestItc:
    @pytest.mark.parametrize(
        ("start", "clamped"), [(0.2, 0.2), (0.7, 0.5), (1e-5, 0.001), (-3.0, 0.001)]
    )
    def test_temperature_is_clamped(self, start, clamped):
        head = ItcHead(4, 5, 6).eval()
        head.temperature.data.fill_(start)
        assert head.logit_scale().item() == pytest.approx(1 / clamped)
        assert head.temperature.item() == pytest.approx(start), (
            "a weight is not changed by using it"
        )
        assert head.train().logit_scale().item() == pytest.approx(1 / clamped)
        assert head.temperature.item() == pytest.approx(clamped), (
            "the parameter itself, as in the official code"
        )

    def test_gradient_at_the_edge(self):
        """The clamp is outside of the graph: a temperature at the edge still learns."""
        head = ItcHead(4, 5, 6)
        head.temperature.data.fill_(0.7)
        head.logit_scale().backward()
        assert head.temperature.grad.item() == pytest.approx(-1 / 0.5**2)

    def test_fused_scale_is_an_exponential(self):
        head = FusedItcHead(4, 5, 8, 6)
        assert (
            head.logit_scale().item()
            == pytest.approx(1 / 0.07)
            == ItcHead(4, 5, 6).logit_scale().item()
        )
        head.log_logit_scale.data.fill_(1.5)
        assert head.logit_scale().item() == pytest.approx(math.exp(1.5))


@pytest.mark.parametrize("kind", ["tower", "fused"])
def test_embeddings(kind):
    model = build_model(changed_config(heads__itc=kind)).double()
    image = model.encode_image(random_images(3).double())
    text = model.encode_text(*random_texts([5, 3, 4]))
    pooled = model.fuse(image, text).pooled
    head = model.head("itc")
    cls = image.cls if kind == "tower" else image.layers[-1][:, 0]
    expected = {
        "image": F.linear(cls, head.image.weight, head.image.bias),
        "text": F.linear(text.cls, head.text.weight, head.text.bias),
        "pair": pooled
        if kind == "tower"
        else F.linear(pooled, head.pooled.weight, head.pooled.bias),
    }
    ours = {
        "image": model.image_embeds(image),
        "text": model.text_embeds(text),
        "pair": model.pair_embeds(pooled),
    }
    for name in ours:
        assert (
            max_difference(ours[name], expected[name] / expected[name].norm(dim=-1, keepdim=True))
            < ATOL
        )
        assert ours[name].shape == (3, 32 if (kind, name) == ("tower", "pair") else 12)


class TestWithoutHeads:
    @pytest.mark.parametrize("name", ["vqa", "snli_ve", "nlvr2"])
    def test_errors(self, name):
        with pytest.raises(
            ValueError, match=rf"this model has no {name} head \(it has mlm, itm, itc\); load"
        ):
            build_model().head(name)
        with pytest.raises(
            ValueError, match=rf"this model has no {name} head \(it has none\); load"
        ):
            build_model(NONE).head(name)

    def test_errors_of_what_reads_heads(self):
        model = build_model(NONE)
        image = model.encode_image(random_images(1))
        text = model.encode_text(*random_texts([4]))
        fused = model.fuse(image, text, "all")
        for read, heads, title in (
            (model.image_embeds, image, "contrastive (ITC)"),
            (model.text_embeds, text, "contrastive (ITC)"),
            (model.itm_logits, fused.pooled, "matching (ITM)"),
            (model.mlm_logits, fused.text, "masked-language (MLM)"),
        ):
            with pytest.raises(ValueError, match=re.escape(f"no {title} head")):
                read(heads)

    def test_pairs_still_have_embeddings(self):
        model = build_model(NONE)
        pooled = model(random_images(2), *random_texts([4, 3])).pooled
        assert torch.equal(model.pair_embeds(pooled), F.normalize(pooled, dim=-1))


class TestTable:
    def test_every_head_of_the_config_is_in_it(self):
        sizes = {
            "custom",
            "itc_size",
            "mlm_layer_norm_eps",
            "mlm_activation",
            "hidden_scale",
            "nlvr2_dropout",
        }
        features = {"image_pooling", "text_pooling", "itc_dropout", "multi_label"}
        assert HEADS.keys() == {item.name for item in fields(HeadsConfig)} - sizes - features

    @pytest.mark.parametrize("name", [name for name, spec in HEADS.items() if spec.published])
    def test_every_parameter_has_one_published_name(self, name):
        all_heads = {"vqa": 4, "snli_ve": True, "nlvr2": True, "rank": True, "itc": "tower"}
        changes = {f"heads__{key}": value for key, value in all_heads.items()}
        head = HEADS[name].build(changed_config(**changes, fusion__num_token_types=3))
        for parameter, _ in head.named_parameters():
            assert (
                len(
                    [
                        ours
                        for ours in HEADS[name].published
                        if f"{parameter}.".startswith(f"{ours}.")
                    ]
                )
                == 1
            )


POOLING = {"heads__image_pooling": "mean", "heads__text_pooling": "mean", "heads__itc_dropout": 0.2}
MEANS = changed_config(**POOLING, vision__distillation_token=True)


def test_means_by_hand():
    model = build_model(MEANS)
    pixels = random_images(3)
    (ids, mask) = random_texts([5, 3, 4])
    image = model.vision(pixels, MEANS.vision_layers)[-1][:, 2:].mean(dim=1)
    last = model.text(ids, mask.bool(), MEANS.text_layers)[-1]
    text = torch.stack(
        [row[:length].mean(dim=0) for row, length in zip(last, (5, 3, 4), strict=True)]
    )
    for outputs in ("layers", "cls"):
        encoded = (
            model.encode_image(pixels, outputs=outputs),
            model.encode_text(ids, mask, outputs=outputs),
        )
        assert max_difference(encoded[0].cls, image) < 1e-6
        assert max_difference(encoded[1].cls, text) < 1e-6
    head = model.itc_head
    image_embeds = model.image_embeds(encoded[0])
    text_embeds = model.text_embeds(encoded[1])
    assert max_difference(image_embeds, F.normalize(head.image(image), dim=-1)) < 1e-6
    assert max_difference(text_embeds, F.normalize(head.text(text), dim=-1)) < 1e-6


def test_dropout_of_features():
    model = build_model(MEANS)
    pixels = random_images(2)
    image = model.encode_image(pixels)
    assert torch.equal(model.image_embeds(image), model.image_embeds(image))
    model.train()
    assert max_difference(model.image_embeds(image), model.image_embeds(image)) > 1e-3


def test_means_saved_and_loaded(tmp_path):
    model = build_model(MEANS)
    checkpoint = Checkpoint(source="tiny", config=MEANS, tensors=model.state_dict())
    write_checkpoint(checkpoint, tmp_path / "model")
    again = read_checkpoint(str(tmp_path / "model")).model().eval()
    pixels = random_images(2)
    assert torch.equal(again.encode_image(pixels).cls, model.encode_image(pixels).cls)
    with pytest.raises(ValueError, match=r"heads\.itc is 'tower'"):
        convert(checkpoint, tmp_path / "hf", "hf")


def test_means_exported():
    graph = ExportedPart(build_model(MEANS), "text")
    program = graph.exported().module()
    for inputs in graph.examples():
        for ours, theirs in zip(program(*inputs), graph(*inputs), strict=True):
            assert max_difference(ours, theirs) < 1e-5
