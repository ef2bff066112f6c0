"""The towers: patches, positions of any grid, of RoBERTa and of BERT, and the layers that are read."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from bridgetower.model.towers import TextTransformer, VisionTransformer, resize_position_embedding
from helpers.models import SMALL_CONFIG, changed_config, max_difference, off_defaults, random_texts
from helpers.models import normal_float64 as random

CONFIG = SMALL_CONFIG.vision
TIMM = replace(CONFIG, activation="gelu", pre_norm=False, patch_bias=True, layer_norm_eps=1e-6)
DISTILLED = replace(TIMM, distillation_token=True)
ATOL = 1e-10


def float64_tower(config=CONFIG):
    return off_defaults(VisionTransformer(config)).double().eval()


def pixel_values(count=2, height=24, width=24):
    return random(count, 3, height, width)


class TestEmbed:
    @pytest.mark.parametrize("config", [CONFIG, TIMM, DISTILLED], ids=["clip", "timm", "distilled"])
    def test_formula(self, config):
        """Prefix tokens first, then the patches row by row, each a linear map of its pixels."""
        tower = float64_tower(config)
        pixels = pixel_values()
        patch = config.patch_size
        weight = tower.patch_embedding.weight.flatten(1)
        prefix = [tower.class_embedding, tower.distillation_embedding]
        tokens = [embedding.expand(2, -1) for embedding in prefix if embedding is not None]
        for row in range(3):
            for column in range(3):
                window = pixels[
                    :, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch
                ]
                tokens.append(F.linear(window.flatten(1), weight, tower.patch_embedding.bias))
        expected = tower.pre_norm(torch.stack(tokens, dim=1) + tower.position_embedding)
        assert max_difference(tower.embed(pixels), expected) < ATOL

    @pytest.mark.parametrize(("height", "width"), [(24, 25), (23, 24), (4, 4), (25, 25)])
    def test_sides_that_the_patch_does_not_divide(self, height, width):
        with pytest.raises(
            ValueError,
            match=rf"image of {width} x {height} pixels; .*multiples of the patch size 8",
        ):
            float64_tower()(pixel_values(height=height, width=width), (4,))


class TestLayers:
    @pytest.mark.parametrize("read", [(1,), (1, 2, 3, 4), (2, 4)], ids=str)
    @pytest.mark.parametrize("config", [CONFIG, TIMM], ids=["clip", "timm"])
    def test_read_layers(self, config, read):
        tower = float64_tower(config)
        ran = []
        hidden = tower.embed(pixel_values())
        expected = {}
        for number, layer in enumerate(tower.layers, start=1):
            hidden = layer(hidden)
            expected[number] = tower.post_norm(hidden)
            layer.register_forward_hook(lambda *_, number=number: ran.append(number))
        for output, number in zip(tower(pixel_values(), read), read, strict=True):
            assert max_difference(output, expected[number]) < ATOL
        assert ran == list(range(1, read[-1] + 1)), "later layers are not run"

    def test_cls_is_that_of_the_whole_layer(self):
        for config in (CONFIG, TIMM, DISTILLED):
            tower = float64_tower(config)
            assert (
                max_difference(tower.cls(pixel_values(), 3), tower(pixel_values(), (3,))[0][:, 0])
                < ATOL
            )


class TestOtherSizes:
    @pytest.mark.parametrize("config", [CONFIG, DISTILLED], ids=["clip", "distilled"])
    @pytest.mark.parametrize(("height", "width"), [(40, 40), (8, 8), (16, 32), (72, 8)])
    def test_positions_are_interpolated(self, config, height, width):
        tower = float64_tower(config)
        pixels = pixel_values(height=height, width=width)
        prefix = config.num_prefix_tokens
        grid = (height // 8, width // 8)
        patches = tower.patch_embedding(pixels).flatten(2).transpose(1, 2)
        positions = resize_position_embedding(tower.position_embedding, grid, prefix)[prefix:]
        expected = tower.pre_norm(patches + positions)
        assert max_difference(tower.embed(pixels)[:, prefix:], expected) < ATOL

    def test_a_grid_of_as_many_patches_is_another_grid(self):
        """72 x 8 has nine patches as 24 x 24 has, but not their places."""
        position = float64_tower().position_embedding
        resized = resize_position_embedding(position, (9, 1))
        assert resized.shape == position.shape
        assert max_difference(resized, position) > 0.1


class TestResize:
    @given(side=st.integers(1, 7), prefix=st.integers(1, 2))
    def test_identity(self, side, prefix):
        position = random(side**2 + prefix, 6)
        assert torch.equal(resize_position_embedding(position, (side, side), prefix), position)

    def test_a_distillation_row_moves_no_patch(self):
        position = random(10, 4)
        distilled = torch.cat([position[:1], random(1, 4), position[1:]])
        ours = resize_position_embedding(distilled, (5, 4), 2)
        expected = resize_position_embedding(position, (5, 4))
        assert torch.equal(ours[:2], distilled[:2])
        assert torch.equal(ours[2:], expected[1:])

    def test_formula(self):
        """Bicubic with a = -0.75, pixel centres at (i + ½) · 3/5 - ½, borders repeated, no antialiasing."""
        position = random(10, 4)
        weights = torch.zeros(5, 3, dtype=torch.float64)
        for target in range(5):
            source_position = (target + 0.5) * 3 / 5 - 0.5
            for source in range(int(source_position // 1) - 1, int(source_position // 1) + 3):
                weights[target, min(max(source, 0), 2)] += cubic(abs(source_position - source))
        grid = position[1:].unflatten(0, (3, 3))
        expected = torch.einsum("ya,xb,abv->yxv", weights, weights, grid).flatten(0, 1)
        assert max_difference(resize_position_embedding(position, (5, 5))[1:], expected) < ATOL

    def test_rows_and_columns_are_told_apart(self):
        position = random(10, 4)
        tall = resize_position_embedding(position, (4, 2))
        wide = resize_position_embedding(position, (2, 4))
        swapped = torch.cat(
            [position[:1], position[1:].unflatten(0, (3, 3)).transpose(0, 1).flatten(0, 1)]
        )
        expected = (
            resize_position_embedding(swapped, (2, 4))[1:]
            .unflatten(0, (2, 4))
            .transpose(0, 1)
            .flatten(0, 1)
        )
        assert max_difference(tall[1:], expected) < ATOL
        assert max_difference(tall[1:], wide[1:]) > 0.01


def cubic(distance, a=-0.75):
    if distance <= 1:
        return (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    return a * (distance**3 - 5 * distance**2 + 8 * distance - 4) if distance < 2 else 0.0


TEXT = SMALL_CONFIG.text
BERT = changed_config(text__positions="bert", text__pad_token_id=0, text__type_vocab_size=2).text
LENGTHS = st.lists(st.integers(1, 8), min_size=1, max_size=4)


def made_text(config=TEXT):
    return off_defaults(TextTransformer(config)).double().eval()


def token_ids(*lengths, width=None):
    ids, mask = random_texts(lengths, width=width)
    return ids, mask.bool()


class TestPositions:
    @pytest.mark.parametrize(
        ("ids", "positions"),
        [
            ([0, 9, 8, 2], [2, 3, 4, 5]),
            ([0, 9, 2, 1, 1], [2, 3, 4, 1, 1]),
            ([1, 1, 0, 9, 2], [1, 1, 2, 3, 4]),
            ([0, 1, 9, 1, 2], [2, 1, 3, 1, 4]),
            ([1], [1]),
        ],
    )
    def test_roberta(self, ids, positions):
        """Positions are counted over tokens from pad + 1 = 2, and padding has position pad = 1."""
        assert made_text().position_ids(torch.tensor([ids])).tolist() == [positions]

    def test_others(self):
        ids = torch.tensor([[5, 6, 0, 7, 0]])
        assert made_text(changed_config(text__pad_token_id=0).text).position_ids(ids).tolist() == [
            [1, 2, 0, 3, 0]
        ]
        assert made_text(BERT).position_ids(ids).tolist() == [0, 1, 2, 3, 4]


class TestTextEmbed:
    @pytest.mark.parametrize("config", [TEXT, BERT], ids=["roberta", "bert"])
    def test_formula(self, config):
        tower = made_text(config)
        (ids, _) = token_ids(5, 3)
        for row in range(2):
            for column in range(5):
                word = int(ids[row, column])
                position = column if config is BERT else int(tower.position_ids(ids)[row, column])
                total = (
                    tower.word_embedding.weight[word] + tower.position_embedding.weight[position]
                )
                expected = tower.embedding_norm(total + tower.token_type_embedding.weight[0])
                assert max_difference(tower.embed(ids)[row, column], expected) < ATOL

    @pytest.mark.parametrize(
        ("config", "longest"), [(TEXT, 14), (BERT, 16)], ids=["roberta", "bert"]
    )
    def test_longest_text(self, config, longest):
        tower = made_text(config)
        assert tower.embed(token_ids(longest)[0]).isfinite().all()
        with pytest.raises(
            ValueError,
            match=rf"{longest + 1} tokens; the position table holds {longest}: shorten it",
        ):
            tower.embed(token_ids(longest + 1)[0])


class TestTextLayers:
    @pytest.mark.parametrize("read", [(3,), (1,), (1, 2, 3)], ids=str)
    def test_read_layers(self, read):
        tower = made_text()
        (ids, mask) = token_ids(5, 3)
        ran = []
        hidden = tower.embed(ids)
        expected = {}
        for number, layer in enumerate(tower.layers, start=1):
            hidden = expected[number] = layer(hidden, mask)
            layer.register_forward_hook(lambda *_, number=number: ran.append(number))
        outputs = tower(ids, mask, read)
        assert all(
            max_difference(out, expected[number]) < ATOL
            for out, number in zip(outputs, read, strict=True)
        )
        assert ran == list(range(1, read[-1] + 1)), "later layers are not run"
