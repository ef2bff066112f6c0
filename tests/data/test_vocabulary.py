"""The file with the answers of a VQA set."""

import pytest

from bridgetower.data.vocabulary import read_vocabulary, write_vocabulary


def test_round_trip_keeps_the_order(tmp_path):
    write_vocabulary(tmp_path, ["yes", "2", "left side", "no"])
    assert read_vocabulary(tmp_path) == ("yes", "2", "left side", "no")


@pytest.mark.parametrize("answers", [["yes", "yes"], ["Yes"], ["a dog"]])
def test_answers_that_could_not_be_compared_are_refused(tmp_path, answers):
    with pytest.raises(ValueError, match="give each once, in normal form"):
        write_vocabulary(tmp_path, answers)
    assert not list(tmp_path.iterdir())


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no answers\.json in .*; give a VQA set"):
        read_vocabulary(tmp_path)


@pytest.mark.parametrize("content", ["[", "{}", "[]", "[1]"])
def test_damaged_file(tmp_path, content):
    (tmp_path / "answers.json").write_text(content)
    with pytest.raises(ValueError, match=r"answers\.json is (not valid JSON .*; run|no list of answers)"):
        read_vocabulary(tmp_path)
