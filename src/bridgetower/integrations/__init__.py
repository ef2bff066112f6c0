"""Models and indexes of this package in the interfaces of other libraries, one module for each."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from bridgetower.files import write_json

ModuleKind = Literal["sentence-transformers", "cross-encoder"]

_MODULES = "bridgetower.integrations.sentence_transformers"
_CONFIGS = {
    "sentence-transformers": {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"},
    "cross-encoder": {"model_type": "CrossEncoder"},
}
_CLASSES = {
    "sentence-transformers": f"{_MODULES}.EmbeddingModule",
    "cross-encoder": f"{_MODULES}.MatchingModule",
}


def write_modules(folder: str | Path, kind: ModuleKind = "sentence-transformers") -> None:
    """Adds the files to a model's folder that `SentenceTransformer` or `CrossEncoder` reads.

    Both take `trust_remote_code=True`.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} has no config.json; expected the folder of a model")
    write_json(folder / "config_sentence_transformers.json", _CONFIGS[kind])
    write_json(
        folder / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": _CLASSES[kind]}]
    )
