"""Tensors in files: safetensors, sharded safetensors and PyTorch archives, read without executing anything."""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections import ChainMap
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bridgetower.files import json_text, read_json, replacing, write_json

# What transformers and timm call the weights in a folder, best first.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
SHARDS = "model-*.safetensors"  # the files that an index lists
SHARD_BYTES = 4 * 10**9  # weights above this are written in several files
ABOUT = "state.json"

_CHECKSUM = "crc32"  # in the metadata of a safetensors file, and in `state.json`
# times the size of an archive, and bytes; compressed weights have about twice
_UNPACKED, _UNPACKED_AT_LEAST = (
    4,
    2**26,
)
_MAPPED_AT_LEAST = 2**22  # bytes
_SHARED = 4  # times the bytes of all memory; tied embeddings and decoders have up to twice


class MappedTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each mapped from it when it is asked for.

    What was read of a mapping stays in memory until the last tensor of it is gone. So the file is mapped anew after
    every sixteenth of it, but at least 4 MiB, and who joins or converts tensors in turn holds the results and that much
    of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._version = path, _version(path)
        self._map()
        self._names = dict.fromkeys(self._file.keys())
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        if self._left < 0:
            self._map()
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"tensor {name} of {self._path} cannot be read ({error})") from error
        self._left -= tensor.nbytes
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _map(self) -> None:
        self._file: Any = safe_open(self._path, framework="pt")
        self._left = max(self._path.stat().st_size // 16, _MAPPED_AT_LEAST)
        # or tensors of two versions would be put together
        if _version(self._path) != self._version:
            raise ValueError(f"{self._path} was replaced while it was read; load it again")


def read_safetensors(path: Path) -> Mapping[str, Tensor]:
    """Opens a safetensors file, memory-mapped; one that `write_safetensors` wrote is compared with its checksum."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; copy the whole folder again")
    try:
        tensors = MappedTensors(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); download or copy it again"
        ) from error
    stored = tensors.metadata.get(_CHECKSUM)  # files for or of other libraries have none
    if stored is not None and checksum(tensors) != stored:
        raise ValueError(
            f"{path} is damaged: its tensors are not those that were written; copy it again"
        )
    return tensors


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Returns the CRC-32 of tensors, their names, shapes and number formats, to find damage at the speed of memory."""

    def part(name: str) -> int:
        tensor = tensors[name].detach().cpu().contiguous()
        about = zlib.crc32(repr((name, list(tensor.shape), str(tensor.dtype))).encode())
        return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, about)

    # less takes longer to share out than to read
    large = sum(tensor.nbytes for tensor in tensors.values()) > 2**22
    with ThreadPoolExecutor(4) as pool:
        parts = list((pool.map if large else map)(part, sorted(tensors)))
    return f"{zlib.crc32(repr(parts).encode()):08x}"


def read_sharded(index: Path) -> Mapping[str, Tensor]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ValueError(f"{index} has no weight_map of names to files; download or copy it again")
    names = sorted(set(shards.values()))
    for shard in names:
        if Path(shard).name != shard or shard in ("", ".."):
            raise ValueError(
                f"{index} points to {shard}, outside its folder; expected plain file names"
            )
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
    except Exception as error:  # a cut or altered pickle fails wherever it is read
        raise ValueError(
            f"{path} is not a whole PyTorch file ({error}); download or copy it again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__}; expected a dictionary of tensors"
        )
    return content


def read_weights(folder: Path, name: str) -> Mapping[str, Tensor]:
    for file, read in zip(
        WEIGHTS, (read_safetensors, read_sharded, read_pickled, read_sharded), strict=True
    ):
        if (folder / file).exists():
            return read(folder / file)
    raise FileNotFoundError(f"{name} has no weights; expected one of {', '.join(WEIGHTS)}")


def read_pickled(path: Path) -> Mapping[str, Tensor]:
    return only_tensors(str(path), read_torch_archive(path))


def only_tensors(name: str, values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns named, dense tensors; each with memory of its own, as training would move two at once."""

    def is_weight(key: object, value: object) -> bool:
        if not isinstance(key, str) or not isinstance(value, Tensor):
            return False
        return value.layout == torch.strided and not value.is_nested and value.device.type == "cpu"

    if others := sorted(str(key) for key, value in values.items() if not is_weight(key, value)):
        raise ValueError(
            f"{name} holds {', '.join(others[:10])}, which are no named, dense tensors; expected weights"
        )
    stored = {
        memory.data_ptr(): memory.nbytes()
        for memory in (one.untyped_storage() for one in values.values())
    }
    read, most = sum(tensor.nbytes for tensor in values.values()), _SHARED * sum(stored.values())
    if read > most:  # shared by many, or a few numbers repeated without end
        raise ValueError(
            f"tensors of {name} share memory and would take {read} bytes apart; expected at most {most}"
        )
    apart = {}
    for key, tensor in values.items():
        first = stored.pop(tensor.untyped_storage().data_ptr(), None) is not None
        apart[key] = tensor.detach() if first else tensor.detach().clone()
    return apart


def extent(tensors: Mapping[str, Tensor], name: str, axis: int = 0) -> int:
    shape = tensors[name].shape
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"tensor {name} is of shape {list(shape)}; expected more axes")
    return shape[axis]


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], *, for_transformers: bool = False
) -> None:
    """Writes tensors atomically with their checksum, in the file, as two files cannot be replaced at once."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt"} if for_transformers else {_CHECKSUM: checksum(contiguous)}
    with replacing(path, (SafetensorError,)) as temporary:
        save_file(contiguous, temporary, metadata=metadata)


def write_weights(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    for_transformers: bool = False,
    shard_bytes: float = SHARD_BYTES,
) -> None:
    """Writes one file, or shards of new names and then their index: who reads finds the old weights or the new ones."""
    if sum(tensor.nbytes for tensor in tensors.values()) <= shard_bytes:
        write_safetensors(folder / WEIGHTS[0], tensors, for_transformers=for_transformers)
        return
    from huggingface_hub import split_torch_state_dict_into_shards

    stem = "model" if for_transformers else f"model-{checksum(tensors)}"
    sizes = {name: tensor.to("meta") for name, tensor in tensors.items()}  # which share no memory
    pattern = f"{stem}{{suffix}}.safetensors"
    split = split_torch_state_dict_into_shards(
        sizes, filename_pattern=pattern, max_shard_size=int(shard_bytes)
    )
    for shard, names in split.filename_to_tensors.items():
        write_safetensors(
            folder / shard,
            {name: tensors[name] for name in names},
            for_transformers=for_transformers,
        )
    write_json(
        folder / WEIGHTS[1], {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    )
    for path in folder.glob(SHARDS):
        if path.name not in split.filename_to_tensors:
            path.unlink()


def _version(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def _check_unpacked(path: Path) -> bool:
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    unpacked = sum(entry.file_size for entry in entries)
    # torch.load would compile its code
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise ValueError(
            "it is TorchScript, as OpenAI publishes CLIP: give a hub id, openai/clip-vit-base-patch16"
        )
    if unpacked > max(_UNPACKED * size, _UNPACKED_AT_LEAST):
        raise ValueError(
            f"its {size} bytes would be {unpacked} unpacked; expected at most {_UNPACKED} times as many"
        )
    return all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)


def write_about(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes `state.json`, what stands beside the tensors of a state, with a checksum."""
    write_json(folder / ABOUT, {**content, "crc32": _checksum(content)})


def read_about(folder: Path) -> dict[str, Any]:
    content = read_json(folder / ABOUT)
    if content.pop("crc32", None) != _checksum(content):
        raise ValueError(f"{ABOUT} is not what was written")
    return content


def share_file(folder: Path, process: int) -> Path:
    return folder / f"process-{process:05d}.safetensors"


def state_tensors(folder: Path, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of a state, each put together from the rows that the processes wrote of it."""
    shares = [
        read_safetensors(share_file(folder, process))
        for process in range(read_about(folder)["processes"])
    ]
    for name in dict.fromkeys(chain(*shares)):
        if name.startswith(prefix):
            parts = [share[name] for share in shares if name in share]
            yield name, torch.cat(parts) if len(parts) > 1 else parts[0].clone()


def state_weights(folder: Path) -> dict[str, Tensor]:
    try:
        return {
            name.removeprefix("model."): tensor for name, tensor in state_tensors(folder, "model.")
        }
    except (OSError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"{folder} is damaged or no state of a run ({error}); use another one"
        ) from error


def _checksum(content: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json_text(content).encode()):08x}"
