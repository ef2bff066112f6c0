"""Encodings come back as they were, in any order, and nothing is encoded that is there."""

from collections.abc import Iterator, Sequence

import pytest
import torch

import tiny
from bridgetower.evaluation.encodings import Encodings
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.encodings import Encoded
from bridgetower.rows import MemoryRows, Rows

LENGTHS = (2, 3, 3, 4, 6)


class Texts:
    """Encodes texts of some lengths and remembers what it was asked for."""

    def __init__(self, model: BridgeTower) -> None:
        self.model, self.asked = model, []
        self.ids, self.mask = tiny.texts(LENGTHS)

    def __call__(self, batches: Sequence[range]) -> Iterator[Encoded]:
        for rows in batches:
            self.asked.append(list(rows))
            yield self.whole(rows)

    def whole(self, rows: range) -> Encoded:
        ids, mask = self.ids[rows.start : rows.stop], self.mask[rows.start : rows.stop]
        longest = int(mask.sum(dim=1).max())
        return self.model.cache_text(self.model.encode_text(ids[:, :longest], mask[:, :longest]))


@pytest.fixture
def texts() -> Texts:
    return Texts(tiny.build())


def rows(per_part: int = 2) -> Rows:
    return MemoryRows(num_rows=len(LENGTHS), rows_per_part=per_part)


@pytest.mark.parametrize(("per_part", "batch_size"), [(2, 2), (4, 2), (5, 3), (100, 100)])
def test_come_back_in_any_order(texts: Texts, per_part: int, batch_size: int) -> None:
    model = texts.model
    kept = Encodings(texts, batch_size=batch_size, kept=rows(per_part), vectors=(model.text_embeds, rows(per_part)))
    done: list[int] = []
    with torch.no_grad():
        kept.fill(done.append)
        taken, asked = kept.take([4, 0, 4], torch.device("cpu")), texts.whole(range(5))[torch.tensor([4, 0, 4])]
        image = model.encode_image(tiny.images(3))
        assert sum(done) == 5
        assert taken.mask is not None
        assert taken.mask.sum(dim=1).tolist() == [6, 2, 6]
        assert tiny.off(model.fuse(image, taken).pooled, model.fuse(image, asked).pooled) < 1e-5
        assert tiny.off(taken.cls, asked.cls) < 1e-5
        assert tiny.off(kept.vectors(model.config.heads.itc_size), model.text_embeds(texts.whole(range(5)))) < 1e-5
    assert kept.take([1, 2], torch.device("cpu")).mask is None


def test_each_item_is_encoded_once_and_only_if_it_is_not_there(texts: Texts) -> None:
    stored, vectors = rows(), rows()
    first = Encodings(texts, batch_size=2, kept=stored, vectors=(texts.model.text_embeds, vectors))
    with torch.no_grad():
        first.fill(lambda number: None, encodings=False)
        assert texts.asked == [[0, 1], [2, 3], [4]]
        first.fill(lambda number: None)
        assert len(texts.asked) == 3
        again = Encodings(texts, batch_size=2, kept=rows(), vectors=(texts.model.text_embeds, vectors))
        again.fill(lambda number: None, encodings=False)
        assert len(texts.asked) == 3  # the vectors outlasted
        again.fill(lambda number: None)
        assert texts.asked[3:] == [[0, 1], [2, 3], [4]]


def test_only_vectors(texts: Texts) -> None:
    model = texts.model

    def cls(batches: Sequence[range]) -> Iterator[Encoded]:
        return (Encoded((), texts.whole(batch).cls) for batch in batches)

    encodings = Encodings(cls, batch_size=2, vectors=(model.text_embeds, rows()))
    with torch.no_grad():
        encodings.fill(lambda number: None)
        assert encodings.vectors(model.config.heads.itc_size).shape == (5, model.config.heads.itc_size)


def test_a_process_without_items() -> None:
    model = tiny.build()
    empty = MemoryRows(num_rows=0, rows_per_part=2)
    encodings = Encodings(lambda batches: iter([]), batch_size=2, vectors=(model.text_embeds, empty))
    encodings.fill(lambda number: None)
    assert encodings.vectors(16).shape == (0, 16)
