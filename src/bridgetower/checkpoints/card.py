"""The model card of a saved model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict, Unpack

from bridgetower.checkpoints.checkpoint import Checkpoint
from bridgetower.files import write_text
from bridgetower.model.heads import chosen_heads

CARD = "README.md"


class CardFacts(TypedDict, total=False):
    """What a model card says that a checkpoint does not know.

    Attributes:
        license: Such as `mit`, as the hub calls it.
        datasets: Ids on the hub of what it was trained on.
        data: Names of what it was trained on elsewhere.
        metrics: Measured values by name.
        command: That trained it.
    """

    license: str | None
    datasets: Sequence[str]
    data: Sequence[str]
    metrics: Mapping[str, float]
    command: str | None


def write_card(checkpoint: Checkpoint, folder: Path, name: str | None = None, **facts: Unpack[CardFacts]) -> None:
    """Writes the model card `README.md` of a folder, which is called `name` on the hub."""
    from huggingface_hub import ModelCardData

    config = checkpoint.config
    data = ModelCardData(
        license=facts.get("license"),
        library_name="bridgetower",
        datasets=list(facts.get("datasets", ())) or None,
        tags=["bridgetower", "vision-language", "arxiv:2206.08657"],
    )
    millions = sum(tensor.numel() for tensor in checkpoint.tensors.values()) / 1e6
    metrics = [f"| {name} | {value:.4g} |" for name, value in facts.get("metrics", {}).items()]
    trained = [f"`{each}`" for each in (*facts.get("datasets", ()), *facts.get("data", ()))]
    vision, text, source = config.vision, config.text, checkpoint.source
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {name or 'BridgeTower'}\n",
        f"[BridgeTower](https://arxiv.org/abs/2206.08657) with {millions:.1f} million parameters: "
        f"{vision.num_layers} layers of the image tower ({vision.architecture}, {vision.image_size} pixels), "
        f"{text.num_layers} of the text tower ({text.architecture}) and {config.fusion.num_layers} of the fusion "
        f"encoder. Heads: {', '.join(chosen_heads(config.heads)) or 'none'}. "
        f"Made from `{Path(source).name if Path(source).exists() else source}`.\n",
        f'```python\nimport bridgetower\n\nmodel = bridgetower.load("{name or "FOLDER"}")\n```\n',
    ]
    parts += [f"Training data: {', '.join(trained)}.\n"] * bool(trained)
    parts += [f"Trained by:\n\n```bash\n{command}\n```\n" for command in [facts.get("command")] if command]
    parts += ["\n".join(["| metric | value |", "|---|---|", *metrics, ""])] * bool(metrics)
    write_text(folder / CARD, "\n".join(parts))
