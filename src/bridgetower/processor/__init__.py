"""Preprocessing, all of it: images to `pixel_values`, texts to `input_ids`."""

from bridgetower.processor.config import ProcessorConfig, Profile
from bridgetower.processor.images import (
    MAX_PIXELS,
    check_length,
    media_type,
    open_image,
    open_reduced,
)
from bridgetower.processor.loading import load_items, loaded
from bridgetower.processor.processor import ImageLike, Processor, Resized, to_tensor
from bridgetower.processor.text import TextBatch
from bridgetower.processor.tokenizer_files import load_tokenizer, train_tokenizer

__all__ = [
    "MAX_PIXELS",
    "ImageLike",
    "Processor",
    "ProcessorConfig",
    "Profile",
    "Resized",
    "TextBatch",
    "check_length",
    "load_items",
    "load_tokenizer",
    "loaded",
    "media_type",
    "open_image",
    "open_reduced",
    "to_tensor",
    "train_tokenizer",
]
