"""What the official code recorded, computed again by this package's model and tasks."""

from contextlib import contextmanager

import torch

from bridgetower.data.batches.batch import IGNORED, CaptionBatch
from bridgetower.model.fusion import Encoded
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.objectives.losses import Losses, Pairs
from bridgetower.objectives.pretraining import PretrainingTask
from bridgetower.tasks.run_config import OptimizerConfig

OBJECTIVES = ("mlm", "itm", "itc")


def pretraining_task(case, model, *, gather_with_grads=True):
    weights = {name: float(weight) for name, weight in case.meta["config"]["loss_names"].items()}
    phase = Phase(mlm=weights["mlm"], itm=weights["itm"], itc=weights["itc"])
    return PretrainingTask(
        model, PretrainingConfig(phases=(phase,), gather_with_grads=gather_with_grads)
    )


def caption_batch(inputs, rows=slice(None)):
    """Returns the recorded inputs, or some rows of them, as a batch of distinct images."""
    ids = inputs["text_ids"][rows]
    return CaptionBatch(
        pixel_values=inputs["image"][rows],
        input_ids=ids,
        attention_mask=inputs["text_masks"][rows],
        masked_input_ids=inputs.get("text_ids_mlm", inputs["text_ids"])[rows],
        mlm_labels=inputs.get("text_labels_mlm", torch.full_like(inputs["text_ids"], IGNORED))[
            rows
        ],
        image_index=torch.arange(len(inputs["text_ids"]))[rows],
    )


def features(model, image, text, prefix=""):
    fused = model.fuse(image, text, outputs="all")
    return {
        f"{prefix}text_feats": fused.text,
        f"{prefix}image_feats": fused.image,
        f"{prefix}cls_feats": fused.pooled,
    }


def encode(model, inputs, suffix="", prefix=""):
    image, ids, mask = (
        inputs[f"{prefix}{name}{suffix}"] for name in ("image", "text_ids", "text_masks")
    )
    return model.encode_image(image), model.encode_text(ids, mask)


def bridged_layers(model, encoded, token_type):
    """Projected tower layers [K, B, L, D] without the token type, which the official code adds only when it fuses."""
    return torch.stack(encoded.layers) - model.token_type_embedding.weight[token_type]


def itm_outputs(task, image, text, pairs, prefix=""):
    with outputs_of(task.model.itm_head) as logits:
        loss, _ = task.itm(image, text, pairs)
    return {f"{prefix}itm_logits": logits[0], f"{prefix}itm_loss": loss}


def mlm_outputs(task, image, batch):
    """Masked-word logits at all positions, and the loss, which the task computes at labelled positions only."""
    masked = task.model.encode_text(batch.masked_input_ids, batch.attention_mask)
    head = task.model.mlm_head
    assert head is not None
    logits = head(task.model.fuse(image, masked, outputs="text").text)
    return {"mlm_logits": logits, "mlm_loss": task.mlm(image, masked, batch)[0]}


def recorded_pairs(labels):
    """Each text with its image (label 1) or with its false image, whose rows follow those of all true images."""
    rows = torch.arange(len(labels))
    return Pairs(torch.where(labels == 1, rows, rows + len(labels)), rows, labels)


def with_false_images(model, image, inputs):
    return Encoded.cat([image, model.encode_image(inputs["false_image_0"])])


def pretraining_outputs(task, inputs):
    """Features on plain text, MLM, ITM (and ITC) as the official training step computes them, and their sum."""
    model = task.model
    batch = caption_batch(inputs)
    weights = task.config.phases[0]
    image, text = encode(model, inputs)
    outputs = features(model, image, text) | mlm_outputs(task, image, batch)
    candidates = with_false_images(model, image, inputs)
    outputs |= itm_outputs(task, candidates, text, recorded_pairs(inputs["itm_labels"]))
    if weights.itc:
        outputs["itc_loss"] = task.itc(image, text, batch)
    losses = {name: outputs[f"{name}_loss"] for name in OBJECTIVES if f"{name}_loss" in outputs}
    total = Losses.weigh(losses, {name: getattr(weights, name) for name in OBJECTIVES}).total
    return outputs | {"total_loss": total}


def optimizer_config(official, max_steps):
    """Returns our optimiser for an official config. Its warm-up is a share of the steps or, from 1 up, their number."""
    warmup = official["warmup_steps"]
    power = official["decay_power"]
    if isinstance(warmup, int):
        warmup = (
            warmup + 0.5
        ) / max_steps  # the half is cut off again; without it rounding could cost a step
    decay = {"schedule": "polynomial", "power": power, "end_lr": official["end_lr"]}
    return OptimizerConfig(
        lr=official["learning_rate"],
        weight_decay=official["weight_decay"],
        head_multiplier=official["lr_mult_head"],
        fusion_multiplier=official["lr_mult_cross_modal"],
        rule="hf_adamw",
        warmup=warmup,
        **({"schedule": "cosine"} if power == "cosine" else decay),
    )


@contextmanager
def outputs_of(module):
    seen = []
    handle = module.register_forward_hook(lambda _module, _args, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()
