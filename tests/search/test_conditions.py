"""Conditions of strangers: comparisons, and nothing else."""

import pytest

from bridgetower.search.conditions import MAX_CHARACTERS, parsed_condition


@pytest.mark.parametrize(
    ("condition", "written"),
    [
        ("width > 800", "width > 800"),
        ("WIDTH >= 8 AND (height<9.5 or not size = 7)", "width >= 8 and ( height < 9.5 or not size = 7 )"),
        (
            "path LIKE 'dogs/%' AND path <> 'it''s; drop table x --.png'\n",
            "path like 'dogs/%' and path <> 'it''s; drop table x --.png'",
        ),
        (
            "mtime > timestamp '2026-01-01 00:00:00' and width not in (1, -2,3)",
            "mtime > timestamp '2026-01-01 00:00:00' and width not in ( 1 , - 2 , 3 )",
        ),
        (
            "array_has(captions, 'a dog') AND captions IS NOT NULL",
            "array_has ( captions , 'a dog' ) and captions is not null",
        ),
        ("width * 2 - 1 between height and size % 7", "width * 2 - 1 between height and size % 7"),
        ("width > 0 -- '\n and version() = 3 -- '", "width > 0 - - '\n and version() = 3 -- '"),
        ("width--1 > 0", "width - - 1 > 0"),
    ],
)
def test_comparisons_are_written_anew(condition: str, written: str) -> None:
    assert parsed_condition(condition) == written
    assert parsed_condition(written) == written


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
        ("width > 0 /* ' */ and version() = '' /* ' */", "after 'width > 0 /' comes '*'"),
        ("width > 0 /* ' */ and now() > mtime", "at character 13"),
        ("", "after 'nothing' comes 'the end'"),
        ("width >", "after 'width >' comes 'the end'"),
        ("width = 1 = 1", "expected and, or, or the end"),
        ("width is 1", "expected false or null or true"),
        ("path like path", "expected a string"),
        ("mtime > timestamp '10000-01-01'", "'10000-01-01' is no time of the years 1 to 9999"),
        ("mtime > timestamp '0000-01-01'", "is no time"),
        ("mtime > timestamp '-9999-01-01'", "is no time"),
        ("mtime > timestamp '2024-02-30'", "is no time"),
        ("mtime > timestamp 'now'", "is no time"),
        ("mtime > timestamp mtime", "expected a string"),
        ("array_has(captions, captions)", "expected a string"),
        ("width in ()", "comes ')'"),
        ("width > 1e400", "'1' at character 8"),
        ("(" * 30 + "width = 1" + ")" * 30, "more than 20 parentheses"),
        ("-" * 400 + "width = 1", "more than 20 parentheses or signs"),
        ("width = 1\x1f", "at character 9"),
        ("cast(path as int) = 1", "'cast'"),
        ("width > 1" + " " * MAX_CHARACTERS, "the limit is 500"),
    ],
)
def test_all_else(condition: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"allowed|limit|expected|more than|no time") as caught:
        parsed_condition(condition)
    assert words in str(caught.value)
