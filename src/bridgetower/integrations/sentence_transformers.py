"""Models of this package as modules of sentence-transformers: one embeds, one matches images with texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch

from bridgetower.checkpoints import UNMEASURED, read_checkpoint, write_checkpoint
from bridgetower.checkpoints.io import checkpoint_of
from bridgetower.engines.engine import Engine, TorchEngine
from bridgetower.extras import require
from bridgetower.inference.items import (
    Item,
    compute_items,
    encoded_images,
    encoded_texts,
    fetched,
    log_odds,
)
from bridgetower.inference.predictor import load
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.cpu import optimize_for_cpu

require("sentence-transformers")

from sentence_transformers.base.modality import infer_modality
from sentence_transformers.base.modules import InputModule

_ENGINES = {"torch": "torch", "onnx": "onnxruntime", "openvino": "openvino"}


class _Unpacked(TorchEngine):
    """Computes with the weights that train, which packing would replace."""

    def _method(self, method: str) -> Callable[..., Any]:
        return getattr(self.model, method)


class _Module(InputModule):
    """A loaded model, which can train with engine torch. Until it trains, inference on a CPU packs a copy of it."""

    def __init__(self, source: str | Path, **options: Any) -> None:
        """Loads a model, as `bridgetower.load` does with the same arguments."""
        super().__init__()
        self.source = str(source)
        self.predictor = load(source, **options)
        self._compiler = "inductor" if options.get("compile") else None
        self._packed_engine: TorchEngine | None = None
        self._packed_state: list[tuple[int, int]] = []  # of the weights that it has a copy of
        self._has_trained = False
        self.network: BridgeTower | None = None
        if isinstance(self.predictor.engine, TorchEngine):
            self.network = self.predictor.model.requires_grad_()
            if self._compiler is None:
                optimize_for_cpu(self.network)
        self.register_buffer(
            "device_marker", torch.empty(0, device=self.predictor.device), persistent=False
        )
        self._follow_device()
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
        **location: Any,
    ) -> Self:
        """Loads a model for sentence-transformers, with options of `bridgetower.load` as `model_kwargs`."""
        if processor_kwargs or config_kwargs:
            raise ValueError(
                "processor_kwargs or config_kwargs given; expected model_kwargs, as of bridgetower.load"
            )
        folder = cls.load_dir_path(model_name_or_path, **location)
        return cls(folder, **{"engine": _ENGINES[backend], **(model_kwargs or {})})

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Writes the model to a folder."""
        checkpoint = (
            read_checkpoint(self.source) if self.network is None else checkpoint_of(self.network)
        )
        checkpoint = replace(checkpoint, reranking=self.predictor.reranking)
        with TemporaryDirectory(dir=output_path) as temporary:
            folder = Path(temporary, "model")
            write_checkpoint(checkpoint, folder)
            files = list(folder.iterdir())
            # last, as it makes a folder a model
            files.sort(key=lambda file: file.name == "config.json")
            for file in files:
                file.replace(Path(output_path, file.name))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_packed_engine": None}

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._follow_device()
        return self

    def _follow_device(self) -> None:
        """Lets the predictor compute on the device of the weights, or refuses it."""
        device = self.device_marker.device
        if self.network is not None:
            weight = self.network.token_type_embedding.weight
            self.predictor.engine = _Unpacked(self.network, weight.device, weight.dtype)
        elif device.type != "cpu":
            raise ValueError(
                f"an exported model runs on the CPU, not on {device}; use backend torch there"
            )

    def _engine(self) -> Engine:
        """Returns the predictor's engine for weights that train, else one with packed copies of them."""
        self._note_training()
        if self.network is None or self._is_training or self._has_trained:
            return self.predictor.engine
        weights = list(self.network.parameters())
        # changes if others are loaded or moved
        state = [(weight.data_ptr(), weight._version) for weight in weights]
        if self._packed_engine is None or self._packed_state != state:
            shared = (*weights, self.network.origin, self.network.extensions)
            network = deepcopy(self.network, {id(value): value for value in shared})
            self._packed_engine = TorchEngine(
                network, weights[0].device, weights[0].dtype, self._compiler
            )
            self._packed_state = state
        return self._packed_engine

    @property
    def _is_training(self) -> bool:
        """Whether dropout or gradients are asked for."""
        return self.training or torch.is_grad_enabled()

    def _note_training(self) -> None:
        """Forgets the packed weights, and what was measured of reranking, once the weights train."""
        if self.training and torch.is_grad_enabled():
            self._has_trained = True
            self._packed_engine = None
            self.predictor.reranking = UNMEASURED

    @property
    def modalities(self) -> list[Any]:
        """Kinds of input, with `message` for batches of several kinds."""
        return ["text", "image", ("image", "text"), "message"]

    @property
    def max_seq_length(self) -> int:
        """Tokens of the longest text. Longer texts are cut."""
        return self.predictor.processor.config.max_length

    def _item(self, value: Any, prompt: str, **options: Any) -> Item:
        """Returns an item of a text, an image, or a dict with either or both."""
        kind = infer_modality(value, supported_modalities=self.modalities)
        inputs = value if isinstance(value, dict) else {kind: value}
        if kind not in ("text", "image", ("image", "text")) or isinstance(
            inputs.get("text"), list | tuple
        ):
            raise ValueError(
                f"an input is {kind}; expected a text, an image, or a dict with text, image or both"
            )
        processor = self.predictor.processor
        image = None
        if "image" in inputs:
            image = processor.resize(fetched(inputs["image"]))
        ids = None
        if "text" in inputs:
            ids = tuple(processor.token_ids([prompt + inputs["text"]], truncate=True)[0])
        return Item(image=image, ids=ids, **options)


class EmbeddingModule(_Module):
    """Embeds texts, images, and images with texts: `SentenceTransformer(modules=[EmbeddingModule(folder)])`."""

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, task: str | None = None
    ) -> dict[str, Any]:
        """Prepares texts, images, or dicts with either or both.

        `input_ids` are indices of the items, as trainers select from them.
        """
        items = [self._item(value, prompt or "") for value in inputs]
        return {"input_ids": torch.arange(len(items)), "items": items}

    def get_embedding_dimension(self) -> int:
        """Width of the vectors of texts and of images."""
        self.predictor.model.head("itc")
        return self.predictor.model.config.heads.itc_size

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Adds the vectors."""
        items = [features["items"][index] for index in features["input_ids"].tolist()]
        engine = self._engine()
        needs_gradients = self.network is not None and self._is_training
        vectors: list[Any] = compute_items(
            engine, self.predictor.processor, items, gradients=needs_gradients
        )
        widths = sorted({len(vector) for vector in vectors})
        if len(widths) > 1:
            raise ValueError(
                f"vectors of {widths} numbers; encode images with texts in a call of their own"
            )
        return {"sentence_embedding": torch.stack(vectors).to(self.device_marker.device)}


class MatchingModule(_Module):
    """Matches images with texts: `CrossEncoder(modules=[MatchingModule(folder)])`. Scores are log-odds."""

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, task: str | None = None
    ) -> dict[str, Any]:
        """Prepares pairs of an image and a text, in any order.

        Texts alone will do too, as trainers describe their columns.
        """
        items = []
        for pair in inputs:
            if isinstance(pair, str):
                items.append(self._item(pair, prompt or ""))
                continue
            kinds = [infer_modality(value, supported_modalities=self.modalities) for value in pair]
            if sorted(map(str, kinds)) != ["image", "text"]:
                raise ValueError(
                    f"a pair is of kinds {kinds[0]} and {kinds[-1]}; expected an image and a text"
                )
            merged = {}
            for kind, value in zip(kinds, pair, strict=True):
                merged[kind] = value[kind] if isinstance(value, dict) else value
            items.append(self._item(merged, prompt or "", kind="match"))
        return {"items": items}

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Adds the scores: log-odds of what `Predictor.match` returns."""
        items = features["items"]
        if any(item.kind != "match" for item in items):
            raise ValueError("a text has no image; expected pairs of an image and a text")
        engine = self._engine()
        processor = self.predictor.processor
        if self.network is not None and self._is_training:
            image = encoded_images(engine, processor, [item.image for item in items])
            text = encoded_texts(engine, processor, [item.ids for item in items])
            scores = log_odds(self.network.itm_logits(engine.fuse(image, text).pooled))
        else:
            scores = torch.tensor(compute_items(engine, processor, items))
        calibration = self.predictor.reranking.calibration
        if calibration is not None:
            scores = calibration.log_odds(scores)
        return {"scores": scores.to(self.device_marker.device)[:, None]}
