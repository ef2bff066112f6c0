"""Matching one pair, eight, and a stream: ours beside transformers eager, compiled, in ONNX Runtime and in OpenVINO."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from bridgetower.engines.config import FORMS, EngineName, Precision
from bridgetower.engines.engine import Engine
from bridgetower.files import replacing
from bridgetower.serve.queues import Batcher
from search import resident
from side_by_side.products import operations, rates
from side_by_side.rows import Row, timed
from side_by_side.setting import Setting
from side_by_side.timing import Timing, alternate

TOKENS, CLIENTS = 16, 4
EAGER = "transformers eager"
PLAIN: dict[Precision, float] = {"fp32": 1.3, "bf16": 2.4}
Way = Callable[[], Tensor]
Request = tuple[Tensor, Tensor, Tensor]  # an image, ids of texts and their mask


def forward_rows(setting: Setting, precision: Precision, batch: int) -> Iterator[Row]:
    """One row for plain PyTorch beside eager, one for the best of our engines beside the best peer.

    Seconds are the geometric mean of two processes, as the side whose models are made first may be the slower one.
    """
    (first, off, more), (last, _, _) = (
        setting.apart(_forward, setting, precision, batch, ours_first) for ours_first in (True, False)
    )
    timings = {
        way: Timing(sqrt(timing.seconds * last[way].seconds), timing.disturbed or last[way].disturbed)
        for way, timing in first.items()
    }
    name = f"itm forward, {precision}, batch {batch}"
    runs = {"seconds": timings, "ours made first": first, "ours made last": last}
    seconds = {run: {way: timing.seconds for way, timing in found.items()} for run, found in runs.items()}
    details = {**seconds, "max_diff": off, **more}
    best, peer = (
        min((way for way in timings if way.startswith(side)), key=lambda way: timings[way].seconds)
        for side in ("ours", "transformers")
    )
    if precision == "int8":
        yield timed(f"{name}: best of ours", timings, best, EAGER, target=3.5, max_diff=off[best], details=details)
        return
    rate = details.pop("rate")
    plain, target = f"{name}: plain torch", PLAIN[precision]
    yield timed(plain, timings, "ours torch", EAGER, target=target, max_diff=off["ours torch"], details=details, **rate)
    yield timed(f"{name}: best of ours, best of theirs", timings, best, peer, target=1.05, max_diff=off[best])


@torch.no_grad()
def _forward(
    setting: Setting, precision: Precision, batch: int, ours_first: bool
) -> tuple[dict[str, Timing], dict[str, float], dict[str, Any]]:
    """Returns timings and differences of all ways, and where the time of plain PyTorch goes."""
    inputs = setting.inputs(batch, TOKENS)
    able = [engine for engine, its in FORMS if its == precision][: 1 if setting.plain else None]
    ways: dict[str, Way] = {}
    for ours in (ours_first, not ours_first):
        if ours:
            ways |= {f"ours {name}": ours_of(setting.engine(name, precision), inputs) for name in able}
        else:
            ways |= peers(setting, precision, inputs)
    exact = ways[EAGER]()
    timings = alternate(ways, repetitions=setting.repetitions)
    off = {name: float((way() - exact).abs().max()) for name, way in ways.items()}
    if precision == "int8" or not ours_first:
        return timings, off, {}
    rate = {"peak_gib": resident("VmHWM") / 1024, **rates(ways["ours torch"], timings["ours torch"].seconds)}
    return timings, off, {"operations": operations(ways["ours torch"]), "rate": rate}


@torch.no_grad()
def stream_rows(setting: Setting) -> Iterator[Row]:
    """Four clients ask for matches of an image with four texts of 4 to 40 tokens, both sides in OpenVINO.

    Ours go through the queue of the server, which computes in one batch what waits.
    """
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(4, 41, (3 if setting.quick else 16, 4), generator=generator)
    images = setting.inputs(1, TOKENS, len(lengths))["pixel_values"]
    requests = []
    for image, row in zip(images[:, None], lengths, strict=True):
        ids, places = setting.inputs(len(row), int(row.max()))["input_ids"], torch.arange(int(row.max()))
        mask = (places < row[:, None]).long()
        ids = torch.where(mask.bool(), ids, setting.config.text_config.pad_token_id)
        requests.append((image, ids, mask))
    graph = setting.cache / f"{setting.name}-stream.onnx"
    if not graph.exists():
        image, ids, mask = requests[0]
        given = {"pixel_values": image.expand(len(ids), -1, -1, -1), "input_ids": ids, "attention_mask": mask}
        _export(setting.theirs(), given, graph, {1: torch.export.Dim("length", min=2, max=64)})
    with ThreadPoolExecutor(CLIENTS) as pool:
        for precision in precisions:
            engine, theirs = setting.engine("openvino", precision), _requests_of(graph, precision)

            ways: dict[str, Way] = {
                "ours openvino": partial(_in_batches, engine, requests),
                "transformers in openvino": partial(_in_threads, pool, theirs, requests),
            }
            off = float((ways["ours openvino"]() - ways["transformers in openvino"]()).abs().max())
            timings = alternate(ways, repetitions=setting.repetitions, warmup=1)
            name = f"a stream of {len(requests)} images with 4 texts each, 4 clients, {precision}"
            yield timed(name, timings, *ways, target=2.0, max_diff=off)


def _in_batches(engine: Engine, requests: Sequence[Request]) -> Tensor:
    def matched(asked: Sequence[Request]) -> list[Tensor]:
        longest = max(ids.shape[1] for _, ids, _ in asked)
        ids, mask = (
            torch.cat([F.pad(request[place], (0, longest - request[place].shape[1])) for request in asked])
            for place in (1, 2)
        )
        image = engine.encode_image(torch.cat([image for image, *_ in asked]))
        rows = torch.arange(len(asked)).repeat_interleave(len(ids) // len(asked))
        pooled = engine.fuse(image[rows], engine.encode_text(ids, mask)).pooled
        return list(engine.model.itm_logits(pooled).float().chunk(len(asked)))

    async def answers() -> list[Tensor]:
        batcher = Batcher[Request, Tensor](matched, max_batch=CLIENTS, queue=len(requests))

        async def client(number: int) -> list[Tensor]:
            return [(await batcher.submit([request]))[0] for request in requests[number::CLIENTS]]

        found = await asyncio.gather(*map(client, range(CLIENTS)))
        await batcher.close()
        return [found[number % CLIENTS][number // CLIENTS] for number in range(len(requests))]

    return torch.cat(asyncio.run(answers()))


def _in_threads(pool: ThreadPoolExecutor, run: Callable[[Request], Tensor], requests: Sequence[Request]) -> Tensor:
    return torch.cat(list(pool.map(run, requests)))


def rank_row(setting: Setting) -> Iterator[Row]:
    """Spearman's correlation of the scores of all pairs of 20 images and 10 texts, int8 with float32."""
    images, texts = (3, 4) if setting.quick else (20, 10)
    inputs = setting.inputs(texts, TOKENS, images)
    engines: tuple[tuple[EngineName, Precision], ...] = (("torch", "fp32"), ("onnxruntime", "int8"))
    scores = {precision: all_pairs(setting.engine(name, precision), inputs) for name, precision in engines}
    correlation = float(spearmanr(scores["int8"].flatten(), scores["fp32"].flatten()).statistic)
    yield Row(
        name=f"rank correlation of int8 with fp32, {images * texts} pairs",
        ours="ours torch fp32",
        peer="ours onnxruntime int8",
        unit="rank correlation",
        ours_s=1.0,
        peer_s=correlation,
        target=0.99,
        max_diff=float((scores["fp32"] - scores["int8"]).abs().max()),
        details={"spread_of_scores": float(scores["fp32"].std())},
    )


@torch.no_grad()
def all_pairs(engine: Engine, inputs: dict[str, Tensor]) -> Tensor:
    """Returns the difference of the two logits of every image with every text."""
    image, text = engine.encode_image(inputs["pixel_values"]), engine.encode_text(inputs["input_ids"])
    rows, columns = torch.cartesian_prod(torch.arange(len(image)), torch.arange(len(text))).T
    logits = [
        engine.model.itm_logits(engine.fuse(image[rows[part]], text[columns[part]]).pooled)
        for part in torch.arange(len(rows)).split(10)
    ]
    return torch.cat(logits).float().diff(dim=-1).squeeze(-1)


def ours_of(engine: Engine, inputs: dict[str, Tensor]) -> Way:
    """Matching with one of our engines; a text without padding has no mask."""

    def match() -> Tensor:
        image, text = engine.encode_image(inputs["pixel_values"]), engine.encode_text(inputs["input_ids"])
        return engine.model.itm_logits(engine.fuse(image, text).pooled).float()

    return match


def peers(setting: Setting, precision: Precision, inputs: dict[str, Tensor]) -> dict[str, Way]:
    """What there is of transformers: always its eager float32, and others of the same precision."""
    model = setting.theirs()
    ways = {EAGER: lambda: model(**inputs).logits}
    if precision == "int8":
        return ways
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    typed = setting.theirs().to(dtype)
    given = {**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}
    if precision == "bf16":
        ways["transformers eager bf16"] = lambda: typed(**given).logits.float()
    if setting.plain:
        return ways
    ways[f"transformers compiled {precision}"] = _compiled(typed, given)
    graph = setting.cache / f"{setting.name}-itm.onnx"
    if not graph.exists():
        _export(model, inputs, graph)
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    if precision == "fp32":
        ways["transformers in onnxruntime"] = _in_onnxruntime(graph, arrays)
    ways[f"transformers in openvino {precision}"] = _in_openvino(graph, precision, arrays)
    return ways


def _compiled(model: nn.Module, inputs: dict[str, Tensor]) -> Way:
    import torch._inductor.config

    torch._inductor.config.freezing = True
    compiled: Any = torch.compile(model)

    return lambda: compiled(**inputs).logits.float()


class _Logits(nn.Module):
    """transformers' model from tensors to logits, as an exporter wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(
            pixel_values=pixel_values, input_ids=input_ids, attention_mask=attention_mask
        ).logits
        return logits


def _export(model: nn.Module, inputs: dict[str, Tensor], graph: Path, length: dict[int, Any] | None = None) -> None:
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    shapes = (batch, *[batch | (length or {})] * 2)
    given = tuple(torch.cat([tensor, tensor]) for tensor in inputs.values())  # a batch of one would be taken as fixed
    program = torch.onnx.export(_Logits(model), given, dynamo=True, input_names=list(inputs), dynamic_shapes=shapes)
    with replacing(graph) as temporary:
        cast(torch.onnx.ONNXProgram, program).save(temporary, external_data=False)


def _in_onnxruntime(graph: Path, arrays: dict[str, np.ndarray]) -> Way:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return lambda: torch.from_numpy(session.run(None, arrays)[0])


def _in_openvino(graph: Path, precision: Precision, arrays: dict[str, np.ndarray]) -> Way:
    compiled = _compiled_by_openvino(graph, precision, "LATENCY")
    return lambda: torch.from_numpy(compiled(arrays)[0].copy())


def _requests_of(graph: Path, precision: Precision) -> Callable[[Request], Tensor]:
    """The image is repeated for each of its texts, as transformers takes them."""
    compiled, local = _compiled_by_openvino(graph, precision, "THROUGHPUT"), threading.local()

    def match(given: Request) -> Tensor:
        image, ids, mask = given
        if not hasattr(local, "request"):
            local.request = compiled.create_infer_request()
        arrays = [image.expand(len(ids), -1, -1, -1).numpy(), ids.numpy(), mask.numpy()]
        return torch.from_numpy(local.request.infer(arrays)[0].copy())

    return match


def _compiled_by_openvino(graph: Path, precision: Precision, hint: str) -> Any:
    import openvino

    settings = {
        "PERFORMANCE_HINT": hint,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
    }
    return openvino.Core().compile_model(graph, "CPU", settings)
