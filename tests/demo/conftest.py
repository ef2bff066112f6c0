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
from shapes import MODEL
from tiny import off_defaults


@pytest.fixture(scope="session")
def predictor(tiny_dataset):
    values = ProcessorConfig(
        profile="official-pretrain", image_size=MODEL.vision.image_size, max_length=24
    )
    pictures = CaptionImages(
        DataConfig(folders=(str(tiny_dataset),)), "train", Processor(values, None)
    )
    captions = [caption for own in pictures.all_captions() for caption in own]
    processor = Processor(values, train_tokenizer(captions, vocab_size=400))
    config = MODEL.override({"text.vocab_size": processor.vocab_size})
    tensors = off_defaults(BridgeTower(config)).state_dict()
    checkpoint = Checkpoint(source="tiny", config=config, tensors=tensors, processor=processor)
    return Predictor(checkpoint, TorchEngine(checkpoint.model(), torch.device("cpu")))


@pytest.fixture(scope="session")
def images(tiny_dataset, predictor):
    return CaptionImages(DataConfig(folders=(str(tiny_dataset),)), "test", predictor.processor)


@pytest.fixture(scope="session")
def config():
    return RetrievalConfig(candidates=4)


@pytest.fixture(scope="session")
def ranked(predictor, images, config):
    return evaluate_retrieval(predictor.model, images, config)
