"""Tensors in files: safetensors, sharded safetensors and PyTorch archives, read without executing anything."""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib
from collections import ChainMap
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bridgetower.files import json_text, read_json, replacing, write_json

WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""What transformers and timm call the weights in a folder, best first."""

SHARDS = "model-*.safetensors"
"""Pattern of the names of the files that an index lists."""

SHARD_BYTES = 4 * 10**9
"""Weights above this are written in several files."""

DAMAGE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
    struct.error,
    zipfile.BadZipFile,
)
"""What reading damaged bytes raises: a cut or altered pickle fails wherever it is read."""

_CHECKSUM = "crc32"  # in the metadata of a safetensors file
_THREADS = 4  # compute checksums, each of tensors that are mapped meanwhile
_THREADED_AT_LEAST = 2**22  # bytes; less takes longer to share out than to read

_UNPACKED, _UNPACKED_AT_LEAST = 4, 2**26  # times the size of an archive, and bytes; compressed weights have about twice

_SHARED = 4  # times the bytes of all memory; tied embeddings and decoders have up to twice

_PARTS = 16  # in which a safetensors file is mapped; each reserves addresses, but no memory, for the whole file


class MappedTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each mapped from it when it is asked for.

    What was read of a mapping stays in memory until the last tensor of that mapping is gone. So the file is mapped anew
    after every sixteenth of it that was handed out: who joins or converts tensors in turn holds the results and at most
    about a sixteenth of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._version = path, _version(path)
        self._map()
        self._names = dict.fromkeys(self._file.keys())
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        if self._handed_out * _PARTS > self._path.stat().st_size:
            self._map()
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"tensor {name} of {self._path} cannot be read ({error})") from error
        self._handed_out += tensor.nbytes
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _map(self) -> None:
        self._file: Any = safe_open(self._path, framework="pt")
        self._handed_out = 0
        if _version(self._path) != self._version:  # or tensors of two versions would be put together
            raise ValueError(f"{self._path} was replaced while it was read; load it again")


def read_safetensors(path: Path) -> Mapping[str, Tensor]:
    """Opens a safetensors file, memory-mapped; one that `write_safetensors` wrote is compared with its checksum."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; copy the whole folder again")
    try:
        tensors = MappedTensors(path)
        stored = tensors.metadata.get(_CHECKSUM)  # files for or of other libraries have none
        if stored is not None and checksum(tensors) != stored:
            raise ValueError(f"{path} is damaged: its tensors are not those that were written; copy it again")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); download or copy it again") from error
    return tensors


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Returns the CRC-32 of tensors, their names, shapes and number formats: 8 hexadecimal digits.

    It is there to find damage, at the speed of memory. Who wants to tell weights apart takes a fingerprint.
    """

    def part(name: str) -> int:
        tensor = tensors[name].detach().cpu().contiguous()
        about = zlib.crc32(repr((name, list(tensor.shape), str(tensor.dtype))).encode())
        return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, about)

    names = sorted(tensors)
    if sum(tensors[name].nbytes for name in names) < _THREADED_AT_LEAST:
        parts = list(map(part, names))
    else:
        with ThreadPoolExecutor(_THREADS) as pool:
            parts = list(pool.map(part, names))
    return f"{zlib.crc32(repr(parts).encode()):08x}"


def read_sharded(index: Path) -> Mapping[str, Tensor]:
    """Opens the shards that a `*.safetensors.index.json` or a `*.bin.index.json` lists."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ValueError(f"{index} has no weight_map of names to files; download or copy it again")
    names = sorted(set(shards.values()))
    for shard in names:
        if Path(shard).name != shard or shard in ("", ".."):
            raise ValueError(f"{index} points to {shard}, outside its folder; expected plain file names")
    read = read_pickled if index.name == WEIGHTS[3] else read_safetensors
    return ChainMap(*(read(index.parent / shard) for shard in names))  # type: ignore[arg-type]  # reads only


def read_torch_archive(path: Path) -> dict[str, Any]:
    """Reads a `.bin` or `.ckpt` file without executing code from it."""
    try:
        is_stored = zipfile.is_zipfile(path) and _check_unpacked(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_stored)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} was refused: it is damaged, or it holds Python objects that only running its code could load; "
            f"ask its author for safetensors ({str(error).splitlines()[0]})"
        ) from error
    except DAMAGE as error:
        raise ValueError(f"{path} is not a whole PyTorch file ({error}); download or copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a dictionary of tensors")
    return content


def read_weights(folder: Path, name: str) -> Mapping[str, Tensor]:
    """Opens the weights in a folder: safetensors or a PyTorch file, each whole or sharded."""
    for file, read in zip(WEIGHTS, (read_safetensors, read_sharded, read_pickled, read_sharded), strict=True):
        if (folder / file).exists():
            return read(folder / file)
    raise FileNotFoundError(f"{name} has no weights; expected one of {', '.join(WEIGHTS)}")


def read_pickled(path: Path) -> Mapping[str, Tensor]:
    """Reads a `.bin` file that holds tensors only."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; copy the whole folder again")
    return only_tensors(str(path), read_torch_archive(path))


def only_tensors(name: str, values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the values, which must all be weights: named, dense tensors with values in memory.

    A tensor that shares memory with an earlier one is copied: safetensors stores each apart, and training would move
    both.
    """

    def is_weight(key: object, value: object) -> bool:
        dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested
        return isinstance(key, str) and dense and cast(Tensor, value).device.type == "cpu"

    others = sorted(str(key) for key, value in values.items() if not is_weight(key, value))
    if others:
        raise ValueError(f"{name} holds {', '.join(others[:10])}, which are no named, dense tensors; expected weights")
    stored: dict[int, int] = {}
    for key, tensor in values.items():
        memory = tensor.untyped_storage()
        if tensor.nbytes > memory.nbytes():  # a copy of repeated numbers would take any amount of memory
            raise ValueError(
                f"tensor {key} of {name} repeats its {memory.nbytes()} bytes to {tensor.nbytes}; expected weights as "
                "they are"
            )
        stored[memory.data_ptr()] = memory.nbytes()
    read, most = sum(tensor.nbytes for tensor in values.values()), _SHARED * sum(stored.values())
    if read > most:
        raise ValueError(f"tensors of {name} share memory and would take {read} bytes apart; expected at most {most}")
    apart = {}
    for key, tensor in values.items():
        first = stored.pop(tensor.untyped_storage().data_ptr(), None) is not None
        apart[key] = tensor.detach() if first else tensor.detach().clone()
    return apart


def extent(tensors: Mapping[str, Tensor], name: str, axis: int = 0) -> int:
    """Returns the size of a tensor along an axis."""
    shape = tensors[name].shape
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"tensor {name} is of shape {list(shape)}; expected more axes")
    return shape[axis]


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], *, for_transformers: bool = False) -> None:
    """Writes tensors with their checksum, atomically.

    The checksum is in the file and not beside it, because two files cannot be replaced at once.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt"} if for_transformers else {_CHECKSUM: checksum(contiguous)}
    with replacing(path, (SafetensorError,)) as temporary:
        save_file(contiguous, temporary, metadata=metadata)


def write_weights(
    folder: Path, tensors: Mapping[str, Tensor], *, for_transformers: bool = False, shard_bytes: float = SHARD_BYTES
) -> None:
    """Writes the weights in a folder: one safetensors file, or several with an index if they are large.

    Who reads meanwhile, or after a kill, finds the old weights or the new ones: new shards have other names than old
    ones, and the index comes after them.
    """
    if sum(tensor.nbytes for tensor in tensors.values()) <= shard_bytes:
        write_safetensors(folder / WEIGHTS[0], tensors, for_transformers=for_transformers)
        return
    from huggingface_hub import split_torch_state_dict_into_shards

    stem = "model" if for_transformers else f"model-{checksum(tensors)}"
    sizes = {name: tensor.to("meta") for name, tensor in tensors.items()}  # which share no memory
    split = split_torch_state_dict_into_shards(
        sizes, filename_pattern=f"{stem}{{suffix}}.safetensors", max_shard_size=int(shard_bytes)
    )
    for shard, names in split.filename_to_tensors.items():
        write_safetensors(folder / shard, {name: tensors[name] for name in names}, for_transformers=for_transformers)
    write_json(folder / WEIGHTS[1], {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    for path in folder.glob(SHARDS):
        if path.name not in split.filename_to_tensors:
            path.unlink()


def _version(path: Path) -> tuple[int, int]:
    """Changes when the file is replaced or written to."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def _check_unpacked(path: Path) -> bool:
    """Checks what the entries of a zip archive claim to be once they are unpacked; no more is read of them."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    unpacked = sum(entry.file_size for entry in entries)
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):  # torch.load would compile its code
        raise ValueError("it is TorchScript, as OpenAI publishes CLIP: give a hub id, openai/clip-vit-base-patch16")
    if unpacked > max(_UNPACKED * size, _UNPACKED_AT_LEAST):
        raise ValueError(f"its {size} bytes would be {unpacked} unpacked; expected at most {_UNPACKED} times as many")
    return all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)


ABOUT = "state.json"
LAYOUT = "tensors"
"""The field of `state.json` that says of each tensor what it is and where its parts are."""


def write_about(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes `state.json`, with a checksum."""
    write_json(folder / ABOUT, {**content, "crc32": _checksum(content)})


def read_about(folder: Path) -> dict[str, Any]:
    """Returns what was written beside the tensors of a state, and their layout."""
    content = read_json(folder / ABOUT)
    if content.pop("crc32", None) != _checksum(content):
        raise ValueError(f"{ABOUT} is not what was written")
    return content


def share_file(folder: Path, process: int) -> Path:
    """Where a process writes its share of the tensors."""
    return folder / f"process-{process:05d}.safetensors"


def state_weights(folder: Path) -> dict[str, Tensor]:
    """Returns the weights of the model in a state, put together from the shares of all processes."""
    try:
        layout = read_about(folder)[LAYOUT]
        shares: dict[int, Mapping[str, Tensor]] = {}
        weights = {}
        for name, about in layout.items():
            if name.startswith("model."):
                whole = torch.empty(about["shape"], dtype=getattr(torch, about["dtype"]))
                for process, offsets, sizes in about["parts"]:
                    if process not in shares:
                        shares[process] = read_safetensors(share_file(folder, process))
                    part = whole
                    for axis, (start, length) in enumerate(zip(offsets, sizes, strict=True)):
                        part = part.narrow(axis, start, length)
                    part.copy_(shares[process][name])
                weights[name.removeprefix("model.")] = whole
    except (OSError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{folder} is damaged or no state of a run ({error}); use another one") from error
    return weights


def _checksum(content: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json_text(content).encode()):08x}"
