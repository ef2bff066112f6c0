"""Retrieval fine-tuning in both published forms: ITC + ITM with hard negatives, and ITM among false texts."""

from dataclasses import replace

from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.model.config import HeadsConfig
from bridgetower.model.presets import BASE
from bridgetower.objectives.config import Phase, PretrainingConfig, RankingConfig
from bridgetower.tasks.run_config import RunConfig
from bridgetower.training.recipes.shared import COLOUR_VIEWS, PAPER_OPTIMIZER

_AT_384 = BASE.override({"vision.image_size": 384})

RETRIEVAL_FLICKR30K = RunConfig(
    recipe="retrieval-flickr30k",
    source="paper, appendix, and official script for Flickr30k: ITC + ITM; give a pre-trained init",
    task=PretrainingConfig(phases=(Phase(mlm=0, itm=1, itc=1, negatives="hard"),)),
    model=replace(_AT_384, heads=HeadsConfig(mlm=False, itc="tower")),
    image_size=384,
    optimizer=replace(PAPER_OPTIMIZER, lr=5e-6, warmup=0.05),
    data=replace(COLOUR_VIEWS, max_length=40),
    evaluation=RetrievalConfig(candidates=128),
    batch_size=512,
    micro_batch_size=32,
    max_epochs=20,
    precision="bf16",
    evaluate_every=1_000,
)

RETRIEVAL_COCO = replace(
    RETRIEVAL_FLICKR30K,
    recipe="retrieval-coco",
    source="paper, appendix, and official script for COCO: ITC + ITM; give a pre-trained init",
    optimizer=replace(PAPER_OPTIMIZER, lr=4.5e-6, warmup=0.1),
    evaluation=RetrievalConfig(candidates=256),
    batch_size=256,
    max_epochs=30,
    evaluate_every=10_000,
)

RETRIEVAL_FLICKR30K_RANKING = replace(
    RETRIEVAL_FLICKR30K,
    recipe="retrieval-flickr30k-ranking",
    source="paper, appendix, and official script for Flickr30k: ITM alone, the true text among 15 false ones; give a "
    "pre-trained init",
    task=RankingConfig(false_texts=15),
    model=replace(_AT_384, heads=HeadsConfig(mlm=False, rank=True)),
    optimizer=replace(PAPER_OPTIMIZER, lr=1.1e-5, warmup=0.1),
    batch_size=2048,
    micro_batch_size=4,
    evaluate_every=0,
)
