"""The text tower: positions of RoBERTa and BERT, padding, and the layers that are read."""

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import tiny
from bridgetower.model.config import TextConfig
from bridgetower.model.towers import TextTransformer

CONFIG = tiny.CONFIG.text
BERT = tiny.changed(text__positions="bert", text__pad_token_id=0, text__type_vocab_size=2).text
ATOL = 1e-10
LENGTHS = st.lists(st.integers(1, 8), min_size=1, max_size=4)


def made(config: TextConfig = CONFIG) -> TextTransformer:
    return tiny.off_defaults(TextTransformer(config)).double().eval()


def texts(*lengths: int, width: int | None = None) -> tuple[Tensor, Tensor]:
    ids, mask = tiny.texts(lengths, width=width)
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
    def test_roberta(self, ids: list[int], positions: list[int]) -> None:
        """Counted over tokens that are not padding, from pad + 1 = 2; padding has position pad = 1."""
        assert made().position_ids(torch.tensor([ids])).tolist() == [positions]

    def test_others(self) -> None:
        ids = torch.tensor([[5, 6, 0, 7, 0]])
        assert made(tiny.changed(text__pad_token_id=0).text).position_ids(ids).tolist() == [[1, 2, 0, 3, 0]]
        assert made(BERT).position_ids(ids).tolist() == [0, 1, 2, 3, 4]


class TestEmbed:
    @pytest.mark.parametrize("config", [CONFIG, BERT], ids=["roberta", "bert"])
    def test_formula(self, config: TextConfig) -> None:
        tower, (ids, _) = made(config), texts(5, 3)
        for row in range(2):
            for column in range(5):
                word = int(ids[row, column])
                place = column if config is BERT else int(tower.position_ids(ids)[row, column])
                total = tower.word_embedding.weight[word] + tower.position_embedding.weight[place]
                expected = tower.embedding_norm(total + tower.token_type_embedding.weight[0])
                assert tiny.off(tower.embed(ids)[row, column], expected) < ATOL

    @pytest.mark.parametrize(("config", "longest"), [(CONFIG, 14), (BERT, 16)], ids=["roberta", "bert"])
    def test_longest_text(self, config: TextConfig, longest: int) -> None:
        tower = made(config)
        assert tower.embed(texts(longest)[0]).isfinite().all()
        message = rf"text of {longest + 1} tokens; the position table holds {longest}: shorten it"
        with pytest.raises(ValueError, match=message):
            tower.embed(texts(longest + 1)[0])


class TestLayers:
    @pytest.mark.parametrize("read", [(3,), (1,), (1, 2, 3)], ids=str)
    def test_read_layers(self, read: tuple[int, ...]) -> None:
        tower, (ids, mask) = made(), texts(5, 3)
        hidden = tower.embed(ids)
        expected = {}
        for number, layer in enumerate(tower.layers, start=1):
            hidden = expected[number] = layer(hidden, mask)
        outputs = tower(ids, mask, read)
        assert len(outputs) == len(read)
        assert all(tiny.off(out, expected[number]) < ATOL for out, number in zip(outputs, read, strict=True))

    def test_later_layers_are_not_run(self) -> None:
        tower, (ids, mask), ran = made(), texts(5, 3), []
        for number, layer in enumerate(tower.layers, start=1):
            layer.register_forward_hook(lambda *_, number=number: ran.append(number))
        tower(ids, mask, (1, 2))
        assert ran == [1, 2]
