"""Every verb through `bridgetower.cli.main`: JSON on standard output, one line on standard error for user errors."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

import bridgetower
from bridgetower import cli
from bridgetower.checkpoints import Calibration, Reranking, read_checkpoint, write_reranking
from bridgetower.cli.options import resolve_demo
from bridgetower.cli.output import emit_metrics, emit_result, emit_results, with_options
from bridgetower.data.sets.prepared_set import read_info
from bridgetower.files import escaped, one_line
from bridgetower.inference.predictor import load
from bridgetower.training.run import read_run
from helpers.contracts import check_contract
from helpers.published_sets import write_nlvr2_arrow
from helpers.shapes import NUM_SHAPE_PICTURES, shapes_train_command, write_shape_pictures


@pytest.fixture(scope="module")
def colour_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{colour}.png" for colour in ("red", "blue")]
    for path in paths:
        Image.new("RGB", (24, 24), path.stem).save(path)
    return paths


class TestUsing:
    def test_verbs_print_what_the_model_returns(
        self, run, tiny_checkpoint, answering_checkpoint, colour_files
    ):
        model = load(tiny_checkpoint, device="cpu")
        answering = load(answering_checkpoint, device="cpu")
        (red, blue) = map(str, colour_files)
        images = ("--images", *colour_files)
        rows = run("embed", tiny_checkpoint, *images, "--texts", "red bar", "--device", "cpu")
        vectors = [
            *model.embed_images(colour_files).tolist(),
            *model.embed_texts("red bar").tolist(),
        ]
        inputs = [{"image": red}, {"image": blue}, {"text": "red bar"}]
        assert rows == [
            fields | {"embedding": vector} for fields, vector in zip(inputs, vectors, strict=True)
        ]

        texts = ("red bar", "blue circle")
        everything = run("match", tiny_checkpoint, *images, "--texts", *texts, "--all-pairs")
        assert [(row["image"], row["text"]) for row in everything] == [
            (f, t) for f in (red, blue) for t in texts
        ]
        expected = model.match(colour_files, texts, all_pairs=True).flatten().tolist()
        assert [row["score"] for row in everything] == pytest.approx(expected, abs=1e-6)
        pairs = run("match", tiny_checkpoint, *images, "--texts", *texts)
        assert [(row["image"], row["text"]) for row in pairs] == [(red, texts[0]), (blue, texts[1])]
        assert [row["score"] for row in pairs] == pytest.approx(
            [expected[0], expected[3]], abs=1e-6
        )

        texts = ("a <mask> on <mask>", "<mask> bar" + " on black" * 40)
        rows = run(
            "fill-mask",
            tiny_checkpoint,
            *images,
            "--texts",
            *texts,
            "--top",
            3,
            "--truncate",
            "--batch-size",
            1,
        )
        inputs = [(red, texts[0]), (red, texts[0]), (blue, texts[1])]
        assert [(row["image"], row["text"]) for row in rows] == inputs
        filled = model.fill_mask(colour_files, texts, top=3, truncate=True)
        expected = [[word.word for word in words] for masks in filled for words in masks]
        assert [[word["word"] for word in row["words"]] for row in rows] == expected
        assert rows[0]["words"][0].keys() == {"word", "probability"}

        questions = ("what colour?", "red?")
        rows = run("answer", answering_checkpoint, *images, "--questions", *questions, "--top", 2)
        answers = [
            list(map(vars, choices)) for choices in answering.answer(colour_files, questions, top=2)
        ]
        assert rows == [
            {"image": file, "question": question, "answers": choices}
            for file, question, choices in zip((red, blue), questions, answers, strict=True)
        ]
        # about one image
        rows = run(
            "answer", "--images", red, "--questions", *questions, "--model", answering_checkpoint
        )
        assert [(row["image"], row["question"]) for row in rows] == [
            (red, questions[0]),
            (red, questions[1]),
        ]
        (row,) = run("entail", answering_checkpoint, "--images", red, "--statements", "a red bar")
        judged = list(map(vars, answering.entail(red, "a red bar")))
        assert row == {"image": red, "statement": "a red bar", "judgements": judged}
        pictures = ("--images", red, "--images-2", blue)
        (row,) = run("reason", answering_checkpoint, *pictures, "--statements", "both are red")
        judged = list(map(vars, answering.reason(red, blue, "both are red")))
        assert row == {
            "image": red,
            "image_2": blue,
            "statement": "both are red",
            "judgements": judged,
        }

    def test_a_table_on_a_terminal(
        self, run, capsys, monkeypatch, tiny_checkpoint, answering_checkpoint, colour_files
    ):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        for name, command in {
            "answers": [
                "answer",
                answering_checkpoint,
                "--images",
                colour_files[0],
                "--questions",
                "what colour?",
            ],
            "words": [
                "fill-mask",
                tiny_checkpoint,
                "--images",
                colour_files[0],
                "--texts",
                "a <mask> bar",
            ],
        }.items():
            (row,) = run(*command, "--json")
            cli.main(list(map(str, command)))
            output = capsys.readouterr().out
            for label, probability in (row_values.values() for row_values in row[name]):
                assert f"{one_line(label)}  {probability:.3f}" in output
            assert "┃" in output

    def test_other_engines_and_sizes(self, run, refused, tiny_checkpoint, exported, colour_files):
        for options, settings in (
            (("--engine", "onnxruntime"), {"engine": "onnxruntime"}),
            (("--image-size", 40, "--device", "cpu"), {"image_size": 40, "device": "cpu"}),
        ):
            model = exported if "engine" in settings else tiny_checkpoint
            rows = run("embed", model, "--images", *colour_files, *options)
            assert [row["embedding"] for row in rows] == load(model, **settings).embed_images(
                colour_files
            ).tolist()
        assert "engine torch has no int8" in refused(
            "embed", exported, "--texts", "a", "--precision", "int8"
        )
        assert "is for hub ids" in refused(
            "embed", tiny_checkpoint, "--images", *colour_files, "--revision", "main"
        )

    def test_names_that_are_not_utf8(
        self, run, tiny_checkpoint, answering_checkpoint, colour_files, tmp_path
    ):
        """Printed, they are valid JSON and name the file again when they are read. A table holds text alone."""
        name = tmp_path / "caf\udce9 \n.png"
        name.write_bytes(colour_files[0].read_bytes())
        arguments = ("--images", name)
        lines = [
            *run("embed", tiny_checkpoint, *arguments),
            *run("match", tiny_checkpoint, *arguments, "--texts", "a red bar"),
            *run("entail", answering_checkpoint, *arguments, "--statements", "a red bar"),
        ]
        assert [line["image"] for line in lines] == [str(name)] * 3
        run("embed", tiny_checkpoint, *arguments, "--out", tmp_path / "out.jsonl")
        (written,) = [
            json.loads(line)
            for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        assert written["image"] == escaped(str(name))

    def test_explain(self, run, refused, tiny_checkpoint, colour_files, tmp_path):
        command = ("explain", colour_files[0], "a red bar", "--model", tiny_checkpoint, "--out")
        (row,) = run(*command, tmp_path / "map.png")
        explanation = bridgetower.explain(load(tiny_checkpoint), colour_files[0], "a red bar")
        assert row == {
            "image": str(colour_files[0]),
            "text": "a red bar",
            "method": "attention",
            "score": explanation.score,
            "words": ["a", "red", "bar"],
            "class_token_shares": explanation.prefix_shares.tolist(),
            "written": str(tmp_path / "map.png"),
        }
        assert (
            Image.open(tmp_path / "map.png").size == bridgetower.draw_explanation(explanation).size
        )
        assert "map.doc has no suffix of a kind of images" in refused(
            *command, tmp_path / "map.doc"
        )

    def test_convert(self, run, refused, tiny_checkpoint, tmp_path):
        command = ("convert", tiny_checkpoint, tmp_path / "larger", "--to")
        assert "--drop-itc leaves the contrastive head out" in refused(*command, "hf")
        (written,) = run(*command, "bridgetower", "--image-size", 40, "--drop-itc")
        assert written == {
            "written": str(tmp_path / "larger"),
            "format": "bridgetower",
            "not_used": [],
        }
        config = read_checkpoint(tmp_path / "larger").config
        assert (config.vision.image_size, config.heads.itc) == (40, None)


class TestData:
    def test_prepare_and_evaluate(self, run, tiny_checkpoint, tmp_path):
        table = write_shape_pictures(tmp_path)
        (prepared,) = run(
            "prepare", "pairs", table, "--out", tmp_path / "set", "--test-fraction", 0.2
        )
        counts = {name: split["images"] for name, split in prepared["splits"].items()}
        assert sum(counts.values()) == NUM_SHAPE_PICTURES
        command = [
            "evaluate",
            tiny_checkpoint,
            "retrieval",
            "--data",
            tmp_path / "set",
            "--candidates",
            3,
        ]
        (report,) = run(*command, "--out", tmp_path / "found")
        assert json.loads((tmp_path / "found" / "metrics.json").read_text()) == report
        assert [path.name for path in (tmp_path / "found").iterdir()] == ["metrics.json"]
        assert report["split"] == "test"
        assert report["chance_text_to_image_r1"] == pytest.approx(1 / counts["test"])
        assert report["rsum"] == report["two_stage_rsum"]
        options = ("--protocol", "paper", "--max-captions", 1, "--fold-size", 3)
        (folds,) = run(*command, *options)
        assert folds["chance_text_to_image_r1"] == pytest.approx(1 / 3)
        assert (folds["protocol"], folds["fold_size"], report["fold_size"]) == ("paper", 3, None)

    def test_evaluate_on_a_terminal(self, run, capsys, monkeypatch, tiny_checkpoint, tiny_dataset):
        command = [
            "evaluate",
            str(tiny_checkpoint),
            "retrieval",
            "--data",
            str(tiny_dataset),
            "--candidates",
            "3",
        ]
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        (report,) = run(*command, "--json")
        cli.main(command)
        lines = capsys.readouterr().out.splitlines()
        cells = {
            row[0]: row[1:]
            for row in ([cell.strip() for cell in line.split("│")[1:-1]] for line in lines)
            if row
        }
        names = [
            f"{stage}_text_to_image_r1" for stage in ("itc", "matching", "two_stage", "chance")
        ]
        assert cells["text to image r1"] == [f"{100 * report[name]:.1f}" for name in names]
        assert cells["rsum"][2] == f"{100 * report['rsum']:.1f}"
        assert cells["itm accuracy"] == ["", f"{100 * report['itm_accuracy']:.1f}", "", "50.0"]
        assert cells["weight of ITC"] == ["", "", "0", ""]

    def test_what_is_fitted_is_written_into_the_checkpoint(
        self, run, refused, tiny_checkpoint, tiny_dataset, tmp_path, caplog
    ):
        model = shutil.copytree(tiny_checkpoint, tmp_path / "model")
        write_reranking(model, Reranking(itc_weight=512.0))
        command = ["evaluate", model, "retrieval", "--data", tiny_dataset]
        before = (model / "config.json").read_bytes()
        for refusal, options in {
            "fit reranking on validation data, not on a test split": (),
            "protocol paper; expected retrieval by protocol standard": (
                "--split",
                "validation",
                "--protocol",
                "paper",
            ),
        }.items():
            assert refusal in refused(*command, "--fit-two-stage", *options)
        assert (model / "config.json").read_bytes() == before
        (plain,) = run(*command, "--split", "train")
        (fitted,) = run(*command, "--split", "train", "--fit-two-stage")
        assert plain["itc_weight"] == 512 != fitted["itc_weight"]
        assert plain["two_stage_rsum"] < fitted["two_stage_rsum"]
        written = read_checkpoint(model).reranking
        assert written == Reranking.from_metrics(fitted)
        assert None not in (written.calibration, written.gain)
        assert json.loads((model / "config.json").read_text()) == {
            **json.loads(before),
            "reranking": written.to_plain(),
        }
        assert fitted["calibration_ece_before"] == pytest.approx(plain["ece"])
        (again,) = run(*command, "--split", "train")
        assert {**again, "versions": None}.items() <= {**fitted, "versions": None}.items()
        (tested,) = run(*command)
        assert tested["itc_weight"] == fitted["itc_weight"]
        assert "9 images: one is 11.1 points" in caplog.text
        assert "too small" not in caplog.text
        run(*command, "--split", "validation", "--candidates", 1, "--fit-two-stage")
        assert "the split is too small for a calibration" in caplog.text
        assert read_checkpoint(model).reranking.calibration is None

    def test_matches_are_probabilities_after_a_calibration(self, run, tiny_checkpoint, tmp_path):
        write_shape_pictures(tmp_path)
        model = shutil.copytree(tiny_checkpoint, tmp_path / "model")
        calibration = Calibration(
            slope=0.5, intercept=-2.0, pairs=9, matching=1, ece_before=0.4, ece_after=0.1
        )
        write_reranking(model, Reranking(calibration=calibration))
        pair = ["--images", tmp_path / "00.png", "--texts", "red circle"]
        (score,) = run("match", tiny_checkpoint, *pair)
        (probability,) = run("match", model, *pair)
        expected = torch.sigmoid(0.5 * torch.tensor(score["score"]).logit() - 2)
        assert probability == {
            "image": score["image"],
            "text": score["text"],
            "probability": pytest.approx(float(expected), abs=1e-5),
        }
        (map_,) = run(
            "explain", pair[1], "red circle", "--model", model, "--out", tmp_path / "map.png"
        )
        assert map_["probability"] == pytest.approx(float(expected), abs=1e-5)
        assert "score" not in map_

    def test_evaluate_says_what_cannot_be_given(
        self, run, refused, answering_checkpoint, tmp_path, caplog
    ):
        write_nlvr2_arrow(tmp_path / "arrows")
        run("prepare", "arrow", "--source", tmp_path / "arrows", "--out", tmp_path)
        command = [
            "evaluate",
            answering_checkpoint,
            "nlvr2",
            "--data",
            tmp_path / "nlvr2",
            "--split",
            "test1",
        ]
        (report,) = run(*command, "--out", tmp_path / "found")
        assert "accuracy" in report
        assert "consistency" not in report
        assert report["notes"][0] in caplog.text
        assert not (tmp_path / "found" / "submission.csv").exists()
        assert "evaluate takes engine torch" in refused(*command, "--engine", "onnxruntime")


class TestTraining:
    def test_trains_refuses_and_resumes(
        self, run, refused, capsys, caplog, monkeypatch, tiny_dataset, tmp_path
    ):
        command = shapes_train_command(tiny_dataset, tmp_path / "run", "--max-steps", "4")
        (result,) = run(*command)
        assert result["run"] == str(tmp_path / "run")
        config = read_run(tmp_path / "run")
        assert (config.recipe, config.max_steps, config.batch_size) == ("pretrain-nano", 4, 8)
        assert config.model.text.dropout == 0.1
        assert "already holds a run; continue it with --resume" in refused(*command)
        assert run(*command, "--resume") == [result]
        changed = refused(*command, "--resume", "--model.fusion.bridge", "weighted_add")
        assert (
            "is a run of another model or task: --model.fusion.bridge add -> weighted_add; resume it with"
            in changed
        )
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        cli.main([*map(str, command), "--resume"])
        table = capsys.readouterr().out
        assert f"{100 * result['rsum']:.1f}" in table
        following = f"evaluate {result['run']} retrieval --data {tiny_dataset}"
        assert table.splitlines()[-1] == f"Next: bridgetower {following}"
        assert caplog.messages[1] == f"pretrain-nano: starting the run in {result['run']}"

    def test_a_run_below_a_file(self, refused, tiny_dataset, tmp_path):
        (tmp_path / "file").write_text("")
        assert "file" in refused(*shapes_train_command(tiny_dataset, tmp_path / "file" / "run"))


class TestUserErrors:
    def test_what_is_missing_is_named_as_an_option(self, refused, tiny_checkpoint, colour_files):
        assert "nothing to embed; give a SOURCE, --images FILE" in refused("embed", tiny_checkpoint)
        message = refused(
            "match", tiny_checkpoint, "--images", *colour_files, "--texts", "a", "b", "c"
        )
        assert (
            "2 images and 3 texts; expected one text per image, or one of either, or --all-pairs"
            in message
        )
        too_long = refused(
            "match",
            tiny_checkpoint,
            "--images",
            colour_files[0],
            "--texts",
            "red bar on black " * 9,
        )
        assert "pass --truncate to cut it" in too_long

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("match none --images red.png red.png --texts a b c", "2 images and 3 texts"),
            (
                "match none --images red.png --texts a --num-workers -1",
                "--num-workers is -1; expected at least 0",
            ),
            ("answer none --images no.png --questions a", "no.png: No such file or directory"),
            ("answer none --images red.png --questions a --top 0", "top is 0; expected at least 1"),
            (
                "reason none --images red.png --images-2 red.png red.png --statements a b c",
                "2 second images and 3 texts",
            ),
            ("classify none red.png --labels cat", "expected two or more"),
            ("classify none no-folder --labels cat dog", "no file or folder no-folder"),
            (
                "explain red.png a --out map.doc --model none",
                "map.doc has no suffix of a kind of images",
            ),
            ("search none.lance", "nothing to search for"),
            ("search none.lance a --sheet hits.doc", "hits.doc has no suffix of a kind of images"),
            ("convert none . --to hf", "not empty"),
            ("export none .", "not empty"),
            ("evaluate none retreival --data x", "there is no benchmark 'retreival'"),
            ("evaluate none vqav2 --data x --candidates 3", "leave them out for vqav2"),
            (
                "evaluate none retrieval --data x --fit-two-stage",
                "fit reranking on validation data, not on a test split",
            ),
            ("evaluate none retrieval --data x", "no dataset.json in x"),
            ("train retrieval-coco --init none --out run --data.folders x", "no dataset.json in x"),
        ],
    )
    def test_what_cannot_work_is_refused_before_a_model_is_read(
        self, refused, colour_files, tmp_path, monkeypatch, arguments, message
    ):
        monkeypatch.chdir(tmp_path)
        shutil.copy(colour_files[0], "red.png")
        assert message in refused(*arguments.split())


class TestStopping:
    def test_interrupted(self, capsys):
        # as Ctrl-C outside of the training loop
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            with pytest.raises(SystemExit) as caught, cli.reported():
                signal.raise_signal(signal.SIGALRM)
        finally:
            signal.signal(signal.SIGALRM, before)
        assert caught.value.code == 130
        assert capsys.readouterr().err == "bridgetower: interrupted\n"

    def test_a_reader_that_left(self, forked):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [forked / "bridgetower", "--help"], stdout=writer, stderr=subprocess.PIPE, check=False
        )
        os.close(writer)
        assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")

    def test_a_full_disk_behind_standard_output(self, forked, tiny_dataset):
        with Path("/dev/full").open("w") as full:
            command = [forked / "bridgetower", "inspect", tiny_dataset]
            done = subprocess.run(
                command, stdout=full, stderr=subprocess.PIPE, text=True, check=False
            )
        message = (
            "standard output could not be written (No space left on device); make room on the disk"
        )
        assert (done.returncode, done.stderr) == (2, f"bridgetower: {message}\n")


def test_only_this_package_speaks_and_nothing_moves_the_terminal_or_feigns_an_entry(forked):
    script = "\n".join(
        (
            "import logging, sys",
            "from bridgetower import cli",
            "cli.main(['--help'])",
            "logging.getLogger('bridgetower.training').info('ours')",
            "logging.getLogger('another').info('theirs')",
            "logging.getLogger('another').warning('a warning')",
            "logging.getLogger('bridgetower').warning('%s is bad', 'a\\x1b[2J\\x9b\\nERROR \\u202egnp.exe')",
            "cli.main(['search', 'no\\x1b[2J\\u202emodel/a.lance', 'a'])",
        )
    )
    done = subprocess.run(
        [forked / "python", "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    quoted = r"WARNING a\u001b[2J\u009b\nERROR \u202egnp.exe is bad"
    assert done.stderr.splitlines()[:3] == ["INFO ours", "WARNING a warning", quoted]
    assert "\x1b" not in done.stderr + done.stdout
    assert r"no\u001b[2J\u202emodel/a.lance" in done.stderr


class TestHelp:
    def test_overview_has_a_line_for_each_command(self, capsys):
        for module in cli.COMMANDS.values():  # as commands that ran before in this process
            import_module(f"bridgetower.cli.{module}")
        cli.main(["--help"])
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines if line.startswith("  ")] == list(cli.COMMANDS)
        assert max(map(len, lines)) < 125
        assert len(lines) < 40

    def test_errors_and_logs_quote_no_megabytes(self, refused, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "a" * 10**6}))
        error = refused("embed", tmp_path, "--texts", "a")
        assert len(error) < 5000
        assert error.endswith("bridgetower train --vision or --text)")
        handler = logging.StreamHandler()
        cli.log_to(handler, "%(message)s")
        assert (
            0
            < len(
                handler.format(logging.makeLogRecord({"msg": "a" * 10**6, "levelno": logging.INFO}))
            )
            < 5000
        )

    def test_entries_are_whole_and_show_a_type(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "250")
        example = 'bridgetower search photos.lance "two dogs in the snow" --sheet hits.png\n          bridgetower'
        whole = "Description of the images to find."
        for command, words_of_entry in {
            ("embed",): ["--revision STR", "Print JSON on a terminal too."],
            ("train", "pretrain-nano"): ["--max-epochs INT"],
            ("search",): ["INDEX.lance [TEXT]", whole, f"Examples: {example}"],
        }.items():
            with pytest.raises(SystemExit):
                cli.main([*command, "--help"])
            text = capsys.readouterr().out
            assert [words for words in words_of_entry if words not in text] == []

    def test_version(self, capsys):
        cli.main(["--version"])
        assert capsys.readouterr().out == f"bridgetower {bridgetower.__version__}\n"

    def test_loads_no_heavy_package(self):
        script = "\n".join(
            (
                "import sys, bridgetower",
                "loaded = [name for name in ('torch', 'numpy', 'PIL', 'datasets') if name in sys.modules]",
                "assert not loaded, f'import bridgetower loads {loaded}'",
                "from bridgetower import cli",
                "try: cli.main(['train', 'pretrain-nano', '--help'])",
                "except SystemExit as stop: assert stop.code == 0",
                "heavy = ('torch', 'torchvision', 'datasets')",
                "loaded = [name for name in heavy if name in sys.modules]",
                "assert not loaded, f'--help loads {loaded}'",
                "assert 'tyro' in sys.modules  # the control: what is loaded is seen",
            )
        )
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


COMPLETING = {  # asks a shell what it completes after its own script was read
    "bash": (
        'source <(bridgetower --completion bash); words=({}); COMP_WORDS=(bridgetower "${{words[@]}}"); '
        "COMP_CWORD=${{#words[@]}}; $(complete -p bridgetower | sed 's/.*-F //; s/ .*//') bridgetower; "
        "printf '%s\\n' \"${{COMPREPLY[@]}}\""
    ),
    "zsh": (
        "compdef() {{}}; _files() {{}}; compadd() {{ print -l -- $found }}; source <(bridgetower --completion zsh); "
        "words=(bridgetower {}); CURRENT=$#words; _bridgetower"
    ),
    "fish": "bridgetower --completion fish | source; complete -C (string join ' ' -- bridgetower {})",
}


@pytest.mark.parametrize("shell", COMPLETING)
def test_shells_complete_commands_options_and_values(shell, forked, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    environment = os.environ | {"PATH": f"{forked}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    for typed, expected in {
        "se": "search serve",
        "search --re": "--rerank --revision",
        "answer --mo": "--model",
        "train pretrain-nano-": "pretrain-nano-meter pretrain-nano-meter-norms",
        "train pretrain-nano --data.no-c": "--data.no-cache",
        "prepare pairs --out x --captions-from ''": "folder text",
        "--completion ''": "bash fish zsh",
        "nothing --x": "",
    }.items():
        command = [shell, "-c", COMPLETING[shell].format(typed)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
        )
        assert (done.stdout.split(), done.stderr) == (expected.split(), ""), typed


class TestPublicNames:
    def test_are_there(self):
        assert dir(bridgetower) == sorted(bridgetower.__all__)
        for name in bridgetower.__all__:
            home = getattr(getattr(bridgetower, name), "__module__", "bridgetower.tasks.table")
            assert home.startswith("bridgetower.")

    def test_a_misspelt_one(self):
        with pytest.raises(
            AttributeError, match="has no attribute 'laod'; public names: BridgeTower, Extensions"
        ):
            bridgetower.laod  # noqa: B018


class TestNamesOfOptions:
    @pytest.mark.parametrize(
        ("typed", "message", "expected"),
        [
            (["--batch-size", "0"], "batch_size is 0", "--batch-size is 0"),
            (
                ["--data.max-length=9"],
                "data.max_length is 9, max_length too",
                "--data.max-length is 9, {} too",
            ),
            (
                ["--model.heads.vqa", "3"],
                "but model.heads.vqa is 3, heads.vqa",
                "but --model.heads.vqa is 3, {}",
            ),
            (["--out", "x"], "out is x, outside of out/x", "out is x, outside of out/x"),
            (["--max-steps", "1"], "/a/max_steps 'max_steps' max_steps_2 --max-steps", ""),
            ([], "batch_size is 0; pass truncate=True", "batch_size is 0; pass --truncate"),
            (
                [],
                "shut; choose one by feature_cache=FOLDER",
                "shut; choose one by --feature-cache FOLDER",
            ),
            ([], "or a custom one, by extensions=NAME", "or a custom one, by --extensions NAME"),
            ([], "a condition x=A", "a condition x=A"),
        ],
    )
    def test_options_are_named_as_they_are_typed(self, typed, message, expected):
        expected = (expected or message).format(typed[0].partition("=")[0] if typed else "")
        assert with_options(message, typed) == expected

    @pytest.mark.parametrize(
        ("message", "expected"),
        [
            ("9 examples; lower batch_size", "9 examples; lower --batch-size"),
            ("batch_size is 0, lower queue", "--batch-size is 0, lower queue"),
            ("raise max_length or lower top_k", "raise --data.max-length or lower top_k"),
            ("a.json: batch_size is 0", "a.json: batch_size is 0"),
            ("lower num_layers", "lower num_layers"),
            (
                "60 is no multiple of 14; set image_size to 56",
                "60 is no multiple of 14; set --image-size to 56",
            ),
        ],
    )
    def test_an_option_that_is_not_typed_is_named_where_it_can_only_be_one(self, message, expected):
        options = (
            "--batch-size",
            "--evaluation.batch-size",
            "--image-size",
            "--model.vision.image-size",
            "--data.max-length",
            "--model.text.num-layers",
            "--model.vision.num-layers",
        )
        assert with_options(message, (), lambda: options) == expected

    def test_a_default_that_does_not_fit_is_named_as_an_option(
        self, refused, tiny_dataset, tmp_path, caplog
    ):
        few = ("train", "pretrain-nano", "--out", tmp_path / "run", "--data.folders", tiny_dataset)
        count = read_info(tiny_dataset).splits["train"].examples
        with caplog.at_level("INFO"):
            message = refused(*few)
        few_for_a_batch = f"{count} training examples are fewer than one batch of 128"
        assert message.endswith(f"{few_for_a_batch}; use --batch-size {count}")
        assert "starting the run" not in caplog.text
        assert not (tmp_path / "run").exists()

    def test_warnings_name_options_too(self, monkeypatch, capsys):
        basic_config = Mock()
        monkeypatch.setattr(logging, "basicConfig", basic_config)
        with pytest.raises(SystemExit):
            cli.main(["train", "pretrain-nano", "--help"])
        capsys.readouterr()
        (handler,) = basic_config.call_args.kwargs["handlers"]
        entry = logging.LogRecord(
            "bridgetower", logging.WARNING, "", 0, "few pairs; raise micro_batch_size", (), None
        )
        assert handler.format(entry) == "WARNING few pairs; raise --micro-batch-size"
        entry.levelno = logging.INFO
        assert handler.format(entry).endswith("raise micro_batch_size")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train pretrain-nano --out x --precision fp16", "fp16"),
        ("train pretrain-nano", "missing: --out PATH; see bridgetower train pretrain-nano --help"),
        ("train --out x", "no RECIPE is given; `bridgetower train --help` lists all"),
        (
            "train pretrain-nano --out x --model.vision.hidden-size 63",
            "--model.vision.hidden-size 63 is not a multiple",
        ),
        (
            "embed model --batch-size many",
            "--batch-size: expected a whole number, not 'many'; see bridgetower embed",
        ),
        ("convert model folder --to onnx", "onnx"),
        (
            "serve --timeout abc",
            "--timeout: expected a number, not 'abc'; see bridgetower serve --help",
        ),
        ("evaluate", "missing: MODEL, BENCHMARK, --data"),
        ("", "no command is given; `bridgetower --help` lists"),
        (
            "explian",
            "there is no command 'explian'; did you mean explain? `bridgetower --help` lists all commands",
        ),
        (
            "search --tpo 3",
            "bridgetower search has no option --tpo; did you mean --top? `bridgetower search --help`",
        ),
        ("search --tpo=3", "bridgetower search has no option --tpo; did you mean --top?"),
        ("serve --no-pge", "bridgetower serve has no option --no-pge; did you mean --no-page?"),
        (
            "evaluate x retrieval --dat y",
            "bridgetower evaluate has no option --dat; did you mean --data?",
        ),
        (
            "embed --helpp",
            "bridgetower embed has no option --helpp; `bridgetower embed --help` lists all",
        ),
        (
            "search --zzzzzz",
            "bridgetower search has no option --zzzzzz; `bridgetower search --help` lists all",
        ),
        (
            "train pretrain-nan",
            "bridgetower train has no 'pretrain-nan'; did you mean pretrain-nano?",
        ),
        (
            "train pretrain-nano --max_step 4",
            "no option --max-step; did you mean --max-steps? `bridgetower train pretrain-nano --help` lists all",
        ),
        ("prepare pair --out x", "bridgetower prepare has no 'pair'; did you mean pairs?"),
        (
            "prepare pairs --ot x",
            "no option --ot; did you mean --out? `bridgetower prepare pairs --help` lists all",
        ),
    ],
)
def test_what_is_missing_wrong_or_was_perhaps_meant(refused, arguments, message):
    assert message in refused(*arguments.split())


@pytest.fixture
def printed_cells(capsys, monkeypatch):
    """Returns the cells of the rows of a printed table."""
    monkeypatch.setenv("COLUMNS", "200")

    def read():
        lines = filter(re.compile(r"\w").search, capsys.readouterr().out.splitlines())
        return [[cell.strip() for cell in re.split("[│┃]", line) if cell.strip()] for line in lines]

    return read


def test_values_on_a_terminal(printed_cells, monkeypatch):
    monkeypatch.setattr("bridgetower.cli.output.is_json", lambda json: json)
    value = {
        "classes": [{"label": "dog", "probability": 0.25}, {"label": "cat", "probability": 0.75}],
        "by_type": {"yes/no": {"score": 0.5}, "other": {"score": 1}},
        "counts": {"train": 1, "test": 0.123456},
        "names": ["a", "b"],
        "nothing": None,
        "is_new": True,
        "text": "two\nlines",
    }
    printed = {}
    emit_result(value, json=False, next_command=("score", "MODEL", "a b"))
    printed["result"] = printed_cells()
    emit_results([value, {**value, "names": []}], json=False)
    printed["results"] = printed_cells()
    emit_results([], json=False)
    assert printed_cells() == []
    check_contract("terminal", printed)


def test_metrics_are_rows(printed_cells):
    emit_metrics("questions", {"vqa_score": 0.61258, "num_questions": 3})
    rows = printed_cells()
    for row in (["questions"], ["vqa score", "0.6126"], ["num questions", "3"]):
        assert row in rows


def test_retrieval_is_a_table_in_percent_by_stage(printed_cells):
    metrics = {
        **{"chance_ir_r1": 0.1, "itc_ir_r1": 0.25, "matching_ir_r1": 0.375, "two_stage_ir_r1": 0.5},
        **{"chance_rsum": 1.2, "itc_rsum": 2.5, "matching_rsum": 3.5, "two_stage_rsum": 4.5},
        **{"itm_accuracy": 0.8125, "itc_weight": 16.0, "ece": 0.04},
        **{"gain_difference": 0.25, "gain_low": -0.05, "gain_high": 0.55},
        **{"calibration_pairs": 7.0, "calibration_ece_before": 0.3, "calibration_ece_after": 0.02},
    }
    emit_metrics("retrieval", metrics)
    rows = printed_cells()
    assert ["retrieval, in percent"] in rows
    for row in (
        ["ITC alone", "matching alone", "two stages", "chance"],
        ["ir r1", "25.0", "37.5", "50.0", "10.0"],
        ["rsum", "250.0", "350.0", "450.0", "120.0"],
        ["itm accuracy", "81.2", "50.0"],
        ["weight of ITC", "16"],
        ["ECE of matches", "4.0"],
        ["text to image, less ITC alone", "+25.0 (-5.0 to +55.0)"],
        ["ECE before and after calibration", "30.0, 2.0"],
    ):
        assert row in rows


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("model", "bridgetower-demo/runs/bridgetower-0/last"),
        ("answering model", "bridgetower-demo/runs/bridgetower-0-answers/last"),
        ("index", "bridgetower-demo/held-out.lance"),
    ],
)
def test_the_word_demo_stands_for_what_the_demo_left(kind, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_demo("other", kind) == "other"
    with pytest.raises(FileNotFoundError, match=f"{kind} is demo, but there is no {path} here"):
        resolve_demo("demo", kind)
    (tmp_path / path).mkdir(parents=True)
    assert resolve_demo("demo", kind) == path
