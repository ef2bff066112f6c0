"""From JSON to dataclasses: what fits, and what is refused by name."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from bridgetower.plain import check_choice, from_plain

Colour = Literal["red", "blue"]


@dataclass(frozen=True, kw_only=True)
class Part:
    size: int
    share: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Whole:
    name: str = ""
    visible: bool = False
    limit: int | None = None
    colour: Colour = "red"
    other: Colour | None = None
    pair: tuple[float, float] = (0.0, 1.0)
    layers: tuple[int, ...] | None = None
    pieces: tuple[Part, ...] = ()
    figures: dict[str, float] | None = None
    notes: Any = None


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"name": "a", "visible": True, "limit": 3, "colour": "blue", "other": "red"},
        {"limit": None, "other": None, "layers": None, "figures": None},
        {"pair": (0.25, 1.5), "layers": (), "pieces": (Part(size=1), Part(size=2, share=0.1))},
        {"layers": (1, 2, 3), "figures": {"a": 1.0, "b": 2.5}, "notes": [1, {"a": None}]},
    ],
)
def test_what_fits(values):
    whole = Whole(**values)
    assert from_plain(Whole, asdict(whole), "whole") == whole
    lists = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(whole).items()
    }
    assert from_plain(Whole, lists, "whole") == whole


def test_a_whole_number_will_do_for_a_float():
    whole = from_plain(Whole, {"pair": [0, 2], "pieces": [{"size": 1, "share": 1}]}, "whole")
    assert (whole.pair, whole.pieces[0].share) == ((0, 2), 1)


@pytest.mark.parametrize(
    ("values", "message"),
    json.loads((Path(__file__).parent / "refused.json").read_text())["plain"],
)
def test_what_is_refused(values, message):
    with pytest.raises(ValueError, match=f"{message}$"):
        from_plain(Whole, values, "whole")


def test_missing_and_unknown_fields():
    with pytest.raises(ValueError, match=r"whole\.pieces\[0\] lacks \['size'\]"):
        from_plain(Whole, {"pieces": [{}]}, "whole")
    with pytest.raises(
        ValueError, match=r"part has unknown fields \['a', 'b'\]; known: \['share', 'size'\]"
    ):
        from_plain(Part, {"b": 1, "a": 2}, "part")
    with pytest.raises(ValueError, match="part is 3; expected names and values"):
        from_plain(Part, 3, "part")


def test_choices():
    check_choice("colour", "blue", Colour)
    check_choice("colour", None, Colour, or_none=True)
    for value, none, choices in (
        ("green", False, "red, blue"),
        (None, False, "red, blue"),
        (1, True, "red, blue, None"),
    ):
        with pytest.raises(ValueError, match=f"colour is {value!r}; expected one of {choices}$"):
            check_choice("colour", value, Colour, or_none=none)
