"""The paper's uni-modal checks: CIFAR on the image tower alone, GLUE on the text tower alone.

The paper gives learning rates (1e-5 or 2e-5) and, for GLUE, batch sizes (16 or 32). The rest is chosen here: for GLUE
as RoBERTa was fine-tuned (Liu et al. 2019, appendix, table 10), for CIFAR alike.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, get_args

from bridgetower.data.config import DataConfig, GlueName
from bridgetower.model.config import HeadsConfig
from bridgetower.model.presets import BASE
from bridgetower.objectives.config import CifarConfig, GlueConfig
from bridgetower.tasks.run_config import OptimizerConfig, RunConfig

_OPTIMIZER = OptimizerConfig(lr=1e-5, weight_decay=0.1, warmup=0.06, head_multiplier=1, fusion_multiplier=1)
_SOURCE = "paper, appendix, for the learning rate{}; epochs, warm-up and decay are chosen here; give a pre-trained init"

_NUM_OUTPUTS: Mapping[GlueName, int] = {"sts-b": 1, "mnli": 3}  # of the others two


def _cifar(num_classes: Literal[10, 100]) -> RunConfig:
    return RunConfig(
        recipe=f"cifar{num_classes}",
        source=_SOURCE.format(""),
        task=CifarConfig(num_classes=num_classes),
        model=replace(BASE, heads=HeadsConfig(mlm=False, itm=False, image=num_classes)).override(
            {"vision.image_size": 224}
        ),
        image_size=224,
        optimizer=_OPTIMIZER,
        data=DataConfig(profile="official-pretrain", num_workers=4),
        batch_size=128,
        max_epochs=10,
        precision="bf16",
        evaluate_every=500,
        select_by="accuracy",
    )


def _glue(name: GlueName) -> RunConfig:
    task = GlueConfig(name=name)
    return RunConfig(
        recipe=f"glue-{name}",
        source=_SOURCE.format(" and the batch size"),
        task=task,
        model=replace(BASE, heads=HeadsConfig(mlm=False, itm=False, text=_NUM_OUTPUTS.get(name, 2))),
        optimizer=replace(_OPTIMIZER, lr=2e-5),
        data=DataConfig(max_length=128),
        batch_size=32,
        max_epochs=10,
        precision="bf16",
        evaluate_every=500,
        select_by=task.figures[0],
    )


CIFAR = (_cifar(10), _cifar(100))
GLUE = tuple(_glue(name) for name in get_args(GlueName))
