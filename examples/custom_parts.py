"""A data set, a task, a head, a bridge and an image tower of one's own: python examples/custom_parts.py FOLDER.

Draws plain squares, prepares them as a set of a schema of its own, trains a small model on them for a few steps, and
measures and uses it. Nothing of the package is changed: everything is passed in. Commands take the same parts:
bridgetower train claims-nano --task-spec custom_parts.py:CLAIMS --extensions custom_parts.py:EXTENSIONS …
bridgetower predict FOLDER/run claim --extensions custom_parts.py:EXTENSIONS --images 3.png --texts "a bright square"
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

import bridgetower
from bridgetower import BridgeTower, Extensions, HeadSpec, RunConfig, VisionTower, train
from bridgetower.data.batches.examples import ClassEncoder, EntryDataset
from bridgetower.data.config import DataConfig, PrepareConfig
from bridgetower.data.sets.datasets import prepare_set
from bridgetower.data.sets.datasets.spec import DatasetSpec, Originals
from bridgetower.data.sets.prepared_set import SetWriter
from bridgetower.data.sets.schema import Schema
from bridgetower.evaluation.config import Outcome, RetrievalConfig
from bridgetower.model.config import FusionConfig, HeadsConfig, VisionConfig
from bridgetower.model.presets import NANO
from bridgetower.objectives.classification import ClassificationTask, task_of_head
from bridgetower.objectives.config import NotAnOption, TaskConfig
from bridgetower.tasks.run_config import OptimizerConfig
from bridgetower.tasks.spec import Evaluation, ExampleSource, TaskSpec
from bridgetower.tasks.table import evaluate


# A schema: what a row holds besides its image.
@dataclass(frozen=True, kw_only=True)
class Claim:
    """Whether a square is as bright as a text says."""

    claim_id: str
    text: str
    label: str = ""


SCHEMA = Schema(
    name="claims",
    entries="claims",
    entry=Claim,
    noun="claim",
    texts=("text",),
    id="claim_id",
    label="label",
    labels=("no", "yes"),
)


# A data set: only what its annotations say; splits, files, workers, restarts and the count of errors are the writer's.
def fill(originals: Originals, writer: SetWriter, config: PrepareConfig) -> None:
    """Reads the annotations."""
    for row in originals.lines(originals.annotation("claims.jsonl")):
        claim = Claim(claim_id=row["id"], text=row["text"], label=row["label"])
        writer.add([originals.image(row["image"])], [claim], split=row["split"], origin=row["id"])


SQUARES = DatasetSpec(
    name="squares",
    schema=SCHEMA,
    splits=("train", "validation"),
    split_rule="as the annotations say",
    fill=fill,
)


# A bridge: sees all bridged layers of its tower, its stream and the other one.
class MeanBridge(nn.Module):
    """LayerNorm(z + mean of the tower layers up to this one)."""

    def __init__(self, config: FusionConfig, layer: int, num_tower_layers: int) -> None:
        super().__init__()
        self.layer, self.norm = (
            layer,
            nn.LayerNorm(config.hidden_size, eps=config.bridge_layer_norm_eps),
        )

    def forward(
        self,
        stream: Tensor,
        tower_layers: tuple[Tensor, ...],
        other_stream: Tensor,
        other_mask: Tensor | None,
    ) -> Tensor:
        """Returns the fusion layer's input [b, l, d]."""
        return self.norm(stream + torch.stack(tower_layers[: self.layer]).mean(dim=0))


# An image tower: hidden states of the layers that are asked for, counted from 1; token 0 is the global one.
class PatchTower(VisionTower):
    """Patches and their mean, each through the same feed-forward layers."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.patches = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
            for _ in range(config.num_layers)
        )

    def forward(self, pixel_values: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
        """Returns hidden states [b, 1 + patches, v]."""
        patches = self.patches(pixel_values).flatten(2).transpose(1, 2)
        hidden, found = torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1), []
        for number, block in enumerate(self.blocks, start=1):
            hidden = hidden + block(hidden)
            if number in layers:
                found.append(hidden)
        return found


EXTENSIONS = Extensions(
    vision_towers={"patches": PatchTower},
    bridges={"mean": MeanBridge},
    heads={
        "claim": HeadSpec(
            build=lambda config: nn.Linear(2 * config.fusion.hidden_size, 2),
            inputs="pooled",
            outputs="softmax",
        )
    },
)


# A task: its config, data, loss and metrics, and a recipe.
@dataclass(frozen=True, kw_only=True)
class ClaimsConfig(TaskConfig):
    """Is a square as bright as a text says?

    Attributes:
        kind: Name of the task in a saved run.
    """

    metrics = ("accuracy",)

    kind: NotAnOption = "claims"


def build(model: BridgeTower, config: ClaimsConfig) -> ClassificationTask:
    """Makes the module that is trained: the head on the pooled output, with cross-entropy."""
    return task_of_head(model, "claim")


def examples(source: ExampleSource) -> EntryDataset:
    """Opens a split."""
    return EntryDataset(source.images(SCHEMA), ClassEncoder(source.names), labelled=True)


def measure(evaluation: Evaluation) -> Outcome:
    """Predicts every claim and counts the right ones."""
    predictions = evaluation.predictions
    labels = [evaluation.names[number] for number in predictions.classes.tolist()]
    entries = list(evaluation.examples)
    right = [entry["label"] == label for entry, label in zip(entries, labels, strict=True)]
    return Outcome(
        metrics={"accuracy": sum(right) / len(right)},
        counts={"num_claims": len(right)},
        predictions=[
            {"claim_id": entry["claim_id"], "label": label}
            for entry, label in zip(entries, labels, strict=True)
        ],
    )


RECIPE = RunConfig(
    recipe="claims-nano",
    source="this file",
    task=ClaimsConfig(),
    model=replace(
        NANO,
        vision=replace(NANO.vision, architecture="patches", image_size=60, patch_size=20),
        fusion=replace(NANO.fusion, bridge="mean"),
        heads=HeadsConfig(mlm=False, itm=False, custom=("claim",)),
    ),
    optimizer=OptimizerConfig(lr=1e-3, head_multiplier=1, fusion_multiplier=1),
    data=DataConfig(max_length=16),
    batch_size=8,
    max_steps=4,
    select_by="accuracy",
)

CLAIMS = TaskSpec(
    name="claims",
    config=ClaimsConfig,
    schema=SCHEMA,
    head="claim",
    class_names=lambda data, config: SCHEMA.labels,
    build=build,
    examples=examples,
    evaluate=measure,
    recipes=(RECIPE,),
    benchmarks={"claims": ClaimsConfig()},
)


def draw(folder: Path) -> Path:
    """Draws 40 squares and claims about them."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(40):
        Image.new("L", (30, 30), 6 * number).save(folder / f"{number}.png")
        text = "a bright square" if number % 2 else "a dark square"
        label = "yes" if (number >= 20) == bool(number % 2) else "no"
        split = "validation" if number % 5 == 0 else "train"
        rows.append(
            {
                "id": f"c{number}",
                "image": f"{number}.png",
                "text": text,
                "label": label,
                "split": split,
            }
        )
    (folder / "claims.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def main(folder: Path) -> dict[str, float]:
    """Prepares, trains and measures; returns the metrics."""
    prepare_set(SQUARES, draw(folder / "originals"), folder / "set", progress=False)
    config = replace(
        RECIPE, data=replace(RECIPE.data, folders=(str(folder / "set"),)), device="cpu"
    )
    train(config, folder / "run", task=CLAIMS, extensions=EXTENSIONS, progress=False)
    model = bridgetower.load(folder / "run", extensions=EXTENSIONS, device="cpu")
    outcome = evaluate(
        model, "claims", [folder / "set"], "validation", RetrievalConfig(), spec=CLAIMS
    )
    square = folder / "originals" / "3.png"
    (best, *_) = model.predict("claim", square, "a bright square")
    print(f"{square.name} is a bright square: {best.label}, probability {best.probability:.2f}")
    return dict(outcome.metrics)


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
