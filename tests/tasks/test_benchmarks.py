"""Benchmarks from a prepared set to an outcome: metrics, predictions by id, submissions, protocols, refusals."""

import json
from dataclasses import replace

import pytest

from bridgetower.checkpoints import read_checkpoint, write_checkpoint
from bridgetower.data.sets.datasets import prepare_arrow
from bridgetower.data.sets.schema import SCHEMAS
from bridgetower.evaluation.class_metrics import vqa_score
from bridgetower.evaluation.config import Outcome, RetrievalConfig
from bridgetower.inference.predictor import load
from bridgetower.tasks.entries import statement_metrics
from bridgetower.tasks.table import evaluate
from helpers.published_sets import write_nlvr2_arrow
from helpers.sets import (
    ENTRY_KINDS,
    pair_records,
    question_records,
    statement_records,
    write_entry_set,
    write_set,
)
from helpers.shapes import SHAPE_COLOURS


@pytest.fixture(scope="module")
def entry_sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return {kind: write_entry_set(folder / kind, kind) for kind in ENTRY_KINDS}


@pytest.fixture
def measure(answering_predictor, entry_sets):
    def call(benchmark, split, **options):
        kind = "vqa" if benchmark == "vqav2" else benchmark
        return evaluate(
            answering_predictor, benchmark, [entry_sets[kind]], split, RetrievalConfig(**options)
        )

    return call


class TestQuestions:
    def test_answers_are_those_of_the_model(self, measure, answering_predictor):
        outcome = measure("vqav2", "validation", batch_size=3)
        records = question_records("validation", 5)
        questions = [
            (record.images[0][1], question) for record in records for question in record.entries
        ]
        assert [row["question_id"] for row in outcome.predictions] == [
            question.question_id for _, question in questions
        ]
        for row, (image, question) in zip(outcome.predictions, questions, strict=True):
            (choice,) = answering_predictor.answer(image, question.question, top=1)
            assert row["answer"] == choice.label
            assert row["probability"] == pytest.approx(choice.probability, abs=1e-5)
        scores = [
            vqa_score(row["answer"], question.answers)
            for row, (_, question) in zip(outcome.predictions, questions, strict=True)
        ]
        assert outcome.metrics["vqa_score"] == pytest.approx(sum(scores) / len(scores), abs=5e-5)
        assert outcome.counts == {"num_questions": 10}
        assert outcome.details["by_answer_type"].keys() == {"other", "yes/no"}
        assert outcome.details["by_question_type"].keys() == {"what colour is", "is this"}

    def test_paper_leaves_out_questions_without_an_answer_of_the_vocabulary(self, measure):
        """The model's answers are colours: no question of yes and no has one, and two of five colours differ."""
        outcome = measure("vqav2", "validation", protocol="paper")
        assert outcome.counts == {"num_questions": 5}
        assert {row["question_id"] for row in outcome.predictions} == {2000, 2010, 2020, 2030, 2040}

    @pytest.mark.parametrize("split", ["test", "test-dev"])
    @pytest.mark.parametrize("protocol", ["standard", "paper"])
    def test_a_test_split_has_a_submission_with_every_question(self, measure, split, protocol):
        outcome = measure("vqav2", split, protocol=protocol)
        assert outcome.metrics == {}
        name, content = outcome.submission
        rows = json.loads(content)
        assert name == "submission.json"
        expected = [
            question.question_id
            for record in question_records("test", 3)
            for question in record.entries
        ]
        assert [row["question_id"] for row in rows] == expected
        assert all(
            row.keys() == {"question_id", "answer"} and row["answer"] in SHAPE_COLOURS
            for row in rows
        )

    def test_sets_with_and_without_answers_together(
        self, measure, answering_predictor, entry_sets, tmp_path
    ):
        other = write_set(
            tmp_path / "set", {"validation": question_records("test", 3)}, SCHEMAS["vqa"]
        )
        outcome = evaluate(
            answering_predictor,
            "vqav2",
            [other, entry_sets["vqa"]],
            "validation",
            RetrievalConfig(),
        )
        alone = measure("vqav2", "validation")
        assert outcome.metrics == alone.metrics
        assert outcome.details == alone.details
        assert outcome.counts == {"num_questions": 16, "num_answered": 10}
        assert len(json.loads(outcome.submission[1])) == len(outcome.predictions) == 16


class TestStatements:
    @pytest.mark.parametrize("benchmark", ["snli-ve", "nlvr2"])
    def test_figures_and_predictions(self, measure, benchmark):
        outcome = measure(benchmark, "validation")
        make = statement_records if benchmark == "snli-ve" else pair_records
        statements = [statement for record in make("validation", 5) for statement in record.entries]
        assert [row["statement_id"] for row in outcome.predictions] == [
            entry.statement_id for entry in statements
        ]
        right = [
            row["label"] == entry.label
            for row, entry in zip(outcome.predictions, statements, strict=True)
        ]
        assert outcome.metrics.keys() == {
            "accuracy",
            *(["consistency"] if benchmark == "nlvr2" else []),
        }
        assert outcome.metrics["accuracy"] == pytest.approx(sum(right) / len(right))
        assert outcome.counts == {"num_statements": len(statements)}

    @pytest.mark.parametrize("benchmark", ["snli-ve", "nlvr2"])
    def test_sets_with_and_without_labels_together(
        self, measure, answering_predictor, entry_sets, tmp_path, benchmark
    ):
        make = statement_records if benchmark == "snli-ve" else pair_records
        records = [
            replace(
                record,
                entries=tuple(
                    replace(statement, statement_id=f"x{statement.statement_id}")
                    for statement in record.entries
                ),
            )
            for record in make("test", 3)
        ]
        other = write_set(tmp_path / "set", {"validation": records}, SCHEMAS[benchmark])
        outcome = evaluate(
            answering_predictor,
            benchmark,
            [other, entry_sets[benchmark]],
            "validation",
            RetrievalConfig(),
        )
        alone = measure(benchmark, "validation")
        assert outcome.metrics == alone.metrics
        num_labelled = alone.counts["num_statements"]
        total = num_labelled + measure(benchmark, "test").counts["num_statements"]
        assert outcome.counts == {"num_statements": total, "num_labelled": num_labelled}
        assert len(outcome.predictions) == total
        assert not outcome.notes

    def test_statements_that_come_twice(self, answering_predictor, entry_sets, monkeypatch):
        # nothing is computed before
        monkeypatch.setattr("bridgetower.evaluation.class_metrics.predict_classes", None)
        with pytest.raises(
            ValueError, match="ids of 10 come again; expected one example of each id"
        ):
            evaluate(
                answering_predictor,
                "nlvr2",
                [entry_sets["nlvr2"]] * 2,
                "validation",
                RetrievalConfig(),
            )

    def test_nlvr2_of_the_official_arrow_files_has_accuracy_alone(
        self, answering_predictor, tmp_path
    ):
        """Its rows do not say which sentences they have: place 0 of two pairs may be two sentences."""
        write_nlvr2_arrow(tmp_path / "arrows")
        prepare_arrow(tmp_path / "arrows", tmp_path)
        outcome = evaluate(
            answering_predictor, "nlvr2", [tmp_path / "nlvr2"], "validation", RetrievalConfig()
        )
        assert outcome.metrics.keys() == {"accuracy"}
        assert outcome.submission is None
        (note,) = outcome.notes
        assert (
            "no consistency and no submission: 4 of 4 statements, such as 'dev-0-0#0', have no identifier"
            in note
        )
        assert outcome.report({})["notes"] == [note]

    def test_nlvr2_leaves_out_nothing_in_its_submission(self, measure):
        outcome = measure("nlvr2", "test")
        assert outcome.metrics == {}
        assert outcome.submission[0] == "submission.csv"
        rows = [line.split(",") for line in outcome.submission[1].splitlines()]
        assert [row[0] for row in rows] == ["test-0-0-0", "test-0-1-0", "test-1-0-0"]
        assert {row[1] for row in rows} <= {"True", "False"}
        assert measure("snli-ve", "test").submission is None

    def test_consistency_counts_a_sentence_with_all_its_pairs(self):
        records = pair_records("validation", 5)  # two sentences with two pairs, one with one
        statements = [vars(statement) for record in records for statement in record.entries]
        wrong = ["?" if row == 2 else entry["label"] for row, entry in enumerate(statements)]
        expected = {"accuracy": pytest.approx(0.8), "consistency": pytest.approx(2 / 3)}
        assert statement_metrics(statements, wrong, is_nlvr2=True) == expected
        unknown = {**statements[0], "label": ""}
        assert (
            statement_metrics([unknown, *statements], ["other", *wrong], is_nlvr2=True) == expected
        )
        assert statement_metrics([unknown], ["other"], is_nlvr2=True) == {}
        assert statement_metrics(
            [{**statements[0], "statement_id": "mine"}], ["?"], is_nlvr2=True
        ) == {"accuracy": 0.0}

    def test_images_in_their_order(self, measure, answering_predictor):
        outcome = measure("nlvr2", "validation")
        record = pair_records("validation", 5)[1]
        best = answering_predictor.reason(
            *(content for _, content in record.images), record.entries[0].text
        )[0]
        assert outcome.predictions[1]["label"] == best.label
        assert outcome.predictions[1]["probability"] == pytest.approx(best.probability, abs=1e-5)


@pytest.mark.parametrize("benchmark", ["vqav2", "snli-ve", "nlvr2", "classification", "regression"])
def test_a_model_without_the_head(tiny_checkpoint, benchmark):
    recipe = "vqav2-base" if benchmark == "vqav2" else benchmark
    message = (
        rf"this model has no .* head \(it has mlm, itm, itc\); .*: bridgetower train {recipe}$"
    )
    with pytest.raises(ValueError, match=message):
        evaluate(
            load(tiny_checkpoint, device="cpu"), benchmark, ["none"], "test", RetrievalConfig()
        )


def test_refusals(answering_predictor, entry_sets):
    with pytest.raises(ValueError, match="are for retrieval; leave them out for nlvr2"):
        evaluate(
            answering_predictor,
            "nlvr2",
            [entry_sets["nlvr2"]],
            "test",
            RetrievalConfig(candidates=3),
        )
    with pytest.raises(ValueError, match="use a set of kind vqa"):
        evaluate(answering_predictor, "vqav2", [entry_sets["nlvr2"]], "test", RetrievalConfig())


def test_one_stage_without_contrastive_head(tiny_checkpoint, tiny_dataset, tmp_path):
    write_checkpoint(read_checkpoint(tiny_checkpoint).without_itc(), tmp_path / "model")
    for source, stage in (
        (tiny_checkpoint, "two_stage_rsum"),
        (tmp_path / "model", "one_stage_rsum"),
    ):
        model = load(source, device="cpu")
        outcome = evaluate(
            model, "retrieval", [tiny_dataset], "test", RetrievalConfig(max_captions=1)
        )
        assert outcome.metrics["rsum"] == outcome.metrics[stage]
        assert outcome.counts == {"num_images": 9, "num_texts": 9}


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
    assert report == {
        **ABOUT,
        "num_questions": 2,
        "vqa_score": 61.25,
        "by_answer_type": {"other": 61.25},
    }
    lines = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["answer"] for line in lines] == ["café", "no"]
    assert (tmp_path / "submission.json").read_text() == "[]"
