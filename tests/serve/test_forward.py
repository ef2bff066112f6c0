"""A batch of every kind of item gives what the predictors' own methods give, each image and text encoded once."""

import pytest
import torch
from torch import Tensor

from bridgetower.inference.attention import Explanation, explain
from bridgetower.inference.items import Item, LikeliestTokens, filled_words
from bridgetower.inference.predictor import load
from bridgetower.serve.service import Explaining, compute_queued
from helpers.servers import PNGS, SERVED_TEXTS

MASKED = ["a <mask> on <mask>", "<mask> bar", "a square that is <mask> on a grey ground"]


def items_of(model):
    images = [model.processor.resize(content) for content in PNGS]
    texts, masked = (
        [tuple(ids) for ids in model.processor.token_ids(texts)] for texts in (SERVED_TEXTS, MASKED)
    )
    rows = []
    for number, image in enumerate(images):
        rows += [
            Item(image=image),
            Item(ids=texts[number]),
            Item(kind="match", image=image, ids=texts[number]),
            Item(kind="fill_mask", image=image, ids=masked[number], top=number + 1),
            Item(image=image, ids=texts[number]),
            Item(kind="match", image=image, ids=texts[0]),
        ]
    return rows


def expected_of(model):
    rows = []
    for number, content in enumerate(PNGS):
        rows += [
            model.embed_images(content)[0],
            model.embed_texts(SERVED_TEXTS[number])[0],
            float(model.match(content, SERVED_TEXTS[number]).logit()),
            model.fill_mask(content, MASKED[number], top=number + 1),
            model.embed_pairs(content, SERVED_TEXTS[number])[0],
            float(model.match(content, SERVED_TEXTS[0]).logit()),
        ]
    return rows


def direct_results(model):
    first, second, third = (model.processor.resize(content) for content in PNGS)
    text, other, _ = map(tuple, model.processor.token_ids(SERVED_TEXTS))
    items = [
        Item(kind="prediction", head="nlvr2", image=first, image_2=second, ids=text, top=2),
        Item(kind="prediction", head="vqa", image=first, ids=text, top=2),
        Item(kind="prediction", head="snli_ve", image=second, ids=other, top=3),
        Item(kind="prediction", head="nlvr2", image=third, image_2=first, ids=other, top=1),
        Item(kind="prediction", head="snli_ve", image=first, ids=text, top=1),
    ]
    return items, [
        model.reason(PNGS[0], PNGS[1], SERVED_TEXTS[0]),
        model.answer(PNGS[0], SERVED_TEXTS[0], top=2),
        model.entail(PNGS[1], SERVED_TEXTS[1]),
        model.reason(PNGS[2], PNGS[0], SERVED_TEXTS[1])[:1],
        model.entail(PNGS[0], SERVED_TEXTS[0])[:1],
    ]


def assert_same_outcomes(outcomes, expected):
    for outcome, result in zip(outcomes, expected, strict=True):
        if isinstance(result, list):
            assert_same_outcomes(outcome, result)
        elif isinstance(result, Explanation):
            assert outcome.words == result.words
            torch.testing.assert_close(outcome.maps, result.maps, atol=1e-6, rtol=0)
            assert outcome.score == pytest.approx(result.score, abs=1e-6)
        elif isinstance(result, Tensor | float):
            atol = 1e-5 if isinstance(result, Tensor) else 5e-5  # log-odds
            torch.testing.assert_close(
                torch.as_tensor(outcome), torch.as_tensor(result), atol=atol, rtol=0
            )
        else:  # a word or a label
            assert vars(outcome) == vars(result) | {
                "probability": pytest.approx(result.probability, abs=1e-5)
            }


def with_words(model, outcomes):
    return [
        filled_words(model.processor, outcome) if isinstance(outcome, LikeliestTokens) else outcome
        for outcome in outcomes
    ]


def computed(model, items):
    return with_words(model, compute_queued(lambda item: model, items))


def test_a_mixed_batch_of_two_models_in_any_order_is_the_direct_calls(
    predictor, answering_predictor
):
    looks = [Explaining(item.image, item.ids, "attention") for item in items_of(predictor)[4::6]]
    judging, judgements = direct_results(answering_predictor)
    items = [*items_of(predictor), *looks, *judging]
    expected = expected_of(predictor) + [
        explain(predictor, *pair) for pair in zip(PNGS, SERVED_TEXTS, strict=True)
    ]
    expected += judgements
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 5, 11, len(items)):
        numbers = torch.randperm(len(items), generator=generator)[:size].tolist()
        outcomes = compute_queued(
            lambda item: answering_predictor if item in judging else predictor,
            [items[number] for number in numbers],
        )
        assert_same_outcomes(
            with_words(predictor, outcomes), [expected[number] for number in numbers]
        )


def test_control_a_swapped_pair_is_noticed(predictor):
    items = items_of(predictor)
    expected = expected_of(predictor)
    items[2] = Item(kind="match", image=items[8].image, ids=items[2].ids)
    with pytest.raises(AssertionError):
        assert_same_outcomes(computed(predictor, items), expected)


def test_each_image_and_text_is_encoded_once(predictor):
    counts = {"vision": 0, "text": 0}

    def counting(name):
        def count(module, inputs, output):
            counts[name] += len(inputs[0])

        return count

    towers = {"vision": predictor.model.vision, "text": predictor.model.text}
    hooks = [tower.register_forward_hook(counting(name)) for name, tower in towers.items()]
    computed(predictor, items_of(predictor))
    for hook in hooks:
        hook.remove()
    assert counts == {"vision": 3, "text": 6}


def test_exported_parts(exported, predictor):
    engine = load(exported, engine="onnxruntime")
    assert_same_outcomes(computed(engine, items_of(engine)), expected_of(predictor))


def test_more_masks_than_are_ranked_at_once(predictor):
    (ids,) = map(tuple, predictor.processor.token_ids(["<mask>" * 20]))
    images = [predictor.processor.resize(content) for content in PNGS] * 2
    outcomes = computed(
        predictor, [Item(kind="fill_mask", image=image, ids=ids) for image in images]
    )
    expected = [predictor.fill_mask(content, "<mask>" * 20, top=1) for content in PNGS]
    assert_same_outcomes(outcomes, expected * 2)
