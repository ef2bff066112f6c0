"""A user's own table is prepared, trained on, measured and used. It is used in Python, by command and over HTTP."""

import json
from dataclasses import replace

import pytest
import torch

from bridgetower.checkpoints import read_checkpoint
from bridgetower.cli import main
from bridgetower.data.sets.custom import Classes, LabelledConfig, prepare_custom, read_classes
from bridgetower.data.sets.prepared_set import PreparedSet
from bridgetower.evaluation.class_metrics import classification_metrics
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.files import read_json
from bridgetower.inference.predictor import load
from bridgetower.tasks.entries import ClassificationConfig
from bridgetower.tasks.table import RECIPES, TASKS, evaluate
from bridgetower.training.run import train
from bridgetower.training.setup import starting_checkpoint, with_classes
from helpers.servers import URIS, error_of, running_client
from helpers.sets import (
    COLOUR_NAMES,
    entry_examples,
    png_of_colour,
    write_entry_set,
    write_labelled_table,
)
from helpers.shapes import SHAPES_MODEL, shapes_run_config

COLOURS = COLOUR_NAMES[:4]


@pytest.fixture(scope="module", params=[False, True], ids=["single", "several"])
def multi_label(request):
    return request.param


@pytest.fixture(scope="module")
def labelled_set(multi_label, tmp_path_factory):
    root = tmp_path_factory.mktemp("things")
    prepare_custom(
        "classification",
        write_labelled_table(root / "source", multi_label=multi_label),
        root / "set",
        progress=False,
    )
    return root / "set"


@pytest.fixture(scope="module")
def classification_config(labelled_set, tiny_checkpoint):
    """The recipe with what it says of heads, which gives way to the data."""
    return shapes_run_config(
        labelled_set,
        recipe="classification",
        task=ClassificationConfig(),
        select_by="accuracy",
        evaluation=RetrievalConfig(),
        model=replace(SHAPES_MODEL, heads=RECIPES["classification"].model.heads),
        init=str(tiny_checkpoint),
        max_steps=3,
        micro_batch_size=4,
        checkpoint_every=1,
        device="cpu",
    )


@pytest.fixture(scope="module")
def trained_run(classification_config, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    return out, train(classification_config, out, progress=False)


@pytest.fixture(scope="module")
def trained_predictor(trained_run):
    return load(trained_run[0] / "last", device="cpu")


class TestPrepare:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (
                "image,text,label\nnone.png,,a\n,x,b\n",
                r"1 bad item.*line 2: 'none\.png': there is no such file",
            ),
            ("text,label\n ,a\nx,b\n", "1 bad item.*line 2: it has neither image nor text"),
            ("id,text,label\n1,x,a\n1,y,b\n", "line 3: id '1' comes twice"),
            ("text,label\nx,a\ny,a\n", r"the classes are \(a\); expected at least two"),
            (
                "text,label,split\nx,a,train\ny,b,park\n",
                "line 3: split is 'park'; expected one of train",
            ),
        ],
    )
    def test_bad_tables(self, tmp_path, content, message):
        (tmp_path / "things.csv").write_text(content)
        with pytest.raises(ValueError, match=message):
            prepare_custom(
                "classification", tmp_path / "things.csv", tmp_path / "set", progress=False
            )

    def test_labels_in_other_forms(self, tmp_path):
        def classes(content, name, **options):
            (tmp_path / name).write_text(content)
            config = LabelledConfig(**options)
            prepare_custom(
                "classification", tmp_path / name, tmp_path / f"set-{name}", config, progress=False
            )
            return read_classes(tmp_path / f"set-{name}")

        tags = "text,tags\n" + "".join(f"word {n},a;b\nother {n},\n" for n in range(6))
        assert classes(tags, "tags.csv", label_separator=";") == Classes(
            names=("a", "b"), multi_label=True
        )
        refused = [
            "text,label",
            *(f"{name} {n},{name}" for name in "ab" for n in range(5)),
            " ,typo",
        ]
        assert classes("\n".join(refused), "refused.csv", max_errors=1).names == ("a", "b")
        numbers = "\n".join(json.dumps({"text": f"t{n}", "label": n % 11}) for n in range(22))
        assert classes(numbers, "n.jsonl").names == tuple(map(str, range(11)))
        with pytest.raises(
            ValueError, match=r"line 2 has a list of labels and .* line 1 a single one"
        ):
            classes(
                '{"text": "a", "label": "x"}\n{"text": "b", "label": ["x", "y"]}', "mixed.jsonl"
            )


class TestTraining:
    def test_names_travel_and_all_metrics_are_given(self, trained_run, multi_label):
        out, metrics = trained_run
        assert metrics.keys() == set(ClassificationConfig.metrics)
        names = tuple(sorted([*COLOURS, "warm"] if multi_label else COLOURS))
        assert read_checkpoint(out / "last").labels == {"classification": names}
        heads = read_json(out / "run.json")["model"]["heads"]
        assert (heads["classification"], heads["multi_label"]) == (len(names), multi_label)

    @pytest.mark.parametrize("other", [False, True])
    def test_further_training_keeps_a_head_of_the_same_classes_only(
        self, classification_config, trained_run, multi_label, other, tmp_path
    ):
        first = read_checkpoint(trained_run[0] / "last")
        names = sorted(
            {*first.labels["classification"], *(["mauve"] if other else [])}
            - ({"red"} if other else set())
        )
        rows = [
            {"text": name, "label": [name] if multi_label else name, "split": "train"}
            for name in reversed(names)
        ]
        (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
        prepare_custom("classification", tmp_path / "t.jsonl", tmp_path / "set", progress=False)
        data = replace(classification_config.data, folders=(str(tmp_path / "set"),))
        further = replace(classification_config, data=data, init=str(trained_run[0] / "last"))
        start = starting_checkpoint(with_classes(further, TASKS["classification"]))
        assert start.labels == {"classification": tuple(names)}
        changed = {
            name
            for name, tensor in start.tensors.items()
            if not torch.equal(tensor, first.tensors[name])
        }
        head = {name for name in first.tensors if name.startswith("classification_head.")}
        assert changed == (head if other else set())

    def test_refusals(self, classification_config, multi_label, labelled_set, tmp_path):
        if not multi_label:
            heads = replace(classification_config.model.heads, multi_label=True)
            with pytest.raises(
                ValueError, match=r"per row, but model\.heads\.multi_label is True; set it to"
            ):
                train(
                    replace(
                        classification_config,
                        model=replace(classification_config.model, heads=heads),
                    ),
                    tmp_path / "run",
                    progress=False,
                )
        heads = replace(classification_config.model.heads, classification=3)
        with pytest.raises(
            ValueError, match=r"but model\.heads\.classification is 3; leave it out"
        ):
            train(
                replace(
                    classification_config, model=replace(classification_config.model, heads=heads)
                ),
                tmp_path / "run",
                progress=False,
            )
        data = replace(classification_config.data, validation_split="test")
        with pytest.raises(ValueError, match="example r39 of split test has no label"):
            train(replace(classification_config, data=data), tmp_path / "run", progress=False)

    @pytest.mark.parametrize("metric", ["auroc", "average_precision"])
    def test_a_metric_that_no_class_has_selects_no_checkpoint(
        self, classification_config, multi_label, tmp_path, metric
    ):
        """All examples to validate on have the same label."""
        names = [*COLOURS, "warm"] if multi_label else COLOURS
        rows = [
            {"text": name, "label": [name] if multi_label else name, "split": "train"}
            for name in names
        ]
        (tmp_path / "t.jsonl").write_text(
            "\n".join(map(json.dumps, [*rows, {**rows[0], "split": "dev"}]))
        )
        prepare_custom("classification", tmp_path / "t.jsonl", tmp_path / "set", progress=False)
        data = replace(classification_config.data, folders=(str(tmp_path / "set"),))
        with pytest.raises(
            ValueError, match=f"select_by is '{metric}', but every class is .*; use one of accuracy"
        ):
            train(
                replace(classification_config, data=data, batch_size=4, select_by=metric),
                tmp_path / "run",
                progress=False,
            )

    def test_labels_that_the_head_does_not_have(self, trained_predictor, multi_label, tmp_path):
        label = ["mauve", "red"] if multi_label else "mauve"
        rows = [
            {"text": "x", "label": label},
            {"text": "y", "label": ["red"] if multi_label else "red"},
        ]
        (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
        config = LabelledConfig(test_fraction=0, validation_fraction=0)
        prepare_custom(
            "classification", tmp_path / "t.jsonl", tmp_path / "set", config, progress=False
        )
        with pytest.raises(
            ValueError, match="example 1 has the label 'mauve'; the model's head has the classes"
        ):
            evaluate(
                trained_predictor, "classification", [tmp_path / "set"], "train", RetrievalConfig()
            )


class TestUse:
    def test_evaluation_gives_what_classify_gives(
        self, trained_predictor, labelled_set, multi_label
    ):
        outcome = evaluate(
            trained_predictor,
            "classification",
            [labelled_set],
            "test",
            RetrievalConfig(batch_size=3),
        )
        assert outcome.counts == {"num_examples": 8, "num_labelled": 7}
        assert outcome.metrics.keys() == set(ClassificationConfig.metrics)
        opened = PreparedSet(labelled_set, ["test"])
        judged = {judgement.id: judgement.probability for judgement in outcome.judge()}
        assert len(judged) == 7
        for content, row in zip(opened.scan(), outcome.predictions, strict=True):
            values = row["probabilities"].values()
            certainty = (
                min(max(value, 1 - value) for value in values) if multi_label else max(values)
            )
            assert judged.get(row["id"], certainty) == pytest.approx(certainty)
            (image,) = opened.images(content["images"]) or [None]
            (choices,) = trained_predictor.classify([image], [content["entry"]["text"]])
            assert row["id"] == content["entry"]["example_id"]
            assert row["probabilities"] == pytest.approx(
                {choice.label: choice.probability for choice in choices}, abs=1e-5
            )
            if multi_label:
                assert set(row["labels"]) == {
                    choice.label for choice in choices if choice.probability > 0.5
                }
            else:
                assert row["labels"] == [choices[0].label]
                assert sum(choice.probability for choice in choices) == pytest.approx(1)

    def test_one_input_or_several(self, trained_predictor):
        image = png_of_colour("red")
        both = trained_predictor.classify(image, "a red thing")
        alone = trained_predictor.classify(image)
        assert [*map(vars, trained_predictor.classify([image], ["a red thing"])[0])] == [
            *map(vars, both)
        ]
        assert [choice.probability for choice in both] != [choice.probability for choice in alone]
        assert len(trained_predictor.classify(texts="a red thing", top=2)) == 2
        assert len(trained_predictor.classify([image, None], ["", "a red thing"])) == 2

    def test_refusals(self, trained_predictor):
        for arguments, message in (
            ({}, "neither images nor texts given"),
            ({"images": [None] * 3, "texts": ["a", "b"]}, "3 images and 2 texts"),
        ):
            with pytest.raises(ValueError, match=message):
                trained_predictor.classify(**arguments)

    def test_command_and_server(
        self, trained_predictor, trained_run, labelled_set, capsys, tmp_path
    ):
        model = str(trained_run[0] / "last")
        (tmp_path / "red.png").write_bytes(png_of_colour("red"))
        main(
            [
                "classify",
                model,
                "--images",
                str(tmp_path / "red.png"),
                "--texts",
                "a red thing",
                "--top",
                "2",
            ]
        )
        row = json.loads(capsys.readouterr().out)
        choices = trained_predictor.classify(png_of_colour("red"), "a red thing", top=2)
        assert row["classes"] == [
            {"label": choice.label, "probability": pytest.approx(choice.probability, abs=1e-5)}
            for choice in choices
        ]
        table = write_labelled_table(tmp_path / "source", multi_label=False)
        with table.open("a") as file:
            file.write("\n" + json.dumps({"id": "none", "img": "", "text": ""}))
        main(["classify", model, str(table), "--max-errors", "1"])
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        rows_of_table = [json.loads(line) for line in table.read_text().splitlines()][:-1]
        images = [
            (table.parent / row_of_table["img"]).read_bytes() if row_of_table["img"] else None
            for row_of_table in rows_of_table
        ]
        assert [(row["id"], row["text"]) for row in rows] == [
            (row_of_table["id"], row_of_table["text"]) for row_of_table in rows_of_table
        ]
        for row, choices in zip(
            rows,
            trained_predictor.classify(
                images, [row_of_table["text"] for row_of_table in rows_of_table]
            ),
            strict=True,
        ):
            expected = {
                choice.label: pytest.approx(choice.probability, abs=1e-5) for choice in choices
            }
            assert {choice["label"]: choice["probability"] for choice in row["classes"]} == expected
        with pytest.raises(SystemExit):
            main(["classify", model, str(table)])
        assert "1 bad item, allowed are 0" in (captured := capsys.readouterr()).err
        assert "it has neither image nor text" in captured.err
        main(
            [
                "evaluate",
                model,
                "classification",
                "--data",
                str(labelled_set),
                "--out",
                str(tmp_path / "found"),
            ]
        )
        lines = (tmp_path / "found" / "predictions.jsonl").read_text().splitlines()
        assert len(lines) == json.loads(capsys.readouterr().out)["num_examples"] == 8
        with running_client(trained_predictor, name="things") as client:
            answer = client.post(
                "/v1/classify", json={"images": URIS[:2], "texts": ["a red thing", ""]}
            ).json()
            assert [len(item["classes"]) for item in answer["data"]] == [
                len(trained_predictor.class_names("classification"))
            ] * 2
            texts = client.post("/v1/classify", json={"texts": "a red thing", "top": 1}).json()
            (chosen_one,) = trained_predictor.classify(texts="a red thing", top=1)
            (choice,) = texts["data"][0]["classes"]
            assert choice == {
                "label": chosen_one.label,
                "probability": pytest.approx(chosen_one.probability, abs=1e-5),
            }
            assert (
                "neither images nor texts"
                in error_of(client.post("/v1/classify", json={}), 400)["message"]
            )


class TestMetrics:
    def test_by_hand(self):
        probabilities = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.8, 0.2]])
        labels = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 1]]).bool()
        metrics = classification_metrics(probabilities, labels, multi_label=False)
        assert metrics["accuracy"] == 0.5
        assert metrics["macro_f1"] == 0.5
        # of four pairs of a right and a wrong row, three are in order
        assert metrics["auroc"] == pytest.approx(0.75)
        assert metrics["average_precision"] == pytest.approx((1 + 2 / 3) / 2)

    def test_several_labels(self):
        probabilities = torch.tensor([[0.9, 0.6, 0.1], [0.2, 0.7, 0.2], [0.7, 0.1, 0.3]])
        labels = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 0]]).bool()
        metrics = classification_metrics(probabilities, labels, multi_label=True)
        assert metrics["accuracy"] == pytest.approx(2 / 3)
        assert metrics["macro_f1"] == pytest.approx(
            (1 + 2 / 3) / 2
        )  # of the classes that are there
        assert metrics["auroc"] == metrics["average_precision"] == 1

    def test_without_both_values(self):
        metrics = classification_metrics(
            torch.rand(2, 2), torch.tensor([[1, 0], [1, 0]]).bool(), multi_label=False
        )
        assert metrics.keys() == {"accuracy", "macro_f1"}


def test_another_kind_of_set(classification_config, tmp_path):
    statements, pairs = (write_entry_set(tmp_path / kind, kind) for kind in ("snli-ve", "nlvr2"))
    with pytest.raises(
        ValueError, match="is a set of kind snli-ve; use a set of kind classification"
    ):
        train(
            replace(
                classification_config,
                data=replace(classification_config.data, folders=(str(statements),)),
            ),
            tmp_path / "run",
            progress=False,
        )
    with pytest.raises(ValueError, match="is a set of kind nlvr2; use a set of kind snli-ve"):
        entry_examples(pairs, "snli-ve", read_checkpoint(classification_config.init).processor)
