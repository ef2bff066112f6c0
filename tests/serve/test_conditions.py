"""Conditions of strangers: comparisons, and nothing else."""

import pytest

from bridgetower.serve.conditions import MAX_CHARACTERS, check_condition


@pytest.mark.parametrize(
    "condition",
    [
        "width > 800",
        "WIDTH >= 8 AND (height<9.5 or not size = 7)",
        "path LIKE 'dogs/%' AND path <> 'it''s; drop table x --.png'",
        "mtime > timestamp '2026-01-01 00:00:00' and width in (1, 2,3)",
        "array_has(captions, 'a dog') AND captions IS NOT NULL",
        "width * 2 - 1 between height and size % 7",
        "",
    ],
)
def test_comparisons(condition: str) -> None:
    check_condition(condition)


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("length(repeat('a', 10000000000)) > 0", "'length' is not allowed; columns are path"),
        ("digest = 'a'", "'digest'"),
        ("width > 1; select 1", "';' at character 9"),
        ("path = 'a' || 'b'", "at character 11"),
        ("path = 'a", "at character 7"),
        ("\"path\" = 'a'", "at character 0"),
        ("path ~ 'a+'", "'~'"),
        ("width > $1", "not allowed"),
        ("select = 1", "'select'"),
        ("path = X'00'", "'X'"),
        ("width > ٣", "not allowed"),
        ("width -- comment", "'comment'"),
        ("width > 1" + " " * MAX_CHARACTERS, "the limit is 500"),
    ],
)
def test_all_else(condition: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"allowed|limit") as caught:
        check_condition(condition)
    assert words in str(caught.value)
