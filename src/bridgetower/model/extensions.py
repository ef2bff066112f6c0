"""Tables of towers, and custom towers, bridges and heads."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from bridgetower.model.bridges import BRIDGES, BridgeBuilder
from bridgetower.model.config import TextConfig, VisionConfig, look_up
from bridgetower.model.heads import HEADS, HeadSpec
from bridgetower.model.library_towers import TimmTower, TransformersTower
from bridgetower.model.towers import TextTower, TextTransformer, VisionTower, VisionTransformer

VISION_ARCHITECTURES: dict[str, Callable[[VisionConfig], VisionTower]] = {
    "vit": VisionTransformer,
    "timm": TimmTower,
}
TEXT_ARCHITECTURES: dict[str, Callable[[TextConfig], TextTower]] = {
    "bert": TextTransformer,
    "transformers": TransformersTower,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Extensions:
    """Custom towers, bridges and heads, by their names in a `ModelConfig`, and custom parts of training.

    Attributes:
        vision_towers: Each makes a `VisionTower`, for `vision.architecture`.
        text_towers: Each makes a `TextTower`, for `text.architecture`.
        bridges: Each makes the bridge of one stream into a fusion layer, called as `Bridge` is, for `fusion.bridge`.
        heads: For `heads.custom`.
        objectives: Each an `Objective` of `bridgetower.objectives.pretraining`, for `objectives` of a phase.
        metrics: Each gives, of a `tasks.spec.Evaluation`, a number for validations and benchmarks, and for `select_by`,
            where higher is better.
        optimizers: Each makes an optimiser of parameter groups (`params`, `names`, `lr`, `weight_decay`) and the
            `OptimizerConfig`, for `optimizer.rule`. It may divide the groups, such as for rates by layer; `names` stay.
        schedules: Each makes, of the `OptimizerConfig` and the number of steps, a function of the step that gives the
            factor of all learning rates, for `optimizer.schedule`.
        loggers: Each makes a `training.logs.Logger` of the run's folder, its config and its first step, for
            `report_to`.
        callbacks: Each a `training.setup.Callback`.

    Raises:
        ValueError: A name is that of an entry of the package.
    """

    vision_towers: dict[str, Callable[[VisionConfig], VisionTower]] = field(default_factory=dict)
    text_towers: dict[str, Callable[[TextConfig], TextTower]] = field(default_factory=dict)
    bridges: dict[str, BridgeBuilder] = field(default_factory=dict)
    heads: dict[str, HeadSpec] = field(default_factory=dict)
    objectives: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Callable[[Any], float]] = field(default_factory=dict)
    optimizers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    schedules: dict[str, Callable[..., Callable[[int], float]]] = field(default_factory=dict)
    loggers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    callbacks: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        tables: dict[str, Collection[str]] = {
            "vision_towers": VISION_ARCHITECTURES,
            "text_towers": TEXT_ARCHITECTURES,
            "bridges": BRIDGES,
            "heads": HEADS,
            "objectives": ("itc", "itm", "mlm"),
            "optimizers": ("adamw", "hf_adamw"),
            "schedules": ("polynomial", "cosine"),
            "loggers": ("tensorboard", "wandb", "trackio", "mlflow"),
        }
        for kind, table in tables.items():
            for name in getattr(self, kind):
                if name in table:
                    raise ValueError(
                        f"extensions.{kind} has {name!r}, a name of the package; expected none of "
                        f"{', '.join(table)}: give it another"
                    )

    @property
    def head_specs(self) -> dict[str, HeadSpec]:
        """Every head that a config may name."""
        return HEADS | self.heads


NO_EXTENSIONS = Extensions()


def vision_tower(config: VisionConfig, extensions: Extensions = NO_EXTENSIONS) -> VisionTower:
    """Builds the image tower of a model."""
    towers = VISION_ARCHITECTURES | extensions.vision_towers
    return look_up("vision.architecture", config.architecture, towers)(config)
