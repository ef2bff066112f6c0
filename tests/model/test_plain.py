"""From JSON to dataclasses: what fits, and what is refused by name."""

from dataclasses import asdict, dataclass
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
    [
        ({"pieces": [{"size": "6"}]}, r"whole\.pieces\[0\]\.size is '6'; expected int"),
        (
            {"pieces": [{"size": 1}, {"size": 6.5}]},
            r"whole\.pieces\[1\]\.size is 6\.5; expected int",
        ),
        ({"pieces": [{"size": True}]}, r"whole\.pieces\[0\]\.size is True; expected int"),
        ({"pieces": [{"size": None}]}, r"whole\.pieces\[0\]\.size is None; expected int"),
        ({"pieces": [{"size": 1, "share": "half"}]}, r"share is 'half'; expected float"),
        ({"pieces": [{"size": 1, "share": False}]}, r"share is False; expected float"),
        ({"pieces": [3]}, r"whole\.pieces\[0\] is 3; expected names and values"),
        (
            {"pieces": {"size": 1}},
            r"whole\.pieces is \{'size': 1\}; expected tuple\[.*Part, \.\.\.\]",
        ),
        ({"name": 3}, r"whole\.name is 3; expected str"),
        ({"name": None}, r"whole\.name is None; expected str"),
        ({"visible": 1}, r"whole\.visible is 1; expected bool"),
        ({"limit": 0.5}, r"whole\.limit is 0\.5; expected int or None"),
        ({"limit": [1]}, r"whole\.limit is \[1\]; expected int or None"),
        ({"colour": "green"}, r"whole\.colour is 'green'; expected 'red' or 'blue'"),
        ({"colour": None}, r"whole\.colour is None; expected 'red' or 'blue'"),
        ({"other": 1}, r"whole\.other is 1; expected 'red' or 'blue' or None"),
        ({"pair": [1.0]}, r"whole\.pair is \[1\.0\]; expected tuple\[float, float\]"),
        ({"pair": [1.0, "2"]}, r"whole\.pair\[1\] is '2'; expected float"),
        ({"layers": "12"}, r"whole\.layers is '12'; expected tuple\[int, \.\.\.\] or None"),
        ({"figures": {"a": "1"}}, r"whole\.figures\.a is '1'; expected float"),
        ({"figures": [1]}, r"whole\.figures is \[1\]; expected dict\[str, float\] or None"),
    ],
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
