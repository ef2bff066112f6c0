"""The files of a state, for `torch.distributed.checkpoint`: a safetensors file of each process, and what is in them.

PyTorch's own files are pickles, which run code when they are read, and their checksums are read by nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from bridgetower.checkpoints.tensors import LAYOUT, read_safetensors, share_file, write_about, write_safetensors
from bridgetower.distributed import rank


class StateWriter(StorageWriter):
    """Writes the shares of all processes and then, in the first one, `state.json`."""

    def __init__(self, folder: Path, about: Mapping[str, Any], finished: Callable[[], None]) -> None:
        self.folder, self.about, self.finished = folder, about, finished

    def reset(self, checkpoint_id: object = None) -> None:
        """Does nothing: a writer writes once."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **options: Any) -> None:
        """Does nothing."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Returns the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Returns the plans as they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes the share of this process."""
        content: dict[str, Any] = {item.index.fqn: planner.resolve_data(item) for item in plan.items}
        tensors = {name: tensor.detach().cpu() for name, tensor in content.items()}
        if tensors:
            write_safetensors(share_file(self.folder, rank()), tensors)
        written: Future[list[WriteResult]] = Future()
        written.set_result([WriteResult(item.index, 0, rank()) for item in plan.items])
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes what is where."""
        processes = {result.index: result.storage_data for share in results for result in share}
        absent = [process for process in set(processes.values()) if not share_file(self.folder, process).exists()]
        if absent:
            raise FileNotFoundError(f"process {absent[0]} does not write to this {self.folder}; use a shared disk")
        layout = {
            name: {
                "dtype": str(about.properties.dtype).removeprefix("torch."),
                "shape": list(about.size),
                "parts": [
                    [processes[MetadataIndex(name, part.offsets)], list(part.offsets), list(part.sizes)]
                    for part in about.chunks
                ],
            }
            for name, about in metadata.state_dict_metadata.items()
            if isinstance(about, TensorStorageMetadata)
        }
        write_about(self.folder, {**self.about, LAYOUT: layout})
        self.finished()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        """Whether a place can be written to."""
        return True


class StateReader(StorageReader):
    """Reads what a `StateWriter` wrote, in any number of processes."""

    def __init__(self, folder: Path, layout: Mapping[str, Any]) -> None:
        self.folder, self.layout = folder, layout
        self.files: dict[int, Mapping[str, Tensor]] = {}

    def reset(self, checkpoint_id: object = None) -> None:
        """Does nothing."""

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """Returns what there is."""
        tensors: dict[str, Any] = {}
        places: dict[MetadataIndex, int] = {}
        for name, about in self.layout.items():
            parts = [(p, torch.Size(offsets), torch.Size(sizes)) for p, offsets, sizes in about["parts"]]
            chunks = [ChunkStorageMetadata(offsets, sizes) for _, offsets, sizes in parts]
            properties = TensorProperties(dtype=getattr(torch, about["dtype"]))
            tensors[name] = TensorStorageMetadata(properties, torch.Size(about["shape"]), chunks)
            places |= {MetadataIndex(name, offsets): process for process, offsets, _ in parts}
        return Metadata(state_dict_metadata=tensors, storage_data=places)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **options: Any) -> None:
        """Notes where the parts of the tensors are."""
        self.places = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Returns the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Returns the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copies what this process needs from the files, each of which is compared with its checksum."""
        for item in plan.items:
            process = self.places[item.storage_index]
            if process not in self.files:
                self.files[process] = read_safetensors(share_file(self.folder, process))
            part = self.files[process][item.storage_index.fqn]
            for axis, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                part = part.narrow(axis, start, length)
            planner.resolve_tensor(item).detach().copy_(part)
        read: Future[None] = Future()
        read.set_result(None)
        return read

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        """Whether a place can be read from."""
        return True
