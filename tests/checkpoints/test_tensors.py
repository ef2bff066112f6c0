"""Tensor files: read as written, refused when damaged, and never executed."""

import io
import json
import pickle
import random
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from bridgetower.checkpoints.tensors import (
    checksum,
    only_tensors,
    read_safetensors,
    read_sharded,
    read_torch_archive,
    write_safetensors,
)
from helpers.checkpoints import FilePayload
from helpers.models import same_tensors

MAPS = Path("/proc/self/maps")


def tensors():
    generator = torch.Generator().manual_seed(0)
    drawn = {
        "a": torch.rand(20, 3, generator=generator),
        "half": torch.rand(7, generator=generator).half(),
    }
    return drawn | {"scalar": torch.tensor(0.5), "ids": torch.arange(5)}


def legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def deflated(content, path):
    plain = io.BytesIO()
    torch.save(content, plain)
    with (
        zipfile.ZipFile(plain) as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))


WRITERS = {"zip": torch.save, "legacy": legacy, "deflated": deflated}


@pytest.fixture(params=WRITERS)
def write(request):
    return WRITERS[request.param]


class TestSafetensors:
    def test_round_trip(self, tmp_path):
        items = tensors() | {
            "transposed": tensors()["a"].T,
            "strided": torch.arange(10)[::2],
            "empty": torch.ones(0),
        }
        write_safetensors(tmp_path / "x.safetensors", items)
        assert same_tensors(read_safetensors(tmp_path / "x.safetensors"), items)

    def test_truncated_or_something_else(self, tmp_path):
        path = tmp_path / "x.safetensors"
        write_safetensors(path, tensors())
        whole = path.read_bytes()
        pieces = [whole[:length] for length in (0, 1, 7, 8, 50, len(whole) // 2, -1)]
        for content in (*pieces, b"<html>not found</html>", struct.pack("<Q", 2**62) + b"{}"):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=r"x.safetensors is not a whole safetensors file"):
                read_safetensors(path)

    def test_a_flipped_bit_is_found_or_changes_nothing(self, tmp_path):
        """Two bits of each byte of the header, and one of each byte of numbers."""
        path = tmp_path / "x.safetensors"
        write_safetensors(path, tensors())
        whole = path.read_bytes()
        refusals = []
        flips = 0
        start = len(whole) - sum(tensor.nbytes for tensor in tensors().values())
        for position in range(len(whole)):
            for bit in {position % 8, (position + 3) % 8} if position < start else {position % 8}:
                flips += 1
                altered = bytearray(whole)
                altered[position] ^= 1 << bit
                path.write_bytes(altered)
                try:
                    assert same_tensors(read_safetensors(path), tensors())
                    assert position < start
                except ValueError as error:
                    refusals.append(str(error))
        assert len(refusals) > 7 / 8 * flips
        assert all(str(path) in refusal for refusal in refusals)

    def test_files_of_others_have_no_checksum(self, tmp_path):
        path = tmp_path / "x.safetensors"
        for metadata in (None, {"format": "pt"}, {"format": "pt", "by": "me"}):
            save_file(tensors(), path, metadata)
            assert same_tensors(read_safetensors(path), tensors())
        write_safetensors(path, tensors(), for_transformers=True)
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}

    def test_the_checksum_is_of_names_formats_shapes_and_numbers(self):
        turned = tensors()["a"].reshape(3, 20)
        whole = torch.tensor(1, dtype=torch.int32)
        for changes in (
            {"a": torch.zeros(20, 3)},
            {"a": turned},
            {"b": torch.ones(1)},
            {"scalar": whole},
        ):
            assert checksum(tensors() | changes) != checksum(tensors())
        assert checksum(dict(reversed(tensors().items()))) == checksum(tensors())

    def test_a_file_that_is_replaced_while_it_is_read(self, tmp_path):
        """Large enough to be mapped more than once: tensors of two versions are never put together."""
        items = {str(number): torch.full((2**16,), float(number)) for number in range(40)}
        write_safetensors(tmp_path / "x.safetensors", items)
        opened = read_safetensors(tmp_path / "x.safetensors")
        assert same_tensors(opened, items)
        write_safetensors(tmp_path / "x.safetensors", items)
        with pytest.raises(
            ValueError, match=r"x.safetensors was replaced while it was read; load it again"
        ):
            dict(opened)


WEIGHT_MAP = {
    "a": "one.safetensors",
    "half": "one.safetensors",
    "scalar": "two.safetensors",
    "ids": "two.safetensors",
}


class TestShards:
    @staticmethod
    def folder(path, weight_map):
        items = tensors()
        save_file({name: items[name] for name in ("a", "half")}, path / "one.safetensors")
        save_file({name: items[name] for name in ("scalar", "ids")}, path / "two.safetensors")
        index = path / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return index

    def test_all_are_read_or_none(self, tmp_path):
        index = self.folder(tmp_path, WEIGHT_MAP)
        two = tmp_path / "two.safetensors"
        assert same_tensors(read_sharded(index), tensors())
        two.write_bytes(two.read_bytes()[:-3])
        with pytest.raises(ValueError, match=r"two.safetensors is not a whole"):
            read_sharded(index)
        two.unlink()
        with pytest.raises(FileNotFoundError, match=r"two.safetensors is missing"):
            read_sharded(index)
        index.write_text(index.read_text()[:-5])
        with pytest.raises(ValueError, match="is not valid JSON"):
            read_sharded(index)

    def test_a_shard_elsewhere(self, tmp_path):
        """The file exists, so that only the check keeps it from being read."""
        inside = tmp_path / "inside"
        (inside / "sub").mkdir(parents=True)
        for folder in (tmp_path, inside / "sub"):
            save_file(tensors(), folder / "x.safetensors")
        for shard in (
            "../x.safetensors",
            "sub/x.safetensors",
            f"{tmp_path}/x.safetensors",
            "..",
            "",
        ):
            with pytest.raises(ValueError, match="outside its folder"):
                read_sharded(self.folder(inside, WEIGHT_MAP | {"b": shard}))
        for weight_map in (None, [], "x", {"a": 3}, {"a": None}):
            with pytest.raises(ValueError, match="has no weight_map of names to files"):
                read_sharded(self.folder(inside, weight_map))


class TestTorchArchive:
    def test_round_trip(self, tmp_path, write):
        write(
            {"state_dict": tensors(), "epoch": 3, "config": {"names": ["a", None], "rate": 0.1}},
            tmp_path / "x.ckpt",
        )
        content = read_torch_archive(tmp_path / "x.ckpt")
        assert same_tensors(content.pop("state_dict"), tensors())
        assert content == {"epoch": 3, "config": {"names": ["a", None], "rate": 0.1}}

    @pytest.mark.filterwarnings("ignore")  # about the altered protocol number
    def test_truncated_or_altered_anywhere(self, tmp_path, write):
        """Whatever the bytes are, the only error is a ValueError that names the file."""
        path = tmp_path / "x.bin"
        rng = random.Random(0)
        refusals = []
        write(tensors(), path)
        whole = path.read_bytes()
        for length in range(0, len(whole), max(1, len(whole) // 80)):
            path.write_bytes(whole[:length])
            with pytest.raises(
                ValueError, match=r"x.bin (is not a whole PyTorch file|was refused)"
            ):
                read_torch_archive(path)
        for _ in range(250):
            altered = bytearray(whole)
            for _ in range(rng.randint(1, 4)):
                altered[rng.randrange(len(altered))] = rng.randrange(256)
            path.write_bytes(bytes(altered))
            try:
                read_torch_archive(path)
            except ValueError as error:
                refusals.append(str(error))
        assert refusals
        assert all(str(path) in refusal for refusal in refusals)

    def test_something_else(self, tmp_path):
        bare = pickle.dumps({"payload": FilePayload(tmp_path / "trace")}, protocol=2)
        for content in (b"", b"<html>not found</html>", b"PK\x03\x04", b"\x80\x02}.", bare):
            (tmp_path / "x.ckpt").write_bytes(content)
            with pytest.raises(ValueError, match=r"x.ckpt"):
                read_torch_archive(tmp_path / "x.ckpt")
        assert not (tmp_path / "trace").exists()

    @pytest.mark.skipif(not MAPS.exists(), reason=f"{MAPS} is Linux")
    def test_plain_archives_are_mapped_and_not_copied(self, tmp_path):
        torch.save(tensors(), tmp_path / "plain.bin")
        deflated(tensors(), tmp_path / "deflated.bin")
        plain, copied = (
            read_torch_archive(tmp_path / name) for name in ("plain.bin", "deflated.bin")
        )
        maps = MAPS.read_text()
        assert same_tensors(plain, copied)
        assert str(tmp_path / "plain.bin") in maps
        assert str(tmp_path / "deflated.bin") not in maps

    def test_an_archive_that_unfolds_is_not_unpacked(self, tmp_path):
        deflated({"w": torch.zeros(2**25)}, tmp_path / "bomb.ckpt")
        with pytest.raises(
            ValueError, match=r"bomb\.ckpt .*its \d+ bytes would be 1342\d+ unpacked"
        ):
            read_torch_archive(tmp_path / "bomb.ckpt")

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    def test_what_is_no_weight(self, tmp_path):
        ones = torch.ones(2, 2)
        nested = torch.nested.nested_tensor([ones])
        for key, value in (
            ("w", ones.to_sparse()),
            ("w", ones.to("meta")),
            ("w", nested),
            (3, ones),
            ("w", "text"),
        ):
            torch.save({**tensors(), key: value}, tmp_path / "x.bin")
            with pytest.raises(
                ValueError, match=f"x holds {key}, which are no named, dense tensors"
            ):
                only_tensors("x", read_torch_archive(tmp_path / "x.bin"))

    def test_each_has_memory_of_its_own(self, tmp_path, write):
        joined = torch.rand(6, 3)
        shared = {"a": joined, "b": joined, "c": joined[2:4], "alone": nn.Parameter(torch.rand(2))}
        write(shared, tmp_path / "x.bin")
        content = read_torch_archive(tmp_path / "x.bin")
        read = only_tensors("x", content)
        assert same_tensors(read, shared)
        assert len({tensor.untyped_storage().data_ptr() for tensor in read.values()}) == len(read)
        assert not read["alone"].requires_grad
        assert read["alone"].data_ptr() == content["alone"].data_ptr(), (
            "what is stored once is not copied"
        )

    @pytest.mark.parametrize(
        ("repeated", "size"),
        [
            (dict.fromkeys("abcde", torch.zeros(8)), 160),
            ({"w": torch.zeros(1).expand(2**40)}, 4398046511104),
        ],
    )
    def test_memory_that_is_shared_without_end(self, tmp_path, write, repeated, size):
        write(repeated, tmp_path / "x.bin")
        with pytest.raises(ValueError, match=f"x share memory and would take {size} bytes apart"):
            only_tensors("x", read_torch_archive(tmp_path / "x.bin"))

    def test_another_content(self, tmp_path, write):
        write([1, 2], tmp_path / "x.bin")
        with pytest.raises(ValueError, match="holds a list; expected a dictionary"):
            read_torch_archive(tmp_path / "x.bin")


def test_code_is_refused_and_not_run(tmp_path, write):
    path = tmp_path / "x.bin"
    trace = tmp_path / "trace"
    write({**tensors(), "payload": FilePayload(trace)}, path)
    with pytest.raises(ValueError, match=r"x\.bin was refused: .*only running its code"):
        read_torch_archive(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)["payload"].close()  # the control
    assert trace.exists()
