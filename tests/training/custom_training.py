"""What a user may write beside the package to train in another way."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bridgetower.extras import load_object
from bridgetower.model.extensions import Extensions
from bridgetower.objectives.config import PretrainingConfig, TaskConfig
from bridgetower.objectives.pretraining import PretrainingTask
from bridgetower.tasks.pretraining import PRETRAINING

DECAY = 0.5
RATE_DECAY = 0.5
LOGGED = []
EXAMPLE = load_object(
    "extensions", f"{Path(__file__).parents[2]}/examples/layered.py:LAYERED", Extensions
)
Averaged = type(EXAMPLE.callbacks[0])


def layered_sgd(groups, config):
    divided = []
    for group in groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            depth = 1 - int(name.split(".")[2]) if name.startswith("vision.layers.") else 0
            lr = group["lr"] * RATE_DECAY**depth
            divided.append({"params": [parameter], "names": [name], "lr": lr, "weight_decay": 0.0})
    return torch.optim.SGD(divided, momentum=config.betas[0])


def constant_rate(config, max_steps):
    return lambda step: 1.0


class Listing:
    def __init__(self, out, config, first_step):
        self.name = out.name

    def log(self, metrics, step):
        LOGGED.append((self.name, step, dict(metrics)))

    def close(self):
        LOGGED.append((self.name, -1, {}))


OWN = Extensions(
    optimizers={"layered_sgd": layered_sgd},
    schedules={"constant": constant_rate},
    loggers={"listing": Listing},
    callbacks=(Averaged(DECAY),),
)


@dataclass(frozen=True, kw_only=True)
class SigmoidConfig(TaskConfig):
    reads = "captions"
    metrics = PretrainingConfig.metrics
    kind: str = "sigmoid"
    masking: Any = PretrainingConfig().masking
    temperature: float = 0.2

    @property
    def contrasts(self):
        return ["ITC"]

    @property
    def needs_masking(self):
        return True

    def contrasts_pairs(self, progress):
        return True

    def counts_labels(self, progress):
        return True


class SigmoidTask(PretrainingTask):
    """Compares pairs as SigLIP does, on request over a whole step."""

    def __init__(self, model, config):
        words = PretrainingConfig().phases[0]
        super().__init__(model, PretrainingConfig(phases=(replace(words, mlm=1, itm=0, itc=1),)))

    def contrast_loss(self, rows, row_index, columns, column_index, **_):
        signs = 2 * (row_index[:, None] == column_index[None]).float() - 1
        similarities = rows[0] @ columns[1].T / 0.2 - 1
        return -F.logsigmoid(signs * similarities).sum(dim=1).mean() / len(column_index)


class TrapTask(SigmoidTask):
    contrast_loss = PretrainingTask.contrast_loss

    def itc(self, image, text, batch, contrast=None):
        return self._embeds(image, text)[0].sum()


def sigmoid(model, config):
    return SigmoidTask(model, config)


SIGMOID = replace(
    PRETRAINING, name="sigmoid", config=SigmoidConfig, build=sigmoid, recipes=(), benchmarks={}
)
TRAP = replace(SIGMOID, build=TrapTask)
