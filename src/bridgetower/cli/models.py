"""The commands of models themselves: convert and export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from bridgetower.cli.options import READ, FirstModel, Json, Reading
from bridgetower.cli.output import emit_result
from bridgetower.engines.config import Form
from bridgetower.files import require_empty
from bridgetower.integrations import ModuleKind, write_modules


def convert_command(
    source: FirstModel,
    destination: Positional[Path],
    *,
    to: Literal["bridgetower", "hf", ModuleKind],
    drop_itc: bool = False,
    reading: Reading = READ,
    json: Json = False,
) -> None:
    """Convert a checkpoint to a folder of this package, of transformers or of sentence-transformers.

    Example: bridgetower convert official.ckpt my-model --to bridgetower --tokenizer roberta-base/

    Args:
        destination: New folder.
        to: bridgetower; hf for transformers' from_pretrained; sentence-transformers for its SentenceTransformer;
            cross-encoder for its CrossEncoder.
        drop_itc: Leave the contrastive head out; transformers cannot hold the official kind.
    """
    from bridgetower.checkpoints import convert as write_converted

    require_empty(destination)
    checkpoint = reading.read(source)
    write_converted(
        checkpoint, destination, "hf" if to == "hf" else "bridgetower", drop_itc=drop_itc
    )
    if to in ("sentence-transformers", "cross-encoder"):
        write_modules(destination, to)
    result = {"written": str(destination), "format": to, "not_used": list(checkpoint.dropped)}
    emit_result(result, json=json, next_command=("serve", "--model", destination))


def export_command(
    model: FirstModel,
    destination: Positional[Path],
    *,
    form: Annotated[Form, arg(name="format")] = "onnx",
    reading: Reading = READ,
    json: Json = False,
) -> None:
    """Export a model in parts, for any batch and text length: image tower, text tower and fusion encoder.

    The parts are run before they get their name: in ONNX Runtime and OpenVINO, whichever is installed.
    Prints the largest difference from the model by engine and part; if one is above 1e-4 (of
    the largest value, where that is above 1; onnx-int8: 0.2), nothing is written. The folder is a checkpoint as well.

    Example: bridgetower export MODEL my-export --format onnx

    Args:
        destination: New folder.
        form: onnx for engines onnxruntime and openvino; onnx-int8, with linear layers in int8, for onnxruntime;
            openvino for .xml and .bin files, which OpenVINO's own tools read.
        reading: How the model is read; an export takes images of one size.
    """
    from bridgetower.engines.export import require_engine, write_exported

    require_engine(form)  # before the model is read, which may be a download
    require_empty(destination)
    differences = write_exported(
        reading.read(model), destination, form, progress=sys.stderr.isatty()
    )
    largest = max(value for by_part in differences.values() for value in by_part.values())
    result = {
        "written": str(destination),
        "format": form,
        "largest_difference": largest,
        "largest_difference_by_part": differences,
    }
    emit_result(
        result,
        json=json,
        next_command=("serve", "--model", destination, "--engine", next(iter(differences))),
    )
