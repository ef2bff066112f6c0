"""Learning curves: inline, without outside references, the same bytes each time, colours from the page."""

import re
import xml.etree.ElementTree as ET

import made_up
import matplotlib
import pytest

from bridgetower.analysis.charts import curve_of, learning_curve
from bridgetower.analysis.results import CurvePoint, DemoResults


def drawn(results: DemoResults | None = None, figure: str = "rsum") -> str:
    svg = learning_curve(results or made_up.results(), figure, label="RSUM", chance=14.0)
    assert svg is not None
    return svg


def test_same_results_same_bytes() -> None:
    assert drawn() == drawn()
    assert drawn() != drawn(made_up.results(made_up.run()))


def test_it_is_one_well_formed_element() -> None:
    root = ET.fromstring(drawn())
    assert root.tag == "svg"
    assert "width" not in root.attrib
    assert root.attrib["role"] == "img"


def test_words_tell_where_the_lines_start_and_end() -> None:
    label = ET.fromstring(drawn()).attrib["aria-label"]
    assert "BridgeTower from 65.5 at step 10 to 131.0 at step 20" in label
    assert "METER from 61.0 at step 10 to 122.0 at step 20" in label


def test_nothing_points_outside() -> None:
    svg = drawn()
    assert "http" not in svg
    assert "<style" not in svg
    assert "<metadata" not in svg
    references = set(re.findall(r'href="#([^"]+)"', svg)) | set(re.findall(r"url\(#([^)]+)\)", svg))
    assert references == set(re.findall(r'\bid="([^"]+)"', svg))


def test_two_drawings_share_no_id() -> None:
    first, second = (set(re.findall(r'\bid="([^"]+)"', drawn(figure=figure))) for figure in ("rsum", "itm_accuracy"))
    assert first
    assert not first & second


def test_colours_are_the_pages() -> None:
    svg = drawn()
    for colour in ("var(--bridgetower)", "var(--meter)", "var(--rule)", "currentColor"):
        assert colour in svg
    assert not re.findall(r"#[0-9a-f]{6}\b", svg)


def test_band_needs_two_seeds() -> None:
    assert "fill-opacity" in drawn()
    assert "fill-opacity" not in drawn(made_up.results(made_up.run()))


def test_curve_keeps_the_steps_that_all_seeds_have() -> None:
    short = made_up.run(seed=1, curve=(CurvePoint(step=20, figures={"rsum": 100.0}),))
    curve = curve_of(made_up.results(made_up.run(seed=0, rsum=120.0), short), "bridgetower", "rsum")
    assert (curve.steps, curve.values, curve.mean) == ((20,), ((120.0, 100.0),), [110.0])


def test_figure_that_no_run_has() -> None:
    assert learning_curve(made_up.results(), "vqa_score", label="VQA") is None


def test_settings_of_matplotlib_stay_as_they_are() -> None:
    before = dict(matplotlib.rcParams)
    drawn()
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_scale(scale: float) -> None:
    svg = learning_curve(made_up.results(), "itm_accuracy", label="accuracy", scale=scale)
    assert svg is not None
    assert f"from {0.6 * scale:.1f} at step 10" in ET.fromstring(svg).attrib["aria-label"]
