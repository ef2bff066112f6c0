"""Zero-shot classification: labels in templates, whose vectors are averaged, compared with those of images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from bridgetower.inference import Choice, check_top, choices, l2_normalize
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.processor.inputs import Images, Texts

TEMPLATES = ("{}", "a photo of a {}", "a picture of a {}", "an image of a {}")
"""Where labels are put by default."""

_PLACE = "{}"


def prompts_of(labels: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Returns the texts of labels: each in all templates, then the next."""
    if isinstance(labels, str) or len(labels) < 2 or not all(label.strip() for label in labels):
        raise ValueError(f"labels are {labels!r}; expected two or more, none empty")
    if repeated := sorted(label for label, count in Counter(labels).items() if count > 1):
        raise ValueError(f"labels has {repeated[0]!r} twice; expected different ones")
    if isinstance(templates, str) or not templates:
        raise ValueError(f"templates are {templates!r}; expected a list of one or more")
    if odd := [template for template in templates if template.count(_PLACE) != 1]:
        raise ValueError(f"template {odd[0]!r} has {odd[0].count(_PLACE)} places for a label; expected one {_PLACE}")
    return [template.replace(_PLACE, label) for label in labels for template in templates]


class Embeds(Protocol):
    """A predictor, as far as images are compared with labels."""

    @property
    def model(self) -> BridgeTower:
        """The network."""

    def embed_images(
        self, images: Images, *, batch_size: int = 32, num_workers: int = 0, progress: bool = False
    ) -> Float[Tensor, "n c"]:
        """Returns vectors."""

    def embed_texts(
        self, texts: Texts, *, batch_size: int = 32, truncate: bool = False, progress: bool = False
    ) -> Float[Tensor, "n c"]:
        """Returns vectors."""


def classify_by_labels(
    predictor: Embeds,
    images: Images,
    labels: Sequence[str],
    templates: Sequence[str],
    top: int | None,
    *,
    batch_size: int = 32,
    truncate: bool = False,
    num_workers: int = 0,
    progress: bool = False,
) -> list[list[Choice]]:
    """Returns the likeliest labels of every image; see `Predictor.classify`."""
    check_top(top)
    prompts = predictor.embed_texts(prompts_of(labels, templates), batch_size=batch_size, truncate=truncate)
    vectors = predictor.embed_images(images, batch_size=batch_size, num_workers=num_workers, progress=progress)
    return label_choices(predictor.model, vectors, prompts, labels, top)


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
