"""Steps of several micro-batches and processes against one large batch, in texts of very different lengths."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from ranks import run_on_ranks
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bridgetower.data.config import MaskingConfig
from bridgetower.data.sets.custom import PairsConfig, prepare_custom
from bridgetower.distributed import world_size
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.model.config import HeadsConfig
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.tasks.entries import Nlvr2Config, SnliVeConfig, VqaConfig
from bridgetower.tasks.run_config import read_metrics
from bridgetower.training.run import train
from helpers.sets import ANSWERS, ENTRY_KINDS, write_entry_set
from helpers.shapes import (
    SHAPES_MODEL,
    shapes_run_config,
    write_shape_pictures,
    write_tiny_checkpoint,
)

SIZES = {1: (8, 2), 2: (1,)}  # of micro-batches, by the number of processes; 8 is the whole batch
CUTS = [(processes, size) for processes, sizes in SIZES.items() for size in sizes][1:]
PLAIN = SHAPES_MODEL.override({"text.dropout": 0.0, "fusion.dropout": 0.0})
TYPES = replace(PLAIN.fusion, num_token_types=3)
# Every word is hidden, so that the same ones are in any cut, and as many as the text is long.
ALL_WORDS = MaskingConfig(probability=1.0, mask_share=1.0, random_share=0.0)
TASK = PretrainingConfig(phases=(Phase(mlm=1, itm=0),), masking=ALL_WORDS)
TASKS = {"words": TASK, "words, officially": replace(TASK, mlm_normalization="official")}
TASKS |= {"vqa": VqaConfig(), "snli-ve": SnliVeConfig(), "nlvr2": Nlvr2Config()}
HEADS = {
    "vqa": HeadsConfig(mlm=False, itm=False, vqa=len(ANSWERS)),
    "snli-ve": HeadsConfig(mlm=False, itm=False, snli_ve=True),
    "nlvr2": HeadsConfig(mlm=False, itm=False, nlvr2=True, nlvr2_dropout=0.0),
}
PARTS = {"words": "mlm", "vqa": "vqa", "snli-ve": "snli_ve", "nlvr2": "nlvr2"}


def first_step(config, out):
    seen = []

    def record(optimizer, arguments, options):
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        seen.append(
            torch.cat(
                [weight.grad.flatten().clone() for weight in weights if weight.grad is not None]
            )
        )

    hook = register_optimizer_step_pre_hook(record)
    train(config, out, progress=False)
    hook.remove()
    (gradients,) = seen
    (metrics,) = read_metrics(out, "train")
    return SimpleNamespace(gradients=gradients, metrics=metrics)


def first_steps(configs, out):
    return {
        (name, size): first_step(replace(config, micro_batch_size=size), out / f"{name}-{size}")
        for name, config in configs.items()
        for size in SIZES[world_size()]
    }


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uneven")
    write_shape_pictures(folder)
    words = ["red", "blue", "circle", "square", "bar"] * 4
    captions = [" ".join(words[:number] if number % 2 else ["red"]) for number in range(20)]
    lines = [
        "image,caption",
        *(f"{number:02}.png,{caption}" for number, caption in enumerate(captions)),
    ]
    (folder / "uneven.csv").write_text("\n".join(lines))
    prepare_custom(
        "pairs",
        folder / "uneven.csv",
        folder / "set",
        PairsConfig(test_fraction=0.1, validation_fraction=0.1),
    )
    return folder / "set"


@pytest.fixture(scope="module")
def configs_by_name(uneven, tiny_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    checkpoint = write_tiny_checkpoint(tiny_dataset, folder / "checkpoint", PLAIN)
    sets = {kind: write_entry_set(folder / kind, kind) for kind in ENTRY_KINDS}
    return {
        name: shapes_run_config(
            sets.get(name, uneven),
            task=task,
            model=replace(
                PLAIN,
                heads=HEADS.get(name, PLAIN.heads),
                fusion=TYPES if name == "nlvr2" else PLAIN.fusion,
            ),
            init=str(checkpoint),
            evaluation=RetrievalConfig(),
            select_by="mlm_accuracy" if isinstance(task, PretrainingConfig) else task.metrics[0],
            device="cpu",
            max_steps=1,
            evaluate_every=None,
        )
        for name, task in TASKS.items()
    }


@pytest.fixture(scope="module")
def single_process(configs_by_name, tmp_path_factory):
    return first_steps(configs_by_name, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def step_results(single_process, configs_by_name, tmp_path_factory):
    return {
        1: [single_process],
        2: run_on_ranks(2, first_steps, configs_by_name, tmp_path_factory.mktemp("two")),
    }


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", PARTS)
def test_any_cut_gives_the_gradients_and_metrics_of_one_batch(
    name, cut, single_process, step_results
):
    (processes, size) = cut
    whole = single_process[name, 8]
    assert len(step_results[processes]) == processes
    for process in step_results[processes]:
        result = process[name, size]
        torch.testing.assert_close(result.gradients, whole.gradients, atol=1e-6, rtol=1e-5)
        for metric in (
            PARTS[name],
            "loss",
            "gradient_norm",
            *(m for m in whole.metrics if "accuracy" in m),
        ):
            assert result.metrics[metric] == pytest.approx(whole.metrics[metric], rel=1e-5), metric
    assert float(whole.gradients.abs().max()) > 0.1


@pytest.mark.parametrize("cut", CUTS)
def test_control_the_official_mean_over_micro_batches_differs(cut, single_process, step_results):
    (processes, size) = cut
    whole = single_process["words", 8]
    # of one batch they are the same
    assert torch.equal(single_process["words, officially", 8].gradients, whole.gradients)
    for process in step_results[processes]:
        result = process["words, officially", size]
        assert float((result.gradients - whole.gradients).abs().max()) > 1e-2
        assert abs(result.metrics["mlm"] - whole.metrics["mlm"]) > 1e-3


def test_labels_are_counted_in_the_process_that_reads(configs_by_name, single_process, tmp_path):
    config = replace(configs_by_name["words"], micro_batch_size=2)
    step_results = first_step(
        replace(config, data=replace(config.data, num_workers=1)), tmp_path / "run"
    )
    assert torch.equal(step_results.gradients, single_process["words", 2].gradients)
