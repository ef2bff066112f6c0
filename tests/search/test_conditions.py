"""Conditions of strangers: comparisons of columns with values, and nothing else, whatever these values are."""

from typing import Any

import pytest
import torch
from test_index import about, row

from bridgetower.search.conditions import MAX_COMPARISONS, condition_sql
from bridgetower.search.index import Index

NAMES = ("a.png", "b'; DROP TABLE x --.png", 'c".jpg', "d\\%.png", "dogs/e.png", "f`.png")
DEEP: dict[str, Any] = {"width": {"eq": 1}}
for _ in range(20):
    DEEP = {"not": DEEP}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Images of widths 1, 2, …, each with its name as caption and written a day after the one before."""
    folder = tmp_path_factory.mktemp("index")
    index, day = Index.create(folder / "a.lance", about(folder)), 86_400_000_000
    rows = []
    for number, name in enumerate(NAMES):
        start, end = (float(number), number + 0.5) if number > 3 else (None, None)
        mtime = 1_767_225_600_000_000 + number * day  # the year 2026 begins
        sizes = {"width": number + 1, "height": 10, "mtime": mtime}
        rows.append(row(name, captions=[name, "a picture"], start=start, end=end, **sizes))
    index.upsert(rows)
    return index


@pytest.mark.parametrize(
    ("condition", "numbers"),
    [
        ({"width": {"gt": 4}}, [4, 5]),
        ({"width": {"gte": 2, "lt": 4}}, [1, 2]),
        ({"width": {"lte": 3}, "height": {"eq": 10}, "path": {"ne": "a.png"}}, [1, 2]),
        ({"width": {"in": [1, 3, 99]}}, [0, 2]),
        ({"width": {"gt": 4.0}}, [4, 5]),
        ({"start": {"gt": 4.5}}, [5]),
        ({"size": {"lt": 2**40}}, [0, 1, 2, 3, 4, 5]),
        ({"width": {"gt": -1}}, [0, 1, 2, 3, 4, 5]),
        *(({"path": {"eq": name}}, [number]) for number, name in enumerate(NAMES)),
        *(({"captions": {"contains": name}}, [number]) for number, name in enumerate(NAMES)),
        ({"path": {"in": list(NAMES)}}, [0, 1, 2, 3, 4, 5]),
        ({"path": {"like": "dogs/%"}}, [4]),
        ({"path": {"like": "%'%"}}, [1]),
        ({"path": {"eq": "' OR 1=1 --"}}, []),
        ({"mtime": {"gte": "2026-01-03", "lt": "2026-01-05T00:00:00+00:00"}}, [2, 3]),
        ({"mtime": {"lt": "2026-01-01T00:00:01Z"}}, [0]),
        ({"start": {"gte": 5}}, [5]),
        ({"or": [{"width": {"eq": 1}}, {"path": {"like": "%.jpg"}, "width": {"lt": 9}}]}, [0, 2]),
        ({"and": [{"width": {"gt": 1}}, {"not": {"width": {"gt": 2}}}]}, [1]),
        ({"or": [{"width": {"eq": 1}}, {"width": {"eq": 2}}], "width": {"ne": 2}}, [0]),
    ],
    ids=str,
)
def test_finds_what_it_says(index: Index, condition: dict[str, Any], numbers: list[int]) -> None:
    found = index.nearest(torch.ones(3), 10, where=condition_sql(condition))
    assert {hit.path for hit in found} == {NAMES[number] for number in numbers}


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ({}, "is no condition"),
        ([], "is no condition"),
        ("width > 1", "is no condition"),
        ({"digest": {"eq": "a"}}, "'digest' is no column; columns are path, size"),
        ({"width) OR (1=1": {"eq": 1}}, "is no column"),
        ({"width": 5}, "expected a comparison such as"),
        ({"width": {}}, "expected a comparison such as"),
        ({"width": {"like": "a"}}, "'like' is no operator of 'width'"),
        ({"width": {"=": 1}}, "'=' is no operator"),
        ({"captions": {"eq": "a"}}, "'eq' is no operator of 'captions'; expected contains"),
        ({"captions": {"contains": 1}}, "expected a text"),
        ({"width": {"eq": "1"}}, "expected a whole number"),
        ({"width": {"eq": 1.5}}, "expected a whole number"),
        ({"width": {"eq": 2**31}}, "expected a whole number"),
        ({"width": {"eq": True}}, "expected a whole number"),
        ({"width": {"eq": None}}, "expected a whole number"),
        ({"width": {"eq": float("nan")}}, "expected a whole number"),
        ({"width": {"eq": float("inf")}}, "expected a whole number"),
        ({"width": {"eq": 10**30}}, "expected a whole number"),
        ({"start": {"eq": float("nan")}}, "expected a number"),
        ({"start": {"eq": "1"}}, "expected a number"),
        ({"path": {"eq": 1}}, "expected a text"),
        ({"path": {"eq": "a" * 501}}, "expected a text"),
        ({"path": {"in": []}}, "expected a list"),
        ({"path": {"in": "ab"}}, "expected a list"),
        ({"mtime": {"gt": "now() --"}}, "expected a time"),
        ({"mtime": {"gt": "99999-01-01"}}, "expected a time"),
        ({"or": []}, "expected a list of conditions"),
        ({"or": {"width": {"eq": 1}}}, "expected a list of conditions"),
        ({"not": []}, "is no condition"),
        (DEEP, "within each other"),
        ({"or": [{"width": {"eq": n}} for n in range(MAX_COMPARISONS + 1)]}, "the limit is 50"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_all_else_is_refused(condition: Any, words: str) -> None:
    with pytest.raises(ValueError, match=r".+") as error:
        condition_sql(condition)
    assert words in str(error.value)
