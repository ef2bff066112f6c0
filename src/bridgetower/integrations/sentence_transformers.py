"""Models of this package as modules of sentence-transformers: one embeds, one matches images with texts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch

from bridgetower.checkpoints import read_checkpoint, write_checkpoint
from bridgetower.extras import require
from bridgetower.inference import Item, fetched
from bridgetower.predictor import load

require("sentence-transformers")

from sentence_transformers.base.modality import infer_modality
from sentence_transformers.base.modules import InputModule

_ENGINES = {"torch": "torch", "onnx": "onnxruntime", "openvino": "openvino"}


class _Module(InputModule):
    """A loaded model. When it is moved to another device it is loaded again, as its weights are packed on a CPU."""

    def __init__(self, source: str | Path, **options: Any) -> None:
        """Loads a model, as `bridgetower.load` does with the same arguments."""
        super().__init__()
        self.source, self._options = str(source), options
        self.predictor = load(source, **options)
        place = torch.empty(0, dtype=torch.uint8, device=self.predictor.device)
        self.register_buffer("place", place, persistent=False)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        *,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        backend: str = "torch",
        trust_remote_code: bool = False,
        **where: Any,
    ) -> Self:
        """Loads a model as sentence-transformers asks for it; `model_kwargs` are options of `bridgetower.load`."""
        if processor_kwargs or config_kwargs:
            raise ValueError("processor_kwargs or config_kwargs given; expected model_kwargs, as of bridgetower.load")
        folder = cls.load_dir_path(model_name_or_path, **where)
        return cls(folder, **{"engine": _ENGINES[backend], **(model_kwargs or {})})

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Writes the model to a folder."""
        with TemporaryDirectory(dir=output_path) as temporary:
            write_checkpoint(read_checkpoint(self.source), Path(temporary, "model"))
            for file in sorted(Path(temporary, "model").iterdir(), key=lambda file: file.name == "config.json"):
                file.replace(Path(output_path, file.name))

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), self.source, **self._options), ()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        before = self.place.device
        super()._apply(fn, recurse)
        if self.place.device != before:
            self._options = {**self._options, "device": self.place.device}
            self.predictor = load(self.source, **self._options)
        return self

    @property
    def modalities(self) -> list[Any]:
        """What it takes; `message` stands for batches of several kinds."""
        return ["text", "image", ("image", "text"), "message"]

    @property
    def max_seq_length(self) -> int:
        """Longest text in tokens; longer ones are cut."""
        return self.predictor.processor.config.max_length

    def _item(self, given: Any, prompt: str, **settings: Any) -> Item:
        """Returns an item of a text, an image, or a dict with either or both."""
        kind = infer_modality(given, supported_modalities=self.modalities)
        parts = given if isinstance(given, dict) else {kind: given}
        if kind not in ("text", "image", ("image", "text")) or isinstance(parts.get("text"), list | tuple):
            raise ValueError(f"an input is {kind}; expected a text, an image, or a dict with text, image or both")
        processor = self.predictor.processor
        image = processor.resize(fetched(parts["image"])) if "image" in parts else None
        ids = tuple(processor.token_ids([prompt + parts["text"]], truncate=True)[0]) if "text" in parts else None
        return Item(image=image, ids=ids, **settings)


class EmbeddingModule(_Module):
    """Embeds texts, images, and images with texts: `SentenceTransformer(modules=[EmbeddingModule(folder)])`."""

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, task: str | None = None) -> dict[str, Any]:
        """Prepares texts, images, or dicts with either or both."""
        return {"items": [self._item(given, prompt or "") for given in inputs]}

    def get_embedding_dimension(self) -> int:
        """Width of the vectors of texts and of images."""
        return self.predictor.embed_texts("a").shape[1]

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Adds the vectors."""
        vectors: list[Any] = self.predictor.compute(features["items"])
        if len(widths := sorted({len(vector) for vector in vectors})) > 1:
            raise ValueError(f"vectors of {widths} numbers; encode images with texts in a call of their own")
        return {"sentence_embedding": torch.stack(vectors).to(self.place.device)}


class MatchingModule(_Module):
    """Matches images with texts: `CrossEncoder(modules=[MatchingModule(folder)])`. Scores are log-odds."""

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None) -> dict[str, Any]:
        """Prepares pairs of an image and a text, in any order."""
        items = []
        for pair in inputs:
            kinds = [infer_modality(part, supported_modalities=self.modalities) for part in pair]
            if sorted(map(str, kinds)) != ["image", "text"]:
                raise ValueError(f"a pair is of kinds {kinds[0]} and {kinds[-1]}; expected an image and a text")
            parts = {
                kind: part[kind] if isinstance(part, dict) else part for kind, part in zip(kinds, pair, strict=True)
            }
            items.append(self._item(parts, prompt or "", kind="match"))
        return {"items": items}

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Adds the scores: log-odds of what `Predictor.match` returns."""
        log_odds = torch.tensor(self.predictor.compute(features["items"]))
        if (calibration := self.predictor.reranking.calibration) is not None:
            log_odds = calibration.log_odds(log_odds)
        return {"scores": log_odds.to(self.place.device)[:, None]}
