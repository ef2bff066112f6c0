"""What a source says: brought together by picture, in order, with what is bad and what is left out."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bridgetower.data.images import ImageRef
from bridgetower.data.manifest import Lookup, Manifest, check_errors, new_manifest
from bridgetower.data.schema import CAPTIONS, NLVR2, VQA, Question, Statement
from rows import png


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    return tmp_path


@pytest.fixture
def manifest() -> Iterator[Manifest]:
    with new_manifest(CAPTIONS) as made:
        yield made


def picture(root: Path, name: str) -> ImageRef:
    return ImageRef.of_file(root, name)


def fill(manifest: Manifest, root: Path, count: int = 5, split: str = "train") -> None:
    for number in range(count):
        manifest.add(f"id-{number}", [picture(root, f"{number}.png")], [f"shade {number}"], split=split)
    manifest.finish()


class TestEntries:
    def test_texts_come_together_in_order_of_first_appearance(self, manifest: Manifest, root: Path) -> None:
        for name, text in (("b", "1"), ("a", "2"), ("b", "3"), ("b", "1")):
            manifest.add(name, [picture(root, "0.png")], [text], split="train")
        manifest.finish()
        assert [(entry.image_id, entry.texts) for entry in manifest.entries("train")] == [
            ("b", ("1", "3", "1")),
            ("a", ("2",)),
        ]

    def test_pictures_can_be_read(self, manifest: Manifest, root: Path) -> None:
        fill(manifest, root)
        entries = list(manifest.entries("train"))
        assert [entry.images[0].read() for entry in entries] == [png(number) for number in range(5)]
        assert entries[2].images == (picture(root, "2.png"),)

    def test_parts(self, manifest: Manifest, root: Path) -> None:
        fill(manifest, root)
        assert [entry.image_id for entry in manifest.entries("train", 1, 2)] == ["id-1", "id-2"]
        assert [entry.image_id for entry in manifest.entries("train", 4, 9)] == ["id-4"]

    def test_a_picture_may_be_in_two_splits(self, manifest: Manifest, root: Path) -> None:
        for split in ("test", "test-dev", "train"):
            manifest.add("a", [picture(root, "0.png")], [split], split=split)
        assert manifest.splits_of("a") == ["test", "test-dev", "train"]
        manifest.finish()
        assert list(manifest.counts().items()) == [("train", 1), ("test", 1), ("test-dev", 1)]

    def test_a_picture_without_a_text_is_dropped(self, manifest: Manifest, root: Path) -> None:
        manifest.add("a", [picture(root, "0.png")], [], split="train")
        manifest.finish()
        assert manifest.counts() == {}
        assert manifest.errors() == []

    def test_digest_follows_texts_and_pictures(self, root: Path) -> None:
        def digest(text: str) -> str:
            with new_manifest(CAPTIONS) as manifest:
                manifest.add("a", [picture(root, "0.png")], [text], split="train")
                manifest.finish()
                return next(manifest.entries("train")).digest

        first = digest("a")
        assert digest("a") == first != digest("b")
        (root / "0.png").write_bytes(png(9, size=8))
        assert digest("a") != first

    def test_questions(self, root: Path) -> None:
        asked = Question(question_id=2**40, question="Where?", question_type="where", answers=("here", "Ünder"))
        with new_manifest(VQA) as manifest:
            manifest.add("a", [picture(root, "0.png")], [asked], split="test-dev")
            manifest.finish()
            assert next(manifest.entries("test-dev")).texts == (asked,)

    def test_statements_about_two(self, root: Path) -> None:
        statement = Statement(statement_id="dev-1-0-0", text="Both.", label="False")
        with new_manifest(NLVR2) as manifest:
            manifest.add("dev-1-0", [picture(root, "0.png"), picture(root, "1.png")], [statement], split="test1")
            manifest.finish()
            entry = next(manifest.entries("test1"))
        assert [each.name for each in entry.images] == ["0.png", "1.png"]
        assert entry.texts == (statement,)


class TestBad:
    def test_missing_pictures_are_counted_once(self, manifest: Manifest, root: Path) -> None:
        for text in ("a", "b"):
            manifest.add("x", [picture(root, "none.png")], [text], split="train", place="line 3")
        manifest.add("y", [picture(root, "0.png"), picture(root, "two.png")], ["c"], split="train")
        manifest.bad("label 'maybe'")
        manifest.finish()
        assert manifest.errors() == ["label 'maybe'", "line 3: no file 'none.png'", "y: no file 'two.png'"]
        assert manifest.counts() == {}
        manifest.check_errors(root, 3)
        with pytest.raises(
            ValueError, match=r"has 3 bad .*, allowed are 2 \(max_errors\): label 'maybe' \| line 3: no"
        ):
            manifest.check_errors(root, 2)

    def test_texts_that_cannot_be_used(self, root: Path) -> None:
        with new_manifest(VQA) as manifest:
            asked = [Question(question_id=number, question=text) for number, text in enumerate(("Why?", " ", "\ud83d"))]
            manifest.add("a", [picture(root, "0.png")], asked, split="train", place="line 3")
            manifest.add("b", [picture(root, "1.png")], asked[1:2], split="train")
            manifest.finish()
            assert manifest.errors() == [
                "line 3: question 1 is empty",
                "line 3: question 2 is not valid Unicode",
                "b: question 1 is empty",
            ]
            assert [entry.texts for entry in manifest.entries("train")] == [tuple(asked[:1])]

    def test_names_that_are_not_utf8_or_empty(self, manifest: Manifest, root: Path) -> None:
        name = "caf\udce9.png"
        (root / name).write_bytes(png(1))
        manifest.add(name, [picture(root, name)], ["a"], split="train")
        manifest.add("two", [picture(root, "0.png"), picture(root, name)], ["a"], split="train", place=f"row of {name}")
        manifest.add("", [picture(root, "0.png")], ["a"], split="train", place="line 4")
        assert manifest.splits_of(name) == []
        assert (manifest.is_new(name), manifest.is_new(name)) == (True, False)
        manifest.leave_out("twice", name)
        manifest.finish()
        problem = r"the name 'caf\udce9.png' is not UTF-8; rename the file"
        assert manifest.errors() == [
            rf"caf\udce9.png: {problem}",
            rf"row of caf\udce9.png: {problem}",
            "line 4: the image has no name",
        ]
        assert manifest.left_out() == {"twice": [r"caf\udce9.png"]}
        assert manifest.counts() == {}

    def test_many_are_counted_and_the_first_named(self, manifest: Manifest, root: Path) -> None:
        for number in range(25):
            manifest.bad(f"number {number}.")
        with pytest.raises(ValueError, match=r"has 25 bad .*number 0\. .* number 9\. and 15 more$"):
            manifest.check_errors(root, 0)
        with pytest.raises(ValueError, match=r"has 12 bad .*: 0 .* 9 and 2 more$"):
            check_errors(root, [str(number) for number in range(12)], 11)

    def test_left_out(self, manifest: Manifest) -> None:
        for number in range(1003):
            manifest.leave_out("dead link", str(number))
        manifest.leave_out("empty", "x")
        left_out = manifest.left_out()
        assert list(left_out) == ["dead link", "empty"]
        assert left_out["dead link"] == [str(number) for number in range(1000)]
        assert manifest.num_left_out() == {"dead link": 1003}


def test_assign_gives_the_lowest_ranks_the_first_split(manifest: Manifest, root: Path) -> None:
    fill(manifest, root, split="")
    manifest.assign(lambda name: str(9 - int(name[-1])).encode(), {"test": 2, "validation": 1, "train": 2})
    assert {split: [entry.image_id for entry in manifest.entries(split)] for split in manifest.counts()} == {
        "train": ["id-0", "id-1"],
        "validation": ["id-2"],
        "test": ["id-3", "id-4"],
    }


def test_no_room_is_an_error_of_the_system() -> None:
    def fill_up() -> None:
        with new_manifest(VQA) as manifest:
            manifest._database.execute("PRAGMA max_page_count = 10")
            for number in range(10_000):
                manifest.bad(f"message number {number}")

    with pytest.raises(OSError, match=r"no room for the list of images .*SQLITE_TMPDIR"):
        fill_up()


def test_values_come_back_and_what_was_not_taken_is_known() -> None:
    with Lookup() as lookup:
        lookup["b"] = {"x": ["ü", 1, None]}
        lookup["a"] = 0
        assert lookup.get("b") == lookup.get("b") == {"x": ["ü", 1, None]}
        assert list(lookup.untaken()) == ["b", "a"]
        assert lookup.take("b") == lookup.take("b") == {"x": ["ü", 1, None]}
        assert list(lookup.untaken()) == ["a"]
        assert lookup.get("c") is lookup.take("c") is None
        lookup["a"] = 2
        assert lookup.take("a") == 2
        assert list(lookup.untaken()) == []
        lookup["caf\udce9"] = 3
        assert lookup.get("caf\udce9") == 3
        assert list(lookup.untaken()) == [r"caf\udce9"]
        assert lookup.take("caf\udce9") == 3
