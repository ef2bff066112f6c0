"""The loop on its own: learning rates, precision, selection, signals, resuming."""

import os
import pickle
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from fitting import run, weights
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.objectives.pretraining import PretrainingTask
from bridgetower.tasks.run_config import OptimizerConfig, read_metrics
from bridgetower.training.data_parallel import run_device
from bridgetower.training.setup import TrainContext
from bridgetower.training.state import StateSaver, TrainingState
from bridgetower.training.trainer import SAME_SECONDS, Interrupted, Trainer
from helpers.checkpoints import saved_state
from helpers.shapes import SHAPES_PHASES, shapes_run_config


def validations(out):
    return [(entry["step"], entry["rsum"]) for entry in read_metrics(out, "validation")]


def test_progress_and_learning_rates(build, tmp_path):
    optimizer = OptimizerConfig(lr=1e-2, warmup=0.5, head_multiplier=2, fusion_multiplier=3)
    context = build(max_steps=4, micro_batch_size=4, optimizer=optimizer)
    rates = []

    def record(current, arguments, options):
        rates.append(sorted({group["lr"] for group in current.param_groups}))

    hook = register_optimizer_step_pre_hook(record)
    run(context, tmp_path)
    hook.remove()
    assert context.task.seen == [0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    factors = [0, 0.5, 1, 0.5]
    expected = [
        sorted({1e-2 * factor * multiplier for multiplier in (1, 2, 3)}) for factor in factors
    ]
    assert rates == [pytest.approx(step) for step in expected]
    logged = [entry["lr"] for entry in read_metrics(tmp_path, "train")]
    assert logged == pytest.approx([1e-2 * factor for factor in factors])


@pytest.mark.parametrize(
    ("num_examples", "length", "evaluate_every", "steps"),
    [
        (65, {"max_steps": 5}, "epoch", [5]),  # of 8 steps in an epoch
        (65, {"max_epochs": 3}, "epoch", [8, 16, 24]),
        (65, {"max_steps": 18, "max_epochs": 3}, "epoch", [8, 16, 18]),
        (65, {"max_steps": 600, "max_epochs": 3}, 10, [10, 20, 24]),
        (65, {"max_epochs": 3}, 0, [24]),
        (65, {"max_epochs": 3}, None, []),
        (20, {"max_epochs": 20}, "epoch", list(range(2, 41, 2))),
        (20, {"max_epochs": 50}, "epoch", [*range(6, 97, 6), 100]),  # at most 20 times
    ],
)
def test_length_and_evaluations_follow_the_data(
    tmp_path, num_examples, length, evaluate_every, steps
):
    config = shapes_run_config(
        tmp_path, **{"max_steps": None, "evaluate_every": evaluate_every} | length
    )
    context = TrainContext(config=config, model=None, task=None, examples=range(num_examples))
    assert [
        step for step in range(1, context.max_steps + 1) if context.evaluates_after(step)
    ] == steps


class TestSelection:
    def test_best_is_kept_and_the_last_evaluation_returned(self, build, tmp_path):
        scores = iter([1.0, 3.0, 3.0, 2.0])
        saved = []
        setup = build(
            max_steps=7,
            evaluate_every=2,
            evaluate=lambda: {"rsum": next(scores), "mlm_loss": 0.5},
            save=lambda context, folder, metrics: saved.append((folder, weights(context.model))),
        )
        metrics = Trainer(setup, tmp_path, resume=False, progress=False).run()
        assert metrics == {"rsum": 2.0, "mlm_loss": 0.5}
        # The first and the better one, not the equal; and at the end the last.
        assert [folder for folder, _ in saved] == [*[tmp_path / "best"] * 2, tmp_path / "last"]
        assert validations(tmp_path) == [(2, 1.0), (4, 3.0), (6, 3.0), (7, 2.0)]
        assert saved_state(tmp_path) == TrainingState(
            step=7, evaluated=7, best=3.0, stale=2, metrics=metrics
        )
        seen = []
        other = build(
            max_steps=7,
            evaluate_every=4,
            save=lambda context, *_: seen.append(weights(context.model)),
        )
        run(other, tmp_path / "other")
        assert torch.equal(saved[1][1], seen[0])
        assert not torch.equal(saved[0][1], seen[0])

    @pytest.mark.parametrize(
        ("scores", "steps", "best"),
        [
            ([1.0, 3.0, 3.0, 2.0, 9.0, 1.0], 8, 3.0),
            ([1.0, 3.0, 2.0, 4.0, 4.0, 5.0], 12, 5.0),  # two in a row, not in all
        ],
    )
    def test_patience_ends_a_run_that_no_longer_improves(
        self, build, tmp_path, scores, steps, best
    ):
        """A run that ended early is finished, and more patience continues it."""
        remaining_scores = iter(scores)
        options = {
            "evaluate": lambda: {"rsum": next(remaining_scores)},
            "max_steps": 12,
            "evaluate_every": 2,
        }
        Trainer(build(patience=2, **options), tmp_path, resume=False, progress=False).run()
        assert (saved_state(tmp_path).step, saved_state(tmp_path).best) == (steps, best)
        again = build(patience=2, **options)
        Trainer(again, tmp_path, resume=True, progress=False).run()
        assert saved_state(tmp_path).step == steps
        if steps < 12:
            longer = build(patience=3, **options)
            Trainer(longer, tmp_path, resume=True, progress=False).run()
            assert (saved_state(tmp_path).step, saved_state(tmp_path).best) == (12, 9.0)

    @pytest.mark.parametrize(
        ("name", "best"),
        [
            ("select_by", 0.5),
            ("data.validation_split", 0.5),
            ("evaluation.candidates", 0.5),
            ("evaluation.batch_size", 5.0),
        ],
    )
    def test_another_figure_is_not_compared_with_the_best_of_before(
        self, build, tmp_path, name, best
    ):
        """Also where the run ends, or is killed, before it is measured again."""
        saved = []
        measured = build(max_steps=2, evaluate=lambda: {"rsum": 5.0})
        Trainer(measured, tmp_path, resume=False, progress=False).run()
        changed = {name: "1 -> 2"}
        Trainer(build(max_steps=2), tmp_path, resume=True, changed=changed, progress=False).run()
        save = lambda context, folder, metrics: saved.append(folder.name)  # noqa: E731
        longer = build(max_steps=4, evaluate=lambda: {"rsum": 0.5}, save=save)
        Trainer(longer, tmp_path, resume=True, progress=False).run()
        assert saved_state(tmp_path).best == best
        assert ("best" in saved) == (best == 0.5)

    def test_model_is_evaluated_without_dropout_and_trained_with(self, build, tmp_path):
        modes = []
        evaluate = lambda: {"rsum": float(modes.append(setup.task.training) or 0)}  # noqa: E731
        setup = build(max_steps=2, evaluate_every=1, evaluate=evaluate)
        setup.task.register_forward_hook(lambda task, inputs, output: modes.append(task.training))
        run(setup, tmp_path)
        assert modes == [True, False, True, False]

    def test_a_figure_that_the_evaluation_does_not_give(self, build, tmp_path):
        with pytest.raises(
            ValueError,
            match=r"'mlm_accuracy'; the evaluation gave \['rsum'\]; the state of step 2 is",
        ):
            run(build(select_by="mlm_accuracy", max_steps=2), tmp_path)
        assert saved_state(tmp_path) == TrainingState(step=2)
        again = build(select_by="rsum", evaluate=lambda: {"rsum": 2.0}, max_steps=2)
        assert Trainer(again, tmp_path, resume=True, progress=False).run() == {"rsum": 2.0}
        assert again.task.seen == []


@pytest.mark.parametrize(
    ("phase", "changes", "warned"),
    [
        (Phase(mlm=1.0, itm=1.0), {"micro_batch_size": 4}, ""),
        (SHAPES_PHASES[-1], {}, ""),
        (
            SHAPES_PHASES[-1],
            {"micro_batch_size": 4},
            "ITC and hard negatives: one micro-batch of 4 pairs per process",
        ),
        (
            SHAPES_PHASES[-1],
            {"micro_batch_size": 4, "contrast_over": "step"},
            "hard negatives: one micro-batch of 4",
        ),
    ],
)
def test_micro_batches_that_contrast_are_warned_of(build, tmp_path, caplog, phase, changes, warned):
    task = PretrainingConfig(phases=(phase,))
    context = build(lambda model: PretrainingTask(model, task), max_steps=1, **changes)
    run(replace(context, config=replace(context.config, task=task)), tmp_path)
    warnings = [line for line in caplog.messages if "is compared" in line]
    assert [line[: len(warned)] for line in warnings] == ([warned] if warned else [])


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_saves_stops_and_can_be_continued(self, build, tmp_path, number, caplog):
        def interrupted(context):
            send = lambda task, *_: os.kill(os.getpid(), number) if len(task.seen) == 2 else None  # noqa: E731
            context.task.register_forward_hook(send)
            return context

        whole = run(build(max_steps=3), tmp_path / "whole")
        before = signal.getsignal(number)
        with pytest.raises(
            Interrupted, match="stopped after step 2 of 3; --resume continues it"
        ) as caught:
            run(interrupted(build(max_steps=3)), tmp_path / "parts")
        assert pickle.loads(pickle.dumps(caught.value)).signal == number
        assert saved_state(tmp_path / "parts").step == 2
        assert f"{number.name}: stopping after this step" in caplog.text
        # at the last step it is simply finished
        run(interrupted(build(max_steps=2)), tmp_path / "last")
        assert signal.getsignal(number) is before
        assert torch.equal(run(build(max_steps=3), tmp_path / "parts", resume=True), whole)

    def test_a_second_one_later_ends_at_once(self, build, tmp_path, monkeypatch):
        """By the signal itself, as if the process had no handler: here what would end it is caught."""
        clock = [0.0]
        monkeypatch.setattr(
            "bridgetower.training.trainer.time", SimpleNamespace(monotonic=lambda: clock[0])
        )
        send = os.kill

        class Ended(BaseException):
            """Carries the signal and what the process does with it."""

        def ended(process, number):
            raise Ended(process, number, signal.getsignal(number))

        monkeypatch.setattr("bridgetower.training.trainer.os.kill", ended)
        context = build()

        def interrupt(task, inputs, output):
            if len(task.seen) == 3:
                send(os.getpid(), signal.SIGTERM)
                # of the launcher: it sent one to the group before
                send(os.getpid(), signal.SIGTERM)
                clock[0] += SAME_SECONDS
                # as late as one may come that is of the same request
                send(os.getpid(), signal.SIGTERM)
                clock[0] += 0.1
                send(os.getpid(), signal.SIGINT)

        context.task.register_forward_hook(interrupt)
        with pytest.raises(Ended) as caught:
            run(context, tmp_path)
        assert caught.value.args == (os.getpid(), signal.SIGINT, signal.SIG_DFL)
        assert saved_state(tmp_path).step == 0

    def test_off_the_main_thread_it_trains_all_the_same(self, build, tmp_path):
        whole = run(build(max_steps=2), tmp_path / "whole")
        with ThreadPoolExecutor() as pool:
            assert torch.equal(
                pool.submit(run, build(max_steps=2), tmp_path / "thread").result(), whole
            )


class TestEvaluation:
    def test_comes_after_the_state_of_its_step_and_is_made_up_for(self, build, tmp_path, caplog):
        """What is killed in an evaluation has lost no step, and ends as if nothing had been."""
        at = []

        def evaluate():
            at.append(saved_state(tmp_path / "killed").step)
            if len(at) == 2:
                raise KeyboardInterrupt
            return {"rsum": float(len(at))}

        whole = run(build(evaluate_every=2), tmp_path / "whole")
        with pytest.raises(KeyboardInterrupt), caplog.at_level("INFO"):
            run(build(evaluate_every=2, evaluate=evaluate), tmp_path / "killed")
        assert "step 2: rsum 1 on validation, the best so far" in caplog.messages
        assert at == [2, 4]
        assert saved_state(tmp_path / "killed") == TrainingState(
            step=4, evaluated=2, best=1.0, metrics={"rsum": 1.0}
        )
        again = build(evaluate_every=2, evaluate=evaluate)
        assert torch.equal(run(again, tmp_path / "killed", resume=True), whole)
        assert at == [2, 4, 4, 6]
        assert len(again.task.seen) == 2
        assert validations(tmp_path / "killed") == [(2, 1.0), (4, 3.0), (6, 4.0)]

    def test_killed_before_the_state_knew_of_it_it_is_not_logged_twice(
        self, build, tmp_path, monkeypatch
    ):
        with monkeypatch.context() as patch:
            patch.setattr(StateSaver, "amend", Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                run(build(evaluate_every=2), tmp_path)
        run(build(evaluate_every=2), tmp_path, resume=True)
        assert [step for step, _ in validations(tmp_path)] == [2, 4, 6]

    def test_of_none_there_is_no_best(self, build, tmp_path):
        saved = []
        changes = {
            "evaluate": Mock(side_effect=AssertionError),
            "save": lambda context, folder, _: saved.append(folder),
        }
        setup = build(evaluate_every=None, max_steps=2, **changes)
        assert Trainer(setup, tmp_path, resume=False, progress=False).run() == {}
        assert saved == [tmp_path / "last"]
        assert Trainer(setup, tmp_path, resume=True, progress=False).run() == {}


class TestSkippedSteps:
    def spoilt(self, build, *steps, **options):
        context = build(**options)

        def spoil(task, inputs, losses):
            number = round(task.progress * context.max_steps) + 1
            return replace(losses, total=losses.total * torch.inf) if number in steps else losses

        context.task.register_forward_hook(spoil)
        return context

    def test_change_nothing_and_are_counted_and_logged(self, build, tmp_path, caplog):
        context = self.spoilt(build, 3, max_skipped_steps=4, checkpoint_every=1)
        seen = []
        context.task.register_forward_pre_hook(
            lambda task, inputs: seen.append(weights(context.model))
        )
        run(context, tmp_path)
        assert [torch.equal(*pair) for pair in pairwise(seen)] == [False, False, True, False, False]
        assert saved_state(tmp_path).skipped == 1
        entries = read_metrics(tmp_path, "train")
        assert [entry.get("skipped_steps") for entry in entries] == [None, None, 1, 1, 1, 1]
        assert "gradient_norm" not in entries[2]
        assert (
            "step 3 is skipped, the 1. of 4 that may be: its gradients are not finite"
            in caplog.text
        )

    @pytest.mark.parametrize("options", [{}, {"micro_batch_size": 4}])
    def test_more_than_may_be_are_an_error_that_more_of_them_resume(self, build, tmp_path, options):
        options |= {"checkpoint_every": 1}
        for allowed, step in ((0, 2), (0, 2), (1, 4)):
            spoilt = self.spoilt(build, 2, 4, max_skipped_steps=allowed, **options)
            with pytest.raises(
                FloatingPointError, match=rf"loss is not finite at step {step}.*--max-skipped-steps"
            ):
                run(spoilt, tmp_path, resume=True)
            assert saved_state(tmp_path).step == step - 1
        run(self.spoilt(build, 2, 4, max_skipped_steps=2, **options), tmp_path, resume=True)
        assert saved_state(tmp_path).skipped == 2


class TestResume:
    @pytest.mark.parametrize("rule", ["adamw", "hf_adamw"])
    def test_gives_the_same_bits(self, build, tmp_path, rule):
        options = {"optimizer": OptimizerConfig(lr=1e-2, rule=rule), "micro_batch_size": 4}
        whole = run(build(**options), tmp_path / "whole")
        stopped = build(**options, checkpoint_every=2)

        def fail(task, inputs, output):
            if len(task.seen) == 2 * 5:  # in the fifth step, after the checkpoint of the fourth
                raise KeyboardInterrupt

        stopped.task.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            run(stopped, tmp_path / "parts")
        resumed = build(**options)
        assert torch.equal(run(resumed, tmp_path / "parts", resume=True), whole)
        assert len(resumed.task.seen) == 2 * 2
        assert [entry["step"] for entry in read_metrics(tmp_path / "parts", "train")] == [
            1,
            2,
            3,
            4,
            5,
            6,
        ]

    def test_refuses_fewer_steps(self, build, tmp_path):
        run(build(max_steps=2), tmp_path)
        with pytest.raises(
            ValueError, match=r"has done 2 steps, more than the 1 asked for; give more"
        ):
            run(build(max_steps=1), tmp_path, resume=True)

    def test_goes_on_with_other_micro_batches_learning_rate_and_clipping(self, build, tmp_path):
        """Losses are means over rows, so that micro-batches change nothing but the last bits."""
        smooth = OptimizerConfig(lr=1e-2, eps=1e-2)
        run(build(max_steps=2, optimizer=smooth), tmp_path / "one")
        shutil.copytree(tmp_path / "one", tmp_path / "two")
        last = [
            run(
                build(max_steps=4, micro_batch_size=size, optimizer=smooth),
                tmp_path / name,
                resume=True,
            )
            for name, size in (("one", None), ("two", 4))
        ]
        assert torch.allclose(*last, rtol=0, atol=1e-5)
        assert not torch.equal(*last)
        still = OptimizerConfig(lr=1e-30, clip_norm=1e-3)
        assert torch.equal(
            run(build(max_steps=6, optimizer=still), tmp_path / "one", resume=True), last[0]
        )
        entries = read_metrics(tmp_path / "one", "train")
        assert [entry["lr"] < 1e-20 for entry in entries] == [False] * 4 + [True] * 2


def test_the_device_of_the_config_is_taken(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_device("auto") == run_device("cpu") == torch.device("cpu")
    with pytest.raises(
        ValueError, match="device is 'cuda', but PyTorch sees no GPU; use auto or cpu"
    ):
        run_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert list(map(run_device, ("auto", "cuda", "cpu"))) == list(
        map(torch.device, ("cuda:1", "cuda:1", "cpu"))
    )
