"""What recipes of the paper have in common: the optimiser, and how training pictures are varied."""

from bridgetower.data.config import DataConfig
from bridgetower.tasks.run_config import OptimizerConfig

PAPER_OPTIMIZER = OptimizerConfig(
    lr=1e-5, weight_decay=0.01, warmup=0.1, head_multiplier=5, fusion_multiplier=5, rule="hf_adamw"
)

# Official `blip_randaug_wc` in training; squashed pictures in evaluation (official `blip`).
COLOUR_VIEWS = DataConfig(
    profile="official-finetune",
    random_crop=0.5,
    flip=True,
    rand_augment="colour",
    rand_magnitude=7,
    max_length=50,
    num_workers=4,
)

# Official `blip_randaug_wohf`: nothing is mirrored, since questions name left and right.
QUESTION_VIEWS = DataConfig(
    profile="official-finetune",
    random_crop=0.5,
    rand_augment="geometry",
    rand_magnitude=5,
    max_length=50,
    num_workers=4,
)

# Official `clip_randaug` in training; the short side resized and the centre cropped in both (official `clip`).
CLIP_VIEWS = DataConfig(
    profile="official-pretrain", rand_augment="colour", rand_magnitude=9, max_length=50, num_workers=4
)
