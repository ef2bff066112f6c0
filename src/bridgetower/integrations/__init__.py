"""Models and indexes of this package in the interfaces of other libraries, one module for each."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from bridgetower.files import write_json

Kind = Literal["sentence-transformers", "cross-encoder"]


def write_modules(folder: str | Path, kind: Kind = "sentence-transformers") -> None:
    """Adds to a model's folder what `SentenceTransformer(folder, trust_remote_code=True)` reads, or `CrossEncoder`."""
    if not (Path(folder) / "config.json").exists():
        raise FileNotFoundError(f"{folder} has no config.json; expected the folder of a model")
    embeds = kind == "sentence-transformers"
    config = (
        {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"}
        if embeds
        else {"model_type": "CrossEncoder"}
    )
    kind_of = f"bridgetower.integrations.sentence_transformers.{'Embedding' if embeds else 'Matching'}Module"
    write_json(Path(folder) / "config_sentence_transformers.json", config)
    write_json(Path(folder) / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": kind_of}])
