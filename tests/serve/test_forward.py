"""A batch of every kind of item gives what the predictor's own methods give, each image and text encoded once."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bridgetower.attention import Explanation as Attention
from bridgetower.attention import attention_of, explain
from bridgetower.inference import FilledWord, Item, Pixels, Tokens
from bridgetower.predictor import Predictor, load
from bridgetower.serve.service import Outcome, QueueItem, compute
from served import PNGS, TEXTS

MASKED = ["a <mask> on <mask>", "<mask> bar", "a square that is <mask> on a grey ground"]


def prepared(predictor: Predictor, texts: Sequence[str] = TEXTS) -> tuple[list[Pixels], list[Tokens]]:
    images = [predictor.processor.resize(content) for content in PNGS]
    return images, [tuple(ids) for ids in predictor.processor.token_ids(texts)]


def computed(predictor: Predictor, items: Sequence[QueueItem]) -> list[Outcome]:
    """What one model computes of a batch."""
    return compute(lambda item: predictor, items)


def items_of(predictor: Predictor) -> list[Item]:
    """Vectors of images, texts and pairs, matches and filled masks, mixed."""
    images, texts = prepared(predictor)
    _, masked = prepared(predictor, MASKED)
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


def expected_of(predictor: Predictor) -> list[Any]:
    """What the predictor's methods say, one input at a time."""
    rows: list[Any] = []
    for number, content in enumerate(PNGS):
        rows += [
            predictor.embed_images(content)[0],
            predictor.embed_texts(TEXTS[number])[0],
            float(predictor.match(content, TEXTS[number]).logit()),
            predictor.fill_mask(content, MASKED[number], top=number + 1),
            predictor.embed_pairs(content, TEXTS[number])[0],
            float(predictor.match(content, TEXTS[0]).logit()),
        ]
    return rows


def assert_same(outcomes: Sequence[Outcome], expected: Sequence[Any]) -> None:
    for outcome, wanted in zip(outcomes, expected, strict=True):
        if isinstance(wanted, list):
            assert len(outcome) == len(wanted)  # type: ignore[arg-type]
            for words, others in zip(outcome, wanted, strict=True):  # type: ignore[arg-type]
                assert [word.word for word in words] == [word.word for word in others]
                pairs = zip(words, others, strict=True)
                assert all(word.probability == pytest.approx(other.probability, abs=1e-5) for word, other in pairs)
        else:
            atol = 1e-5 if isinstance(outcome, Tensor) else 5e-5  # log-odds
            torch.testing.assert_close(torch.as_tensor(outcome), torch.as_tensor(wanted), atol=atol, rtol=0)


def test_a_mixed_batch_in_any_order_is_the_direct_calls(predictor: Predictor) -> None:
    items, expected = items_of(predictor), expected_of(predictor)
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 5, 11, len(items)):
        numbers = torch.randperm(len(items), generator=generator)[:size].tolist()
        outcomes = computed(predictor, [items[number] for number in numbers])
        assert_same(outcomes, [expected[number] for number in numbers])


def test_control_a_swapped_pair_is_noticed(predictor: Predictor) -> None:
    items, expected = items_of(predictor), expected_of(predictor)
    images, _ = prepared(predictor)
    items[2] = Item(kind="match", image=images[1], ids=items[2].ids)
    with pytest.raises(AssertionError):
        assert_same(computed(predictor, items), expected)


def test_each_image_and_text_is_encoded_once(predictor: Predictor) -> None:
    counts = {"vision": 0, "text": 0}

    def counting(name: str) -> Callable[..., None]:
        def count(module: object, inputs: tuple[Tensor, ...], output: object) -> None:
            counts[name] += len(inputs[0])

        return count

    towers = {"vision": predictor.model.vision, "text": predictor.model.text}
    hooks = [tower.register_forward_hook(counting(name)) for name, tower in towers.items()]
    computed(predictor, items_of(predictor))
    for hook in hooks:
        hook.remove()
    assert counts == {"vision": 3, "text": 6}


def test_attention_among_others(predictor: Predictor) -> None:
    images, texts = prepared(predictor)
    looks = [partial(attention_of, predictor, *given) for given in zip(images, texts, strict=True)]
    outcomes = computed(predictor, [looks[0], *items_of(predictor), *looks[1:]])
    for outcome, content, text in zip([outcomes[0], *outcomes[-2:]], PNGS, TEXTS, strict=True):
        expected = explain(predictor, content, text)
        assert isinstance(outcome, Attention)
        assert outcome.words == expected.words
        torch.testing.assert_close(outcome.maps, expected.maps, atol=1e-6, rtol=0)
        assert outcome.score == pytest.approx(expected.score, abs=1e-6)
    assert_same(outcomes[1:-2], expected_of(predictor))


def test_exported_parts(exported: Path, predictor: Predictor) -> None:
    engine = load(exported, engine="onnxruntime")
    assert_same(computed(engine, items_of(engine)), expected_of(predictor))


def test_more_masks_than_are_ranked_at_once(predictor: Predictor) -> None:
    images, _ = prepared(predictor)
    (ids,) = prepared(predictor, ["<mask>" * 20])[1]
    outcomes = computed(predictor, [Item(kind="fill_mask", image=image, ids=ids) for image in images * 2])
    assert [len(outcome) for outcome in outcomes if isinstance(outcome, list)] == [20] * 6
    (masks,) = [predictor.fill_mask(PNGS[1], "<mask>" * 20, top=1)]
    first = [words[0] for words in outcomes[4]]  # type: ignore[union-attr, index]
    assert all(isinstance(word, FilledWord) for word in first)
    assert [word.word for word in first] == [words[0].word for words in masks]


def test_answers_of_another_model(predictor: Predictor, answering_checkpoint: Path) -> None:
    answering = load(answering_checkpoint, device="cpu")
    (image, *_), (text, *_) = prepared(predictor)
    asked = Item(kind="answer", image=image, ids=text, top=2)
    items = [asked, Item(image=image, ids=text), asked, Item(kind="match", image=image, ids=text)]
    first, joint, second, match = compute(lambda item: answering if item is asked else predictor, items)
    (expected,) = computed(answering, [asked])
    assert first == second
    assert [choice.label for choice in first] == [choice.label for choice in expected]  # type: ignore[union-attr]
    assert_same([joint, match], computed(predictor, [items[1], items[3]]))
    assert computed(answering, items[:2])[0] == first


def test_two_images_beside_all_other_kinds(answering_checkpoint: Path) -> None:
    model = load(answering_checkpoint, device="cpu")
    (first, second, third), (text, other, _) = prepared(model)
    items = [
        Item(kind="reason", image=first, image_2=second, ids=text, top=2),
        Item(kind="answer", image=first, ids=text, top=2),
        Item(kind="entail", image=second, ids=other, top=3),
        Item(kind="reason", image=third, image_2=first, ids=other, top=1),
        Item(kind="entail", image=first, ids=text, top=1),
    ]
    expected = [
        model.reason(PNGS[0], PNGS[1], TEXTS[0]),
        model.answer(PNGS[0], TEXTS[0], top=2),
        model.entail(PNGS[1], TEXTS[1]),
        model.reason(PNGS[2], PNGS[0], TEXTS[1])[:1],
        model.entail(PNGS[0], TEXTS[0])[:1],
    ]
    for outcome, choices in zip(computed(model, items), expected, strict=True):
        assert isinstance(outcome, list)
        assert [choice.label for choice in outcome] == [choice.label for choice in choices]  # type: ignore[union-attr]
        found = [choice.probability for choice in outcome]  # type: ignore[union-attr]
        assert found == pytest.approx([choice.probability for choice in choices], abs=1e-5)
