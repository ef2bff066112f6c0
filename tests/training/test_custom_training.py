"""Optimiser, schedule, logger, objective, tower, bridge and head from outside of the package."""

import sys
from dataclasses import replace
from types import ModuleType

import custom_training
import pytest
import torch
from custom_training import DECAY, OWN, RATE_DECAY, SIGMOID, TRAP, SigmoidConfig
from torch.optim.optimizer import register_optimizer_step_post_hook

import bridgetower
from bridgetower import cli
from bridgetower.checkpoints import read_checkpoint
from bridgetower.objectives.pretraining import OBJECTIVES
from bridgetower.tasks.run_config import OptimizerConfig, read_metrics
from bridgetower.training.logs import LOGGERS
from bridgetower.training.optim import OPTIMIZERS, SCHEDULES
from bridgetower.training.run import train
from bridgetower.training.setup import starting_checkpoint
from helpers.checkpoints import same_weights, state_tensors
from helpers.custom_modules import CUSTOM_EXTENSIONS as MODULES
from helpers.shapes import SHAPES_MODEL, shapes_run_config, shapes_train_command

SGD = OptimizerConfig(rule="layered_sgd", schedule="constant", lr=1e-2)


@pytest.fixture
def layered_config(tiny_dataset):
    return shapes_run_config(
        tiny_dataset, optimizer=SGD, checkpoint_every=1, evaluate_every=2, max_steps=4
    )


class TestOptimizer:
    def test_rates_by_layer_schedule_and_mean_of_the_weights(
        self, layered_config, tmp_path, monkeypatch
    ):
        rates = []
        weights = []

        def note(optimizer, arguments, options):
            rates.append({group["names"][0]: group["lr"] for group in optimizer.param_groups})
            pairs = ((group["names"][0], group["params"][0]) for group in optimizer.param_groups)
            weights.append({name: weight.detach().clone() for name, weight in pairs})

        hook = register_optimizer_step_post_hook(note)
        train(layered_config, tmp_path / "run", extensions=OWN, progress=False)
        hook.remove()
        name = "vision.layers.{}.mlp.up.weight"
        lower = name.format(0)
        upper = name.format(1)
        for step in rates:
            assert step[upper] == pytest.approx(1e-2)
            assert step[lower] == pytest.approx(RATE_DECAY * 1e-2)
        mean = weights[0][upper]
        for tensor in weights:
            mean = mean.lerp(tensor[upper], 1 - DECAY)
        last = read_checkpoint(tmp_path / "run" / "last").tensors
        assert torch.equal(last[upper], mean)
        assert not torch.equal(last[upper], weights[-1][upper])
        saved = state_tensors(tmp_path / "run")
        assert torch.equal(saved[f"model.{upper}"], weights[-1][upper])
        assert torch.equal(saved[f"mean.{upper}"], mean)
        with monkeypatch.context() as patch:
            patch.setattr(custom_training.Averaged, "after_step", stop_trainer(3))
            with pytest.raises(KeyboardInterrupt):
                train(layered_config, tmp_path / "parts", extensions=OWN, progress=False)
        train(layered_config, tmp_path / "parts", extensions=OWN, resume=True, progress=False)
        for folder in ("last", "best"):
            assert same_weights(tmp_path / "parts" / folder, tmp_path / "run" / folder)

    def test_refused(self, layered_config, tmp_path):
        def nameless(groups, config):
            return torch.optim.SGD(
                [parameter for group in groups for parameter in group["params"]], lr=1.0
            )

        changed_extensions = replace(OWN, optimizers={"layered_sgd": nameless})
        with pytest.raises(
            ValueError, match="a group of optimiser 'layered_sgd' lacks names of its parameters"
        ):
            train(layered_config, tmp_path / "run", extensions=changed_extensions, progress=False)
        tables = {
            "objectives": OBJECTIVES,
            "optimizers": OPTIMIZERS,
            "schedules": SCHEDULES,
            "loggers": LOGGERS,
        }
        for kind, table in tables.items():
            for name in table:
                with pytest.raises(
                    ValueError, match=rf"extensions\.{kind} has '{name}', a name of the package"
                ):
                    replace(OWN, **{kind: {name: nameless}})


@pytest.mark.parametrize(
    ("option", "names"), [("rule", "adamw,hf_adamw"), ("schedule", "polynomial,cosine")]
)
def test_the_help_says_where_others_come_from(option, names, capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "pretrain-nano", "--help-all"])
    _, help_text, after = "".join(capsys.readouterr().out.split()).partition(
        f"--optimizer.{option}{{{names}}}|STR"
    )
    assert help_text
    assert (
        f"Extensions.{'optimizers' if option == 'rule' else 'schedules'}"
        in after.partition("--optimizer.")[0]
    )


def stop_trainer(step):
    original = custom_training.Averaged.after_step

    def after_step(self, context, optimizer, now):
        original(self, context, optimizer, now)
        if now == step:
            raise KeyboardInterrupt

    return after_step


class TestLoggers:
    def test_by_the_command_line(self, tiny_dataset, tmp_path):
        extensions_path = f"{custom_training.__file__}:OWN"
        loggers = (
            "--extensions",
            extensions_path,
            "--optimizer.rule",
            "layered_sgd",
            "--optimizer.schedule",
            "constant",
        )
        options = (
            *loggers,
            "--max-steps",
            "2",
            "--report-to",
            "listing",
            "--data.num-workers",
            "0",
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", sys.stderr)
            cli.main(shapes_train_command(tiny_dataset, tmp_path / "run", *options))
        module = next(module for name, module in sys.modules.items() if is_own(name, module))
        assert [step for _, step, _ in module.LOGGED] == [1, 2, 2, -1]
        assert not (tmp_path / "run" / "tensorboard").exists()
        entries = read_metrics(tmp_path / "run", "train")
        assert [metrics["train/loss"] for _, _, metrics in module.LOGGED[:2]] == [
            entry["loss"] for entry in entries
        ]
        assert "validation/rsum" in module.LOGGED[2][2]

    @pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
    def test_trackers_of_others(self, layered_config, tmp_path, monkeypatch, name):
        calls = []

        class Stub(ModuleType):
            def __getattr__(self, attribute):
                if attribute.startswith("__"):
                    raise AttributeError(attribute)
                return lambda *arguments, **options: calls.append((attribute, arguments, options))

        monkeypatch.setitem(sys.modules, name, Stub(name))
        for steps in (1, 2):
            config = replace(layered_config, max_steps=steps)
            train(
                config,
                tmp_path / "run",
                extensions=OWN,
                resume=True,
                report_to=(name,),
                progress=False,
            )
        log = "log_metrics" if name == "mlflow" else "log"
        logged = [
            (options["step"], arguments[0]) for call, arguments, options in calls if call == log
        ]
        assert [step for step, metrics in logged if "train/loss" in metrics] == [1, 2]
        assert [step for step, metrics in logged if "validation/rsum" in metrics] == [1, 2]
        starts = [options for call, _, options in calls if call in ("init", "start_run")]
        names = [options.get("name", options.get("run_name")) for options in starts]
        assert len(names) == 2
        assert names[0] == names[1]
        assert [call for call, _, _ in calls].count(
            "end_run" if name == "mlflow" else "finish"
        ) == 2

    def test_that_are_not_installed(self, layered_config, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "wandb", None)
        with pytest.raises(
            ValueError, match=r"report_to names wandb, which is not installed .*; pip install wandb"
        ):
            train(
                layered_config,
                tmp_path / "run",
                extensions=OWN,
                report_to=("wandb",),
                progress=False,
            )


def is_own(name, module):
    path = getattr(module, "__file__", None)
    return (
        path == custom_training.__file__
        and bool(getattr(module, "LOGGED", None))
        and module is not custom_training
    )


class TestObjective:
    def gradients(self, config, out, **options):
        out.mkdir()
        train(replace(config, **options), out / "run", task=SIGMOID, progress=False)
        saved = state_tensors(out / "run")
        return {name: tensor for name, tensor in saved.items() if name.startswith("exp_avg.")}

    @pytest.mark.parametrize("contrast_over", ["step", "micro-batch"])
    def test_of_a_step_is_that_of_one_large_batch(self, tiny_dataset, tmp_path, contrast_over):
        masking = replace(
            SigmoidConfig().masking, probability=1.0, mask_share=1.0, random_share=0.0
        )
        config = shapes_run_config(
            tiny_dataset,
            task=SigmoidConfig(masking=masking),
            model=SHAPES_MODEL.override({"text.dropout": 0.0, "fusion.dropout": 0.0}),
            max_steps=1,
            evaluate_every=None,
        )
        config = replace(config, data=replace(config.data, augmentation="none"))
        whole = self.gradients(config, tmp_path / "whole")
        options = {"micro_batch_size": 4, "contrast_over": contrast_over}
        accumulated = self.gradients(config, tmp_path / "parts", **options)
        off = max(
            float((whole[name] - accumulated[name]).abs().max() / whole[name].abs().max())
            for name in whole
        )
        assert (off < 1e-3) == (contrast_over == "step")

    def test_a_loss_of_a_micro_batch_is_not_taken_for_one_of_the_step(self, tiny_dataset, tmp_path):
        config = shapes_run_config(
            tiny_dataset, task=SigmoidConfig(), contrast_over="step", micro_batch_size=4
        )
        with pytest.raises(
            ValueError,
            match=r"TrapTask overrides itc, which sees one micro-batch only: .*contrast_",
        ):
            train(config, tmp_path / "run", task=TRAP, progress=False)


def test_from_scratch_to_use(tiny_dataset, tmp_path):
    kinds = {
        "vision.architecture": "patches",
        "vision.prefix_tokens": 0,
        "fusion.bridge": "manager",
    }
    layers = {f"{tower}.num_layers": 3 for tower in ("vision", "text")}
    layers |= {f"fusion.{tower}_layers": (1, 2, 3) for tower in ("vision", "text")}
    model = SHAPES_MODEL.override(kinds | layers | {"heads.custom": ("mood",)})
    config = shapes_run_config(tiny_dataset, model=model, max_steps=2)
    out = tmp_path / "run"
    with pytest.raises(
        ValueError,
        match=r"vision\.architecture is 'patches'; expected one of vit, timm, or a custom",
    ):
        train(config, tmp_path / "without", progress=False)
    metrics = train(config, out, extensions=MODULES, progress=False)
    assert train(config, out, extensions=MODULES, resume=True, progress=False) == metrics

    drawn = starting_checkpoint(config, extensions=MODULES)
    trained = read_checkpoint(out / "last", extensions=MODULES)
    for name in (
        "vision.blocks.0.weight",
        "fusion.text_bridges.0.weigh.weight",
        "text.layers.0.mlp.up.weight",
    ):
        assert not torch.equal(drawn.tensors[name], trained.tensors[name]), name

    again = replace(
        config, init=str(out), model=replace(config.model, heads=replace(model.heads, itm=False))
    )
    started = starting_checkpoint(again, extensions=MODULES)
    assert torch.equal(started.tensors["mood_head.weight"], trained.tensors["mood_head.weight"])
    assert not any(name.startswith("itm_head.") for name in started.tensors)

    predictor = bridgetower.load(out, extensions=MODULES)
    assert predictor.embed_texts(["red bar", "blue ring"]).shape == (2, model.heads.itc_size)
