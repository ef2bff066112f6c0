"""What there is to choose: engines, precisions, and the form of parts that each of them runs; imports no torch."""

from __future__ import annotations

from typing import Literal

EngineName = Literal["torch", "onnxruntime", "openvino"]
EngineRequest = Literal["auto", "torch", "onnxruntime", "openvino"]
Precision = Literal["fp32", "bf16", "fp16", "int8"]
Form = Literal["onnx", "onnx-int8", "openvino"]

# What a model is exported to when an engine first needs it. None: the model itself, no exported parts.
FORMS: dict[tuple[EngineName, Precision], Form | None] = {
    ("torch", "fp32"): None,
    ("torch", "bf16"): None,
    ("torch", "fp16"): None,
    ("onnxruntime", "fp32"): "onnx",
    ("onnxruntime", "int8"): "onnx-int8",
    ("openvino", "fp32"): "onnx",
    ("openvino", "bf16"): "onnx",
}
FASTEST: dict[Precision, tuple[EngineName, ...]] = {
    "fp32": ("openvino", "onnxruntime", "torch"),
    "bf16": ("openvino", "torch"),
    "fp16": ("torch",),
    "int8": ("onnxruntime",),
}
"""Engines from the fastest on a CPU to the slowest, as they were measured: see docs/engines.md."""

# Largest difference from the model that an export may have, as a share of an output's largest value where that is
# above one. That of int8 only tells a broken export from a whole one.
TOLERANCES: dict[Form, float] = {"onnx": 1e-4, "onnx-int8": 0.2, "openvino": 1e-4}
