"""A small model with a vocabulary of whole words, the set it reads, and how it ranks that set."""

import pytest
import torch

from bridgetower.checkpoints import Checkpoint
from bridgetower.data.batches.captions import CaptionImages
from bridgetower.data.config import DataConfig
from bridgetower.engines.engine import TorchEngine
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.evaluation.retrieval import evaluate_retrieval
from bridgetower.inference.predictor import Predictor
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.processor import Processor, ProcessorConfig, train_tokenizer
from helpers.models import off_defaults
from helpers.shapes import SHAPES_MODEL


@pytest.fixture(scope="session")
def words_predictor(tiny_dataset):
    values = ProcessorConfig(
        profile="official-pretrain", image_size=SHAPES_MODEL.vision.image_size, max_length=24
    )
    pictures = CaptionImages(
        DataConfig(folders=(str(tiny_dataset),)), "train", Processor(values, None)
    )
    captions = [caption for texts in pictures.all_captions() for caption in texts]
    processor = Processor(values, train_tokenizer(captions, vocab_size=400))
    config = SHAPES_MODEL.override({"text.vocab_size": processor.vocab_size})
    tensors = off_defaults(BridgeTower(config)).state_dict()
    checkpoint = Checkpoint(source="tiny", config=config, tensors=tensors, processor=processor)
    return Predictor(checkpoint, TorchEngine(checkpoint.model(), torch.device("cpu")))


@pytest.fixture(scope="session")
def shape_images(tiny_dataset, words_predictor):
    return CaptionImages(
        DataConfig(folders=(str(tiny_dataset),)), "test", words_predictor.processor
    )


@pytest.fixture(scope="session")
def retrieval_config():
    return RetrievalConfig(candidates=4)


@pytest.fixture(scope="session")
def evaluation(words_predictor, shape_images, retrieval_config):
    return evaluate_retrieval(words_predictor.model, shape_images, retrieval_config)
