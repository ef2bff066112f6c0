"""What an evaluation writes: metrics with what they are of, predictions by id, submission files."""

import json

from bridgetower.evaluation.config import Outcome

ABOUT = {"benchmark": "vqav2", "split": "validation", "protocol": "standard"}


def test_everything_is_written(tmp_path):
    outcome = Outcome(
        metrics={"vqa_score": 61.25},
        counts={"num_questions": 2},
        details={"by_answer_type": {"other": 61.25}},
        predictions=[{"question_id": 1, "answer": "café"}, {"question_id": 2, "answer": "no"}],
        submission=("submission.json", "[]"),
    )
    outcome.write(tmp_path, ABOUT)
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report == outcome.report(ABOUT)
    assert report.pop("versions").keys() == {"bridgetower", "torch", "python"}
    assert report == {**ABOUT, "num_questions": 2, "vqa_score": 61.25, "by_answer_type": {"other": 61.25}}
    lines = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["answer"] for line in lines] == ["café", "no"]
    assert (tmp_path / "submission.json").read_text() == "[]"


def test_metrics_alone(tmp_path):
    Outcome(metrics={"rsum": 1.0}, counts={}).write(tmp_path, ABOUT)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
