"""Batches put together: texts filled up, masks only where something is padded, every tensor in order."""

from dataclasses import replace

import torch

import tiny
from bridgetower.data.batch import IGNORED, Batch, RankingBatch, joined


def test_captions_are_filled_up_to_the_longest() -> None:
    parts = [tiny.caption_batch((0, 1), (3, 3), seed=1), tiny.caption_batch((2,), (5,), seed=2)]
    whole = joined(parts, seed=9)
    assert (whole.seed, whole.ids, len(whole)) == (9, ("0", "1", "2"), 3)
    assert torch.equal(whole.pixel_values, torch.cat([part.pixel_values for part in parts]))
    assert whole.attention_mask is not None
    assert whole.attention_mask.sum(dim=1).tolist() == [3, 3, 5]
    assert torch.equal(whole.input_ids[:2, :3], parts[0].input_ids)
    assert whole.mlm_labels[0, 3:].tolist() == [IGNORED] * 2
    assert whole.image_index.tolist() == [0, 1, 2]


def test_no_mask_where_nothing_is_padded() -> None:
    whole = joined([tiny.caption_batch((0,), (4,)), tiny.caption_batch((1,), (4,))], seed=0)
    assert whole.attention_mask is None


def test_several_texts_of_an_image_stay_together() -> None:
    parts = []
    for number, lengths in enumerate([(2, 4), (6, 3)]):
        ids, mask = tiny.texts(lengths, seed=number)
        parts.append(
            RankingBatch(
                pixel_values=tiny.images(1),
                input_ids=ids,
                attention_mask=mask,
                image_index=torch.tensor([number]),
                ids=(str(number),),
            )
        )
    whole = joined(parts, seed=0)
    assert whole.attention_mask is not None
    assert whole.attention_mask.sum(dim=1).tolist() == [2, 4, 6, 3]


def test_what_is_not_known_stays_unknown() -> None:
    ids, mask = tiny.texts((3,))
    one = Batch(pixel_values=tiny.images(1), input_ids=ids, attention_mask=mask, ids=("a",))
    assert joined([one, replace(one, ids=("b",))], seed=0).labels is None
    known = replace(one, labels=torch.tensor([[0.5, 1.0]]))
    assert joined([known, known], seed=0).labels.tolist() == [[0.5, 1.0]] * 2
