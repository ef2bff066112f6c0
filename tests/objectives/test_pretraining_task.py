"""The pre-training task: what it computes, how often, and how the losses weigh."""

from dataclasses import replace

import pytest
import torch

from bridgetower.model.bridgetower import BridgeTower
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.objectives.losses import hard_pairs
from bridgetower.objectives.pretraining import PretrainingTask
from helpers.models import build_model, random_caption_batch, same_tensors
from helpers.shapes import SHAPES_MODEL, SHAPES_PHASES

CONFIG = SHAPES_MODEL.override({"text.dropout": 0.0, "fusion.dropout": 0.0, "text.vocab_size": 40})
FUSED = CONFIG.override({"heads.itc": "fused"})
ALL = Phase(mlm=1, itm=1, itc=1)


def make_batch(index=(0, 1, 2, 3, 3), seed=3):
    return random_caption_batch(index, [7, 4, 6, 5, 3][: len(index)], CONFIG, seed=seed)


def task_on_small_model(*phases, **changes):
    return PretrainingTask(
        build_model(CONFIG), PretrainingConfig(phases=phases or (ALL,), **changes)
    )


def gradient(task, batch):
    task.zero_grad()
    task(batch).total.backward()
    return torch.cat([p.grad.flatten() for p in task.parameters() if p.grad is not None])


class Calls:
    """Counts what the model computes."""

    def __init__(self, model):
        self.images = []
        self.texts = []
        self.pairs = []
        model.vision.patch_embedding.register_forward_hook(
            lambda _, inputs, __: self.images.append(len(inputs[0]))
        )
        model.text.word_embedding.register_forward_hook(
            lambda _, inputs, __: self.texts.append(len(inputs[0]))
        )
        model.fusion.register_forward_hook(
            lambda module, inputs, output: self.pairs.append(len(inputs[1][0]))
        )


class TestWork:
    @pytest.mark.parametrize(
        ("phase", "texts", "pairs"),
        [
            (ALL, [10], [5, 5]),
            (replace(ALL, negatives="hard"), [10], [15, 5]),
            (Phase(mlm=1, itm=0, itc=0), [5], [5]),
            (Phase(mlm=0, itm=1, itc=0), [5], [5]),
            (Phase(mlm=0, itm=0, itc=1), [5], []),
        ],
    )
    def test_one_image_encode_serves_all(self, phase, texts, pairs):
        task = task_on_small_model(phase)
        calls = Calls(task.model)
        losses = task(make_batch())
        assert (calls.images, calls.texts, calls.pairs) == ([5], texts, pairs)
        assert set(losses.terms) == {name for name in ("mlm", "itm", "itc") if getattr(phase, name)}

    @pytest.mark.parametrize(
        ("phase", "pairs"), [(Phase(mlm=0, itm=0, itc=1), [5]), (ALL, [5, 5, 5])]
    )
    def test_a_fused_head_compares_each_image_fused_with_its_text_too(self, phase, pairs):
        task = PretrainingTask(build_model(FUSED), PretrainingConfig(phases=(phase,)))
        calls = Calls(task.model)
        task(make_batch()).terms["itc"].backward()
        assert (calls.images, calls.pairs) == ([5], pairs)
        assert task.model.itc_head.pooled.weight.grad.abs().max() > 1e-3


class TestValues:
    def test_hard_negatives_are_drawn_by_the_scaled_cosines(self):
        phase = replace(ALL, negatives="hard")
        batch = make_batch()
        for seed in range(20):
            batch = replace(batch, seed=seed)
            task = task_on_small_model(phase)
            image = task.model.encode_image(batch.pixel_values)
            text = task.model.encode_text(batch.input_ids, batch.attention_mask)
            cosines = task.model.image_embeds(image) @ task.model.text_embeds(text).T
            scores = cosines.detach() / task.model.itc_head.temperature.item()
            generator = torch.Generator().manual_seed(seed)
            rows = slice(0, len(batch))
            expected = hard_pairs(
                scores, scores.T, batch.image_index, batch.image_index, rows, generator
            )
            pairs, _ = task.pairs(image, text, batch, phase)
            assert torch.equal(pairs.image_rows, expected.image_rows)
            assert torch.equal(pairs.text_rows, expected.text_rows)

    @pytest.mark.parametrize("negatives", ["random", "uniform", "hard"])
    def test_of_one_image_only_matching_is_left_out(self, negatives):
        """The same parameters have gradients, as processes average them, and they are those of the other objectives."""
        batch = make_batch((2, 2, 2))
        gradients = []
        for weight in (1, 100):
            task = task_on_small_model(replace(ALL, itm=weight, negatives=negatives))
            losses = task(batch)
            assert losses.terms["itm"] == 0
            losses.total.backward()
            assert not task.model.itm_head.fc.weight.grad.any()
            gradients.append({name: value.grad for name, value in task.named_parameters()})
        assert same_tensors(*gradients)
        assert all(gradient.isfinite().all() for gradient in gradients[0].values())

    def test_mlm_is_weighed_with_its_accuracy(self):
        """The mean over micro-batches is that over all hidden words then."""
        task = task_on_small_model(Phase(mlm=1, itm=0))
        batch = make_batch()
        word = batch.mlm_labels[0, 1]
        with torch.no_grad():
            task.model.mlm_head.decoder.bias[word] += 1000
        share = float((batch.mlm_labels[:, 1] == word).float().mean())
        assert 0 < share < 1
        plain = task(batch)
        weighed = task(replace(batch, mlm_weight=torch.tensor(0.25)))
        assert float(plain.metrics["mlm_accuracy"]) == pytest.approx(share)
        assert float(weighed.metrics["mlm_accuracy"]) == pytest.approx(share / 4)
        assert weighed.terms["mlm"].item() == pytest.approx(plain.terms["mlm"].item() / 4)


@pytest.mark.parametrize("name", ["mlm", "itm", "itc"])
def test_a_doubled_weight_doubles_its_share_of_the_gradient(name):
    batch = make_batch()
    changes = {}, {name: 2}, {"mlm": 1e-30, "itm": 1e-30, "itc": 1e-30, name: 1}
    once, twice, alone = (
        gradient(task_on_small_model(replace(ALL, **change)), batch) for change in changes
    )
    torch.testing.assert_close(twice - once, alone, atol=1e-5, rtol=1e-4)
    assert alone.abs().max() > 1e-3


class TestPhases:
    def test_progress_decides(self):
        task = task_on_small_model(*SHAPES_PHASES)
        seen = {}
        for progress in (0.0, 0.29, 0.3, 0.61, 1.0):
            task.progress = progress
            losses = task(make_batch())
            seen[progress] = sorted(losses.terms)
        everything = ["itc", "itm", "mlm"]
        assert seen == {
            0.0: ["itc"],
            0.29: ["itc"],
            0.3: everything,
            0.61: everything,
            1.0: everything,
        }

    @pytest.mark.parametrize(
        ("heads", "phases", "message"),
        [
            ({"heads.mlm": False}, (ALL,), "no mlm head"),
            ({"heads.itm": False}, (ALL,), "no itm head"),
            ({"heads.itc": None}, (ALL,), "no itc head"),
            ({"heads.itc": None}, (Phase(negatives="hard"),), "no itc head"),
            (
                {"heads.mlm": False, "heads.itc": None},
                (Phase(until=0.5), ALL),
                "no mlm and no itc head",
            ),
        ],
    )
    def test_missing_heads(self, heads, phases, message):
        with pytest.raises(ValueError, match=message):
            PretrainingTask(BridgeTower(CONFIG.override(heads)), PretrainingConfig(phases=phases))

    @pytest.mark.parametrize(
        "phases", [(Phase(negatives="hard"),), (replace(ALL, until=0.5), Phase())]
    )
    def test_embeddings_of_pairs_are_not_left_behind_by_their_fusion_encoder(self, phases):
        with pytest.raises(
            ValueError, match=r"heads\.itc is fused, but itc of the last phase is 0"
        ):
            PretrainingTask(BridgeTower(FUSED), PretrainingConfig(phases=phases))

    def test_heads_that_no_phase_needs_may_be_missing(self):
        model = BridgeTower(CONFIG.override({"heads.mlm": False, "heads.itc": None}))
        losses = PretrainingTask(model, PretrainingConfig(phases=(Phase(mlm=0, itm=1),)))(
            make_batch()
        )
        assert list(losses.terms) == ["itm"]


def test_in_one_process_hard_negatives_of_the_world_are_those_of_the_rank():
    phase = replace(ALL, negatives="hard")
    totals = {
        scope: task_on_small_model(phase, negatives_from=scope)(make_batch()).total.item()
        for scope in ("rank", "world")
    }
    assert totals["rank"] == totals["world"]


def test_what_compares_the_pairs_of_a_batch():
    names = ((Phase(), []), (Phase(itc=1), ["ITC"]), (Phase(negatives="hard"), ["hard negatives"]))
    for phase, contrasts in names:
        assert PretrainingConfig(phases=(Phase(until=0.5), phase)).contrasts == contrasts


def test_phase_in_force():
    phases = (Phase(until=0.25), Phase(until=0.5, itc=1), Phase(until=1.0, mlm=0))
    config = PretrainingConfig(phases=phases)
    shares = {0.0: 0, 0.2499: 0, 0.25: 1, 0.4999: 1, 0.5: 2, 0.99: 2, 1.0: 2}
    assert {share: phases.index(config.phase(share)) for share in shares} == shares
