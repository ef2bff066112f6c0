"""Scores of many pairs: reranking for one text, and retrieval in two stages, with what pairs share computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bridgetower.engines.engine import Engine
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.evaluation.metrics import GroundTruth, candidate_pairs
from bridgetower.model.fusion import Encoded
from side_by_side.rows import Row
from side_by_side.setting import Setting
from side_by_side.timing import Timing, alternate

TOKENS = 16
CHUNK = 16  # pairs at once


@torch.no_grad()
def rerank_row(setting: Setting) -> Iterator[Row]:
    """One text against 64 images that were encoded before, beside transformers, which encodes them for every text."""
    count = 4 if setting.quick else 64
    engine, inputs = setting.engine("torch", "fp32"), setting.inputs(1, TOKENS, count)
    model = setting.theirs()
    image = engine.cache_image(engine.encode_image(inputs["pixel_values"]))
    sample = slice(0, 2 if setting.quick else 4)  # transformers takes the same time for every pair

    def ours() -> Tensor:
        return scores(engine, image, engine.cache_text(engine.encode_text(inputs["input_ids"])))

    def theirs() -> Tensor:
        pixels = inputs["pixel_values"][sample]
        ids, mask = (
            inputs[name].expand(len(pixels), -1) for name in ("input_ids", "attention_mask")
        )
        return model(pixel_values=pixels, input_ids=ids, attention_mask=mask).logits

    timings = alternate({"ours": ours, "theirs": theirs}, repetitions=setting.repetitions)
    yield Row(
        name=f"rerank one text against {count} encoded images, per pair",
        ours="ours torch fp32",
        peer="transformers eager",
        ours_s=timings["ours"].seconds / count,
        peer_s=timings["theirs"].seconds / len(theirs()),
        target=5.0,
        max_diff=float((ours()[sample] - theirs()).abs().max()),
        disturbed=any(timing.disturbed for timing in timings.values()),
    )


def scores(engine: Engine, image: Encoded, text: Encoded) -> Tensor:
    """Returns logits of every image with one text."""
    parts = torch.arange(len(image)).split(CHUNK)
    fused = [engine.fuse(image[rows], text[torch.zeros_like(rows)]).pooled for rows in parts]
    return engine.model.itm_logits(torch.cat(fused))


@torch.no_grad()
def retrieval_rows(setting: Setting) -> Iterator[Row]:
    """200 images with 5 texts each in both directions, 32 candidates, encoding included.

    Everything is timed on a sample and scaled by how often it is needed, as transformers would take a day. The vectors
    that choose the candidates are random, so that the two directions share few pairs.
    """
    num_images, per_image, k, sample = (8, 2, 3, 2) if setting.quick else (200, 5, 32, CHUNK)
    num_texts = num_images * per_image
    vectors = torch.randn(num_images + num_texts, 32, generator=torch.Generator().manual_seed(0))
    similarity = vectors[:num_images] @ vectors[num_images:].T
    truth = GroundTruth(torch.arange(num_texts) // per_image, torch.arange(num_images))
    pairs = candidate_pairs(
        lambda rows, texts: similarity[rows][:, texts], truth, RetrievalConfig(candidates=k)
    )
    shared, apart = len(pairs.image), int(pairs.image_side.sum() + pairs.text_side.sum())
    engine, inputs = setting.engine("torch", "fp32"), setting.inputs(sample, TOKENS)
    padded = setting.inputs(sample, 50)
    padded["attention_mask"][:, TOKENS:] = 0
    padded["input_ids"][:, TOKENS:] = engine.model.config.text.pad_token_id
    padded["input_ids"][:, :TOKENS] = inputs["input_ids"]
    model = setting.theirs()
    started = _started(engine, inputs)
    plain = (
        engine.encode_image(inputs["pixel_values"]),
        engine.encode_text(padded["input_ids"], padded["attention_mask"]),
    )
    few = {name: tensor[: min(sample, 4)] for name, tensor in inputs.items()}
    ways: dict[str, Callable[[], object]] = {
        "image": lambda: engine.cache_image(engine.encode_image(inputs["pixel_values"])),
        "text": lambda: engine.cache_text(engine.encode_text(inputs["input_ids"])),
        "pair": lambda: engine.fuse(*started),
        "pair alone": lambda: engine.fuse(*plain),
        "transformers pair": lambda: model(**few),
    }
    timings = {name: _timing(setting, way) for name, way in ways.items()}
    items = {
        name: len(few["input_ids"]) if name == "transformers pair" else sample for name in ways
    }
    seconds = {name: timing.seconds / items[name] for name, timing in timings.items()}
    disturbed = any(timing.disturbed for timing in timings.values())
    off = float((engine.fuse(*started).pooled - engine.fuse(*plain).pooled).abs().max())
    encoding = num_images * seconds["image"] + num_texts * seconds["text"]
    ours = encoding + shared * seconds["pair"]
    details = {
        "pairs": shared,
        "pairs_without_sharing": apart,
        "all_pairs": similarity.numel(),
        "seconds": seconds,
    }
    name = f"two-stage retrieval, {num_images} images, {num_texts} texts, k {k}"
    yield Row(
        name=f"{name}: transformers on all pairs",
        ours="ours torch fp32",
        peer="transformers eager",
        ours_s=ours,
        peer_s=similarity.numel() * seconds["transformers pair"],
        target=10.0,
        disturbed=disturbed,
        details=details,
    )
    yield Row(
        name=f"{name}: nothing shared",
        ours="ours torch fp32",
        peer="ours, each direction for itself, padded to 50, no shared start",
        ours_s=ours,
        peer_s=encoding + apart * seconds["pair alone"],
        target=1.4,
        disturbed=disturbed,
        max_diff=off,
    )


def _started(engine: Engine, inputs: dict[str, Tensor]) -> tuple[Encoded, Encoded]:
    image = engine.cache_image(engine.encode_image(inputs["pixel_values"]))
    return image, engine.cache_text(engine.encode_text(inputs["input_ids"]))


def _timing(setting: Setting, way: Callable[[], object]) -> Timing:
    return alternate({"way": way}, repetitions=min(3, setting.repetitions), warmup=1)["way"]
