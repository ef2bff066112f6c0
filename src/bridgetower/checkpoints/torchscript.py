"""Tensors in a TorchScript archive, read without running or compiling anything in it.

Such an archive, as OpenAI publishes CLIP, is a zip with source code, a pickle of the module tree, and one file per
storage. The code is not opened. The pickle is read by an unpickler that knows four kinds of names: the archive's own
classes, which become empty objects with attributes; tensors; storages; and typed lists. Any other name is refused.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridgetower.checkpoints.tensors import DAMAGE, check_repeats, check_unpacked

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LISTS = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist", "restore_type_tag")


def is_torchscript(path: Path) -> bool:
    """Tells a TorchScript archive from a plain PyTorch file: only the former holds the constants of its code."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.split("/")[-1] == "constants.pkl" for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a TorchScript archive by the dotted names that `state_dict()` would give them.

    Raises:
        ValueError: The archive is damaged, or asks for anything but tensors.
    """
    try:
        check_unpacked(path)
        with zipfile.ZipFile(path) as archive:
            (pickled,) = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
            root = _Unpickler(archive, pickled).load()
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} was refused: it is damaged, or it asks for more than tensors ({error}); "
            "ask its author for safetensors"
        ) from error
    except DAMAGE as error:
        raise ValueError(f"{path} is not a whole TorchScript archive ({error}); download or copy it again") from error
    return dict(_named_tensors(root))


class _Object:
    """An instance of a class of the archive: nothing but its attributes."""

    __slots__ = ("attributes",)

    def __setstate__(self, state: Any) -> None:
        self.attributes = state


class _Rebuild:
    """Stands for one function that the pickle may call. It has no attributes, so that a pickle cannot alter it."""

    __slots__ = ()


class _NoHooks(_Rebuild):
    """For `collections.OrderedDict`: the backward hooks of a tensor, always empty."""

    __slots__ = ()

    def __call__(self) -> None:
        return None


class _First(_Rebuild):
    """For typed lists: the values without the type."""

    __slots__ = ()

    def __call__(self, values: Any, _type: str = "") -> Any:
        return values


class _View(_Rebuild):
    """For `torch._utils._rebuild_tensor_v2`: a view of a storage; torch checks that it lies inside."""

    __slots__ = ()

    def __call__(
        self, storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_flags: Any
    ) -> Tensor:
        view = storage.as_strided(size, stride, offset)
        check_repeats(view, "a tensor")
        return view


class _Unpickler(pickle.Unpickler):
    """Builds tensors and empty objects; every other name in the pickle is an error."""

    def __init__(self, archive: zipfile.ZipFile, pickled: str) -> None:
        super().__init__(BytesIO(archive.read(pickled)))
        self._archive, self._folder = archive, pickled.split("/")[0]
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return _Object
        if module == "torch" and name in _STORAGES:
            return name
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _View()
        if (module, name) == ("collections", "OrderedDict"):
            return _NoHooks()
        if module == "torch.jit._pickle" and name in _LISTS:
            return _First()
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        _kind, storage, key, _device, _count = pid
        if key not in self._storages:
            self._storages[key] = self._read(_STORAGES[storage], key)
        return self._storages[key]

    def _read(self, dtype: torch.dtype, key: str) -> Tensor:
        entry = self._archive.getinfo(f"{self._folder}/data/{key}")
        if entry.compress_type != zipfile.ZIP_STORED:  # TorchScript stores; a bomb would be deflated
            raise pickle.UnpicklingError(f"its storage {key} is compressed")
        content = bytearray(self._archive.read(entry))
        return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)


def _named_tensors(root: Any) -> Iterator[tuple[str, Tensor]]:
    """Walks the module tree, each object once, so that shared and circular ones do no harm."""
    seen, waiting = set(), [("", root)]
    while waiting:
        prefix, value = waiting.pop()
        if isinstance(value, Tensor):
            yield prefix, value
        elif isinstance(value, _Object) and id(value) not in seen:
            seen.add(id(value))
            attributes = getattr(value, "attributes", None)
            children = attributes.items() if isinstance(attributes, dict) else ()
            waiting += [(f"{prefix}.{name}" if prefix else str(name), child) for name, child in children]
