"""Reads and writes tensors in files: safetensors, sharded safetensors and PyTorch archives.

Reading executes no code of a file.
"""

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

# Names of weights in folders of transformers and timm: one file, or the index of several.
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
WEIGHTS = (*SAFETENSORS, *PICKLED)
SHARDS = "model-*.safetensors"  # the files that an index lists
SHARD_BYTES = 4 * 10**9  # weights above this are written in several files
STATE_JSON = "state.json"

_CHECKSUM = "crc32"  # in the metadata of a safetensors file, and in `state.json`
# Compressed weights have about twice the size of their archive.
_MAX_UNPACKED_RATIO = 4
_ALWAYS_UNPACKED = 2**26  # bytes
_MIN_MAPPED = 2**22  # bytes
# Tied embeddings and decoders take up to twice the bytes of their memory.
_MAX_SHARED_RATIO = 4
_MIN_THREADED = 2**22  # bytes; threads take longer to start than to read less


class MappedTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, mapped when they are read.

    A mapping keeps all that was read of it in memory until its last tensor is gone. The file is therefore mapped anew
    after every sixteenth of it, but at least 4 MiB. A caller that joins or converts tensors in turn holds the results
    and that much of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._version = _file_version(path)
        self._map()
        self._names = dict.fromkeys(self._file.keys())
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        if self._bytes_left < 0:
            self._map()
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"tensor {name} of {self._path} cannot be read ({error})") from error
        self._bytes_left -= tensor.nbytes
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _map(self) -> None:
        self._file: Any = safe_open(self._path, framework="pt")
        self._bytes_left = max(self._path.stat().st_size // 16, _MIN_MAPPED)
        # Tensors of two versions are never joined.
        if _file_version(self._path) != self._version:
            raise ValueError(f"{self._path} was replaced while it was read; load it again")


def read_safetensors(path: Path) -> Mapping[str, Tensor]:
    """Opens a safetensors file, memory-mapped, and compares it with the checksum of `write_safetensors`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; copy the whole folder again")
    try:
        tensors = MappedTensors(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); download or copy it again"
        ) from error
    # Files for or of other libraries have no checksum.
    stored = tensors.metadata.get(_CHECKSUM)
    if stored is not None and checksum(tensors) != stored:
        raise ValueError(
            f"{path} is damaged: its tensors are not those that were written; copy it again"
        )
    return tensors


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Returns the CRC-32 of tensors, their names, shapes and number formats, to find damage at the speed of memory."""

    def tensor_crc(name: str) -> int:
        tensor = tensors[name].detach().cpu().contiguous()
        header = repr((name, list(tensor.shape), str(tensor.dtype)))
        numbers = tensor.reshape(-1).view(torch.uint8).numpy().data
        header_crc = zlib.crc32(header.encode())
        return zlib.crc32(numbers, header_crc)

    names = sorted(tensors)
    if sum(tensor.nbytes for tensor in tensors.values()) > _MIN_THREADED:
        with ThreadPoolExecutor(4) as pool:
            crcs = list(pool.map(tensor_crc, names))
    else:
        crcs = list(map(tensor_crc, names))
    crc = zlib.crc32(repr(crcs).encode())
    return f"{crc:08x}"


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
    read = read_pickled if index.name == PICKLED[1] else read_safetensors
    # A ChainMap only asks for mutable mappings to write to them.
    return ChainMap(*(read(index.parent / shard) for shard in names))  # type: ignore[arg-type]


def read_torch_archive(path: Path) -> dict[str, Any]:
    """Reads a `.bin` or `.ckpt` file without executing code from it."""
    try:
        # Compressed entries cannot be mapped.
        is_stored = zipfile.is_zipfile(path) and _is_stored(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_stored)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} was refused: it is damaged, or it holds Python objects that only running its code could load; "
            f"ask its author for safetensors ({str(error).splitlines()[0]})"
        ) from error
    # A cut or altered pickle fails anywhere.
    except Exception as error:
        raise ValueError(
            f"{path} is not a whole PyTorch file ({error}); download or copy it again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__}; expected a dictionary of tensors"
        )
    return content


def read_weights(folder: Path, name: str) -> Mapping[str, Tensor]:
    readers = (read_safetensors, read_sharded, read_pickled, read_sharded)
    for file, read in zip(WEIGHTS, readers, strict=True):
        if (folder / file).exists():
            return read(folder / file)
    raise FileNotFoundError(f"{name} has no weights; expected one of {', '.join(WEIGHTS)}")


def read_pickled(path: Path) -> Mapping[str, Tensor]:
    return only_tensors(str(path), read_torch_archive(path))


def only_tensors(name: str, values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns named, dense tensors that share no memory, as training would move two tensors at once."""

    def is_weight(key: object, value: object) -> bool:
        if not isinstance(key, str) or not isinstance(value, Tensor):
            return False
        return value.layout == torch.strided and not value.is_nested and value.device.type == "cpu"

    invalid = sorted(str(key) for key, value in values.items() if not is_weight(key, value))
    if invalid:
        raise ValueError(
            f"{name} holds {', '.join(invalid[:10])}, which are no named, dense tensors; expected weights"
        )

    # A small file could have many views of one storage, or a few numbers that strides repeat.
    storages = [tensor.untyped_storage() for tensor in values.values()]
    stored = {storage.data_ptr(): storage.nbytes() for storage in storages}
    num_bytes = sum(tensor.nbytes for tensor in values.values())
    limit = _MAX_SHARED_RATIO * sum(stored.values())
    if num_bytes > limit:
        raise ValueError(
            f"tensors of {name} share memory and would take {num_bytes} bytes apart; expected at most {limit}"
        )

    # The first tensor of a storage keeps it, and all others are copies.
    separate = {}
    for key, tensor in values.items():
        is_first = stored.pop(tensor.untyped_storage().data_ptr(), None) is not None
        separate[key] = tensor.detach() if is_first else tensor.detach().clone()
    return separate


def extent(tensors: Mapping[str, Tensor], name: str, axis: int = 0) -> int:
    shape = tensors[name].shape
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"tensor {name} is of shape {list(shape)}; expected more axes")
    return shape[axis]


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], *, for_transformers: bool = False
) -> None:
    """Writes tensors and their checksum atomically to one file, as two files cannot be replaced at once."""
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
    """Writes one file, or shards with new names and then their index.

    A reader finds the old weights or the new ones.
    """
    if sum(tensor.nbytes for tensor in tensors.values()) <= shard_bytes:
        write_safetensors(folder / SAFETENSORS[0], tensors, for_transformers=for_transformers)
        return
    from huggingface_hub import split_torch_state_dict_into_shards

    # Tensors on the meta device share no memory.
    stem = "model" if for_transformers else f"model-{checksum(tensors)}"
    split = split_torch_state_dict_into_shards(
        {name: tensor.to("meta") for name, tensor in tensors.items()},
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=int(shard_bytes),
    )
    for shard, names in split.filename_to_tensors.items():
        shard_tensors = {name: tensors[name] for name in names}
        write_safetensors(folder / shard, shard_tensors, for_transformers=for_transformers)
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    write_json(folder / SAFETENSORS[1], index)
    for path in folder.glob(SHARDS):
        if path.name not in split.filename_to_tensors:
            path.unlink()


def _file_version(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def _is_stored(path: Path) -> bool:
    """Checks the content of an archive before it is unpacked, and tells whether it is stored uncompressed."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    # torch.load would compile the code of TorchScript.
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise ValueError(
            "it is TorchScript, as OpenAI publishes CLIP: give a hub id, openai/clip-vit-base-patch16"
        )
    size = path.stat().st_size
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > max(_MAX_UNPACKED_RATIO * size, _ALWAYS_UNPACKED):
        raise ValueError(
            f"its {size} bytes would be {unpacked} unpacked; expected at most {_MAX_UNPACKED_RATIO} times as many"
        )
    return all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)


def write_state_json(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes the numbers and settings of a state with their checksum."""
    write_json(folder / STATE_JSON, {**content, _CHECKSUM: _json_checksum(content)})


def read_state_json(folder: Path) -> dict[str, Any]:
    content = read_json(folder / STATE_JSON)
    if content.pop(_CHECKSUM, None) != _json_checksum(content):
        raise ValueError(f"{STATE_JSON} is not what was written")
    return content


def share_file(folder: Path, process: int) -> Path:
    return folder / f"process-{process:05d}.safetensors"


def state_tensors(folder: Path, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of a state, joined from the rows that each process wrote."""
    processes = range(read_state_json(folder)["processes"])
    shares = [read_safetensors(share_file(folder, process)) for process in processes]
    for name in dict.fromkeys(chain(*shares)):
        if name.startswith(prefix):
            rows = [share[name] for share in shares if name in share]
            # One row may be a number, which cannot be joined.
            joined = torch.cat(rows) if len(rows) > 1 else rows[0].clone()
            yield name, joined


def state_weights(folder: Path) -> dict[str, Tensor]:
    prefix = "model."
    try:
        return {name.removeprefix(prefix): rows for name, rows in state_tensors(folder, prefix)}
    except (OSError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"{folder} is damaged or no state of a run ({error}); use another one"
        ) from error


def _json_checksum(content: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json_text(content).encode()):08x}"
