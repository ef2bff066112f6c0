"""Statements about one picture (SNLI-VE) and about two (NLVR2)."""

from dataclasses import replace

from bridgetower.model.config import HeadsConfig
from bridgetower.model.presets import BASE
from bridgetower.objectives.config import Nlvr2Config, SnliVeConfig
from bridgetower.tasks.run_config import RunConfig
from bridgetower.training.recipes.shared import COLOUR_VIEWS, PAPER_OPTIMIZER

_AT_384 = BASE.override({"vision.image_size": 384})

SNLI_VE = RunConfig(
    recipe="snli-ve",
    source="paper, appendix, and official script for SNLI-VE; give a pre-trained init",
    task=SnliVeConfig(),
    model=replace(_AT_384, heads=HeadsConfig(mlm=False, itm=False, snli_ve=True, hidden_scale=2.0)),
    image_size=384,
    optimizer=replace(PAPER_OPTIMIZER, lr=3e-6, warmup=0.06, head_multiplier=10),
    data=COLOUR_VIEWS,
    batch_size=64,
    micro_batch_size=32,
    max_epochs=5,
    precision="bf16",
    evaluate_every=4_000,
    select_by="accuracy",
)

NLVR2 = RunConfig(
    recipe="nlvr2",
    source="paper, appendix, and official script for NLVR2; give a pre-trained init",
    task=Nlvr2Config(),
    model=replace(
        _AT_384,
        fusion=replace(_AT_384.fusion, num_token_types=3),
        heads=HeadsConfig(mlm=False, itm=False, nlvr2=True, hidden_scale=1.5),
    ),
    image_size=384,
    optimizer=replace(PAPER_OPTIMIZER, lr=5e-6, weight_decay=0.008, head_multiplier=10),
    data=COLOUR_VIEWS,
    batch_size=64,
    micro_batch_size=16,
    max_epochs=10,
    precision="bf16",
    evaluate_every=1_000,
    select_by="accuracy",
)
