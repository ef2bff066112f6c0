"""Tables of the engines and of the forms of exported models, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from bridgetower.extras import Extra

EngineName = Literal["torch", "onnxruntime", "openvino"]
EngineRequest = Literal["auto", EngineName]
Precision = Literal["fp32", "bf16", "fp16", "int8"]
Form = Literal["onnx", "onnx-int8", "openvino"]


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """An engine that computes the outputs of a model.

    Attributes:
        forms: Form that a model is exported to, by precision; None: the engine runs the model itself.
        also_reads: Further forms that it reads, if a folder has been exported to them.
        extra: Extra that installs the package of the engine's name; None: it is always installed.
    """

    forms: Mapping[Precision, Form | None]
    also_reads: tuple[Form, ...] = ()
    extra: Extra | None = None


# From the fastest on a CPU to the slowest, as measured in docs/engines.md. `LOADERS` of `parts.py` has the function
# that loads exported parts for an engine.
ENGINES: Mapping[EngineName, EngineSpec] = {
    "openvino": EngineSpec(
        forms={"fp32": "onnx", "bf16": "onnx"}, also_reads=("openvino",), extra="openvino"
    ),
    "onnxruntime": EngineSpec(forms={"fp32": "onnx", "int8": "onnx-int8"}, extra="onnx"),
    "torch": EngineSpec(forms={"fp32": None, "bf16": None, "fp16": None}),
}


@dataclass(frozen=True, kw_only=True)
class FormSpec:
    """A form of exported parts.

    Attributes:
        precision: Precision in which the outputs of an engine are compared with those of the model.
        tolerance: Largest difference from the model, as a share of an output's largest value where that is above one.
    """

    precision: Precision = "fp32"
    tolerance: float = 1e-4


# `WRITERS` of `export.py` has the function that writes parts in a form. The tolerance of int8 is for broken exports.
FORMS: Mapping[Form, FormSpec] = {
    "onnx": FormSpec(),
    "onnx-int8": FormSpec(precision="int8", tolerance=0.2),
    "openvino": FormSpec(),
}


def engines_with(precision: Precision) -> list[EngineName]:
    """Returns the engines with a precision, from the fastest on a CPU to the slowest."""
    return [name for name, spec in ENGINES.items() if precision in spec.forms]


def engines_for(form: Form) -> list[EngineName]:
    """Returns the engines that read a form, by name."""
    return sorted(
        name
        for name, spec in ENGINES.items()
        if form in spec.forms.values() or form in spec.also_reads
    )
