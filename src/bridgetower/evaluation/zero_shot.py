"""Evaluation without training: classes that texts name, and captions that differ in little."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bridgetower.data.batch import Batch
from bridgetower.data.examples import PreparedImages
from bridgetower.evaluation.config import EvaluationOptions, RetrievalConfig
from bridgetower.evaluation.retrieval import PairScorer, resumable
from bridgetower.inference import encoded_texts, l2_normalize, label_vectors, log_odds, prompts_of
from bridgetower.model.bridgetower import BridgeTower, EncodeOutputs
from bridgetower.model.fusion import Encoded
from bridgetower.processor import Processor

_TEXTS = 256  # that are encoded at once
_FEW = 20  # categories up to which each has a metric of its own


class ZeroShot(nn.Module):
    """Gives images the probabilities of labels: by cosine, or by matching with the first template."""

    def __init__(
        self, model: BridgeTower, processor: Processor, labels: Sequence[str], templates: Sequence[str], matching: bool
    ) -> None:
        super().__init__()
        self.model, self.matching, self.num_labels = model, matching, len(labels)
        model.head("itm" if matching else "itc")
        self.outputs: EncodeOutputs = "layers" if matching else "cls"
        ids = processor.token_ids(prompts_of(labels, templates[:1] if matching else templates))
        parts = [ids[start : start + _TEXTS] for start in range(0, len(ids), _TEXTS)]
        with torch.inference_mode():
            texts = [encoded_texts(model, processor, part, self.outputs) for part in parts]
            if matching:
                self.texts = model.cache_text(Encoded.cat(texts))
            else:
                self.vectors = label_vectors(torch.cat([model.text_embeds(one) for one in texts]), len(labels))

    def predict(self, batch: Batch) -> Float[Tensor, "b k"]:
        """Returns the probabilities, which sum to one."""
        model = self.model
        image = model.encode_image(batch.pixel_values, outputs=self.outputs)
        if not self.matching:
            scale = model.head("itc").logit_scale().item()
            return (scale * l2_normalize(model.image_embeds(image)) @ self.vectors.T).softmax(dim=1)
        image, rows = model.cache_image(image), torch.zeros(len(image), dtype=torch.long, device=image.cls.device)
        fused = (model.fuse(image, self.texts[rows + number]).pooled for number in range(self.num_labels))
        return torch.stack([log_odds(model.itm_logits(pooled)) for pooled in fused], dim=1).softmax(dim=1)


@torch.inference_mode()
def evaluate_compositions(
    model: BridgeTower,
    images: PreparedImages,
    rows: Sequence[Mapping[str, Any]],
    config: RetrievalConfig,
    options: EvaluationOptions,
) -> tuple[dict[str, float], dict[str, dict[str, float]], list[dict[str, Any]]]:
    """Returns metrics, those by category, and the scores of the `images` and captions of the `entry` of each row.

    Of each there are those by cosine, `itc`, and by `matching`, as far as the model has the heads.
    """
    if model.itc_head is None:
        model.head("itm")
    pairs = [(image, text) for row in rows for image in row["images"] for text in row["entry"]["captions"]]
    texts = {text: place for place, text in enumerate(dict.fromkeys(text for _, text in pairs))}
    numbers, image = torch.tensor([number for number, _ in pairs]).unique(return_inverse=True)
    text, found = torch.tensor([texts[text] for _, text in pairs]), dict[str, Tensor]()
    with resumable(PairScorer(model, images, list(texts), config, options, numbers)) as scorer:
        if model.itc_head is not None:
            vectors, text_vectors = scorer.vectors()
            found["itc"] = (vectors[image] * text_vectors[text]).sum(dim=1)
        if model.itm_head is not None:
            order = image.argsort(stable=True)
            found["matching"] = scorer.score(image[order], text[order])[0][order.argsort()]
    metrics, details, predictions = dict[str, float](), dict[str, dict[str, float]](), [dict[str, Any]() for _ in rows]
    shapes = [(len(row["images"]), len(row["entry"]["captions"])) for row in rows]
    for kind, values in found.items():
        parts = values.split([one * other for one, other in shapes])
        scores = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        own, by_category = composition_metrics(scores, [row["entry"]["label"] for row in rows])
        shown = own | (by_category if len(by_category) <= _FEW else {})
        metrics |= {f"{kind}_{name}": value for name, value in shown.items()}
        details[f"{kind}_by_category"] = by_category
        for prediction, score in zip(predictions, scores, strict=True):
            prediction[kind] = score.tolist()
    return metrics, details, predictions


def composition_metrics(
    scores: Sequence[Float[Tensor, "i c"]], categories: Sequence[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Returns `accuracy`, or of examples with two images Winoground's scores, and the last of these by category.

    Caption n belongs to image n. The text score counts examples whose images all have a larger score with their own
    caption than with any other, the image score those whose captions have a larger one with their own image, the group
    score those with both. Equal scores are wrong.
    """
    right, groups = list[tuple[bool, ...]](), defaultdict[str, list[bool]](list)
    for one, category in zip(scores, categories, strict=True):
        own, others = one.diagonal(), one.clone().fill_diagonal_(-torch.inf)
        text, image = (own > others.amax(dim=1)).all(), (own > others[:, : len(one)].amax(dim=0)).all()
        right.append((bool(text), bool(image), bool(text & image)))
        groups[category].append(right[-1][-1])
    means = {"text_score": 0, "image_score": 1, "group_score": 2} if max(map(len, scores)) > 1 else {"accuracy": 2}
    by_category = {name: fmean(groups[name]) for name in sorted(groups)}
    metrics = {name: fmean(hits[place] for hits in right) for name, place in means.items()}
    return {**metrics, f"macro_{list(means)[-1]}": fmean(by_category.values())}, by_category
