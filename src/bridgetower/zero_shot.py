"""Zero-shot classification: labels in templates, whose vectors are averaged, compared with those of images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from bridgetower.inference import Choice, choices, l2_normalize
from bridgetower.model.bridgetower import BridgeTower

TEMPLATES = ("{}", "a photo of a {}", "a picture of a {}", "an image of a {}")


def prompts_of(labels: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Returns the texts of labels: each in all templates, then the next."""
    if isinstance(labels, str) or len(labels) < 2 or not all(label.strip() for label in labels):
        raise ValueError(f"labels are {labels!r}; expected two or more, none empty")
    if repeated := sorted(label for label, count in Counter(labels).items() if count > 1):
        raise ValueError(f"labels has {repeated[0]!r} twice; expected different ones")
    if isinstance(templates, str) or not templates:
        raise ValueError(f"templates are {templates!r}; expected a list of one or more")
    if odd := [template for template in templates if template.count("{}") != 1]:
        raise ValueError(f"template {odd[0]!r} has {odd[0].count('{}')} places for a label; expected one {{}}")
    return [template.replace("{}", label) for label in labels for template in templates]


def label_choices(
    model: BridgeTower,
    images: Float[Tensor, "n c"],
    prompts: Float[Tensor, "p c"],
    labels: Sequence[str],
    top: int | None = None,
) -> list[list[Choice]]:
    """Returns the likeliest labels of every image; the probabilities of all labels of an image sum to one."""
    scale = float(model.contrastive_head().logit_scale())
    of_labels = l2_normalize(prompts.unflatten(0, (len(labels), -1)).mean(dim=1))
    return choices((scale * images @ of_labels.T).softmax(dim=-1), labels, top)
