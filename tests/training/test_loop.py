"""The loop on its own: learning rates, precision, selection, signals, resuming."""

import logging
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import run, weights
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import shapes
import states
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.objectives.pretraining import PretrainingTask
from bridgetower.tasks.run_config import OptimizerConfig
from bridgetower.tasks.run_folder import read_metrics
from bridgetower.training.data_parallel import run_device
from bridgetower.training.loop import Interrupted, fit
from bridgetower.training.setup import TrainContext
from bridgetower.training.state import TrainingState
from folders import snapshot


class TestSteps:
    def test_progress_and_learning_rates(self, build: Callable[..., TrainContext], tmp_path: Path) -> None:
        optimizer = OptimizerConfig(lr=1e-2, warmup=0.5, head_multiplier=2, fusion_multiplier=3)
        parts = build(max_steps=4, micro_batch_size=4, optimizer=optimizer)
        rates = []

        def record(current: torch.optim.Optimizer, arguments: Any, options: Any) -> None:
            rates.append(sorted({group["lr"] for group in current.param_groups}))

        hook = register_optimizer_step_pre_hook(record)
        run(parts, tmp_path)
        hook.remove()
        assert parts.task.seen == [0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
        factors = [0, 0.5, 1, 0.5]
        expected = [sorted({1e-2 * factor * part for part in (1, 2, 3)}) for factor in factors]
        assert rates == [pytest.approx(step) for step in expected]
        logged = [entry["lr"] for entry in read_metrics(tmp_path, "train")]
        assert logged == pytest.approx([1e-2 * factor for factor in factors])

    def test_bfloat16_trains_in_single_precision_weights(
        self, build: Callable[..., TrainContext], tmp_path: Path
    ) -> None:
        def task(model: BridgeTower) -> nn.Module:
            return PretrainingTask(model, PretrainingConfig(phases=shapes.PHASES))

        runs = {precision: build(task, precision=precision) for precision in ("fp32", "bf16")}
        for precision, parts in runs.items():
            run(parts, tmp_path / precision)
            assert {parameter.dtype for parameter in parts.model.parameters()} == {torch.float32}
        losses = [[entry["loss"] for entry in read_metrics(tmp_path / name, "train")] for name in runs]
        assert losses[0] == pytest.approx(losses[1], rel=0.05)
        assert losses[0] != losses[1]


class TestSelection:
    def test_best_is_kept_and_the_last_evaluation_returned(
        self, build: Callable[..., TrainContext], tmp_path: Path
    ) -> None:
        scores, saved = iter([1.0, 3.0, 3.0, 2.0]), []
        parts = build(
            max_steps=7,
            evaluate_every=2,
            evaluate=lambda: {"rsum": next(scores), "mlm_loss": 0.5},
            save=lambda folder, metrics: saved.append((folder, weights(parts.model))),
        )
        metrics = fit(parts, tmp_path, resume=False, progress=False)
        assert metrics == {"rsum": 2.0, "mlm_loss": 0.5}
        assert [folder for folder, _ in saved] == [tmp_path / "best"] * 2  # the first and the better one, not the equal
        entries = read_metrics(tmp_path, "validation")
        assert [(entry["step"], entry["rsum"]) for entry in entries] == [(2, 1.0), (4, 3.0), (6, 3.0), (7, 2.0)]
        end = TrainingState(step=7, best=3.0, best_step=4, metrics={"rsum": 2.0, "mlm_loss": 0.5})
        assert states.saved(tmp_path) == end
        seen: list[Tensor] = []
        other = build(max_steps=7, evaluate_every=4, save=lambda folder, metrics: seen.append(weights(other.model)))
        run(other, tmp_path / "other")
        assert torch.equal(saved[1][1], seen[0])
        assert not torch.equal(saved[0][1], seen[0])

    def test_model_is_evaluated_without_dropout_and_trained_with(
        self, build: Callable[..., TrainContext], tmp_path: Path
    ) -> None:
        modes = []
        parts = build(
            max_steps=2, evaluate_every=1, evaluate=lambda: {"rsum": float(modes.append(parts.task.training) or 0)}
        )
        parts.task.register_forward_hook(lambda task, inputs, output: modes.append(task.training))
        run(parts, tmp_path)
        assert modes == [True, False, True, False]

    def test_a_figure_that_the_evaluation_does_not_give(
        self, build: Callable[..., TrainContext], tmp_path: Path
    ) -> None:
        parts = build(select_by="mlm_accuracy")
        message = r"select_by is 'mlm_accuracy'; the evaluation gave \['rsum'\]; the state of step 6 is saved"
        with pytest.raises(ValueError, match=message):
            run(parts, tmp_path)
        assert states.saved(tmp_path) == TrainingState(step=6, metrics={"rsum": 0.0})


class TestSmallContrast:
    def test_micro_batches_that_contrast_are_warned_of(
        self, build: Callable[..., TrainContext], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        def contrasting(model: BridgeTower) -> nn.Module:
            return PretrainingTask(model, PretrainingConfig(phases=shapes.PHASES))

        plain = PretrainingConfig(phases=(Phase(mlm=1.0, itm=1.0),))
        parts = build(max_steps=1, micro_batch_size=4)
        run(replace(parts, config=replace(parts.config, task=plain)), tmp_path / "plain")
        run(build(max_steps=1, micro_batch_size=8), tmp_path / "one")
        run(build(max_steps=1), tmp_path / "default")
        assert "ITC" not in caplog.text
        run(build(max_steps=1, micro_batch_size=4), tmp_path / "small")
        limited = "hard negatives: one micro-batch of 4 pairs per process is compared, not the batch of 8"
        assert f"ITC and {limited}" in caplog.text
        caplog.clear()
        run(build(contrasting, max_steps=1, micro_batch_size=4, contrast_over="step"), tmp_path / "step")
        assert limited in caplog.text
        assert "ITC and" not in caplog.text


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_saves_stops_and_can_be_continued(
        self,
        build: Callable[..., TrainContext],
        tmp_path: Path,
        number: signal.Signals,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        whole = run(build(), tmp_path / "whole")
        parts = build()
        before = signal.getsignal(number)

        def interrupt(task: Any, inputs: Any, output: Any) -> None:
            if len(task.seen) == 3:
                os.kill(os.getpid(), number)

        parts.task.register_forward_hook(interrupt)
        with (
            caplog.at_level(logging.WARNING),
            pytest.raises(Interrupted, match="stopped after step 3 of 6; --resume continues it"),
        ):
            run(parts, tmp_path / "parts")
        assert f"{number.name}: stopping after this step" in caplog.text
        assert signal.getsignal(number) is before
        assert torch.equal(run(build(), tmp_path / "parts", resume=True), whole)

    def test_at_the_last_step_the_run_is_simply_finished(
        self, build: Callable[..., TrainContext], tmp_path: Path
    ) -> None:
        parts = build(max_steps=2)

        def interrupt(task: Any, inputs: Any, output: Any) -> None:
            if len(task.seen) == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        parts.task.register_forward_hook(interrupt)
        run(parts, tmp_path)
        assert states.saved(tmp_path).step == 2


class TestResume:
    @pytest.mark.parametrize("rule", ["adamw", "hf_adamw"])
    def test_gives_the_same_bits(self, build: Callable[..., TrainContext], tmp_path: Path, rule: Any) -> None:
        options = {"optimizer": OptimizerConfig(lr=1e-2, rule=rule), "micro_batch_size": 4}
        whole = run(build(**options), tmp_path / "whole")
        stopped = build(**options, checkpoint_every=2)

        def fail(task: Any, inputs: Any, output: Any) -> None:
            if len(task.seen) == 2 * 5:  # in the fifth step, after the checkpoint of the fourth
                raise KeyboardInterrupt

        stopped.task.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            run(stopped, tmp_path / "parts")
        resumed = build(**options)
        assert torch.equal(run(resumed, tmp_path / "parts", resume=True), whole)
        assert len(resumed.task.seen) == 2 * 2
        steps = [entry["step"] for entry in read_metrics(tmp_path / "parts", "train")]
        assert steps == [1, 2, 3, 4, 5, 6]

    @pytest.mark.parametrize("finished", [False, True])
    def test_refuses_other_data(self, build: Callable[..., TrainContext], tmp_path: Path, finished: bool) -> None:
        run(build(max_steps=2, evaluate=lambda: {"rsum": 7.0}), tmp_path)
        parts = replace(build(max_steps=2 if finished else 4), digests={"train.parquet": "34cd"})
        with pytest.raises(ValueError, match=r"result: content of train\.parquet was 12ab, now 34cd; put"):
            run(parts, tmp_path, resume=True)

    def test_refuses_another_number_of_micro_batches(self, build: Callable[..., TrainContext], tmp_path: Path) -> None:
        run(build(max_steps=2), tmp_path)
        with pytest.raises(ValueError, match="result: micro-batches of each was 1, now 2; put"):
            run(build(max_steps=4, micro_batch_size=4), tmp_path, resume=True)

    def test_of_a_finished_run_does_nothing(
        self, build: Callable[..., TrainContext], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        whole = run(build(evaluate=lambda: {"rsum": 7.0}), tmp_path)
        before = snapshot(tmp_path)
        again = build(evaluate=lambda: {"rsum": 8.0})
        with caplog.at_level(logging.INFO):
            metrics = fit(again, tmp_path, resume=True, progress=False)
        assert metrics == {"rsum": 7.0}
        assert again.task.seen == []
        assert torch.equal(weights(again.model), whole)
        assert f"{tmp_path} is finished: all 6 steps are done" in caplog.text
        assert snapshot(tmp_path) == before


def test_the_device_of_the_config_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_device("auto") == run_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (run_device("auto"), run_device("cpu")) == (torch.device("cuda:1"), torch.device("cpu"))
