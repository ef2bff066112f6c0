"""Learning curves: one image that loads nothing, the same bytes each time, of the steps that all seeds have."""

import base64
import xml.etree.ElementTree as ET

import made_up
import matplotlib

from bridgetower.analysis.report import learning_curve
from bridgetower.analysis.results import CurvePoint, DemoResults


def drawn(results: DemoResults | None = None, metric: str = "rsum") -> str:
    image = learning_curve((results or made_up.results()).runs, metric, label="RSUM", chance=0.14)
    assert image is not None
    kind, _, content = image.partition(",")
    assert kind == "data:image/svg+xml;base64"
    return base64.b64decode(content).decode()


def test_same_results_same_bytes() -> None:
    assert drawn() == drawn()
    assert drawn() != drawn(made_up.results(made_up.run()))


def test_it_is_one_well_formed_image() -> None:
    assert ET.fromstring(drawn()).tag.endswith("svg")


def test_a_step_that_not_all_seeds_have_is_left_out() -> None:
    point = CurvePoint(step=20, metrics={"rsum": 1.0})
    short, long = made_up.run(seed=1, curve=(point,)), made_up.run(seed=0, rsum=120.0)
    only = made_up.run(seed=0, curve=(CurvePoint(step=20, metrics={"rsum": 1.2}),))
    assert drawn(made_up.results(long, short)) == drawn(made_up.results(only, short))


def test_metric_that_no_run_has() -> None:
    assert learning_curve(made_up.results().runs, "vqa_score", label="VQA") is None
    assert learning_curve((), "rsum", label="RSUM") is None


def test_settings_of_matplotlib_stay_as_they_are() -> None:
    before = dict(matplotlib.rcParams)
    drawn()
    assert dict(matplotlib.rcParams) == before
