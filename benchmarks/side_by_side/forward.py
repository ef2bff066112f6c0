"""Matching one pair, eight, and a stream: ours beside transformers eager, compiled, in ONNX Runtime and in OpenVINO."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import Any, cast

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from bridgetower.engines.config import EngineName, Precision, engines_with
from bridgetower.engines.engine import Engine
from bridgetower.files import replacing
from bridgetower.serve.queues import Scheduler, Work
from search import resident
from side_by_side.products import nodes, operations, rates, recorded
from side_by_side.rows import Row, timed
from side_by_side.setting import Setting
from side_by_side.timing import Timing, alternate

TOKENS, CLIENTS = 16, 4
EAGER, COMPILED, EAGER_BF16 = (
    "transformers eager",
    "transformers compiled",
    "transformers eager bf16",
)
IN_ONNXRUNTIME, IN_OPENVINO = "transformers in onnxruntime", "transformers in openvino"
RIVALS: dict[
    Precision, tuple[tuple[str, ...], ...]
] = {  # who share a process, in which only they are
    "fp32": (
        ("ours torch", EAGER),
        ("ours openvino", IN_OPENVINO),
        ("ours onnxruntime", IN_ONNXRUNTIME),
        (COMPILED,),
    ),
    "bf16": (("ours torch", EAGER), ("ours openvino", IN_OPENVINO), (COMPILED,), (EAGER_BF16,)),
    "int8": (("ours onnxruntime", EAGER),),
}
PLAIN: dict[Precision, float] = {"fp32": 1.3, "bf16": 2.4}
Way = Callable[[], Tensor]
Request = tuple[Tensor, Tensor, Tensor]  # an image, ids of texts and their mask
# timings and outputs by way, what else was measured
Run = tuple[dict[str, Timing], dict[str, Tensor], dict[str, Any]]


def forward_rows(setting: Setting, precision: Precision, batch: int) -> Iterator[Row]:
    """One row for plain PyTorch beside eager, one for the best of our engines beside the best peer."""
    if not setting.plain:
        setting.apart(_export_all, setting, precision)
    rivals = RIVALS[precision][: 1 if setting.plain else None]
    timings, off, details = in_both_orders(
        setting, rivals, partial(_forward, setting, precision, batch)
    )
    name = f"itm forward, {precision}, batch {batch}"
    best, peer = (
        min((way for way in timings if way.startswith(side)), key=lambda way: timings[way].seconds)
        for side in ("ours", "transformers")
    )
    if precision == "int8":
        yield timed(
            f"{name}: best of ours",
            timings,
            best,
            EAGER,
            target=3.5,
            max_diff=off[best],
            details=details,
        )
        return
    rate = details.pop("rate")
    plain, target = f"{name}: plain torch", PLAIN[precision]
    yield timed(
        plain,
        timings,
        "ours torch",
        EAGER,
        target=target,
        max_diff=off["ours torch"],
        details=details,
        **rate,
    )
    yield timed(
        f"{name}: best of ours, best of theirs",
        timings,
        best,
        peer,
        target=1.05,
        max_diff=off[best],
    )


def in_both_orders(
    setting: Setting, rivals: Sequence[tuple[str, ...]], measure: Callable[[tuple[str, ...]], Run]
) -> tuple[dict[str, Timing], dict[str, float], dict[str, Any]]:
    """Returns geometric means of two processes, as the model made first may be slower, differences, and details."""
    orders = [order for rival in rivals for order in (rival, rival[::-1])[: len(rival)]]
    runs: list[dict[str, Timing]] = []
    outputs: dict[str, Tensor] = {}
    details: dict[str, Any] = {}
    for order in orders:
        timings, found, more = setting.apart(measure, order)
        runs.append(timings)
        outputs |= found
        details |= more
    every = {way: [run[way] for run in runs if way in run] for way in outputs}
    means = {
        way: Timing(
            geometric_mean(each.seconds for each in found), any(each.disturbed for each in found)
        )
        for way, found in every.items()
    }
    exact = outputs[rivals[0][-1]]
    off = {way: float((output - exact).abs().max()) for way, output in outputs.items()}
    seconds = {way: mean.seconds for way, mean in means.items()}
    in_turn = [{way: timing.seconds for way, timing in run.items()} for run in runs]
    return (
        means,
        off,
        {
            "seconds": seconds,
            "processes, in the order of making": in_turn,
            "max_diff": off,
            **details,
        },
    )


@torch.no_grad()
def _forward(setting: Setting, precision: Precision, batch: int, names: tuple[str, ...]) -> Run:
    inputs = setting.inputs(batch, TOKENS)
    ways = {name: _made(setting, precision, name, inputs) for name in names}
    timings = alternate(ways, repetitions=setting.repetitions)
    outputs = {name: way() for name, way in ways.items()}
    if names == ("ours torch", EAGER):
        rate = {
            "peak_gib": resident("VmHWM") / 1024,
            **rates(ways["ours torch"], timings["ours torch"].seconds),
        }
        gflop = {name: recorded(way).flops / 1e9 for name, way in ways.items()}
        return (
            timings,
            outputs,
            {"rate": rate, "operations": operations(ways["ours torch"]), "gflop": gflop},
        )
    if names == ("ours openvino", IN_OPENVINO):
        makers = {name: partial(_made, setting, precision, name, inputs) for name in names}
        return (
            timings,
            outputs,
            {"openvino": {name: nodes(maker) for name, maker in makers.items()}},
        )
    return timings, outputs, {}


def _export_all(setting: Setting, precision: Precision) -> None:
    for engine in engines_with(precision):
        setting.engine(engine, precision)
    if not setting.graph.exists():
        _export(setting.theirs(), setting.inputs(2, TOKENS), setting.graph)


def _made(setting: Setting, precision: Precision, name: str, inputs: dict[str, Tensor]) -> Way:
    """Matching in one way, with a model of its own."""
    if name.startswith("ours"):
        return ours_of(
            setting.engine(cast(EngineName, name.removeprefix("ours ")), precision), inputs
        )
    if name == IN_ONNXRUNTIME:
        return _in_onnxruntime(setting.graph, inputs)
    if name == IN_OPENVINO:
        return _in_openvino(setting.graph, precision, inputs)
    model = setting.theirs()
    if name == EAGER:
        return lambda: model(**inputs).logits
    if precision == "bf16":
        model.to(torch.bfloat16)
        inputs = {**inputs, "pixel_values": inputs["pixel_values"].to(torch.bfloat16)}
    run = _compiled(model) if name == COMPILED else model
    return lambda: run(**inputs).logits.float()


def stream_rows(setting: Setting) -> Iterator[Row]:
    """Four clients ask for matches of an image with four texts of 4 to 40 tokens, both sides in OpenVINO.

    Ours go through the queue of the server, which computes in one batch what waits.
    """
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(4, 41, (3 if setting.quick else 16, 4), generator=generator)
    images = setting.inputs(1, TOKENS, len(lengths))["pixel_values"]
    requests = []
    for image, row in zip(images[:, None], lengths, strict=True):
        ids, places = (
            setting.inputs(len(row), int(row.max()))["input_ids"],
            torch.arange(int(row.max())),
        )
        mask = (places < row[:, None]).long()
        requests.append(
            (image, torch.where(mask.bool(), ids, setting.config.text_config.pad_token_id), mask)
        )
    graph, pair = setting.cache / f"{setting.name}-stream.onnx", ("ours openvino", IN_OPENVINO)
    gflop = setting.apart(_gflop_of_stream, setting, requests[:CLIENTS], graph)
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    for precision in precisions:
        run = partial(_stream, setting, precision, requests, graph)
        timings, off, details = in_both_orders(setting, [pair], run)
        name = f"a stream of {len(requests)} images with 4 texts each, 4 clients, {precision}"
        details["gflop"] = gflop
        yield timed(name, timings, *pair, target=2.0, max_diff=off[pair[0]], details=details)


@torch.no_grad()
def _gflop_of_stream(setting: Setting, asked: Sequence[Request], graph: Path) -> dict[str, float]:
    """Counts the products of four requests; what is not there yet is exported first."""
    model = setting.theirs()
    if not graph.exists():
        _export(model, _repeated(asked[0]), graph, {1: torch.export.Dim("length", min=2, max=64)})
    ours = partial(_matched, setting.engine("torch", "fp32"), asked)
    setting.engine("openvino", "fp32")
    theirs = recorded(lambda: [model(**_repeated(request)) for request in asked])
    return {"ours": recorded(ours).flops / 1e9, EAGER: theirs.flops / 1e9}


def _stream(
    setting: Setting,
    precision: Precision,
    requests: Sequence[Request],
    graph: Path,
    names: tuple[str, ...],
) -> Run:
    ways: dict[str, Way] = {}
    with ThreadPoolExecutor(CLIENTS) as pool:
        for name in names:
            if name == IN_OPENVINO:
                ways[name] = partial(_in_threads, pool, _requests_of(graph, precision), requests)
            else:
                ways[name] = partial(_in_batches, setting.engine("openvino", precision), requests)
        timings = alternate(ways, repetitions=min(3, setting.repetitions), warmup=1)
        return timings, {name: way() for name, way in ways.items()}, {}


def _matched(engine: Engine, asked: Sequence[Request]) -> list[Tensor]:
    longest = max(ids.shape[1] for _, ids, _ in asked)
    ids, mask = (
        torch.cat(
            [F.pad(request[place], (0, longest - request[place].shape[1])) for request in asked]
        )
        for place in (1, 2)
    )
    image = engine.encode_image(torch.cat([image for image, *_ in asked]))
    rows = torch.arange(len(asked)).repeat_interleave(len(ids) // len(asked))
    pooled = engine.fuse(image[rows], engine.encode_text(ids, mask)).pooled
    return list(engine.model.itm_logits(pooled).float().chunk(len(asked)))


def _repeated(request: Request) -> dict[str, Tensor]:
    """The image is repeated for each of its texts, as transformers takes them."""
    image, ids, mask = request
    return {
        "pixel_values": image.expand(len(ids), -1, -1, -1),
        "input_ids": ids,
        "attention_mask": mask,
    }


def _in_batches(engine: Engine, requests: Sequence[Request]) -> Tensor:
    async def answers() -> list[Tensor]:
        scheduler = Scheduler[Request, Tensor](
            partial(_matched, engine),
            lambda _: Work("pairs", 1.0),
            lanes={"pairs": CLIENTS},
            queue=len(requests),
        )

        async def client(number: int) -> list[Tensor]:
            return [(await scheduler.submit([request]))[0] for request in requests[number::CLIENTS]]

        found = await asyncio.gather(*map(client, range(CLIENTS)))
        await scheduler.close()
        return [found[number % CLIENTS][number // CLIENTS] for number in range(len(requests))]

    return torch.cat(asyncio.run(answers()))


def _in_threads(
    pool: ThreadPoolExecutor, run: Callable[[Request], Tensor], requests: Sequence[Request]
) -> Tensor:
    return torch.cat(list(pool.map(run, requests)))


def rank_row(setting: Setting) -> Iterator[Row]:
    """Spearman's correlation of the scores of all pairs of 20 images and 10 texts, int8 with float32."""
    images, texts = (3, 4) if setting.quick else (20, 10)
    inputs = setting.inputs(texts, TOKENS, images)
    engines: tuple[tuple[EngineName, Precision], ...] = (("torch", "fp32"), ("onnxruntime", "int8"))
    scores = {
        precision: all_pairs(setting.engine(name, precision), inputs) for name, precision in engines
    }
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
    image, text = (
        engine.encode_image(inputs["pixel_values"]),
        engine.encode_text(inputs["input_ids"]),
    )
    rows, columns = torch.cartesian_prod(torch.arange(len(image)), torch.arange(len(text))).T
    logits = [
        engine.model.itm_logits(engine.fuse(image[rows[part]], text[columns[part]]).pooled)
        for part in torch.arange(len(rows)).split(10)
    ]
    return torch.cat(logits).float().diff(dim=-1).squeeze(-1)


def ours_of(engine: Engine, inputs: dict[str, Tensor]) -> Way:
    """Matching with one of our engines; a text without padding has no mask."""

    def match() -> Tensor:
        image, text = (
            engine.encode_image(inputs["pixel_values"]),
            engine.encode_text(inputs["input_ids"]),
        )
        return engine.model.itm_logits(engine.fuse(image, text).pooled).float()

    return match


def _compiled(model: nn.Module) -> Any:
    import torch._inductor.config

    torch._inductor.config.freezing = True
    return torch.compile(model)


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


def _export(
    model: nn.Module, inputs: dict[str, Tensor], graph: Path, length: dict[int, Any] | None = None
) -> None:
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    shapes = (batch, *[batch | (length or {})] * 2)
    # a batch of one would be taken as fixed
    given = tuple(torch.cat([tensor, tensor]) for tensor in inputs.values())
    program = torch.onnx.export(
        _Logits(model), given, dynamo=True, input_names=list(inputs), dynamic_shapes=shapes
    )
    with replacing(graph) as temporary:
        cast(torch.onnx.ONNXProgram, program).save(temporary, external_data=False)


def _in_onnxruntime(graph: Path, inputs: dict[str, Tensor]) -> Way:
    import onnxruntime

    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return lambda: torch.from_numpy(session.run(None, arrays)[0])


def _in_openvino(graph: Path, precision: Precision, inputs: dict[str, Tensor]) -> Way:
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    compiled = _compiled_by_openvino(graph, precision, "LATENCY")
    return lambda: torch.from_numpy(compiled(arrays)[0].copy())


def _requests_of(graph: Path, precision: Precision) -> Callable[[Request], Tensor]:
    compiled, local = _compiled_by_openvino(graph, precision, "THROUGHPUT"), threading.local()

    def match(given: Request) -> Tensor:
        if not hasattr(local, "request"):
            local.request = compiled.create_infer_request()
        arrays = [tensor.numpy() for tensor in _repeated(given).values()]
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
