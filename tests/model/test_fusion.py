"""Bridges and the fusion encoder against their formulas, and what each way of reading computes."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from bridgetower.model.bridges import BRIDGES
from bridgetower.model.config import MANAGERS, BridgeKind
from bridgetower.model.cpu import optimize_for_cpu
from bridgetower.model.fusion import FusionEncoder, FusionLayer
from helpers.models import changed_config, in_float64, max_difference
from helpers.models import normal_float64 as random

CONFIG = changed_config(fusion__num_layers=3).fusion
METER = changed_config(fusion__num_layers=3, fusion__bridge=None, fusion__input_norm=False).fusion
NORMS = changed_config(fusion__num_layers=3, fusion__bridge="norm").fusion
WIDTH = CONFIG.hidden_size
EACH_BRIDGE = [METER, *(replace(CONFIG, bridge=kind) for kind in BRIDGES)]
ATOL = 1e-10


def normed(norm, hidden):
    return F.layer_norm(hidden, (WIDTH,), norm.weight, norm.bias, eps=CONFIG.bridge_layer_norm_eps)


def fusion_inputs(config=CONFIG):
    count = config.num_bridged_layers
    image = tuple(random(3, 5, WIDTH, seed=number) for number in range(count))
    text = tuple(random(3, 4, WIDTH, seed=10 + number) for number in range(count))
    return image, text, torch.arange(4)[None] < torch.tensor([4, 2, 3])[:, None]


class TestBridge:
    TOWER = random(2, 4, WIDTH)
    STREAM = random(2, 4, WIDTH, seed=1)
    OTHER = random(2, 5, WIDTH, seed=2)

    def output(self, kind):
        bridge = in_float64(BRIDGES[kind](CONFIG, 2, 2))
        return bridge, bridge(
            self.STREAM, (torch.full_like(self.TOWER, torch.nan), self.TOWER), self.OTHER, None
        )

    @pytest.mark.parametrize("kind", [kind for kind in BRIDGES if kind not in MANAGERS])
    def test_formula(self, kind):
        bridge, output = self.output(kind)
        both = torch.cat([self.TOWER, self.STREAM], dim=-1)
        gate = lambda: torch.sigmoid(bridge.linear(both))  # noqa: E731 - only where there is a linear layer
        total = {
            "add": lambda: self.TOWER + self.STREAM,
            "scaled_add": lambda: bridge.scale * self.TOWER + self.STREAM,
            "interpolate": lambda: (1 - bridge.beta) * self.TOWER + bridge.beta * self.STREAM,
            "concatenate": lambda: bridge.linear(both),
            "gated": lambda: gate() * self.TOWER + (1 - gate()) * self.STREAM,
            "norm": lambda: self.STREAM,
        }[kind]()
        assert max_difference(output, normed(bridge.norm, total)) < ATOL

    def test_start_values(self):
        """A fresh scaled bridge adds, a fresh interpolating one averages."""
        assert BRIDGES["scaled_add"](CONFIG, 2, 2).scale.item() == 1
        assert BRIDGES["interpolate"](CONFIG, 2, 2).beta.item() == 0.5
        assert {name for name, _ in BRIDGES["add"](CONFIG, 2, 2).named_parameters()} == {
            "norm.weight",
            "norm.bias",
        }
        assert set(get_args(BridgeKind)) == set(BRIDGES)

    def test_unknown(self):
        with pytest.raises(
            ValueError,
            match=r"fusion\.bridge is 'multiply'; expected one of add, .*, or a custom one",
        ):
            FusionEncoder(replace(CONFIG, bridge="multiply"))


class TestManager:
    LAYERS = tuple(random(2, 4, WIDTH, seed=number) for number in range(5))
    STREAM = random(2, 4, WIDTH, seed=11)
    OTHER = random(2, 6, WIDTH, seed=12)
    MASK = torch.arange(6)[None] < torch.tensor([6, 3])[:, None]

    def build(self, kind, layer=2):
        return in_float64(BRIDGES[kind](CONFIG, layer, len(self.LAYERS)))

    def weighed(self, manager, scores):
        weights = torch.softmax(scores / manager.temperature, dim=0)
        return sum(
            weights[number] * normed(manager.norms[number], layer)
            for number, layer in enumerate(self.LAYERS)
        )

    def test_static(self):
        manager = self.build("static_manager")
        arguments = (self.STREAM, self.LAYERS, self.OTHER, None)
        stream = manager.stream_weight * normed(manager.stream_norm, self.STREAM)
        assert (
            max_difference(
                manager(*arguments), self.weighed(manager, manager.weights[:, None, None]) + stream
            )
            < ATOL
        )
        torch.manual_seed(0)
        noise = torch.randn_like(torch.stack(self.LAYERS)) / len(self.LAYERS)
        torch.manual_seed(0)
        noisy = self.weighed(manager, manager.weights[:, None, None] + noise) + stream
        assert max_difference(manager.train()(*arguments), noisy) < ATOL

    def test_adaptive(self):
        manager = self.build("adaptive_manager")
        stream = normed(manager.stream_norm, self.STREAM)
        other = normed(manager.other_norm, self.OTHER)
        attention = manager.query(stream) @ manager.key(other).mT / WIDTH**0.5
        attention = attention.masked_fill(~self.MASK[:, None], -torch.inf).softmax(dim=-1)
        scores = manager.scores(torch.cat([attention @ other, stream], dim=-1))
        expected = (
            self.weighed(manager, scores.movedim(-1, 0)[..., None]) + manager.stream_weight * stream
        )
        assert (
            max_difference(manager(self.STREAM, self.LAYERS, self.OTHER, self.MASK), expected)
            < ATOL
        )
        assert max_difference(manager(self.STREAM, self.LAYERS, self.OTHER, None), expected) > 1e-3
        manager.train()
        assert (
            max_difference(manager(self.STREAM, self.LAYERS, self.OTHER, self.MASK), expected)
            > 1e-3
        ), "noise"

    @pytest.mark.parametrize("kind", MANAGERS)
    def test_into_the_first_layer(self, kind):
        manager = self.build(kind, layer=1)
        expected = self.weighed(manager, manager.weights[:, None, None])
        assert max_difference(manager(None, self.LAYERS, None, None), expected) < ATOL

    def test_start_values(self):
        """A fresh static manager averages the layers and adds the stream."""
        manager = BRIDGES["static_manager"](CONFIG, 2, 5).double().eval()
        expected = sum(F.layer_norm(layer, (WIDTH,)) for layer in self.LAYERS) / 5 + F.layer_norm(
            self.STREAM, (WIDTH,)
        )
        assert max_difference(manager(self.STREAM, self.LAYERS, self.OTHER, None), expected) < 1e-4

    @pytest.mark.parametrize("kind", MANAGERS)
    def test_any_number_of_tower_layers(self, kind):
        config = replace(CONFIG, bridge=kind, vision_layers=(1, 2, 3, 4), text_layers=(2, 3))
        encoder = in_float64(FusionEncoder(config))
        image = self.LAYERS[:4]
        text = tuple(layer[:, :3] for layer in self.LAYERS[:2])
        mask = None
        before = encoder(image, text, mask, "all")
        for number in range(4):
            changed = (*image[:number], image[number] + self.STREAM, *image[number + 1 :])
            assert all(
                max_difference(*pair) > 1e-3
                for pair in zip(encoder(changed, text, mask, "all"), before, strict=True)
            )
        with pytest.raises(
            ValueError, match=r"fusion\.vision_layers is \(1, 2, 3, 4\); expected 3 tower layers"
        ):
            replace(config, bridge="add")

    @pytest.mark.parametrize("kind", MANAGERS)
    @pytest.mark.parametrize("input_norm", [True, False])
    def test_no_norm_beside_the_first_manager(self, kind, input_norm):
        encoder = FusionEncoder(replace(CONFIG, bridge=kind, input_norm=input_norm))
        assert [len(encoder.text_bridges), len(encoder.image_bridges)] == [3, 3]
        assert not [
            name
            for name, _ in encoder.named_parameters()
            if name.startswith(("text_norm", "image_norm"))
        ]


class TestLayer:
    def test_formula(self):
        layer = in_float64(FusionLayer(CONFIG))
        (image, text, mask) = fusion_inputs()
        hidden = text[0]
        other = image[0]
        after_self = layer.self_attention_norm(hidden + layer.self_attention(hidden, mask))
        cross = layer.cross_attention
        crossed = cross(cross.query(after_self), cross.key_value(other), None)
        after_cross = layer.cross_attention_norm(after_self + crossed)
        expected = layer.mlp_norm(after_cross + layer.mlp(after_cross))
        assert max_difference(layer(hidden, other, mask=mask), expected) < ATOL

    def test_the_two_masks(self):
        layer = in_float64(FusionLayer(CONFIG))
        (image, text, mask) = fusion_inputs()
        far = 100 * random(*text[0].shape, seed=5) * ~mask[..., None]
        of_text = layer(text[0], image[0], mask=mask), layer(text[0] + far, image[0], mask=mask)
        assert max_difference(of_text[0][mask], of_text[1][mask]) < ATOL
        of_image = (
            layer(image[0], text[0], other_mask=mask),
            layer(image[0], text[0] + far, other_mask=mask),
        )
        assert max_difference(*of_image) < ATOL
        assert max_difference(layer(image[0], text[0]), layer(image[0], text[0] + far)) > 0.01

    @pytest.mark.parametrize("queries", [1, 2])
    def test_first_queries_only(self, queries):
        layer = in_float64(FusionLayer(CONFIG))
        (image, text, mask) = fusion_inputs()
        everything = layer(text[0], image[0], mask=mask)
        assert (
            max_difference(
                layer(text[0], image[0], mask=mask, num_queries=queries), everything[:, :queries]
            )
            < ATOL
        )


def managed_by_hand(encoder, config, mask):
    image, text, _ = fusion_inputs(config)
    image_stream = image[0]
    text_stream = text[0]
    if config.input_norm:
        image_stream = encoder.image_norm(image_stream)
        text_stream = encoder.text_norm(text_stream)
    for number in range(config.num_layers):
        if number > 0 and config.bridge is not None:
            entering = (image[number], text[number]) if config.bridge == "add" else (0, 0)
            image_stream = encoder.image_bridges[number - 1].norm(image_stream + entering[0])
            text_stream = encoder.text_bridges[number - 1].norm(text_stream + entering[1])
        image_stream, text_stream = (
            encoder.image_layers[number](image_stream, text_stream, other_mask=mask),
            encoder.text_layers[number](text_stream, image_stream, mask=mask),
        )
    return text_stream, image_stream


class TestEncoder:
    @pytest.mark.parametrize("config", [CONFIG, METER, NORMS], ids=["bridges", "meter", "norms"])
    @pytest.mark.parametrize("masked", [True, False])
    def test_formula(self, config, masked):
        encoder = in_float64(FusionEncoder(config))
        (image, text, mask) = fusion_inputs(config)
        ours = encoder(image, text, mask if masked else None, "all")
        expected = managed_by_hand(encoder, config, mask if masked else None)
        assert (
            max(
                max_difference(actual, reference)
                for actual, reference in zip(ours, expected, strict=True)
            )
            < ATOL
        )

    @pytest.mark.parametrize("outputs", ["pooled", "text"])
    @pytest.mark.parametrize("config", EACH_BRIDGE, ids=lambda config: str(config.bridge))
    def test_reading_less(self, config, outputs):
        encoder = in_float64(FusionEncoder(config))
        (image, text, mask) = fusion_inputs(config)
        whole_text, whole_image = encoder(image, text, mask, "all")
        some_text, some_image = encoder(image, text, mask, outputs)
        if outputs == "text":
            assert max_difference(some_text, whole_text) < ATOL
            assert some_image is None
        else:
            assert max_difference(some_text, whole_text[:, :1]) < ATOL
            assert max_difference(some_image, whole_image[:, :1]) < ATOL

    @pytest.mark.parametrize("config", EACH_BRIDGE, ids=lambda config: str(config.bridge))
    def test_caches_change_nothing(self, config):
        encoder = in_float64(FusionEncoder(config))
        (image, text, mask) = fusion_inputs(config)
        caches = (
            encoder.cache_first_layer("image", image),
            encoder.cache_first_layer("text", text, mask),
        )
        ours = encoder(image, text, mask, "all", *caches)
        expected = encoder(image, text, mask, "all")
        assert all(max_difference(*pair) < ATOL for pair in zip(ours, expected, strict=True))

    @pytest.mark.parametrize("config", EACH_BRIDGE, ids=lambda config: str(config.bridge))
    def test_bfloat16_autocast_trains(self, config):
        encoder = in_float64(FusionEncoder(config)).float()
        (image, text, mask) = fusion_inputs(config)
        image = tuple(layer.float() for layer in image)
        text = tuple(layer.float() for layer in text)
        expected = encoder(image, text, mask, "all")
        for optimize in (lambda _: None, optimize_for_cpu):
            optimize(encoder)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                outputs = encoder(image, text, mask, "all")
            assert all(
                0 < max_difference(*pair) < 0.2 for pair in zip(outputs, expected, strict=True)
            )
            sum(output.float().square().sum() for output in outputs).backward()
            assert all(
                weight.grad.isfinite().all()
                for weight in encoder.parameters()
                if weight.grad is not None
            )

    def test_reading_text_leaves_the_last_image_layer_out(self):
        encoder = in_float64(FusionEncoder(CONFIG))
        (image, text, mask) = fusion_inputs()
        ran = []
        for number, layer in enumerate(encoder.image_layers, start=1):
            layer.register_forward_hook(lambda *_, number=number: ran.append(number))
        encoder(image, text, mask, "text")
        assert ran == [1, 2]
        encoder(image, text, mask, "all")
        assert ran == [1, 2, 1, 2, 3]

    def test_the_control_has_the_parameters_of_bridges_but_one_tower_layer(self):
        control, bridged = (FusionEncoder(config).state_dict() for config in (NORMS, CONFIG))
        assert {name: value.shape for name, value in control.items()} == {
            n: v.shape for n, v in bridged.items()
        }
        assert (NORMS.num_bridged_layers, METER.num_bridged_layers, CONFIG.num_bridged_layers) == (
            1,
            1,
            3,
        )

    def test_dropout_after_each_part_of_a_layer(self):
        """Where all is dropped, nothing but the norms is left of self-attention, cross-attention and feed-forward."""
        layer = in_float64(FusionLayer(CONFIG)).train()
        hidden = random(3, 5, WIDTH)
        layer.dropout.p = 1.0
        expected = layer.mlp_norm(layer.cross_attention_norm(layer.self_attention_norm(hidden)))
        assert max_difference(layer(hidden, random(3, 4, WIDTH, seed=1)), expected) < ATOL
        assert max_difference(layer.eval()(hidden, random(3, 4, WIDTH, seed=1)), expected) > 0.01
