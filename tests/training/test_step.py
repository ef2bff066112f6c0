"""One step: accumulation, clipping, contrast over the step, and what stops a run before its weights are spoilt."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import recorded_gradients, run, weights
from torch import Tensor, nn

import shapes
import states
from bridgetower.data.batch import CaptionBatch
from bridgetower.data.examples import PreparedImages
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.objectives.losses import Losses
from bridgetower.objectives.pretraining import PretrainingTask
from bridgetower.tasks.run_config import OptimizerConfig, read_metrics
from bridgetower.training import step as step_module
from bridgetower.training.setup import TrainContext


class TestAccumulation:
    def gradients(self, parts: TrainContext, out: Path) -> list[Tensor]:
        with recorded_gradients(parts.model) as seen:
            run(parts, out)
        return seen

    @pytest.mark.parametrize("micro_batch_size", [4, 3, 1])
    def test_equals_one_large_batch(
        self, build: Callable[..., TrainContext], tmp_path: Path, micro_batch_size: int
    ) -> None:
        size = 6 if micro_batch_size == 3 else 8
        whole = self.gradients(build(batch_size=size, max_steps=3), tmp_path / "whole")
        cut = build(batch_size=size, micro_batch_size=micro_batch_size, max_steps=3)
        parts = self.gradients(cut, tmp_path / "parts")
        assert len(whole) == len(parts) == 3
        for one, other in zip(whole, parts, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
        losses = [[entry["loss"] for entry in read_metrics(tmp_path / name, "train")] for name in ("whole", "parts")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        control = self.gradients(build(batch_size=size // 2, max_steps=1), tmp_path / "half")
        assert (whole[0] - control[0]).abs().max() > 1e-2


class TestClipping:
    def test_shortens_the_gradient_and_keeps_its_direction(
        self, build: Callable[..., TrainContext], tmp_path: Path
    ) -> None:
        seen = {}
        for name, clip_norm in (("free", None), ("clipped", 0.01)):
            parts = build(max_steps=1, optimizer=OptimizerConfig(lr=1e-2, clip_norm=clip_norm))
            with recorded_gradients(parts.model) as gradients:
                run(parts, tmp_path / name)
            (seen[name],) = gradients
        norm = seen["free"].norm().item()
        assert norm > 0.1
        assert seen["clipped"].norm().item() == pytest.approx(0.01, rel=1e-3)
        torch.testing.assert_close(seen["clipped"] / 0.01, seen["free"] / norm, atol=1e-4, rtol=1e-3)
        (entry,) = read_metrics(tmp_path / "clipped", "train")
        assert entry["gradient_norm"] == pytest.approx(norm, rel=1e-4)
        assert read_metrics(tmp_path / "free", "train")[0]["gradient_norm"] == entry["gradient_norm"]


class TestNotFinite:
    def test_stops_and_names_the_pictures(self, build: Callable[..., TrainContext], tmp_path: Path) -> None:
        phase = Phase(mlm=1.0, itm=1.0, itc=1.0, negatives="hard")
        parts = build(
            lambda model: PretrainingTask(model, PretrainingConfig(phases=(phase,))), checkpoint_every=1, max_steps=4
        )
        batches: list[CaptionBatch] = []

        def spoil(task: nn.Module, inputs: tuple[CaptionBatch]) -> None:
            batches.append(inputs[0])
            if len(batches) == 3:
                with torch.no_grad():
                    next(parts.model.parameters()).fill_(torch.nan)

        parts.task.register_forward_pre_hook(spoil)
        with pytest.raises(FloatingPointError, match=r"loss is not finite at step 3: .*'itc': nan") as caught:
            run(parts, tmp_path)
        assert all(name in str(caught.value) for name in batches[2].ids)
        assert "\n" not in str(caught.value)
        assert states.saved(tmp_path).step == 2
        assert all(tensor.isfinite().all() for tensor in states.tensors(tmp_path).values())

    @pytest.mark.parametrize("clip_norm", [None, 1.0])
    def test_a_gradient_stops_before_the_weights_change(
        self, build: Callable[..., TrainContext], tmp_path: Path, clip_norm: float | None
    ) -> None:
        parts = build(micro_batch_size=4, optimizer=OptimizerConfig(lr=1e-2, clip_norm=clip_norm))
        batches: list[CaptionBatch] = []

        def spoil(gradient: Tensor) -> Tensor:
            return torch.full_like(gradient, torch.inf) if len(batches) == 5 else gradient

        parts.task.register_forward_pre_hook(lambda task, inputs: batches.append(inputs[0]))
        parts.model.token_type_embedding.weight.register_hook(spoil)
        with (
            recorded_gradients(parts.model) as seen,
            pytest.raises(FloatingPointError, match=r"gradients are not finite at step 3: norm (inf|nan)") as caught,
        ):
            run(parts, tmp_path)
        assert len(seen) == 2
        assert weights(parts.model).isfinite().all()
        assert all(name in str(caught.value) for batch in batches[4:6] for name in batch.ids)
        assert not all(name in str(caught.value) for batch in batches[:4] for name in batch.ids)


class TestContrastOverStep:
    def contrasting(self, build: Callable[..., TrainContext], **changes: Any) -> TrainContext:
        task = PretrainingConfig(phases=(Phase(mlm=0, itm=0, itc=1),))
        parts = build(lambda model: PretrainingTask(model, task), batch_size=8, max_steps=2, **changes)
        return replace(parts, config=replace(parts.config, task=task))

    def trained(self, parts: TrainContext, out: Path) -> tuple[list[Tensor], list[float]]:
        with recorded_gradients(parts.model) as seen:
            run(parts, out)
        return seen, [entry["itc"] for entry in read_metrics(out, "train")]

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_equals_one_large_batch(self, build: Callable[..., TrainContext], tmp_path: Path, num_workers: int) -> None:
        whole = self.trained(self.contrasting(build), tmp_path / "whole")
        parts = self.contrasting(build, micro_batch_size=2, contrast_over="step")
        data = replace(parts.config.data, num_workers=num_workers)
        parts = replace(parts, config=replace(parts.config, data=data))
        found = self.trained(parts, tmp_path / "parts")
        for one, other in zip(whole[0], found[0], strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
        assert found[1] == pytest.approx(whole[1], rel=1e-5)
        control = self.trained(self.contrasting(build, micro_batch_size=2), tmp_path / "control")
        assert float((whole[0][0] - control[0][0]).abs().max()) > 1e-2
        assert control[1][0] < whole[1][0]  # fewer pairs to tell apart

    def test_pixels_are_kept_between_the_passes_unless_they_are_too_many(
        self, build: Callable[..., TrainContext], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        drawn: list[int] = []
        views = PreparedImages.views

        def counted(images: PreparedImages, numbers: Sequence[int], *rest: Any) -> Any:
            drawn.append(len(numbers))
            return views(images, numbers, *rest)

        monkeypatch.setattr(PreparedImages, "views", counted)
        found, decoded = [], []
        size = shapes.MODEL.vision.image_size
        for limit in (8 * 3 * size**2, 8 * 3 * size**2 - 1):
            monkeypatch.setattr(step_module, "KEPT_BYTES", limit)
            drawn.clear()
            parts = self.contrasting(build, micro_batch_size=2, contrast_over="step", augmentation="affine")
            pictures: Any = parts.examples.images
            found.append(self.trained(replace(parts, images=(pictures, pictures)), tmp_path / str(limit)))
            assert pictures.raw is (not decoded)  # kept as uint8, read again as they are needed
            decoded.append(sum(drawn))
        assert decoded == [2 * 8, 4 * 8]  # of two steps
        assert found[0][1] == found[1][1]
        assert all(torch.equal(kept, read) for kept, read in zip(found[0][0], found[1][0], strict=True))

    def test_masked_words_are_those_of_a_step_without_it(
        self, build: Callable[..., TrainContext], tmp_path: Path
    ) -> None:
        task, logged = PretrainingConfig(phases=(Phase(mlm=1, itm=0, itc=1),)), []
        for contrast_over in ("step", "micro-batch"):
            parts = build(
                lambda model: PretrainingTask(model, task), max_steps=1, micro_batch_size=2, contrast_over=contrast_over
            )
            run(replace(parts, config=replace(parts.config, task=task)), tmp_path / contrast_over)
            logged += read_metrics(tmp_path / contrast_over, "train")
        assert logged[0]["mlm"] == logged[1]["mlm"] > 0
        assert logged[0]["itc"] != logged[1]["itc"]

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_both_passes_see_the_same_views_and_draw_the_same_dropout(
        self, build: Callable[..., TrainContext], tmp_path: Path, precision: str
    ) -> None:
        options = {"micro_batch_size": 2, "contrast_over": "step", "model": shapes.MODEL, "precision": precision}
        parts = self.contrasting(build, augmentation="affine", **options)
        heads = parts.model.head("itc")
        seen: dict[str, list[Tensor]] = {"text": [], "image": []}
        for name, outputs in seen.items():
            getattr(heads, name).register_forward_hook(lambda head, inputs, output, to=outputs: to.append(output))
        run(parts, tmp_path)
        for outputs in seen.values():
            first, second = (torch.cat(outputs[start : start + 4]) for start in (0, 4))
            assert torch.equal(first, second)
            assert [tensor.requires_grad for tensor in outputs] == ([False] * 4 + [True] * 4) * 2


class Large(PretrainingTask):
    """Has memory for so many pairs, as a small GPU."""

    fits = 3

    def forward(self, batch: CaptionBatch, *contrast: Any) -> Losses:
        if len(batch) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(batch, *contrast)


@pytest.mark.parametrize(
    ("fits", "message"),
    [
        (3, "a micro-batch of 8 does not fit into memory, one of 2 does: use --micro-batch-size 2"),
        (0, "a micro-batch of 8 does not fit into memory, nor does one of 1; use --checkpoint-activations"),
    ],
)
def test_a_batch_that_does_not_fit_names_one_that_does(
    build: Callable[..., TrainContext], tmp_path: Path, fits: int, message: str
) -> None:
    parts = build(lambda model: Large(model, PretrainingConfig(phases=(Phase(mlm=1, itm=1, itc=1),))))
    parts.task.fits = fits
    before = weights(parts.model)
    with pytest.raises(ValueError, match=message):
        run(parts, tmp_path)
    assert torch.equal(weights(parts.model), before)


def test_dropout_differs_by_step_micro_batch_and_process(
    build: Callable[..., TrainContext], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(number: int) -> list[float]:
        with monkeypatch.context() as patch:
            patch.setattr("bridgetower.training.step.rank", lambda: number)
            parts, seen = build(micro_batch_size=4, max_steps=2), []
            parts.task.register_forward_pre_hook(lambda task, inputs: seen.append(float(torch.rand(1))))
            run(parts, tmp_path / str(len(list(tmp_path.iterdir()))))
            return seen

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert first == again
    assert len({*first, *other}) == 8
