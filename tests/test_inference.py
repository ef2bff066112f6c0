"""Distributions at masks, and the ranking of two stages; serve/test_forward.py has batches of items of all kinds."""

import pytest
import torch

from bridgetower.inference import Item, top_words, two_stage_order
from served import PNGS


@pytest.mark.parametrize(
    ("cosine", "match", "order"),
    [
        ([0.1, 0.9, 0.5], [torch.nan, torch.nan, torch.nan], [1, 2, 0]),
        ([0.1, 0.9, 0.5], [0.2, 0.1, torch.nan], [0, 1, 2]),
        ([0.1, 0.9, 0.5, 0.7], [-5.0, torch.nan, -5.0, torch.nan], [2, 0, 1, 3]),  # equal scores: by cosine
        ([0.5, 0.5, 0.5], [torch.nan, 0.3, torch.nan], [1, 0, 2]),
        ([], [], []),
    ],
)
def test_what_was_matched_comes_first_then_the_nearest(cosine, match, order):
    assert two_stage_order(torch.tensor(cosine), torch.tensor(match)).tolist() == order


def test_queries_are_ranked_each_on_its_own():
    generator = torch.Generator().manual_seed(0)
    cosine, match = torch.rand(2, 4, 6, generator=generator).unbind()
    match[match < 0.5] = torch.nan
    rows = [two_stage_order(*row) for row in zip(cosine, match, strict=True)]
    assert torch.equal(two_stage_order(cosine, match), torch.stack(rows))


def test_distributions_at_masks_are_those_that_words_are_taken_from(predictor):
    texts = ["a <mask> on <mask>", "<mask> bar"]
    ids = [tuple(tokens) for tokens in predictor.processor.token_ids(texts)]
    images = [predictor.processor.resize(content) for content in PNGS[:2]]
    pairs = list(zip(images, ids, strict=True))
    whole = predictor.compute([Item(kind="mask_probabilities", image=image, ids=tokens) for image, tokens in pairs])
    for found, content, text, masks in zip(whole, PNGS, texts, (2, 1), strict=False):
        assert found.shape == (masks, predictor.processor.vocab_size)
        torch.testing.assert_close(found.sum(dim=1), torch.ones(masks))
        words, expected = top_words(predictor.processor, found, 3), predictor.fill_mask(content, text, top=3)
        for one, other in zip(words, expected, strict=True):
            assert [word.word for word in one] == [word.word for word in other]
            found_, expected_ = ([word.probability for word in each] for each in (one, other))
            assert found_ == pytest.approx(expected_, abs=1e-6)
