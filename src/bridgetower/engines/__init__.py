"""What runs a model: PyTorch, or its exported parts in ONNX Runtime or OpenVINO."""
