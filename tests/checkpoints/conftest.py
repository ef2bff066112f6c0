"""One small model as every kind of source that is read."""

import pytest
import torch

from bridgetower.checkpoints import Checkpoint, convert, write_checkpoint
from bridgetower.processor import Processor, ProcessorConfig, train_tokenizer
from helpers.checkpoints import OFFICIAL_CONFIG
from helpers.models import build_model

# As transformers has it, so that its folder tells every field.
CONFIG = OFFICIAL_CONFIG.override(
    {
        "text.vocab_size": 280,
        "fusion.layer_norm_eps": 1e-5,
        "fusion.vision_layers": (2, 3),
        "fusion.text_layers": (2, 3),
        "heads.itm": False,
        "heads.mlm_layer_norm_eps": 1e-5,
        "heads.itc_size": 512,
    }
)


@pytest.fixture(scope="session")
def checkpoint():
    width = CONFIG.text.hidden_size
    generator = torch.Generator().manual_seed(7)
    pooler = {
        "text.pooler.dense.weight": torch.rand(width, width, generator=generator),
        "text.pooler.dense.bias": torch.rand(width, generator=generator),
    }
    tokenizer = train_tokenizer(["a dog runs", "two red boats"] * 3, vocab_size=280)
    processor = Processor(
        ProcessorConfig(profile="hf", image_size=32, max_length=18, patch_size=16), tokenizer
    )
    tensors = {name: value.detach() for name, value in build_model(CONFIG).state_dict().items()}
    return Checkpoint(
        source="mine", config=CONFIG, tensors=tensors, extra_tensors=pooler, processor=processor
    )


@pytest.fixture
def bridgetower_folder(checkpoint, tmp_path):
    write_checkpoint(checkpoint, tmp_path / "own")
    return tmp_path / "own"


@pytest.fixture
def safe(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "safe", "hf")
    return tmp_path / "safe"


@pytest.fixture
def theirs(safe):
    return pytest.importorskip("transformers").BridgeTowerForMaskedLM.from_pretrained(safe)


@pytest.fixture
def sharded(safe, theirs, checkpoint):
    folder = safe.with_name("sharded")
    theirs.save_pretrained(folder, max_shard_size="200KB")
    checkpoint.processor.save_huggingface(folder)
    return folder


@pytest.fixture
def pickled(safe, theirs):
    """A folder as transformers wrote it before safetensors, buffers of positions included."""
    state_dict = theirs.state_dict()
    prefix = "bridgetower.text_model.embeddings."
    state_dict[prefix + "position_ids"] = torch.arange(CONFIG.text.max_positions)[None]
    state_dict[prefix + "token_type_ids"] = torch.zeros(
        1, CONFIG.text.max_positions, dtype=torch.long
    )
    state_dict["bridgetower.vision_model.visual.embeddings.position_ids"] = torch.arange(5)[None]
    torch.save(state_dict, safe / "pytorch_model.bin")
    (safe / "model.safetensors").unlink()
    return safe.rename(safe.with_name("pickled"))


@pytest.fixture
def run(checkpoint, tmp_path):
    write_checkpoint(checkpoint, tmp_path / "run" / "best")
    (tmp_path / "run" / "config.json").write_text('{"about": "the run, not the model"}')
    return tmp_path / "run"
