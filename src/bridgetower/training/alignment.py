"""Projections aligned by ITC before the fusion encoder learns to read them: `align_first`."""

from __future__ import annotations

import logging
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bridgetower.data.batch import BatchDataset, CaptionBatch, StepSampler, derive_seed
from bridgetower.distributed import rank
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.layers import autocast, mean_token
from bridgetower.objectives.losses import info_nce
from bridgetower.processor import load_items
from bridgetower.progress import step_bars
from bridgetower.tasks.run_config import RunConfig

logger = logging.getLogger(__name__)

LR = 1e-2
"""Learning rate of AdamW at the first step; it falls linearly to 0. Nothing else is trained, so nothing is upset."""


class Alignment(nn.Module):
    """ITC of what the projections hand to the fusion encoder: one contrast for each bridged tower layer.

    An image or a text is the mean of its projected tokens, since it is tokens that cross-attention compares. As with
    the contrastive head (paper, section "Pre-training Objectives"), the temperature is learnt and starts at 0.07.
    """

    def __init__(self, model: BridgeTower) -> None:
        super().__init__()
        self.model = model
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, batch: CaptionBatch) -> Float[Tensor, ""]:
        """Returns the mean of the contrastive losses of all bridged layers."""
        images = self.model.encode_image(batch.pixel_values, states=batch.image_states)
        texts = self.model.encode_text(batch.input_ids, batch.attention_mask, states=batch.text_states)
        losses = []
        for image, text in zip(images.layers, texts.layers, strict=True):
            means = mean_token(image, images.mask), mean_token(text, texts.mask)
            features = F.normalize(means[0], dim=-1), F.normalize(means[1], dim=-1)
            losses.append(
                info_nce(features, batch.image_index, features, batch.image_index, logit_scale=self.log_scale.exp())
            )
        return torch.stack(losses).mean()

    def trained(self) -> list[nn.Parameter]:
        """Returns what is trained: the projections of both towers, and the temperature."""
        projections = self.model.image_projections, self.model.text_projections
        return [self.log_scale, *(weight for module in projections for weight in module.parameters())]


def align_projections(config: RunConfig, model: BridgeTower, examples: BatchDataset, *, progress: bool) -> None:
    """Trains the projections of frozen towers by ITC, and nothing else, for `config.align_first` steps.

    What comes out depends on the config and the data alone, so a run that was killed before its first checkpoint does
    the same again. Every process does all of it.
    """
    task = Alignment(model).to(model.device).eval()  # layers of the towers that run here draw no dropout
    parameters = task.trained()
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    sampler = StepSampler(
        len(examples),
        batch_size=config.batch_size,
        micro_batches=1,
        steps=range(config.align_first),
        seed=derive_seed(config.seed, "alignment"),
    )
    workers, device = config.data.num_workers, model.device
    batches = load_items(examples.__getitem__, sampler, num_workers=workers, device=device)
    first = last = math.nan
    with step_bars(shown=progress and rank() == 0) as bars:
        bar = bars.add_task("aligning projections", total=config.align_first, metrics="")
        for step, batch in enumerate(batches):
            optimizer.param_groups[0]["lr"] = LR * (1 - step / config.align_first)
            with autocast(device, config.precision):
                loss: Tensor = task(batch.to(device))
            last = loss.item()
            if not math.isfinite(last):
                raise FloatingPointError(f"loss of aligning is {last} at step {step + 1}; leave out align_first")
            gradients = torch.autograd.grad(loss, parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            first = last if step == 0 else first
            bars.update(bar, advance=1, metrics=f"itc {last:.3f}")
    for parameter in parameters:
        parameter.grad = None
    model.train()
    logger.info("projections aligned in %d steps: ITC from %.3f to %.3f", config.align_first, first, last)
