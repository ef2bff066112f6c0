"""The commands of models themselves: convert, export, profile and attention."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from bridgetower.cli.options import READ, Model, Reading, named
from bridgetower.cli.output import emit, emit_result, emit_rows, is_json
from bridgetower.cli.own import own_extensions
from bridgetower.engines.config import Form
from bridgetower.extras import require
from bridgetower.files import write_bytes, write_json
from bridgetower.integrations.sentence_transformers_files import Kind, write_modules

if TYPE_CHECKING:
    from bridgetower.model.config import ModelConfig
    from bridgetower.model.extensions import Extensions


def convert(
    source: Positional[str],
    destination: Positional[Path],
    *,
    to: Literal["bridgetower", "hf"] | Kind,
    drop_itc: bool = False,
    reading: Reading = READ,
    json: bool = False,
) -> None:
    """Convert a checkpoint to a folder of this package, of transformers or of sentence-transformers.

    Example: bridgetower convert official.ckpt my-model --to bridgetower --tokenizer roberta-base/

    Args:
        source: Hub id, folder, or official .ckpt.
        destination: New folder.
        to: bridgetower; hf for transformers' from_pretrained; sentence-transformers for its SentenceTransformer;
            cross-encoder for its CrossEncoder.
        drop_itc: Leave the contrastive head out; transformers cannot hold the official kind.
        reading: How the source is read.
        json: Print JSON on a terminal too.
    """
    from bridgetower.checkpoints import convert as write_converted

    checkpoint = reading.read(source)
    write_converted(checkpoint, destination, "hf" if to == "hf" else "bridgetower", drop_itc=drop_itc)
    if to in ("sentence-transformers", "cross-encoder"):
        write_modules(destination, to)
    value = {"written": str(destination), "format": to, "not_used": list(checkpoint.dropped)}
    emit_result(value, json=json, following=("serve", "--model", destination))


def export(
    model: Positional[Model],
    destination: Positional[Path],
    *,
    form: Annotated[Form, arg(name="format")] = "onnx",
    reading: Reading = READ,
    json: bool = False,
) -> None:
    """Export a model in parts, for any batch and text length: image tower, text tower and fusion encoder.

    The parts are run before they get their name: in ONNX Runtime and OpenVINO, whichever is installed.
    Prints the largest difference from the model by engine and part; if one is above 1e-4 (of
    the largest value, where that is above 1; onnx-int8: 0.2), nothing is written. The folder is a checkpoint as well.

    Example: bridgetower export MODEL my-export --format onnx

    Args:
        model: What to load.
        destination: New folder.
        form: onnx for engines onnxruntime and openvino; onnx-int8, with linear layers in int8, for onnxruntime.
        reading: How the model is read; an export takes images of one size.
        json: Print JSON on a terminal too.
    """
    from bridgetower.engines.folder import write_exported

    differences = write_exported(reading.read(model), destination, form, progress=sys.stderr.isatty())
    largest = max(value for parts in differences.values() for value in parts.values())
    value = {
        "written": str(destination),
        "format": form,
        "largest_difference": largest,
        "largest_difference_by_part": differences,
    }
    emit_result(value, json=json, following=("serve", "--model", destination, "--engine", next(iter(differences))))


def attention(
    models: Positional[tuple[str, ...]],
    *,
    data: Path,
    split: str = "test",
    count: int = 64,
    extensions: str | None = None,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Measure the attention of fusion encoders, layer by layer: distance, entropy, divergence of the heads.

    Images with their own first captions go through each model. Of every attention, within both streams and between
    them: the mean distance between positions that attend and those that they attend to (pixels of an image, tokens of
    a text, within a stream only), the entropy of the weights, and the KL divergence of the weights of a head from those
    of another, both in nats. On a terminal it prints a table of means over heads, else one line of JSON.

    Example: bridgetower attention BridgeTower=runs/add METER=runs/meter --data data/flags --out attention

    Args:
        models: What to load, MODEL or NAME=MODEL.
        data: Prepared folder with captions.
        split: Of the data.
        count: Pairs, spread evenly over the split; all of a split that has fewer.
        extensions: Towers, bridges and heads of your own that a model has: FILE.py:NAME or module:NAME.
        out: Folder for attention.png, with a dot for each head, and attention.json; default: none are written.
        json: Print JSON on a terminal too.
    """
    for extra in ("train", "plot"):
        require(extra)
    from bridgetower.analysis.attention_plot import TITLES, draw_statistics, statistics_rows
    from bridgetower.analysis.attention_weights import attention_statistics
    from bridgetower.data.captions import CaptionImages
    from bridgetower.data.config import DataConfig
    from bridgetower.predictor import load

    names = [name or path for name, path in named(models)]
    if len(set(names)) < len(names):
        raise ValueError(f"models are called {', '.join(names)}; give each a name of its own, NAME=MODEL")
    found, config = {}, DataConfig(folders=(str(data),))
    for name, (_, path) in zip(names, named(models), strict=True):
        predictor = load(path, extensions=own_extensions(extensions))
        images = CaptionImages(config, split, predictor.processor)
        count = min(count, len(images))
        found[name] = attention_statistics(predictor.model, images, count=count, progress=sys.stderr.isatty())
    layers = {name: {kind: list(map(vars, each)) for kind, each in kinds.items()} for name, kinds in found.items()}
    about = {"data": str(data), "split": split, "count": count, "models": layers}
    if out is not None:
        write_bytes(out / "attention.png", draw_statistics(found))
        write_json(out / "attention.json", about)
    if is_json(json):
        emit(about)
    else:
        emit_rows(f"{data}, {split}, {count} pairs", TITLES, statistics_rows(found))


Preset = Literal["base", "large", "nano"]

_COLUMNS = {"parameters": ("parameters [M]", 1e6), "flops": ("GFLOP", 1e9), "milliseconds": ("ms", 1.0)}


def profile(
    *,
    preset: Preset | None = None,
    model: Model | None = None,
    text_length: int = 16,
    image_size: int | None = None,
    repeats: int = 10,
    threads: int | None = None,
    processes: int | None = None,
    extensions: str | None = None,
    json: bool = False,
) -> None:
    """Measure parameters, floating-point operations and time of a model, part by part, and of METER.

    One image is matched with one text, on the CPU, with random weights of the model's architecture. METER is the same
    model fed from the last tower layers only, without bridges. Operations are two per multiply-add, of matrix products
    and convolutions. On a terminal it prints a table, else one line of JSON: {"model", "image_size", "text_length",
    "costs": {"bridgetower": {"parameters": {part: …}, "flops": {…}, "milliseconds": {…}}, "meter": …}}.

    With --processes it prints what training keeps in the memory of each process instead, without the activations:
    {"model", "processes", "memory": {"ddp": {"weights": …, "gradients": …, "optimiser": …}, "fsdp": …}}, in bytes.

    Examples: bridgetower profile --preset nano
              bridgetower profile --preset large --processes 8

    Args:
        preset: A published architecture, or the small one; default base.
        model: A model instead, of which the architecture is read.
        text_length: Tokens of the text, start and end included.
        image_size: Pixels; default: the model's own.
        repeats: Timed passes of each part, of which the median counts.
        threads: Of the processor; default: as many as PyTorch takes.
        processes: Of a training, whose memory is counted; nothing is measured then.
        extensions: Towers, bridges and heads of your own that the model has: FILE.py:NAME or module:NAME.
        json: Print JSON on a terminal too.
    """
    if preset is not None and model is not None:
        raise ValueError(f"preset {preset} and model {model}; give one of them")
    own = own_extensions(extensions)
    config = _architecture(preset, model, own).override({"heads.itm": True})
    if image_size is not None:
        config = config.override({"vision.image_size": image_size})
    name = model or preset or "base"
    if processes is not None:
        _plan(name, config, own, processes, json=json)
        return
    costs = _costs(config, own, text_length, repeats, threads)
    size = config.vision.image_size
    if is_json(json):
        emit({"model": name, "image_size": size, "text_length": text_length, "costs": costs})
    else:
        _show(f"{name}: {size} px, {text_length} tokens, one pair", costs)


def _plan(name: str, config: ModelConfig, extensions: Extensions, processes: int, *, json: bool) -> None:
    from bridgetower.analysis.memory_plan import memory_plan
    from bridgetower.model.bridgetower import BridgeTower
    from bridgetower.model.layers import on_meta

    with on_meta():
        network = BridgeTower(config, extensions)
    memory = memory_plan(network, processes)
    if is_json(json):
        emit({"model": name, "processes": processes, "memory": memory})
        return
    totals = {kind: {**sizes, "total": sum(sizes.values())} for kind, sizes in memory.items()}
    rows = [[what, *(f"{sizes.get(what, 0) / 2**30:.2f}" for sizes in totals.values())] for what in totals["fsdp"]]
    emit_rows(f"{name}: GiB in each of {processes} processes, without activations", ("", *memory), rows)


def _architecture(preset: Preset | None, model: str | None, extensions: Extensions) -> ModelConfig:
    from bridgetower.checkpoints import read_checkpoint
    from bridgetower.model.presets import BASE, LARGE, NANO

    if model is not None:
        return read_checkpoint(model, extensions=extensions).config
    return {"base": BASE, "large": LARGE, "nano": NANO}[preset or "base"]


def _costs(
    config: ModelConfig, extensions: Extensions, text_length: int, repeats: int, threads: int | None
) -> dict[str, dict[str, dict[str, float]]]:
    """Returns what the model and, where it has bridges, its METER cost."""
    import torch

    from bridgetower.model.presets import meter

    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads is {threads}; expected at least 1")
        torch.set_num_threads(threads)
    arms = {"bridgetower": config} if config.fusion.bridge is None else {"bridgetower": config, "meter": meter(config)}
    return {name: _cost(arm, extensions, text_length, repeats) for name, arm in arms.items()}


def _cost(config: ModelConfig, extensions: Extensions, text_length: int, repeats: int) -> dict[str, dict[str, float]]:
    import torch

    from bridgetower.analysis.profile import flops_by_part, milliseconds_by_part, parameters_by_part
    from bridgetower.model.bridgetower import BridgeTower
    from bridgetower.model.cpu import pack_weights

    network = BridgeTower(config, extensions, generator=torch.Generator().manual_seed(0)).eval()
    parameters, flops = parameters_by_part(network), flops_by_part(network, text_length)
    pack_weights(network)  # as it is when it is used
    return {
        "parameters": dict(parameters),
        "flops": dict(flops),
        "milliseconds": milliseconds_by_part(network, text_length, repeats=repeats),
    }


def _show(title: str, costs: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    titles = [f"{arm}\n{name}" for arm in costs for name, _ in _COLUMNS.values()]
    columns = [(cost[figure], unit) for cost in costs.values() for figure, (_, unit) in _COLUMNS.items()]
    rows = [[part, *(f"{values[part] / unit:.2f}" for values, unit in columns)] for part in columns[0][0]]
    total = ["total", *(f"{sum(values.values()) / unit:.2f}" for values, unit in columns)]
    emit_rows(title, ("", *titles), [*rows, total])
