"""What runs a model: PyTorch, or its exported parts in ONNX Runtime."""

from bridgetower.engines.engine import Engine, TorchEngine
from bridgetower.engines.folder import is_exported, write_exported
from bridgetower.engines.start import EngineChoice, EngineName, Precision

__all__ = ["Engine", "EngineChoice", "EngineName", "Precision", "TorchEngine", "is_exported", "write_exported"]
