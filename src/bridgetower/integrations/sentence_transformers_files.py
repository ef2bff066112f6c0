"""The two files by which sentence-transformers loads a folder of this package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from bridgetower.files import write_json

Kind = Literal["sentence-transformers", "cross-encoder"]

_MODULES: Mapping[Kind, str] = {"sentence-transformers": "EmbeddingModule", "cross-encoder": "MatchingModule"}
_CONFIGS: Mapping[Kind, Mapping[str, Any]] = {
    "sentence-transformers": {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"},
    "cross-encoder": {"model_type": "CrossEncoder"},
}


def write_modules(folder: str | Path, kind: Kind = "sentence-transformers") -> None:
    """Adds to a model's folder what `SentenceTransformer(folder, trust_remote_code=True)` reads, or `CrossEncoder`.

    A folder is for one of the two; the files of the other are replaced.

    Args:
        folder: Of this package or of transformers.
        kind: `sentence-transformers` embeds, `cross-encoder` matches images with texts.

    Raises:
        FileNotFoundError: There is no model.
    """
    if not (Path(folder) / "config.json").exists():
        raise FileNotFoundError(f"{folder} has no config.json; expected the folder of a model")
    home = "bridgetower.integrations.sentence_transformers"
    module = {"idx": 0, "name": "0", "path": "", "type": f"{home}.{_MODULES[kind]}"}
    write_json(Path(folder) / "config_sentence_transformers.json", dict(_CONFIGS[kind]))
    write_json(Path(folder) / "modules.json", [module])
