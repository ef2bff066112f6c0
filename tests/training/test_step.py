"""One step: accumulation, clipping, contrast over the step (GradCache), and what stops a run."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fitting import recorded_gradients, run, weights

from bridgetower.data.batches.examples import PreparedImages
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.objectives.losses import itc_loss
from bridgetower.objectives.pretraining import PretrainingTask
from bridgetower.tasks.run_config import OptimizerConfig, read_metrics
from bridgetower.training import step as step_module
from bridgetower.training.step import (
    check_batch_size,
    contrast_of_step,
    encodes_twice,
)
from helpers.checkpoints import saved_state, state_tensors
from helpers.models import build_model, changed_config, random_caption_batch
from helpers.shapes import SHAPES_MODEL, shapes_run_config


def recorded_steps(context, out):
    with recorded_gradients(context.model) as seen:
        run(context, out)
    return seen, read_metrics(out, "train")


@pytest.mark.parametrize(
    ("examples", "processes", "micro_batch_size", "works"),
    [
        (65, 1, None, 65),
        (65, 1, 48, 64),
        (49, 1, 48, 48),
        (65, 4, None, 64),
        (71, 4, 16, 64),
        (75, 4, 16, 72),
        (4, 4, 16, 4),
    ],
)
def test_a_batch_of_more_examples_than_there_are_is_refused_with_one_that_works(
    tmp_path, monkeypatch, examples, processes, micro_batch_size, works
):
    monkeypatch.setattr(step_module, "world_size", lambda: processes)
    config = shapes_run_config(tmp_path, batch_size=384, micro_batch_size=micro_batch_size)
    with pytest.raises(
        ValueError, match=rf"{examples} training examples .* batch of 384; use batch_size {works}$"
    ):
        check_batch_size(config, examples)
    fitting = replace(config, batch_size=works)
    check_batch_size(fitting, examples)
    monkeypatch.setattr(step_module, "world_size", lambda: 5)
    with pytest.raises(
        ValueError, match=r"^3 training examples are fewer than 5 processes; start at most"
    ):
        check_batch_size(config, 3)


@pytest.mark.parametrize(("processes", "micro_batches"), [(1, 3), (8, 1), (3, 2)])
def test_a_batch_that_does_not_split_is_refused(tmp_path, monkeypatch, processes, micro_batches):
    monkeypatch.setattr(step_module, "world_size", lambda: processes)
    monkeypatch.setattr(step_module, "count_micro_batches", lambda config: micro_batches)
    message = (
        f"^batch_size 4 does not split into {processes} processes x {micro_batches} micro-batches; "
        f"use a multiple of {processes * micro_batches}$"
    )
    with pytest.raises(ValueError, match=message):
        check_batch_size(shapes_run_config(tmp_path, batch_size=4), 14)


@pytest.mark.parametrize("micro_batch_size", [4, 3, 1])
def test_accumulation_equals_one_large_batch(build, tmp_path, micro_batch_size):
    size = 6 if micro_batch_size == 3 else 8
    whole, logged = recorded_steps(build(batch_size=size, max_steps=2), tmp_path / "whole")
    cut = build(batch_size=size, micro_batch_size=micro_batch_size, max_steps=2)
    gradients_cut, entry_cut = recorded_steps(cut, tmp_path / "parts")
    assert len(whole) == len(gradients_cut) == 2
    for actual, expected in zip(whole, gradients_cut, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    assert [entry["loss"] for entry in entry_cut] == pytest.approx(
        [entry["loss"] for entry in logged], rel=1e-4
    )
    control, _ = recorded_steps(build(batch_size=size // 2, max_steps=1), tmp_path / "half")
    assert (whole[0] - control[0]).abs().max() > 1e-2


def test_clipping_shortens_the_gradient_and_keeps_its_direction(build, tmp_path):
    gradients_clipped = [
        recorded_steps(
            build(max_steps=1, optimizer=OptimizerConfig(lr=1e-2, clip_norm=limit)),
            tmp_path / str(limit),
        )
        for limit in (None, 0.01)
    ]
    (((free,), (entry,)), ((clipped,), (other,))) = gradients_clipped
    norm = free.norm().item()
    assert norm > 0.1
    assert clipped.norm().item() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(clipped / 0.01, free / norm, atol=1e-4, rtol=1e-3)
    assert other["gradient_norm"] == entry["gradient_norm"] == pytest.approx(norm, rel=1e-4)


class TestNotFinite:
    def test_stops_and_names_the_pictures(self, build, tmp_path):
        phase = Phase(mlm=1.0, itm=1.0, itc=1.0, negatives="hard")
        config = PretrainingConfig(phases=(phase,))
        context = build(
            lambda model: PretrainingTask(model, config), checkpoint_every=1, max_steps=4
        )
        batches = []

        def spoil(task, inputs):
            batches.append(inputs[0])
            if len(batches) == 3:
                with torch.no_grad():
                    next(context.model.parameters()).fill_(torch.nan)

        context.task.register_forward_pre_hook(spoil)
        with pytest.raises(
            FloatingPointError, match=r"loss is not finite at step 3: .*'itc': nan"
        ) as caught:
            run(context, tmp_path)
        assert all(name in str(caught.value) for name in batches[2].ids)
        assert "\n" not in str(caught.value)
        assert saved_state(tmp_path).step == 2
        assert all(tensor.isfinite().all() for tensor in state_tensors(tmp_path).values())

    @pytest.mark.parametrize("clip_norm", [None, 1.0])
    def test_a_gradient_stops_before_the_weights_change(self, build, tmp_path, clip_norm):
        context = build(micro_batch_size=4, optimizer=OptimizerConfig(lr=1e-2, clip_norm=clip_norm))
        batches = []

        def spoil(gradient):
            return torch.full_like(gradient, torch.inf) if len(batches) == 5 else gradient

        context.task.register_forward_pre_hook(lambda task, inputs: batches.append(inputs[0]))
        context.model.token_type_embedding.weight.register_hook(spoil)
        with (
            recorded_gradients(context.model) as seen,
            pytest.raises(
                FloatingPointError, match=r"gradients are not finite at step 3: norm (inf|nan)"
            ) as caught,
        ):
            run(context, tmp_path)
        assert len(seen) == 2
        assert weights(context.model).isfinite().all()
        assert all(name in str(caught.value) for batch in batches[4:6] for name in batch.ids)
        assert not all(name in str(caught.value) for batch in batches[:4] for name in batch.ids)


class TestContrastOverStep:
    def contrasting(self, build, **changes):
        task = PretrainingConfig(phases=(Phase(mlm=0, itm=0, itc=1),))
        context = build(
            lambda model: PretrainingTask(model, task), batch_size=8, max_steps=2, **changes
        )
        return replace(context, config=replace(context.config, task=task))

    def trained(self, context, out):
        seen, entries = recorded_steps(context, out)
        return seen, [entry["itc"] for entry in entries]

    def test_equals_one_large_batch(self, build, tmp_path):
        whole = self.trained(self.contrasting(build), tmp_path / "whole")
        for num_workers in (0, 1):
            context = self.contrasting(build, micro_batch_size=2, contrast_over="step")
            data = replace(context.config.data, num_workers=num_workers)
            context = replace(context, config=replace(context.config, data=data))
            results = self.trained(context, tmp_path / str(num_workers))
            for actual, expected in zip(whole[0], results[0], strict=True):
                torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
            assert results[1] == pytest.approx(whole[1], rel=1e-5)
        control = self.trained(self.contrasting(build, micro_batch_size=2), tmp_path / "control")
        assert float((whole[0][0] - control[0][0]).abs().max()) > 1e-2
        assert control[1][0] < whole[1][0]  # fewer pairs to tell apart

    def test_pixels_are_kept_between_the_passes_unless_they_are_too_many(
        self, build, tmp_path, monkeypatch
    ):
        drawn = []
        views = PreparedImages.views

        def counted(images, numbers, *arguments):
            drawn.append(len(numbers))
            return views(images, numbers, *arguments)

        monkeypatch.setattr(PreparedImages, "views", counted)
        results = []
        decoded = []
        size = SHAPES_MODEL.vision.image_size
        for limit in (8 * 3 * size**2, 8 * 3 * size**2 - 1):
            monkeypatch.setattr(step_module, "KEPT_BYTES", limit)
            drawn.clear()
            context = self.contrasting(
                build, micro_batch_size=2, contrast_over="step", augmentation="affine"
            )
            pictures = context.examples.images
            results.append(
                self.trained(replace(context, images=(pictures, pictures)), tmp_path / str(limit))
            )
            assert pictures.raw is (not decoded)  # kept as uint8, read again as they are needed
            decoded.append(sum(drawn))
        assert decoded == [2 * 8, 4 * 8]  # of two steps
        assert results[0][1] == results[1][1]
        assert all(
            torch.equal(first_pass, read)
            for first_pass, read in zip(results[0][0], results[1][0], strict=True)
        )

    def test_masked_words_are_those_of_a_step_without_it(self, build, tmp_path):
        task = PretrainingConfig(phases=(Phase(mlm=1, itm=0, itc=1),))
        logged = []
        for contrast_over in ("step", "micro-batch"):
            options = {"max_steps": 1, "micro_batch_size": 2, "contrast_over": contrast_over}
            context = build(lambda model: PretrainingTask(model, task), **options)
            run(
                replace(context, config=replace(context.config, task=task)),
                tmp_path / contrast_over,
            )
            logged += read_metrics(tmp_path / contrast_over, "train")
        assert logged[0]["mlm"] == logged[1]["mlm"] > 0
        assert logged[0]["itc"] != logged[1]["itc"]

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_both_passes_see_the_same_views_and_draw_the_same_dropout(
        self, build, tmp_path, precision
    ):
        options = {
            "micro_batch_size": 2,
            "contrast_over": "step",
            "model": SHAPES_MODEL,
            "precision": precision,
        }
        context = self.contrasting(build, augmentation="affine", **options)
        heads = context.model.head("itc")
        seen = {"text": [], "image": []}
        for name, outputs in seen.items():
            getattr(heads, name).register_forward_hook(
                lambda head, inputs, output, to=outputs: to.append(output)
            )
        run(context, tmp_path)
        for outputs in seen.values():
            first, second = (torch.cat(outputs[start : start + 4]) for start in (0, 4))
            assert torch.equal(first, second)
            assert [tensor.requires_grad for tensor in outputs] == ([False] * 4 + [True] * 4) * 2


class Large(PretrainingTask):
    """Has no memory for a pass, as a small GPU."""

    def forward(self, batch, *contrast):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_batch_that_does_not_fit_says_what_takes_less(build, tmp_path):
    context = build(
        lambda model: Large(model, PretrainingConfig(phases=(Phase(mlm=1, itm=1, itc=1),)))
    )
    with pytest.raises(
        ValueError, match="a micro-batch of 8 does not fit into memory; try a smaller --micro-batch"
    ):
        run(context, tmp_path)


def test_dropout_differs_by_step_micro_batch_and_process(build, tmp_path, monkeypatch):
    def drawn(number):
        with monkeypatch.context() as patch:
            patch.setattr("bridgetower.training.step.rank", lambda: number)
            context = build(micro_batch_size=4, max_steps=2)
            seen = []
            context.task.register_forward_pre_hook(
                lambda task, inputs: seen.append(float(torch.rand(1)))
            )
            run(context, tmp_path / str(len(list(tmp_path.iterdir()))))
            return seen

    first = drawn(0)
    again = drawn(0)
    other = drawn(1)
    assert first == again
    assert len({*first, *other}) == 8


CONTRAST = Phase(mlm=0, itm=0, itc=2)
EVERYTHING = Phase(mlm=0.5, itm=2, itc=1)
BATCHES = [
    random_caption_batch((0, 1), (5, 3), seed=3),
    random_caption_batch((2, 0), (4, 4), seed=4),
    random_caption_batch((3, 4), (7, 2), seed=5),
]


HEADS = {"tower": {"heads__itc_dropout": 0.3}, "fused": {"heads__itc": "fused"}}


def contrast_task(phase, kind):
    model = build_model(changed_config(**HEADS[kind])).train()
    return PretrainingTask(model, PretrainingConfig(phases=(phase,)))


def seed_from_number(number):
    torch.manual_seed(100 + number)


def gradient_vector(task):
    return {
        name: value.grad for name, value in task.model.named_parameters() if value.grad is not None
    }


def contrast_in_parts(phase, kind="tower", batches=BATCHES, again=seed_from_number):
    task = contrast_task(phase, kind)
    contrasts = contrast_of_step(task, batches, seed_from_number)
    losses_of_parts = []
    for number, (batch, contrast) in enumerate(zip(batches, contrasts, strict=True)):
        again(number)
        losses = task(batch, contrast)
        (losses.total / len(batches)).backward()
        losses_of_parts.append({name: loss.detach() for name, loss in losses.terms.items()})
    return losses_of_parts, gradient_vector(task)


def as_a_whole(phase, kind="tower"):
    task = contrast_task(phase, kind)
    features = []
    for number, batch in enumerate(BATCHES):
        seed_from_number(number)
        features.append(task.features(batch))
    embeds = [
        torch.cat(embeds_of_parts)
        for embeds_of_parts in zip(
            *(features_of_part.embeds for features_of_part in features), strict=True
        )
    ]
    index = torch.cat([batch.image_index for batch in BATCHES])
    loss = itc_loss(embeds, index, task.model.head("itc").logit_scale())
    (phase.itc * loss).backward()
    if phase.itm:
        for number, batch in enumerate(BATCHES):
            seed_from_number(number)
            embeds_of_parts = task(
                batch, SimpleNamespace(through=lambda embeds, scale: embeds[0].sum())
            ).terms  # dropout as above
            (
                (phase.mlm * embeds_of_parts["mlm"] + phase.itm * embeds_of_parts["itm"])
                / len(BATCHES)
            ).backward()
    return loss.detach(), gradient_vector(task)


def norm_of_difference(actual, expected):
    assert actual.keys() == expected.keys()
    return max(
        float((actual[name] - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1))
        for name in actual
    )


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("phase", [CONTRAST, EVERYTHING])
def test_losses_and_gradients_are_those_of_the_whole(phase, kind):
    piece_losses, actual = contrast_in_parts(phase, kind)
    loss, expected = as_a_whole(phase, kind)
    for piece_loss in piece_losses:
        torch.testing.assert_close(piece_loss["itc"], loss, atol=2e-6, rtol=1e-5)
    assert norm_of_difference(actual, expected) < 1e-5
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 0.1
    assert float(expected["text.layers.0.mlp.up.weight"].abs().max()) > 1e-4
    assert kind == "tower" or float(expected["itc_head.pooled.weight"].abs().max()) > 1e-3


@pytest.mark.parametrize("kind", HEADS)
def test_control_other_draws_of_dropout_differ(kind):
    _, expected = as_a_whole(CONTRAST, kind)
    _, actual = contrast_in_parts(CONTRAST, kind, again=lambda number: seed_from_number(number + 1))
    assert norm_of_difference(actual, expected) > 1e-3


def test_features_that_are_not_finite_name_their_batch():
    spoilt = replace(BATCHES[1], pixel_values=BATCHES[1].pixel_values * torch.nan)
    with pytest.raises(
        FloatingPointError, match="contrastive features are not finite; examples of the batch: 2, 0"
    ):
        contrast_in_parts(CONTRAST, batches=[BATCHES[0], spoilt])


def test_which_steps_encode_their_micro_batches_twice(tiny_dataset):
    phases = (Phase(until=0.5, itc=1), Phase())
    task = PretrainingConfig(phases=phases)
    config = shapes_run_config(tiny_dataset, task=task, contrast_over="step")
    assert [encodes_twice(config, progress, 2) for progress in (0.0, 0.4, 0.5, 0.9)] == [
        True,
        True,
        False,
        False,
    ]
    assert not encodes_twice(config, 0.0, 1)
    assert not encodes_twice(replace(config, contrast_over="micro-batch"), 0.0, 2)
