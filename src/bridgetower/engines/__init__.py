"""Backends of a model: PyTorch, or exported graphs in ONNX Runtime or OpenVINO."""
