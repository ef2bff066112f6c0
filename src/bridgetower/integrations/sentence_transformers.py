"""Models of this package as modules of sentence-transformers: one embeds, one matches images with texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from inspect import unwrap
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch

from bridgetower.checkpoints import UNMEASURED, read_checkpoint, write_checkpoint
from bridgetower.checkpoints.io import checkpoint_of
from bridgetower.engines.engine import Engine, TorchEngine
from bridgetower.extras import require
from bridgetower.inference import Item, compute, encoded_images, encoded_texts, fetched, log_odds
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.cpu import optimize_for_cpu
from bridgetower.predictor import load

require("sentence-transformers")

from sentence_transformers.base.modality import infer_modality
from sentence_transformers.base.modules import InputModule

_ENGINES = {"torch": "torch", "onnx": "onnxruntime", "openvino": "openvino"}


class _Unpacked(TorchEngine):
    """Computes with the weights that train, which packing would replace."""

    def _started(self, method: str) -> Callable[..., Any]:
        return getattr(self.model, method)


class _Module(InputModule):
    """A loaded model, which can train with engine torch; until then, inference packs a copy of its weights on a CPU."""

    def __init__(self, source: str | Path, **options: Any) -> None:
        """Loads a model, as `bridgetower.load` does with the same arguments."""
        super().__init__()
        self.source, self.predictor = str(source), load(source, **options)
        self._compiler = "inductor" if options.get("compile") else None
        self._packed: tuple[Any, TorchEngine] | None = None  # and the state of the weights that it is a copy of
        self._trained = False
        self.network: BridgeTower | None = None
        if isinstance(self.predictor.engine, TorchEngine):
            self.network = self.predictor.model.requires_grad_()
            if self._compiler is None:
                optimize_for_cpu(self.network)
        self.register_buffer("place", torch.empty(0, device=self.predictor.device), persistent=False)
        self._moved()
        self.eval()

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
        checkpoint = read_checkpoint(self.source) if self.network is None else checkpoint_of(self.network)
        with TemporaryDirectory(dir=output_path) as temporary:
            write_checkpoint(replace(checkpoint, reranking=self.predictor.reranking), Path(temporary, "model"))
            for file in sorted(Path(temporary, "model").iterdir(), key=lambda file: file.name == "config.json"):
                file.replace(Path(output_path, file.name))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_packed": None}

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._moved()
        return self

    def _moved(self) -> None:
        """Lets the predictor compute where the weights are, or refuses that."""
        if self.network is not None:
            weight = self.network.token_type_embedding.weight
            self.predictor.engine = _Unpacked(self.network, weight.device, weight.dtype)
        elif self.place.device.type != "cpu":
            raise ValueError(f"an exported model runs on the CPU, not on {self.place.device}; use backend torch there")

    def _engine(self) -> Engine:
        """Returns the predictor's for weights that train, whose changes show nowhere, else one of packed copies."""
        if self.network is None or self._trains() or self._trained:
            return self.predictor.engine
        weights = list(self.network.parameters())
        now = [(weight.data_ptr(), weight._version) for weight in weights]  # others are loaded or moved
        if self._packed is None or self._packed[0] != now:
            shared = (*weights, self.network.origin, self.network.extensions)
            copied, weight = deepcopy(self.network, {id(each): each for each in shared}), weights[0]
            self._packed = now, TorchEngine(copied, weight.device, weight.dtype, self._compiler)
        return self._packed[1]

    def _trains(self) -> bool:
        """Whether dropout or gradients are asked for; what was measured of weights that train is then forgotten."""
        if self.training and torch.is_grad_enabled():
            self._trained, self._packed, self.predictor.reranking = True, None, UNMEASURED
        return self.training or torch.is_grad_enabled()

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
        """Prepares texts, images, or dicts with either or both; `input_ids` are their numbers, which trainers cut."""
        items = [self._item(given, prompt or "") for given in inputs]
        return {"input_ids": torch.arange(len(items)), "items": items}

    def get_embedding_dimension(self) -> int:
        """Width of the vectors of texts and of images."""
        self.predictor.model.head("itc")
        return self.predictor.model.config.heads.itc_size

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Adds the vectors."""
        items = [features["items"][row] for row in features["input_ids"].tolist()]
        computed = unwrap(compute) if self.network is not None and self._trains() else compute  # not in inference mode
        vectors: list[Any] = computed(self._engine(), self.predictor.processor, items)
        if len(widths := sorted({len(vector) for vector in vectors})) > 1:
            raise ValueError(f"vectors of {widths} numbers; encode images with texts in a call of their own")
        return {"sentence_embedding": torch.stack(vectors).to(self.place.device)}


class MatchingModule(_Module):
    """Matches images with texts: `CrossEncoder(modules=[MatchingModule(folder)])`. Scores are log-odds."""

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, task: str | None = None) -> dict[str, Any]:
        """Prepares pairs of an image and a text, in any order; texts alone too, as trainers describe their columns."""
        items = []
        for pair in inputs:
            if isinstance(pair, str):
                items.append(self._item(pair, prompt or ""))
                continue
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
        items, engine, processor = features["items"], self._engine(), self.predictor.processor
        if any(item.kind != "match" for item in items):
            raise ValueError("a text has no image; expected pairs of an image and a text")
        if self.network is not None and self._trains():
            image = encoded_images(engine, processor, [item.image for item in items])
            text = encoded_texts(engine, processor, [item.ids for item in items])
            scores = log_odds(self.network.itm_logits(engine.fuse(image, text).pooled))
        else:
            scores = torch.tensor(compute(engine, processor, items))
        if (calibration := self.predictor.reranking.calibration) is not None:
            scores = calibration.log_odds(scores)
        return {"scores": scores.to(self.place.device)[:, None]}
