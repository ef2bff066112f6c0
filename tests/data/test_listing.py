"""What a source says: brought together by picture, in order, with what is bad and what is left out."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bridgetower.data.kinds import Question, Statement
from bridgetower.data.listing import Listing, check_bad, new_listing
from bridgetower.data.locations import FilePicture
from rows import png


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    return tmp_path


@pytest.fixture
def listing() -> Iterator[Listing]:
    with new_listing("captions") as made:
        yield made


def picture(root: Path, name: str) -> FilePicture:
    return FilePicture(root=root, name=name)


def fill(listing: Listing, root: Path, count: int = 5, split: str = "train") -> None:
    for number in range(count):
        listing.add(f"id-{number}", [picture(root, f"{number}.png")], [f"shade {number}"], split=split)
    listing.finish()


class TestEntries:
    def test_texts_come_together_in_order_of_first_appearance(self, listing: Listing, root: Path) -> None:
        for name, text in (("b", "1"), ("a", "2"), ("b", "3"), ("b", "1")):
            listing.add(name, [picture(root, "0.png")], [text], split="train")
        listing.finish()
        assert [(entry.image_id, entry.texts) for entry in listing.entries("train")] == [
            ("b", ("1", "3", "1")),
            ("a", ("2",)),
        ]

    def test_pictures_can_be_read(self, listing: Listing, root: Path) -> None:
        fill(listing, root)
        entries = list(listing.entries("train"))
        assert [entry.pictures[0].read() for entry in entries] == [png(number) for number in range(5)]
        assert entries[2].pictures == (picture(root, "2.png"),)

    def test_parts(self, listing: Listing, root: Path) -> None:
        fill(listing, root)
        assert [entry.image_id for entry in listing.entries("train", 1, 2)] == ["id-1", "id-2"]
        assert [entry.image_id for entry in listing.entries("train", 4, 9)] == ["id-4"]

    def test_a_picture_may_be_in_two_splits(self, listing: Listing, root: Path) -> None:
        for split in ("test", "test-dev", "train"):
            listing.add("a", [picture(root, "0.png")], [split], split=split)
        assert listing.splits_of("a") == ["test", "test-dev", "train"]
        listing.finish()
        assert list(listing.counts().items()) == [("train", 1), ("test", 1), ("test-dev", 1)]

    def test_a_picture_without_a_text_is_dropped(self, listing: Listing, root: Path) -> None:
        listing.add("a", [picture(root, "0.png")], [], split="train")
        listing.finish()
        assert listing.counts() == {}
        assert listing.bad_messages() == []

    def test_digest_follows_texts_and_pictures(self, root: Path) -> None:
        def digest(text: str) -> str:
            with new_listing("captions") as listing:
                listing.add("a", [picture(root, "0.png")], [text], split="train")
                listing.finish()
                return next(listing.entries("train")).digest

        first = digest("a")
        assert digest("a") == first != digest("b")
        (root / "0.png").write_bytes(png(9, size=8))
        assert digest("a") != first

    def test_questions(self, root: Path) -> None:
        asked = Question(question_id=2**40, question="Where?", question_type="where", answers=("here", "Ünder"))
        with new_listing("vqa") as listing:
            listing.add("a", [picture(root, "0.png")], [asked], split="test-dev")
            listing.finish()
            assert next(listing.entries("test-dev")).texts == (asked,)

    def test_statements_about_two(self, root: Path) -> None:
        statement = Statement(statement_id="dev-1-0-0", text="Both.", label="False")
        with new_listing("nlvr2") as listing:
            listing.add("dev-1-0", [picture(root, "0.png"), picture(root, "1.png")], [statement], split="test1")
            listing.finish()
            entry = next(listing.entries("test1"))
        assert [each.name for each in entry.pictures] == ["0.png", "1.png"]
        assert entry.texts == (statement,)


class TestBad:
    def test_missing_pictures_are_counted_once(self, listing: Listing, root: Path) -> None:
        for text in ("a", "b"):
            listing.add("x", [picture(root, "none.png")], [text], split="train", place="line 3")
        listing.add("y", [picture(root, "0.png"), picture(root, "two.png")], ["c"], split="train")
        listing.bad("label 'maybe'")
        listing.finish()
        assert listing.bad_messages() == ["label 'maybe'", "line 3: no file 'none.png'", "y: no file 'two.png'"]
        assert listing.counts() == {}
        listing.check_bad(root, 3)
        with pytest.raises(ValueError, match=r"has 3 bad .*, allowed are 2 \(max_bad\): label 'maybe' \| line 3: no"):
            listing.check_bad(root, 2)

    def test_texts_that_cannot_be_used(self, root: Path) -> None:
        with new_listing("vqa") as listing:
            asked = [Question(question_id=number, question=text) for number, text in enumerate(("Why?", " ", "\ud83d"))]
            listing.add("a", [picture(root, "0.png")], asked, split="train", place="line 3")
            listing.add("b", [picture(root, "1.png")], asked[1:2], split="train")
            listing.finish()
            assert listing.bad_messages() == [
                "line 3: question 1 is empty",
                "line 3: question 2 is not valid Unicode",
                "b: question 1 is empty",
            ]
            assert [entry.texts for entry in listing.entries("train")] == [tuple(asked[:1])]

    def test_names_that_are_not_utf8_or_empty(self, listing: Listing, root: Path) -> None:
        name = "caf\udce9.png"
        (root / name).write_bytes(png(1))
        listing.add(name, [picture(root, name)], ["a"], split="train")
        listing.add("two", [picture(root, "0.png"), picture(root, name)], ["a"], split="train", place=f"row of {name}")
        listing.add("", [picture(root, "0.png")], ["a"], split="train", place="line 4")
        assert listing.splits_of(name) == []
        assert (listing.is_new(name), listing.is_new(name)) == (True, False)
        listing.leave_out("twice", name)
        listing.finish()
        problem = r"the name 'caf\udce9.png' is not UTF-8; rename the file"
        assert listing.bad_messages() == [
            rf"caf\udce9.png: {problem}",
            rf"row of caf\udce9.png: {problem}",
            "line 4: the picture has no name",
        ]
        assert listing.left_out() == {"twice": [r"caf\udce9.png"]}
        assert listing.counts() == {}

    def test_many_are_counted_and_the_first_named(self, listing: Listing, root: Path) -> None:
        for number in range(25):
            listing.bad(f"number {number}.")
        with pytest.raises(ValueError, match=r"has 25 bad .*number 0\. .* number 9\. and 15 more$"):
            listing.check_bad(root, 0)
        with pytest.raises(ValueError, match=r"has 12 bad .*: 0 .* 9 and 2 more$"):
            check_bad(root, [str(number) for number in range(12)], 11)

    def test_left_out(self, listing: Listing) -> None:
        for number in range(1003):
            listing.leave_out("dead link", str(number))
        listing.leave_out("empty", "x")
        left_out = listing.left_out()
        assert list(left_out) == ["dead link", "empty"]
        assert left_out["dead link"] == [str(number) for number in range(1000)]
        assert listing.num_left_out() == {"dead link": 1003}


def test_assign_gives_the_lowest_ranks_the_first_split(listing: Listing, root: Path) -> None:
    fill(listing, root, split="")
    listing.assign(lambda name: str(9 - int(name[-1])).encode(), {"test": 2, "validation": 1, "train": 2})
    assert {split: [entry.image_id for entry in listing.entries(split)] for split in listing.counts()} == {
        "train": ["id-0", "id-1"],
        "validation": ["id-2"],
        "test": ["id-3", "id-4"],
    }


def test_no_room_is_an_error_of_the_system() -> None:
    def fill_up() -> None:
        with new_listing("vqa") as listing:
            listing._database.execute("PRAGMA max_page_count = 10")
            for number in range(10_000):
                listing.bad(f"message number {number}")

    with pytest.raises(OSError, match=r"no room for the list of pictures .*SQLITE_TMPDIR"):
        fill_up()
