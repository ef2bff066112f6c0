"""Case b2: two processes, each with its own rows, against two official ones."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from recompute import caption_batch, encode, itm_outputs, pretraining_task

from bridgetower.checkpoints.keymap import export_tensors
from bridgetower.distributed import all_gather, rank, world_size
from bridgetower.objectives.losses import pairs_with_negatives
from bridgetower.objectives.pretraining import gather_texts
from golden import GRADIENTS, case, wrong

CASE = "b2_itc_world2"
ARMS = ("itc_gather_with_grads_True", "itc_gather_with_grads_False", "hard_local", "hard_global")


def matching(task, image, text, arm, recorded_arm):
    images, texts = (torch.tensor(recorded_arm[f"neg_{kind}_idx"]) for kind in ("image", "text"))
    local_rows = slice(0, len(images))
    if arm == "hard_global":
        image = image.map(all_gather)
        text = gather_texts(text)
        local_rows = slice(rank() * len(images), (rank() + 1) * len(images))
    return itm_outputs(task, image, text, pairs_with_negatives(images, texts, local_rows))


def gradient_norms(recorded, model, names):
    table = recorded.table()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    shapes = {name: tensor.shape for name, tensor in recorded.checkpoint.tensors.items()}
    gradients = {
        name: torch.zeros(shape) if ours[name] is None else ours[name]
        for name, shape in shapes.items()
    }
    official = export_tensors(table, gradients)
    return {name: official[name].norm().item() for name in names}


def average_gradients(model):
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= world_size()


def run_arm(arm):
    recorded = case(CASE)
    recorded_arm = recorded.meta["ranks"][rank()][arm]
    count = recorded.meta["rows_per_rank"]
    task = pretraining_task(
        recorded, recorded.fresh_model(), gather_with_grads=not arm.endswith("False")
    )
    batch = caption_batch(recorded.inputs, slice(rank() * count, (rank() + 1) * count))
    rows = {
        "image": batch.pixel_values,
        "text_ids": batch.input_ids,
        "text_masks": batch.attention_mask,
    }
    image, text = encode(task.model, rows)
    outputs = {"itc_loss": task.itc(image, text, batch)}
    if arm.startswith("hard"):
        outputs |= matching(task, image, text, arm, recorded_arm)
    sum(loss for name, loss in outputs.items() if name.endswith("loss")).backward()
    local = gradient_norms(recorded, task.model, recorded_arm["local_grad_norm"])
    average_gradients(task.model)
    mean = gradient_norms(recorded, task.model, recorded_arm["ddp_mean_grad_norm"])
    return {name: value.detach() for name, value in outputs.items()}, local, mean


def run_arms():
    return {arm: run_arm(arm) for arm in ARMS}


@pytest.fixture(scope="module")
def rank_outputs(recorded):
    return run_on_ranks(recorded.meta["world_size"], run_arms)


@pytest.mark.parametrize("arm", ARMS)
def test_losses_logits_and_gradients_before_and_after_averaging(recorded, rank_outputs, arm):
    assert len(recorded.meta["ranks"]) == recorded.meta["world_size"]
    for number, (ours, arms) in enumerate(zip(rank_outputs, recorded.meta["ranks"], strict=True)):
        assert set(arms) == set(ARMS)
        outputs, local, mean = ours[arm]
        losses = {name: value for name, value in outputs.items() if name.endswith("loss")}
        expected = {
            name: torch.tensor(arms[arm][name if arm.startswith("hard") else "loss"])
            for name in losses
        }
        assert wrong(losses, expected) == {}
        if arm.startswith("hard"):
            logits = {f"rank{number}_{arm}_itm_logits": outputs["itm_logits"]}
            assert wrong(logits, recorded.outputs) == {}
        for norms, name in ((local, "local_grad_norm"), (mean, "ddp_mean_grad_norm")):
            assert norms == pytest.approx(arms[arm][name], rel=GRADIENTS.rtol, abs=GRADIENTS.atol)


def test_control_gradients_to_other_ranks_make_a_difference(recorded, rank_outputs):
    for ours, arms in zip(rank_outputs, recorded.meta["ranks"], strict=True):
        for position, name in ((1, "local_grad_norm"), (2, "ddp_mean_grad_norm")):
            expected = arms["itc_gather_with_grads_False"][name]
            assert ours["itc_gather_with_grads_True"][position] != pytest.approx(
                expected, rel=1e-2, abs=1e-2
            )


def test_control_local_negatives_are_not_global_ones(recorded, rank_outputs):
    for number, ours in enumerate(rank_outputs):
        name = f"rank{number}_hard_global_itm_logits"
        assert wrong({name: ours["hard_local"][0]["itm_logits"]}, recorded.outputs) != {}
