"""A run config survives JSON and refuses what it does not know, and what its task would ignore."""

import inspect
import json
import re
from dataclasses import fields, replace
from unittest.mock import Mock

import pytest

from bridgetower import cli
from bridgetower.data.config import DataConfig
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.objectives.config import Phase, RankingConfig
from bridgetower.tasks.entries import Nlvr2Config, SnliVeConfig, VqaConfig
from bridgetower.tasks.run_config import OptimizerConfig, RunConfig
from bridgetower.tasks.table import RECIPES, TASKS
from bridgetower.training.run import train


def read_config(values):
    return RunConfig.from_dict(values, {name: spec.config for name, spec in TASKS.items()})


class TestRunConfig:
    def test_changes_survive_json(self):
        run = replace(
            RECIPES["pretrain-nano"],
            data=replace(RECIPES["pretrain-nano"].data, folders=("a", "b"), repeats=(1, 2)),
            optimizer=OptimizerConfig(schedule="cosine", betas=(0.8, 0.9), clip_norm=1.0),
            init="somewhere",
        )
        assert read_config(json.loads(json.dumps(run.to_dict()))) == run

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_layers_are_compiled_on_a_gpu_unless_told_otherwise(self, device):
        changes = [{}, {"deterministic": True}, {"compile": "yes"}, {"compile": "no"}]
        choices = [
            replace(RECIPES["pretrain-base"], **change).compiles(device) for change in changes
        ]
        assert choices == [device == "cuda", False, True, False]

    @pytest.mark.parametrize("path", [(), ("optimizer",), ("model", "text"), ("task", "phases", 1)])
    def test_unknown_keys(self, path):
        values = json.loads(json.dumps(RECIPES["pretrain-nano"].to_dict()))
        inner = values
        for name in path:
            inner = inner[name]
        inner["learning_rat"] = 1
        with pytest.raises(ValueError, match=r"has unknown fields \['learning_rat'\]; known: \["):
            read_config(values)

    @pytest.mark.parametrize("kind", ["painting", None])
    def test_unknown_task_or_metric(self, kind, tmp_path):
        values = RECIPES["pretrain-base"].to_dict()
        values["task"]["kind"] = kind
        with pytest.raises(
            ValueError,
            match=rf"run config\.task\.kind is {kind!r}; expected one of pretraining, rank",
        ):
            read_config(values)
        config = RunConfig(max_steps=1, task=RankingConfig(), select_by="itm_accuracy")
        with pytest.raises(
            ValueError, match="select_by is 'itm_accuracy'; expected one of rsum, one_stage_rsum"
        ):
            train(config, tmp_path / "run")

    @pytest.mark.parametrize(
        "task", [VqaConfig(), SnliVeConfig(), Nlvr2Config()], ids=lambda task: task.kind
    )
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (
                {"evaluation": RetrievalConfig(candidates=3)},
                "evaluation would be ignored by {}; leave it out",
            ),
            (
                {"data": DataConfig(captions="one", word_dropout=0.1)},
                r"captions, data\.word_dropout would be ignored",
            ),
        ],
    )
    def test_what_the_task_would_ignore(self, task, values, message):
        settings = {"task": task, "select_by": task.metrics[0], "max_steps": 1}
        RunConfig(**settings, evaluation=RetrievalConfig(batch_size=3))
        with pytest.raises(ValueError, match=message.format(task.kind)):
            RunConfig(**settings, **values)

    @pytest.mark.parametrize(
        ("options", "length"),
        [
            (["vqav2-base", "--max-steps", "3"], (3, None)),
            (["vqav2-base", "--max-steps=3"], (3, None)),
            (["pretrain-base", "--max_epochs", "2"], (None, 2)),
            (["pretrain-base", "--max-epochs", "2", "--max-steps", "None"], (None, 2)),
            (["pretrain-base"], (100_000, None)),
            (["vqa-nano"], (2_000, 50)),
            (["vqa-nano", "--max-steps", "9", "--max-epochs", "3"], (9, 3)),
        ],
    )
    def test_a_length_takes_the_place_of_the_recipe_s(self, options, length, monkeypatch):
        train = Mock(return_value={})
        monkeypatch.setattr("bridgetower.training.run.train", train)
        monkeypatch.setenv("RANK", "1")  # whose process reports nothing
        cli.main(["train", *options, "--data.folders", "set", "--out", "run"])
        config = train.call_args.args[0]
        assert (config.max_steps, config.max_epochs) == length

    @pytest.mark.parametrize("name", ["recipe", "source"])
    def test_where_a_run_comes_from_is_no_option(self, name, capsys):
        with pytest.raises(SystemExit):
            cli.main(
                [
                    "train",
                    "pretrain-nano",
                    "--data.folders",
                    "set",
                    "--out",
                    "run",
                    f"--{name}",
                    "mine",
                ]
            )
        assert f"--{name}" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "config", [RunConfig, OptimizerConfig, Phase, *(spec.config for spec in TASKS.values())]
    )
    def test_every_field_has_an_entry_of_its_own(self, config):
        """The command's help shows an entry only for the one name before its colon."""
        entries = re.findall(
            r"^        (\w+): ",
            inspect.getdoc(config).replace("\n    ", "\n        "),
            re.MULTILINE,
        )
        assert entries == [item.name for item in fields(config) if item.name != "kind"]
