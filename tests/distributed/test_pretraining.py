"""Steps and evaluation in several processes against one that holds everything."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from ranks import run_on_ranks
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from bridgetower.checkpoints import read_checkpoint
from bridgetower.data.batches.batch import StepSampler
from bridgetower.data.batches.captions import CaptionImages
from bridgetower.data.config import DataConfig, MaskingConfig
from bridgetower.distributed import rank, world_size
from bridgetower.evaluation import masked_words
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.evaluation.retrieval import evaluate_matching, evaluate_retrieval
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.objectives.losses import Pairs, itc_loss
from bridgetower.objectives.pretraining import PretrainingTask
from bridgetower.training.step import contrast_of_step
from helpers.models import SMALL_CONFIG, build_model, changed_config, random_caption_batch
from helpers.retrieval import cosine_table, itm_table
from helpers.sets import records_of, write_set
from helpers.shapes import SHAPES_MODEL

WORLD = 2
ROWS = 4  # pairs of each process
CONFIG = SHAPES_MODEL.override({"text.dropout": 0.0, "fusion.dropout": 0.0, "text.vocab_size": 40})
INDEX = (0, 1, 2, 2, 3, 0, 4, 5)  # picture 0 is in both processes, picture 2 twice in one
LENGTHS = {"padded": (7, 3, 5, 4, 4, 2, 6, 3), "one without padding": (7, 3, 5, 4, 5, 5, 5, 5)}
EXACT = {"atol": 2e-6, "rtol": 2e-5}


def whole_batch(lengths):
    """Returns the batch of both processes together, with one hidden word in each text."""
    return random_caption_batch(INDEX, lengths, CONFIG, seed=5)


def own_part(batch, process):
    """One process's rows, padded only as far as they need it, as a data loader makes them."""
    rows = slice(process * ROWS, (process + 1) * ROWS)
    mask = batch.attention_mask[rows]
    length = int(mask.sum(dim=1).max())
    cut = {
        name: getattr(batch, name)[rows, :length]
        for name in ("input_ids", "masked_input_ids", "mlm_labels")
    }
    cut |= {name: getattr(batch, name)[rows] for name in ("pixel_values", "image_index", "ids")}
    mask = None if bool(mask[:, :length].all()) else mask[:, :length]
    return replace(batch, **cut, attention_mask=mask, seed=batch.seed + process)


def task_in_phase(phase, **changes):
    return PretrainingTask(build_model(CONFIG), PretrainingConfig(phases=(phase,), **changes))


def gradient_values(task):
    return {
        name: value.grad.clone()
        for name, value in task.model.named_parameters()
        if value.grad is not None
    }


PHASES = {
    "itc": (Phase(mlm=0.0, itm=0.0, itc=1.0), {}),
    "itc without gradients": (Phase(mlm=0.0, itm=0.0, itc=1.0), {"gather_with_grads": False}),
    "random": (Phase(mlm=0.5, itm=2.0, itc=1.0), {}),
    "hard": (Phase(mlm=0.5, itm=2.0, itc=1.0, negatives="hard"), {}),
    "hard of all": (
        Phase(mlm=0.5, itm=2.0, itc=1.0, negatives="hard"),
        {"negatives_from": "world"},
    ),
}


def step_in_process(texts, name):
    (phase, changes) = PHASES[name]
    drawn = []
    task = task_in_phase(phase, **changes)
    original = task.pairs

    def pairs(image, text, batch, phase):
        result = original(image, text, batch, phase)
        drawn.append(result[0])
        return result

    task.pairs = pairs
    parallel = DistributedDataParallel(task, find_unused_parameters=True)
    losses = parallel(own_part(whole_batch(LENGTHS[texts]), rank()))
    losses.total.backward()
    terms = {name: value.detach() for name, value in losses.terms.items()}
    return {
        "total": losses.total.detach(),
        "parts": terms,
        "gradients": gradient_values(task),
        "pairs": drawn,
    }


def evaluate(checkpoint, dataset):
    loaded = read_checkpoint(checkpoint)
    images = CaptionImages(DataConfig(folders=(str(dataset),)), "test", loaded.processor)
    config = RetrievalConfig(candidates=3, batch_size=4)
    model = loaded.model()
    result = evaluate_retrieval(model, images, config)
    accuracy = evaluate_matching(model, images, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masked_words, "BATCH_SIZE", 5)
        words = masked_words.evaluate_masked_words(model, images, MaskingConfig(probability=0.4))
    evaluation = {"metrics": result.metrics(), "accuracy": accuracy, "words": words}
    return evaluation | {"similarity": cosine_table(result), "itm": itm_table(result)}


def both_evaluations(checkpoint, dataset, single):
    sets = {"evaluation": dataset, "evaluation of one": single}
    return {name: evaluate(checkpoint, folder) for name, folder in sets.items()}


def sample():
    process = {"rank": rank(), "world_size": world_size()}
    return [
        key.examples
        for key in StepSampler(27, batch_size=8, micro_batches=2, steps=range(6), seed=3, **process)
    ]


def step_and_evaluations(checkpoint, dataset, single):
    steps = {(texts, name): step_in_process(texts, name) for texts in LENGTHS for name in PHASES}
    return {"steps": steps, "samples": sample(), **both_evaluations(checkpoint, dataset, single)}


@pytest.fixture(scope="module")
def single_picture(tiny_dataset, tmp_path_factory):
    return write_set(
        tmp_path_factory.mktemp("single") / "set", {"test": records_of(tiny_dataset, "test")[:1]}
    )


@pytest.fixture(scope="module")
def processes(tiny_checkpoint, tiny_dataset, single_picture):
    return run_on_ranks(WORLD, step_and_evaluations, tiny_checkpoint, tiny_dataset, single_picture)


@pytest.fixture(scope="module", params=[WORLD, 4])
def evaluations(request, tiny_checkpoint, tiny_dataset, single_picture):
    if request.param == WORLD:
        return request.getfixturevalue("processes")
    return run_on_ranks(
        request.param, both_evaluations, tiny_checkpoint, tiny_dataset, single_picture
    )


def joined_pairs(pairs_of_ranks, *, global_rows):
    shifts = [0 if global_rows else process * ROWS for process in range(WORLD)]
    return Pairs(
        torch.cat(
            [pairs.image_rows + shift for pairs, shift in zip(pairs_of_ranks, shifts, strict=True)]
        ),
        torch.cat(
            [pairs.text_rows + shift for pairs, shift in zip(pairs_of_ranks, shifts, strict=True)]
        ),
        torch.cat([pairs.labels for pairs in pairs_of_ranks]),
    )


def step_in_one_process(texts, name, processes):
    phase, changes = PHASES[name]
    task = task_in_phase(phase, **changes)
    batch = whole_batch(LENGTHS[texts])
    image = task.model.encode_image(batch.pixel_values)
    text = task.model.encode_text(batch.input_ids, batch.attention_mask)
    terms = {"itc": task.itc(image, text, batch)}
    if phase.itm:
        drawn = [process["steps"][texts, name]["pairs"][0] for process in processes]
        pairs = joined_pairs(drawn, global_rows=changes.get("negatives_from") == "world")
        match = batch.image_index[pairs.image_rows] == batch.image_index[pairs.text_rows]
        assert torch.equal(match.long(), pairs.labels)
        terms["itm"], _ = task.itm(image, text, pairs)
        masked = task.model.encode_text(batch.masked_input_ids, batch.attention_mask)
        terms["mlm"], _ = task.mlm(image, masked, batch)
    total = torch.stack([getattr(phase, term) * loss for term, loss in terms.items()]).sum()
    total.backward()
    return {"total": total.detach(), "parts": terms, "gradients": gradient_values(task)}


def relative_distance(actual, expected):
    return max(float((actual[name] - expected[name]).abs().max()) for name in actual)


@pytest.mark.parametrize("texts", LENGTHS)
class TestStep:
    @pytest.mark.parametrize("name", PHASES)
    def test_losses_and_averaged_gradients_are_those_of_one_process(self, processes, texts, name):
        expected = step_in_one_process(texts, name, processes)
        results = [process["steps"][texts, name] for process in processes]
        assert results[0]["parts"].keys() == expected["parts"].keys()
        for term, loss in expected["parts"].items():
            mean = torch.stack([result["parts"][term] for result in results]).mean()
            torch.testing.assert_close(mean, loss.detach(), **EXACT)
        total = torch.stack([result["total"] for result in results]).mean()
        torch.testing.assert_close(total, expected["total"], **EXACT)
        for result in results if name != "itc without gradients" else ():
            assert result["gradients"].keys() == expected["gradients"].keys()
            for parameter, gradient in expected["gradients"].items():
                actual = result["gradients"][parameter]
                torch.testing.assert_close(actual, gradient, atol=1e-5, rtol=1e-4, msg=parameter)
        assert max(float(gradient.abs().max()) for gradient in expected["gradients"].values()) > 0.1

    def test_control_gradients_that_stay_in_their_process_differ(self, processes, texts):
        expected = step_in_one_process(texts, "itc", processes)["gradients"]
        assert (
            relative_distance(
                expected, processes[0]["steps"][texts, "itc without gradients"]["gradients"]
            )
            > 1e-2
        )

    def test_hard_negatives_of_all_cross_the_processes(self, processes, texts):
        foreign = 0
        for process, result in enumerate(processes):
            (pairs,) = result["steps"][texts, "hard of all"]["pairs"]
            rows = torch.cat([pairs.image_rows, pairs.text_rows])
            is_local = (rows >= process * ROWS) & (rows < (process + 1) * ROWS)
            assert int(is_local.sum()) >= 4 * ROWS  # positives, and one side of every negative
            foreign += int((~is_local).sum())
            (local,) = result["steps"][texts, "hard"]["pairs"]
            assert int(torch.cat([local.image_rows, local.text_rows]).max()) < ROWS
        assert foreign > 0


class TestEvaluation:
    def test_an_odd_number_of_pictures(self, evaluations, tiny_checkpoint, tiny_dataset):
        expected = evaluate(tiny_checkpoint, tiny_dataset)
        assert len(expected["similarity"]) % len(evaluations) == 1
        for process in evaluations:
            evaluation = process["evaluation"]
            assert evaluation["metrics"] == pytest.approx(expected["metrics"], abs=1e-6)
            assert (
                evaluation["accuracy"]
                == expected["accuracy"]
                == expected["metrics"]["itm_accuracy"]
            )
            assert evaluation["words"] == pytest.approx(expected["words"], abs=1e-7)
            torch.testing.assert_close(
                evaluation["similarity"], expected["similarity"], atol=1e-5, rtol=0
            )
            torch.testing.assert_close(
                evaluation["itm"], expected["itm"], atol=1e-5, rtol=0, equal_nan=True
            )

    def test_fewer_pictures_than_processes(self, evaluations, tiny_checkpoint, single_picture):
        expected = evaluate(tiny_checkpoint, single_picture)
        for process in evaluations:
            assert process["evaluation of one"]["metrics"] == pytest.approx(
                expected["metrics"], abs=1e-6
            )
            assert process["evaluation of one"]["words"] == pytest.approx(
                expected["words"], abs=1e-7
            )


def test_batches_of_the_processes_are_that_of_one(processes):
    alone = [
        key.examples
        for key in StepSampler(27, batch_size=8, micro_batches=1, steps=range(6), seed=3)
    ]
    first, second = (process["samples"] for process in processes)
    for number, pairs in enumerate(alone):
        micro = slice(2 * number, 2 * number + 2)
        assert pairs == tuple(
            pair for examples in (*first[micro], *second[micro]) for pair in examples
        )


KINDS = {
    "tower": changed_config(heads__itc_dropout=0.3),
    "fused": changed_config(heads__itc="fused"),
}
NO_DROPOUT = {"text.dropout": 0.0, "fusion.dropout": 0.0, "heads.itc_dropout": 0.0}
ITC = PretrainingConfig(phases=(Phase(mlm=0, itm=0, itc=2),))


def row_slice(start, stop):
    batch = random_caption_batch(INDEX, LENGTHS["padded"], SMALL_CONFIG)
    tensors = {
        name: value[start:stop] for name, value in vars(batch).items() if isinstance(value, Tensor)
    }
    return replace(batch, **tensors, ids=batch.ids[start:stop])


def micro_batches(process, processes):
    half = len(INDEX) // processes // 2
    return [
        row_slice(start, start + half) for start in (2 * process * half, (2 * process + 1) * half)
    ]


def seed_dropout(process, micro):
    torch.manual_seed(10 * process + micro)


def at_once(kind):
    share = len(INDEX) // world_size()
    task = PretrainingTask(build_model(KINDS[kind].override(NO_DROPOUT)).train(), ITC)
    parallel = DistributedDataParallel(task, find_unused_parameters=True)
    loss = parallel(row_slice(rank() * share, (rank() + 1) * share)).total
    loss.backward()
    return loss.detach(), gradient_values(task)


def losses_of_micro_batches(kind):
    task = PretrainingTask(build_model(KINDS[kind]).train(), ITC)
    shares = micro_batches(rank(), world_size())
    contrasts = contrast_of_step(task, shares, lambda micro: seed_dropout(rank(), micro))
    parallel = DistributedDataParallel(task, find_unused_parameters=True)
    losses = []
    for micro, (batch, contrast) in enumerate(zip(shares, contrasts, strict=True)):
        seed_dropout(rank(), micro)
        with nullcontext() if micro else parallel.no_sync():
            losses.append(parallel(batch, contrast).total)
            (losses[-1] / 2).backward()
    return torch.stack(losses).mean().detach(), gradient_values(task)


def contrasts():
    return {
        (kind, whole): at_once(kind) if whole else losses_of_micro_batches(kind)
        for kind in KINDS
        for whole in (True, False)
    }


def one_graph(kind, whole, processes):
    config = KINDS[kind].override(NO_DROPOUT) if whole else KINDS[kind]
    task = PretrainingTask(build_model(config).train(), ITC)
    features = []
    for process in range(processes):
        for micro, batch in enumerate(micro_batches(process, processes)):
            seed_dropout(process, micro)
            features.append(task.features(batch))
    embeds = [
        torch.cat(embeds_of_parts)
        for embeds_of_parts in zip(
            *(features_of_part.embeds for features_of_part in features), strict=True
        )
    ]
    loss = 2 * itc_loss(embeds, torch.tensor(INDEX), task.model.head("itc").logit_scale())
    loss.backward()
    return loss.detach(), gradient_values(task)


@pytest.mark.parametrize("processes", [2, 4])
def test_contrast_of_towers_and_of_fused_pairs_is_that_of_one_process(processes):
    results = run_on_ranks(processes, contrasts)
    for key in results[0]:
        loss, expected = one_graph(*key, processes)
        mean = torch.stack([result[key][0] for result in results]).mean()
        torch.testing.assert_close(mean, loss, atol=5e-6, rtol=2e-5)
        assert expected["itc_head.text.weight"].abs().max() > 1e-2
        assert key[0] == "tower" or expected["fusion.text_layers.0.mlp.up.weight"].abs().max() > 0
        for result in results:
            assert result[key][1].keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(
                    result[key][1][name], gradient, atol=2e-5, rtol=1e-4, msg=f"{key}: {name}"
                )
