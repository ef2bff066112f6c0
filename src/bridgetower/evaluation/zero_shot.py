"""Evaluation without training: classes that texts name, and captions that differ in little."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from math import prod
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bridgetower.data.batches.batch import Batch
from bridgetower.data.batches.examples import PreparedImages
from bridgetower.evaluation.config import Details, EvaluationOptions, Metrics, RetrievalConfig
from bridgetower.evaluation.retrieval import PairScorer, resumable
from bridgetower.inference.items import (
    encoded_texts,
    l2_normalize,
    label_vectors,
    log_odds,
    prompts_of,
)
from bridgetower.model.bridgetower import BridgeTower, EncodeOutputs
from bridgetower.model.fusion import Encoded
from bridgetower.processor import Processor

_TEXTS_AT_ONCE = 256
_MAX_CATEGORY_METRICS = 20  # with more categories, their scores are in the details only


class ZeroShot(nn.Module):
    """Zero-shot classifier by cosines with vectors of labels, or by the matching head with the first template."""

    def __init__(
        self,
        model: BridgeTower,
        processor: Processor,
        labels: Sequence[str],
        templates: Sequence[str],
        matching: bool,
    ) -> None:
        super().__init__()
        self.model = model
        self.matching = matching
        self.num_labels = len(labels)
        self.outputs: EncodeOutputs = "cls"
        if matching:
            self.outputs = "layers"
            templates = templates[:1]
        model.head("itm" if matching else "itc")
        ids = processor.token_ids(prompts_of(labels, templates))
        with torch.inference_mode():
            texts = []
            for start in range(0, len(ids), _TEXTS_AT_ONCE):
                batch = ids[start : start + _TEXTS_AT_ONCE]
                texts.append(encoded_texts(model, processor, batch, self.outputs))
            if matching:
                self.texts = model.cache_text(Encoded.cat(texts))
            else:
                vectors = torch.cat([model.text_embeds(text) for text in texts])
                self.vectors = label_vectors(vectors, len(labels))

    def predict(self, batch: Batch) -> Float[Tensor, "b k"]:
        """Returns the probabilities, which sum to one."""
        model = self.model
        image = model.encode_image(batch.pixel_values, outputs=self.outputs)
        if not self.matching:
            scale = model.head("itc").logit_scale().item()
            vectors = l2_normalize(model.image_embeds(image))
            logits = scale * vectors @ self.vectors.T
            return logits.softmax(dim=1)
        image = model.cache_image(image)
        scores = []
        for label_index in range(self.num_labels):
            rows = torch.full((len(image),), label_index, device=model.device)
            fused = model.fuse(image, self.texts[rows])
            scores.append(log_odds(model.itm_logits(fused.pooled)))
        return torch.stack(scores, dim=1).softmax(dim=1)


@torch.inference_mode()
def evaluate_compositions(
    model: BridgeTower,
    images: PreparedImages,
    rows: Sequence[Mapping[str, Any]],
    config: RetrievalConfig,
    options: EvaluationOptions,
) -> tuple[Metrics, Details, list[dict[str, Any]]]:
    """Returns metrics, metrics by category, and predictions: for each row a table of scores of images by captions.

    Scores are cosines, `itc`, and log-odds of a match, `matching`, as far as the model has the heads.

    Args:
        rows: Examples, with row numbers of `images` and with an `entry` that has captions and a label, the category.
    """
    if model.itc_head is None:
        model.head("itm")

    # Each image and each text is encoded once.
    image_numbers = []
    captions = []
    for row in rows:
        for image, caption in product(row["images"], row["entry"]["captions"]):
            image_numbers.append(image)
            captions.append(caption)
    different_images, image_index = torch.tensor(image_numbers).unique(return_inverse=True)
    row_of_text: dict[str, int] = {}
    text_rows = [row_of_text.setdefault(caption, len(row_of_text)) for caption in captions]
    text_index = torch.tensor(text_rows)
    texts = list(row_of_text)

    scores: dict[str, Tensor] = {}
    with resumable(PairScorer(model, images, texts, config, options, different_images)) as scorer:
        if model.itc_head is not None:
            image_vectors, text_vectors = scorer.vectors()
            products = image_vectors[image_index] * text_vectors[text_index]
            scores["itc"] = products.sum(dim=1)
        if model.itm_head is not None:
            by_image = image_index.argsort(stable=True)
            match, _ = scorer.score(image_index[by_image], text_index[by_image])
            scores["matching"] = match[by_image.argsort()]

    # The scores of an example are a table of images by captions.
    metrics: Metrics = {}
    details: Details = {}
    predictions: list[dict[str, Any]] = [{} for _ in rows]
    categories = [row["entry"]["label"] for row in rows]
    for kind, scores_of_pairs in scores.items():
        tables = []
        start = 0
        for row, prediction in zip(rows, predictions, strict=True):
            shape = (len(row["images"]), len(row["entry"]["captions"]))
            stop = start + prod(shape)
            table = scores_of_pairs[start:stop].view(shape)
            tables.append(table)
            prediction[kind] = table.tolist()
            start = stop
        overall, by_category = composition_metrics(tables, categories)
        if len(by_category) <= _MAX_CATEGORY_METRICS:
            overall |= by_category
        for name, share in overall.items():
            metrics[f"{kind}_{name}"] = share
        details[f"{kind}_by_category"] = by_category
    return metrics, details, predictions


def composition_metrics(
    scores: Sequence[Float[Tensor, "i c"]], categories: Sequence[str]
) -> tuple[Metrics, Metrics]:
    """Returns metrics of all examples, and a metric of each category.

    Caption n belongs to image n. The text score is the share of examples whose images all score higher with their own
    caption than with any other. The image score is the share of examples whose captions all score higher with their
    own image than with any other. The group score is the share of examples with both, here also by category. Where all
    examples have one image, it is the `accuracy`. Equal scores are wrong.
    """
    text_hits = []
    image_hits = []
    group_hits = []
    hits_by_category: dict[str, list[bool]] = {}
    for table, category in zip(scores, categories, strict=True):
        num_images = len(table)
        matching = table.diagonal()
        wrong = table.clone().fill_diagonal_(-torch.inf)
        best_wrong_caption = wrong.amax(dim=1)
        best_wrong_image = wrong[:, :num_images].amax(dim=0)
        text_hit = bool((matching > best_wrong_caption).all())
        image_hit = bool((matching > best_wrong_image).all())
        group_hit = text_hit and image_hit
        text_hits.append(text_hit)
        image_hits.append(image_hit)
        group_hits.append(group_hit)
        hits_by_category.setdefault(category, []).append(group_hit)

    by_category = {}
    for category in sorted(hits_by_category):
        by_category[category] = fmean(hits_by_category[category])
    macro = fmean(by_category.values())
    has_one_image = max(map(len, scores)) == 1
    if has_one_image:
        return {"accuracy": fmean(group_hits), "macro_accuracy": macro}, by_category
    metrics = {
        "text_score": fmean(text_hits),
        "image_score": fmean(image_hits),
        "group_score": fmean(group_hits),
        "macro_group_score": macro,
    }
    return metrics, by_category
