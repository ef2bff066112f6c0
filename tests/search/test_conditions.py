"""Conditions of strangers: comparisons of columns with values, and nothing else, whatever these values are."""

import pytest
import torch
from test_index import about, row

from bridgetower.search.conditions import MAX_COMPARISONS, condition_sql
from bridgetower.search.index import Index

NAMES = ("a.png", "b'; DROP TABLE x --.png", 'c".jpg', "d\\%.png", "dogs/e.png", "f`.png")
DEEP = {"width": {"eq": 1}}
for _ in range(20):
    DEEP = {"not": DEEP}


@pytest.fixture(scope="module")
def dated_index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    index = Index.create(folder / "a.lance", about(folder))
    day = 86_400_000_000
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
        *(({"width": {"gt": number}}, [4, 5]) for number in (4, 4.0)),
        ({"width": {"gte": 2, "lt": 4}}, [1, 2]),
        ({"width": {"lte": 3}, "height": {"eq": 10}, "path": {"ne": "a.png"}}, [1, 2]),
        ({"width": {"in": [1, 3, 99]}}, [0, 2]),
        *(({"start": start}, [5]) for start in ({"gt": 4.5}, {"gte": 5})),
        *(
            (condition, [0, 1, 2, 3, 4, 5])
            for condition in (
                {"size": {"lt": 2**40}},
                {"width": {"gt": -1}},
                {"path": {"in": [*NAMES]}},
            )
        ),
        *(({"path": {"eq": name}}, [number]) for number, name in enumerate(NAMES)),
        *(({"captions": {"contains": name}}, [number]) for number, name in enumerate(NAMES)),
        *(
            ({"path": path}, numbers)
            for path, numbers in (({"like": "dogs/%"}, [4]), ({"like": "%'%"}, [1]))
        ),
        ({"path": {"eq": "' OR 1=1 --"}}, []),
        ({"mtime": {"gte": "2026-01-03", "lt": "2026-01-05T00:00:00+00:00"}}, [2, 3]),
        ({"mtime": {"lt": "2026-01-01T00:00:01Z"}}, [0]),
        ({"or": [{"width": {"eq": 1}}, {"path": {"like": "%.jpg"}, "width": {"lt": 9}}]}, [0, 2]),
        ({"and": [{"width": {"gt": 1}}, {"not": {"width": {"gt": 2}}}]}, [1]),
        ({"or": [{"width": {"eq": 2}}, {"width": {"eq": 1}}], "width": {"ne": 2}}, [0]),
        ({"width": {"ne": 2}, "or": [{"width": {"eq": 1}}, {"width": {"eq": 2}}]}, [0]),
        ({"not": {"or": [{"width": {"gt": 2}}, {"path": {"eq": "a.png"}}]}}, [1]),
        ({"not": {"width": {"gt": 2}, "path": {"like": "%.png"}}}, [0, 1, 2]),
        (
            {"and": [{"or": [{"width": {"eq": 3}}, {"width": {"eq": 1}}]}, {"width": {"lt": 3}}]},
            [0],
        ),
    ],
    ids=str,
)
def test_finds_what_it_says(dated_index, condition, numbers):
    hits = dated_index.nearest(torch.ones(3), 10, where=condition_sql(condition))
    assert {hit.path for hit in hits} == {NAMES[number] for number in numbers}


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        *((condition, "is no condition") for condition in ({}, [], "width > 1", {"not": []})),
        ({"digest": {"eq": "a"}}, "'digest' is no column; columns are path, size"),
        ({"width) OR (1=1": {"eq": 1}}, "is no column"),
        *(({"width": condition}, "expected a comparison such as") for condition in (5, {})),
        ({"width": {"like": "a"}}, "'like' is no operator of 'width'"),
        ({"width": {"=": 1}}, "'=' is no operator"),
        ({"captions": {"eq": "a"}}, "'eq' is no operator of 'captions'; expected contains"),
        *(
            ({"width": {"eq": value}}, "expected a whole number")
            for value in ("1", 1.5, 2**31, 10**30, True, None)
        ),
        *(({"width": {"eq": float(value)}}, "expected a whole number") for value in ("nan", "inf")),
        *(
            ({"start": {"eq": value}}, "expected a number")
            for value in (float("nan"), 10**400, "1")
        ),
        *(
            (condition, "expected a text")
            for condition in ({"captions": {"contains": 1}}, {"path": {"eq": 1}})
        ),
        ({"path": {"eq": "a" * 501}}, "expected a text"),
        *(({"path": {"in": value}}, "expected a list") for value in ([], "ab")),
        *(({"mtime": {"gt": value}}, "expected a time") for value in ("now() --", "99999-01-01")),
        *(({"or": value}, "expected a list of conditions") for value in ([], {"width": {"eq": 1}})),
        (DEEP, "within each other"),
        ({"or": [{"width": {"eq": n}} for n in range(MAX_COMPARISONS + 1)]}, "the limit is 50"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_all_else_is_refused(condition, words):
    with pytest.raises(ValueError, match=r".+") as error:
        condition_sql(condition)
    assert words in str(error.value)
