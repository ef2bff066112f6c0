"""The path of a step on a GPU, on pretended devices: nothing waits for the device, and layers are one graph."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bridgetower.data.batches.batch import IGNORED
from bridgetower.data.batches.captions import CaptionImages
from bridgetower.data.config import DataConfig
from bridgetower.engines.engine import TorchEngine
from bridgetower.inference import items as inference
from bridgetower.inference.items import (
    Computation,
    Item,
    compute_batches,
    encoded_images,
    encoded_texts,
)
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.layers import autocast, on_meta
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.objectives.losses import _draw, mlm_loss
from bridgetower.objectives.pretraining import PretrainingTask
from bridgetower.tasks.run_config import OptimizerConfig, RunConfig
from bridgetower.training.data_parallel import Replicated, set_numerics
from bridgetower.training.optim import build_optimizer, parameter_groups
from bridgetower.training.setup import TrainContext
from bridgetower.training.step import run_step
from helpers.models import (
    SMALL_CONFIG,
    build_model,
    changed_config,
    max_difference,
    random_caption_batch,
    random_images,
    random_texts,
)

GPU = torch.device("meta")  # of which nothing can be read either
EVERYTHING = Phase(mlm=1, itm=1, itc=1)
PHASES = {
    "random negatives": {"phases": (EVERYTHING,)},
    "hard negatives": {"phases": (replace(EVERYTHING, negatives="hard"),)},
    "official words": {"phases": (EVERYTHING,), "mlm_normalization": "official"},
    "contrast": {"phases": (Phase(mlm=0, itm=0, itc=1),)},
}


class HostWaitsError(Exception):
    """The host would wait for the device."""


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: reading a value, finding places, and copies that may block."""

    def __enter__(self):
        # kept, so that no other tensor gets their place
        self.patch = pytest.MonkeyPatch()
        self.pinned = []
        self.patch.setattr("bridgetower.model.layers.has_cuda", lambda: True)
        self.patch.setattr(
            Tensor, "pin_memory", lambda tensor: self.pinned.append(tensor) or tensor
        )
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [value for value in args if isinstance(value, Tensor)]
        is_read = any(tensor.device == GPU for tensor in tensors)
        if is_read and func.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
        ):
            raise HostWaitsError(str(func))
        if func is torch.ops.aten._to_copy.default:
            devices = {
                tensors[0].device.type,
                torch.device(kwargs.get("device") or tensors[0].device).type,
            }
            pinned = tensors[0].device == GPU or any(tensors[0] is buffer for buffer in self.pinned)
            if devices == {"cpu", "meta"} and not (kwargs.get("non_blocking") and pinned):
                raise HostWaitsError(f"a copy that may block, {devices}")
            if tensors[0].device == GPU and devices == {"cpu", "meta"}:
                return torch.ones(tensors[0].shape, dtype=tensors[0].dtype)
        return func(*args, **kwargs)


def on_gpu():
    with on_meta():
        return BridgeTower(SMALL_CONFIG).train()


def meta_batches(count):
    made = (
        random_caption_batch((0, 1, 2, 3), (5, 3, 7, 4), seed=number) for number in range(count)
    )
    return iter([replace(batch, step_labels=torch.tensor(8)) for batch in made])


def run_meta_step(task, config, step_batches=None):
    context = TrainContext(config=config, task=task, model=task.model, examples=[])
    optimizer = build_optimizer(parameter_groups(context.model, config.optimizer), config.optimizer)
    return run_step(Replicated(task), context, optimizer, iter(step_batches or meta_batches(2)), 0)[
        0
    ]


def meta_config(**options):
    return RunConfig(
        task=PretrainingConfig(**options),
        model=SMALL_CONFIG,
        optimizer=OptimizerConfig(rule="hf_adamw", clip_norm=1.0),
        batch_size=8,
        micro_batch_size=4,
        max_steps=10,
        select_by="itc_rsum",
    )


def frozen_batches():
    config = SMALL_CONFIG
    frozen = []
    for batch in meta_batches(2):
        image = torch.randn(
            4, len(config.vision_layers), config.vision.num_tokens, config.vision.hidden_size
        )
        text = torch.randn(
            4, len(config.text_layers), batch.input_ids.shape[1], config.text.hidden_size
        )
        frozen.append(
            replace(
                batch, pixel_values=None, image_states=image, text_states=text, masked_states=text
            )
        )
    return frozen


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *((name, "micro-batch") for name in PHASES if name != "contrast"),
        *((name, way) for name in ("hard negatives", "contrast") for way in ("step", "frozen")),
    ],
)
def test_a_step_does_not_wait_for_the_device(name, way):
    config = meta_config(**PHASES[name])
    model = on_gpu()
    step_batches = None
    if way == "step":
        config = replace(config, contrast_over="step")
    if way == "frozen":
        model.vision.requires_grad_(False)
        model.text.requires_grad_(False)
        step_batches = frozen_batches()
    with NoWaiting():
        means = run_meta_step(PretrainingTask(model, config.task), config, step_batches)
    assert {value.device for value in means.values()} == {GPU}
    assert "gradient_norm" in means


class Waiting(PretrainingTask):
    def forward(self, *inputs):
        losses = super().forward(*inputs)
        assert float(losses.total) >= 0
        return losses


def test_control_a_task_that_reads_a_value_is_refused():
    config = meta_config(**PHASES["contrast"])
    task = Waiting(on_gpu(), config.task)
    with NoWaiting(), pytest.raises(HostWaitsError, match="_local_scalar_dense"):
        run_meta_step(task, config)


@pytest.mark.parametrize("copy", [{}, {"non_blocking": True}])
def test_control_a_copy_that_blocks_or_is_not_pinned_is_refused(copy):
    with NoWaiting(), pytest.raises(HostWaitsError, match="a copy that may block"):
        torch.zeros(2).to(GPU, **copy)


def test_pixels_are_normalised_where_they_are_used(tiny_dataset, tiny_processor):
    """As uint8 they take a quarter of the bytes on the way, and the numbers are the same."""
    data = DataConfig(folders=(str(tiny_dataset),), augmentation="affine")
    images = CaptionImages(data, "train", tiny_processor)
    plain = images.views([0, 3], torch.Generator().manual_seed(1))
    images.raw = True
    raw = images.views([0, 3], torch.Generator().manual_seed(1))
    assert (plain.dtype, raw.dtype) == (torch.float32, torch.uint8)
    assert torch.equal(tiny_processor.normalise(raw), plain)


def test_one_call_changes_all_weights_of_a_rate(monkeypatch):
    model = on_gpu()
    config = OptimizerConfig(rule="hf_adamw")
    called = []
    monkeypatch.setattr(
        torch, "_fused_adamw_", lambda weights, *arguments, **numbers: called.append(weights)
    )
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    build_optimizer(groups := parameter_groups(model, config), config).step()
    assert [len(weights) for weights in called] == [len(group["params"]) for group in groups]
    assert len(called) < 10


def test_a_predictor_sends_bytes_and_does_not_wait(tiny_processor):
    engine = TorchEngine(on_gpu().eval(), GPU, torch.float16)
    pixels = [torch.zeros(3, 24, 24, dtype=torch.uint8)] * 2
    # In inference mode, `to` would come whole.
    with torch.no_grad(), NoWaiting() as waiting:
        image = encoded_images(engine, tiny_processor, pixels)
        text = encoded_texts(engine, tiny_processor, [[0, 5, 6, 2], [0, 7, 2]])
        fused = engine.fuse(engine.cache_image(image), engine.cache_text(text))
    pixel_types = [tensor.dtype for tensor in waiting.pinned if tensor.ndim == 4]
    assert pixel_types == [torch.uint8]
    assert fused.pooled.device == GPU
    assert fused.pooled.dtype == torch.float16


def test_items_are_computed_without_waiting_and_constants_are_sent_once(tiny_processor):
    engine = TorchEngine(on_gpu().eval(), GPU)
    first, second = (torch.full((3, 24, 24), value, dtype=torch.uint8) for value in (0, 1))
    items = [
        Item(image=second),
        Item(ids=(0, 5, 2)),
        *(
            Item(kind=kind, image=image, ids=(0, 6, 2))
            for kind in ("match", "score")
            for image in (second, first)
        ),
        Item(image=first, ids=(0, 7, 8, 2)),
    ]
    with torch.no_grad():  # in inference mode, `to` would come whole
        with NoWaiting():
            Computation(engine, tiny_processor, items, gradients=True).start()
        with NoWaiting() as waiting:
            batch = Computation(engine, tiny_processor, items, gradients=True)
            batch.start()
        outcomes = batch.outcomes()
    assert {tensor.dtype for tensor in waiting.pinned} == {torch.uint8, torch.int64}
    assert [np.shape(outcome) for outcome in outcomes] == [(12,), (12,), (), (), (2,), (2,), (32,)]


def test_a_batch_is_read_when_the_next_one_has_begun(monkeypatch):
    order = []

    def computation(engine, processor, items):
        return SimpleNamespace(
            start=lambda: order.append(f"begun {items}"),
            outcomes=lambda: order.append(f"read {items}"),
        )

    monkeypatch.setattr(inference, "Computation", computation)
    list(compute_batches(None, None, iter("abc")))
    assert order == ["begun a", "begun b", "read a", "begun c", "read b", "read c"]


@pytest.mark.parametrize("positions", [None, torch.tensor([1, 8])])
def test_words_are_found_on_the_host_or_looked_for(positions):
    hidden = torch.randn(2, 7, 3)
    labels = torch.full((2, 7), IGNORED)
    labels[0, 1] = 0
    labels[1, 1] = 2
    loss, accuracy = mlm_loss(lambda predicted: 2 * predicted, hidden, labels, positions)
    expected = torch.nn.functional.cross_entropy(2 * hidden[:, 1], torch.tensor([0, 2]))
    assert loss == expected
    assert accuracy == (hidden[:, 1].argmax(dim=1) == torch.tensor([0, 2])).float().mean()


@pytest.mark.parametrize("seed", range(5))
def test_draws_are_those_of_multinomial(seed):
    logits = 3 * torch.randn(6, 9, generator=torch.Generator().manual_seed(seed))
    allowed = torch.rand(6, 9, generator=torch.Generator().manual_seed(seed)) < 0.7
    weights = logits.masked_fill(~allowed, -torch.inf).softmax(dim=1)
    expected = torch.multinomial(weights, 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    assert torch.equal(_draw(logits, allowed, torch.Generator().manual_seed(seed)), expected)


@pytest.fixture
def unchecked():
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch._dynamo.reset()


@pytest.mark.usefixtures("unchecked")
def test_compiled_layers_are_one_graph_each_and_give_the_same_losses_and_gradients():
    config = PretrainingConfig(phases=(replace(EVERYTHING, negatives="hard"),))
    results = []
    for compiled in (False, True):
        # Without dropout, which draws other numbers for padded texts.
        task = PretrainingTask(
            build_model(changed_config(text__dropout=0.0, fusion__dropout=0.0)).train(), config
        )
        if compiled:
            task.model.compile_layers(backend="eager")
        for batch in meta_batches(2):
            torch.manual_seed(0)
            task(batch).total.backward()
        results.append(
            {name: value.grad for name, value in task.named_parameters() if value.grad is not None}
        )
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def graphs_of(multiple, texts):
    graphs = []
    outputs = []

    def backend(graph, inputs):
        graphs.append(inputs)
        return graph.forward

    torch._dynamo.reset()
    model = build_model(SMALL_CONFIG)
    model.compile_layers(backend=backend)
    model.text_multiple = multiple
    for lengths in texts:
        ids, mask = random_texts(lengths)
        outputs.append(model.encode_text(ids, mask if len(set(lengths)) > 1 else None).layers[-1])
    return len(graphs), outputs


@torch.no_grad()
@pytest.mark.usefixtures("unchecked")
def test_texts_of_all_lengths_share_their_graphs():
    texts = [(length, expected) for length in (3, 8, 9, 14) for expected in (2, length)]
    few, padded = graphs_of(8, texts)
    assert few == graphs_of(8, [texts[0], texts[-1]])[0]  # for eight tokens, and for other lengths
    num_graphs, plain = graphs_of(1, texts)
    assert num_graphs >= 2 * few  # control: batches without a mask need others
    for lengths, actual, expected in zip(texts, padded, plain, strict=True):
        torch.testing.assert_close(
            actual[0, : lengths[0]], expected[0, : lengths[0]], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("frozen", [False, True])
def test_texts_padded_for_compiled_layers_have_the_same_losses(frozen):
    task = PretrainingTask(build_model(SMALL_CONFIG), PretrainingConfig(phases=(EVERYTHING,)))
    batch = frozen_batches()[0] if frozen else next(meta_batches(1))
    expected = task(batch).terms
    task.model.text_multiple = 8
    assert task.encode(batch).texts["plain"].layers[0].shape[1] == 8  # in place of 7
    for name, loss in task(batch).terms.items():
        torch.testing.assert_close(loss, expected[name], atol=1e-5, rtol=1e-5)
    assert expected.keys() == {"mlm", "itm", "itc"}
    longest = task.model.encode_text(torch.full((1, 13), 5)).layers[0]
    assert longest.shape[1] == 14  # as many as the position table holds


def no_compiler(graph, inputs):
    raise RuntimeError


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("strict", "backend"), [(True, "eager"), (False, "eager"), (False, no_compiler)]
)
def test_a_layer_of_two_graphs_is_refused_or_runs_so_or_without(strict, backend):
    model = build_model(SMALL_CONFIG)
    expected = model.encode_image(random_images(1)).cls
    layer = model.vision.stacked_layers()[0]
    original = layer.forward

    def broken(hidden, *arguments, **options):
        torch._dynamo.graph_break()
        return original(hidden, *arguments, **options)

    layer.forward = broken
    settings = torch._dynamo.config.get_config_copy()
    model.compile_layers(backend=backend, strict=strict)
    with (
        nullcontext() if not strict else pytest.raises(Exception, match=r"graph_break|graph break")
    ):
        assert max_difference(model.encode_image(random_images(1)).cls, expected) < 1e-5
    assert torch._dynamo.config.get_config_copy() == settings, (
        "those of other models are the user's"
    )


def test_what_the_towers_hand_over_is_bfloat16_under_autocast():
    model = build_model(SMALL_CONFIG)
    with autocast(torch.device("cpu"), "bf16"):
        image = model.encode_image(random_images(2))
        text = model.encode_text(*random_texts([5, 3]))
    assert {layer.dtype for layer in (*image.layers, *text.layers)} == {torch.bfloat16}


def test_tf32_is_refused_on_a_cpu():
    with pytest.raises(
        ValueError, match="precision tf32 is for GPUs, not for cpu; use fp32 or bf16"
    ):
        set_numerics(torch.device("cpu"), "tf32", deterministic=False)
