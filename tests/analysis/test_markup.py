"""Fragments of HTML escape what they are given."""

import made_up
import pytest

from bridgetower.analysis import markup

HOSTILE = '<b onclick="x">&\''
ESCAPED = "&lt;b onclick=&quot;x&quot;&gt;&amp;&#x27;"


@pytest.mark.parametrize(
    "fragment",
    [
        markup.paragraph(HOSTILE),
        markup.paragraph("text", HOSTILE),
        markup.heading(HOSTILE, 3),
        markup.definitions([(HOSTILE, "value")]),
        markup.definitions([("name", HOSTILE)]),
        markup.picture(made_up.png(), HOSTILE),
        markup.bar(0.5, HOSTILE),
        markup.table(HOSTILE, ["a"], []),
        markup.table("a", [HOSTILE], []),
        markup.table("a", ["b"], [], groups=[(HOSTILE, 1)]),
        markup.Row(header=HOSTILE, cells=[]).render(),
        markup.Row(header="a", cells=[HOSTILE]).render(),
        markup.Row(header="a", cells=[f"1 ± {HOSTILE}"]).render(),
        markup.Row(header="a", cells=[], style=HOSTILE).render(),
        markup.Section(name="a", title=HOSTILE, body="").render(),
        markup.Section(name="a", title=HOSTILE, body="").link(),
    ],
)
def test_escapes(fragment: str) -> None:
    assert ESCAPED in fragment
    assert HOSTILE not in fragment


def test_spread_is_set_apart() -> None:
    assert '<td>1.0<span class="spread"> ± 0.2</span></td>' in markup.Row(header="a", cells=["1.0 ± 0.2"]).render()


def test_bar_stays_within_its_width() -> None:
    assert [
        f"width:{width}%" in markup.bar(share) for share, width in ((-1, "0.0"), (0.256, "25.6"), (7, "100.0"))
    ] == [True] * 3


def test_picture_carries_itself() -> None:
    assert markup.picture(made_up.png(), "a dot").startswith('<img src="data:image/png;base64,iVBOR')


def test_content_that_is_no_picture() -> None:
    with pytest.raises(ValueError, match="picture of 'a dot' cannot be read"):
        markup.picture(b"text", "a dot")
