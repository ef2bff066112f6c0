"""What recipes have in common: the paper's optimiser, how training images are varied, models; without torch."""

from bridgetower.data.config import DataConfig
from bridgetower.model.presets import BASE
from bridgetower.tasks.run_config import OptimizerConfig

PAPER_OPTIMIZER = OptimizerConfig(
    lr=1e-5, weight_decay=0.01, warmup=0.1, head_multiplier=5, fusion_multiplier=5, rule="hf_adamw"
)

BASE_AT_384 = BASE.override({"vision.image_size": 384})

# Official `blip_randaug_wc` in training; squashed images in evaluation (official `blip`).
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

# The paper's uni-modal checks. The paper gives learning rates (1e-5 or 2e-5) and, for GLUE, batch sizes (16 or 32). The
# rest is chosen here: for GLUE as RoBERTa was fine-tuned (Liu et al. 2019, appendix, table 10), for CIFAR alike.
SINGLE_TOWER_OPTIMIZER = OptimizerConfig(lr=1e-5, weight_decay=0.1, warmup=0.06, head_multiplier=1, fusion_multiplier=1)
SINGLE_TOWER_SOURCE = (
    "paper, appendix, for the learning rate{}; epochs, warm-up and decay are chosen here; give a pre-trained init"
)
