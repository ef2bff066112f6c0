"""Tasks on captions: MLM, ITM and ITC for pre-training and retrieval, and ranking of texts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from bridgetower.data.config import DataConfig
from bridgetower.data.sets.schema import CAPTIONS
from bridgetower.evaluation.config import Outcome, RetrievalConfig
from bridgetower.model.config import HeadsConfig
from bridgetower.model.presets import BASE, LARGE, NANO, meter, meter_with_norms
from bridgetower.objectives.config import Phase, PretrainingConfig, RankingConfig
from bridgetower.tasks.run_config import (
    BASE_AT_384,
    COLOUR_VIEWS,
    PAPER_OPTIMIZER,
    OptimizerConfig,
    RunConfig,
)
from bridgetower.tasks.spec import Evaluation, ExampleSource, TaskSpec

if TYPE_CHECKING:
    from torch import nn

    from bridgetower.data.batches.captions import CaptionPairs, RankingPairs
    from bridgetower.model.bridgetower import BridgeTower


def build_caption_task(model: BridgeTower, config: PretrainingConfig | RankingConfig) -> nn.Module:
    from bridgetower.objectives.pretraining import PretrainingTask, RankingTask

    if isinstance(config, RankingConfig):
        return RankingTask(model, config)
    return PretrainingTask(model, config)


def caption_examples(source: ExampleSource) -> CaptionPairs | RankingPairs:
    from bridgetower.data.batches.captions import CaptionImages, CaptionPairs, RankingPairs

    images = CaptionImages(source.data, source.splits, source.processor)
    task = source.task
    if isinstance(task, RankingConfig) and source.use == "train":
        return RankingPairs(images, task.false_texts)
    return CaptionPairs(images, task.masking if task.needs_masking else None)


def judge_retrieval(evaluation: Evaluation) -> Outcome:
    """Measures retrieval, by the scores of all pairs if the model has no contrastive head."""
    from bridgetower.evaluation.retrieval import ranked_texts, retrieval_judgements

    images = evaluation.examples.images
    settings = evaluation.settings
    texts, _ = ranked_texts(images, settings)
    has_ranks = evaluation.model.itc_head is not None and not settings.fold_size
    return Outcome(
        metrics=_retrieval_metrics(evaluation),
        counts={"num_images": len(images), "num_texts": len(texts)},
        judge=(lambda: retrieval_judgements(evaluation.retrieval, images, texts))
        if has_ranks
        else None,
    )


def _retrieval_metrics(evaluation: Evaluation) -> dict[str, float]:
    if evaluation.model.itc_head is None:
        return _all_pairs_metrics(evaluation)
    result = evaluation.retrieval
    metrics = result.metrics()
    if evaluation.reranking is None and result.reranking is not None:
        return {**result.reranking.metrics(), **metrics}
    return metrics


def _all_pairs_metrics(evaluation: Evaluation) -> dict[str, float]:
    from bridgetower.evaluation.retrieval import evaluate_all_pairs

    return evaluate_all_pairs(
        evaluation.model, evaluation.examples.images, evaluation.settings, evaluation.options
    )


def validate_captions(evaluation: Evaluation) -> dict[str, float]:
    from bridgetower.evaluation.masked_words import evaluate_masked_words
    from bridgetower.evaluation.retrieval import evaluate_matching

    model = evaluation.model
    images = evaluation.examples.images
    options = evaluation.options
    metrics: dict[str, float] = {}
    if model.mlm_head:
        metrics = evaluate_masked_words(model, images, evaluation.task.masking, options)
    if model.itc_head:
        metrics |= _retrieval_metrics(evaluation)
    elif model.itm_head:
        metrics["itm_accuracy"] = evaluate_matching(model, images, evaluation.settings, options)
    return metrics


_METRIC_HEADS = {
    "matching_rsum": ("itc", "itm"),
    "two_stage_rsum": ("itc", "itm"),
    "itm_accuracy": ("itm",),
    "mlm_accuracy": ("mlm",),
}
"""Heads that metrics need, other than the contrastive one alone."""


def unavailable_metric(evaluation: Evaluation, metric: str) -> str | None:
    model = evaluation.model
    heads = _METRIC_HEADS.get(metric, ("itc",))
    missing = [head for head in heads if getattr(model, f"{head}_head") is None]
    if missing:
        return f"the model has no {' and no '.join(missing)} head"
    if "itm" in heads and model.itc_head is not None and not evaluation.settings.candidates:
        return "evaluation.candidates is 0, so that no pairs are matched"
    return None


PRETRAIN_BASE = RunConfig(
    recipe="pretrain-base",
    source="paper, appendix 'Implementation Details': MLM + ITM, 100k steps of 4096 pairs, with the official mean of "
    "MLM over each micro-batch; give vision and text, or the towers start from random weights",
    task=PretrainingConfig(phases=(Phase(mlm=1, itm=1),), mlm_normalization="official"),
    model=BASE,
    optimizer=PAPER_OPTIMIZER,
    data=DataConfig(max_length=50, num_workers=12),
    batch_size=4096,
    micro_batch_size=32,
    max_steps=100_000,
    precision="bf16",
    evaluate_every=10_000,
    select_by="itm_accuracy",
)

PRETRAIN_LARGE = replace(PRETRAIN_BASE, recipe="pretrain-large", model=LARGE, micro_batch_size=16)

PRETRAIN_BASE_ITC = replace(
    PRETRAIN_BASE,
    recipe="pretrain-base-itc",
    source="official script: MLM, with a mean over each micro-batch, + ITM + ITC with hard negatives; give vision "
    "and text, or the towers start from random weights",
    task=PretrainingConfig(
        phases=(Phase(mlm=1, itm=1, itc=1, negatives="hard"),), mlm_normalization="official"
    ),
    model=replace(BASE, heads=HeadsConfig(itc="tower")),
    select_by="rsum",
)

PRETRAIN_NANO = RunConfig(
    recipe="pretrain-nano",
    source="this project: chosen on the validation splits of the emoji and flags sets, see docs/demo.md",
    task=PretrainingConfig(
        phases=(Phase(until=0.4, mlm=0, itm=0, itc=1), Phase(until=1.0, mlm=1, itm=1, itc=1))
    ),
    model=NANO,
    optimizer=OptimizerConfig(
        lr=1e-3, weight_decay=0.05, warmup=0.05, head_multiplier=1, fusion_multiplier=1
    ),
    data=DataConfig(augmentation="affine", max_length=40, background=(255, 255, 255), cache=True),
    evaluation=RetrievalConfig(candidates=16, max_captions=1),
    batch_size=128,
    max_steps=600,
    max_epochs=50,
    evaluate_every="epoch",
    checkpoint_every=100,
    select_by="itc_rsum",
)

PRETRAIN_NANO_METER = replace(PRETRAIN_NANO, recipe="pretrain-nano-meter", model=meter(NANO))

PRETRAIN_NANO_METER_NORMS = replace(
    PRETRAIN_NANO, recipe="pretrain-nano-meter-norms", model=meter_with_norms(NANO)
)

RETRIEVAL_FLICKR30K = RunConfig(
    recipe="retrieval-flickr30k",
    source="paper, appendix, and official script for Flickr30k: ITC + ITM, on 8 GPUs: ITC compares 64 pairs, and hard "
    "negatives are out of 8; give a pre-trained init",
    task=PretrainingConfig(phases=(Phase(mlm=0, itm=1, itc=1, negatives="hard"),)),
    model=replace(BASE_AT_384, heads=HeadsConfig(mlm=False, itc="tower")),
    image_size=384,
    optimizer=replace(PAPER_OPTIMIZER, lr=5e-6, warmup=0.05),
    data=replace(COLOUR_VIEWS, max_length=40),
    evaluation=RetrievalConfig(candidates=128),
    batch_size=512,
    micro_batch_size=8,
    max_epochs=20,
    precision="bf16",
    evaluate_every="epoch",
)

RETRIEVAL_COCO = replace(
    RETRIEVAL_FLICKR30K,
    recipe="retrieval-coco",
    source="paper, appendix, and official script for COCO: ITC + ITM, on 8 GPUs: ITC compares 128 pairs, and hard "
    "negatives are out of 16; give a pre-trained init",
    optimizer=replace(PAPER_OPTIMIZER, lr=4.5e-6, warmup=0.1),
    evaluation=RetrievalConfig(candidates=256),
    batch_size=256,
    micro_batch_size=16,
    max_epochs=30,
    evaluate_every=10_000,
)

RETRIEVAL_FLICKR30K_RANKING = replace(
    RETRIEVAL_FLICKR30K,
    recipe="retrieval-flickr30k-ranking",
    source="paper, appendix, and official script for Flickr30k: ITM alone, the true text among 15 false ones; give a "
    "pre-trained init",
    task=RankingConfig(false_texts=15),
    model=replace(BASE_AT_384, heads=HeadsConfig(mlm=False, rank=True)),
    optimizer=replace(PAPER_OPTIMIZER, lr=1.1e-5, warmup=0.1),
    batch_size=2048,
    micro_batch_size=4,
    evaluate_every=0,
)

CONTRASTIVE_LARGE = RunConfig(
    recipe="contrastive-large",
    source="Hugging Face's post on fine-tuning bridgetower-large-itm-mlm-itc (huggingface.co/blog/bridgetower) and its "
    "script in optimum-habana: ITC alone, 48 pairs on each of 8 devices, and what the Trainer of transformers does "
    "unless told otherwise; give init. There each device compares its own pairs, here those of all devices",
    task=PretrainingConfig(phases=(Phase(mlm=0, itm=0, itc=1),)),
    model=replace(LARGE, heads=HeadsConfig(mlm=False, itm=False, itc="fused", itc_size=512)),
    optimizer=OptimizerConfig(
        lr=1e-5,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        head_multiplier=1,
        fusion_multiplier=1,
        warmup=0.0,
        clip_norm=1.0,
    ),
    data=DataConfig(max_length=128, num_workers=12),
    batch_size=384,
    micro_batch_size=48,
    max_epochs=5,
    precision="bf16",
    evaluate_every="epoch",
    select_by="itc_rsum",
)

PRETRAINING = TaskSpec(
    name="pretraining",
    config=PretrainingConfig,
    schema=CAPTIONS,
    build=build_caption_task,
    examples=caption_examples,
    evaluate=judge_retrieval,
    validate=validate_captions,
    unavailable=unavailable_metric,
    recipes=(
        PRETRAIN_BASE,
        PRETRAIN_BASE_ITC,
        PRETRAIN_LARGE,
        PRETRAIN_NANO,
        PRETRAIN_NANO_METER,
        PRETRAIN_NANO_METER_NORMS,
    ),
    fine_tuning=(RETRIEVAL_FLICKR30K, RETRIEVAL_COCO, CONTRASTIVE_LARGE),
    benchmarks={"retrieval": PretrainingConfig()},
)

RANKING = replace(
    PRETRAINING,
    name="ranking",
    config=RankingConfig,
    validate=_all_pairs_metrics,
    unavailable=lambda evaluation, metric: None,
    recipes=(),
    fine_tuning=(RETRIEVAL_FLICKR30K_RANKING,),
    benchmarks={},
)
