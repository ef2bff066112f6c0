"""A made-up set of pictures of coloured shapes, a model small enough for it, and training runs on both."""

from dataclasses import replace

from PIL import Image, ImageDraw

from bridgetower.checkpoints import Checkpoint, write_checkpoint
from bridgetower.data.batches.captions import CaptionImages
from bridgetower.data.config import DataConfig
from bridgetower.data.sets.custom import PairsConfig, prepare_custom
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.config import (
    FusionConfig,
    HeadsConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
)
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.processor import Processor, ProcessorConfig, train_tokenizer
from bridgetower.tasks.run_config import OptimizerConfig, RunConfig
from helpers.models import off_defaults

SHAPE_COLOURS = ("red", "green", "blue", "yellow", "white")
GROUNDS = ("black", "grey", "purple")
SHAPES = ("circle", "square", "bar")
NUM_SHAPE_PICTURES = len(SHAPE_COLOURS) * len(GROUNDS) * len(SHAPES)
SPLIT_SEED = 7  # with which the hashes of the pictures give just these counts
NUM_HELD_OUT = 9  # in validation and in test: an odd number does not split evenly over processes

SHAPES_MODEL = ModelConfig(
    vision=VisionConfig(
        image_size=20, patch_size=10, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=12
    ),
    text=TextConfig(
        vocab_size=300,
        hidden_size=8,
        num_layers=2,
        num_heads=2,
        intermediate_size=12,
        max_positions=34,
        dropout=0.1,
    ),
    fusion=FusionConfig(
        hidden_size=8, num_layers=2, num_heads=2, intermediate_size=12, dropout=0.1
    ),
    heads=HeadsConfig(itc="tower", itc_size=8),
)

SHAPES_PHASES = (
    Phase(until=0.3, mlm=0, itm=0, itc=1),
    Phase(until=0.6, mlm=1, itm=1, itc=1),
    Phase(until=1.0, mlm=1, itm=1, itc=1, negatives="hard"),
)


def write_shape_pictures(folder):
    lines = ["image,caption"]
    combinations = [
        (colour, ground, shape)
        for colour in SHAPE_COLOURS
        for ground in GROUNDS
        for shape in SHAPES
    ]
    for number, (colour, ground, shape) in enumerate(combinations):
        picture = Image.new("RGB", (24, 24), ground)
        draw = ImageDraw.Draw(picture)
        match shape:
            case "circle":
                draw.ellipse((5, 5, 18, 18), fill=colour)
            case "square":
                draw.rectangle((6, 6, 17, 17), fill=colour)
            case "bar":
                draw.rectangle((2, 10, 21, 13), fill=colour)
        picture.save(folder / f"{number:02}.png")
        captions = [
            f"{colour} {shape} on {ground}",
            f"a {shape} that is {colour} on a {ground} ground",
        ]
        lines += [f"{number:02}.png,{caption}" for caption in captions[: 1 + number % 2]]
    (folder / "shapes.csv").write_text("\n".join(lines))
    return folder / "shapes.csv"


def prepare_shapes(pictures, out, **options):
    share = NUM_HELD_OUT / NUM_SHAPE_PICTURES
    options = {"seed": SPLIT_SEED} | options
    config = PairsConfig(test_fraction=share, validation_fraction=share, **options)
    prepare_custom("pairs", write_shape_pictures(pictures), out, config)
    return out


def write_tiny_checkpoint(dataset, folder, model=SHAPES_MODEL, labels=None):
    """Writes a small model with random weights and preprocessing for the set. Returns the folder."""
    values = ProcessorConfig(
        profile="official-pretrain", image_size=SHAPES_MODEL.vision.image_size, max_length=24
    )
    images = CaptionImages(DataConfig(folders=(str(dataset),)), "train", Processor(values, None))
    captions = [caption for captions in images.all_captions() for caption in captions]
    processor = Processor(
        values, train_tokenizer(captions, vocab_size=SHAPES_MODEL.text.vocab_size)
    )
    config = model.override({"text.vocab_size": processor.vocab_size})
    tensors = off_defaults(BridgeTower(config)).state_dict()
    checkpoint = Checkpoint(
        source="tiny", config=config, tensors=tensors, processor=processor, labels=labels or {}
    )
    write_checkpoint(checkpoint, folder)
    return folder


def write_answering_checkpoint(dataset, folder):
    """Writes the small model with the heads of VQA, SNLI-VE and NLVR2. Its answers are the colours."""
    heads = HeadsConfig(mlm=False, itm=False, vqa=len(SHAPE_COLOURS), snli_ve=True, nlvr2=True)
    model = replace(
        SHAPES_MODEL, heads=heads, fusion=replace(SHAPES_MODEL.fusion, num_token_types=3)
    )
    return write_tiny_checkpoint(dataset, folder, model, {"vqa": SHAPE_COLOURS})


def shapes_run_config(dataset, **changes):
    config = RunConfig(
        recipe="shapes",
        task=PretrainingConfig(phases=SHAPES_PHASES),
        model=SHAPES_MODEL,
        data=DataConfig(folders=(str(dataset),), max_length=24),
        optimizer=OptimizerConfig(
            lr=1e-2, weight_decay=0.05, head_multiplier=1, fusion_multiplier=1
        ),
        evaluation=RetrievalConfig(candidates=4),
        batch_size=8,
        max_steps=6,
        log_every=1,
    )
    return replace(config, **changes)


def shapes_train_command(dataset, out, *options):
    tower = ["hidden-size=8", "num-layers=2", "num-heads=2", "intermediate-size=12"]
    sections = {
        "vision": ["image-size=20", "patch-size=10", *tower],
        "text": ["vocab-size=300", "max-positions=34", "dropout=0.1", *tower],
        "fusion": ["dropout=0.1", *tower],
        "heads": ["itc-size=8"],
    }
    values = [
        f"--model.{section}.{value}" for section, entries in sections.items() for value in entries
    ]
    values += ["--batch-size=8", "--precision=fp32", "--log-every=1"]
    values += ["--data.max-length=24", "--evaluation.candidates=4"]
    arguments = [argument for value in values for argument in value.split("=")]
    return [
        "train",
        "pretrain-nano",
        "--data.folders",
        str(dataset),
        "--out",
        str(out),
        *arguments,
        *options,
    ]
