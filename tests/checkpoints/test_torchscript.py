"""TorchScript archives: the tensors of `state_dict()`, and nothing of an archive is ever run."""

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tiny
from bridgetower.checkpoints.torchscript import is_torchscript, read_torchscript
from payload import Payload


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.register_buffer("steps", torch.tensor(5))
        self.register_buffer("nothing", torch.empty(0, 2))
        self.sizes = [1, 2, 3]
        self.note = "text"

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden) * self.sizes[0]


class Tree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = Branch(), nn.LayerNorm(4)
        self.transposed = nn.Parameter(torch.rand(2, 5).T)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(self.first(hidden))


@pytest.fixture
def scripted() -> torch.jit.ScriptModule:
    module = torch.jit.script(tiny.off_defaults(Tree()))
    module.first.to(torch.float16)
    module.norm.to(torch.bfloat16)
    return module


@pytest.fixture
def archive(scripted: torch.jit.ScriptModule, tmp_path: Path) -> Path:
    scripted.save(tmp_path / "tree.pt")
    return tmp_path / "tree.pt"


def rewritten(archive: Path, change: Callable[[str, bytes], bytes | None], **options: int) -> Path:
    """The archive with the content of its files changed; None leaves one out."""
    target = archive.with_name("changed.pt")
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(target, "w", **options) as new:
        for entry in old.infolist():
            content = change(entry.filename, old.read(entry))
            if content is not None:
                new.writestr(entry.filename, content)
    return target


def with_pickle(archive: Path, content: bytes) -> Path:
    return rewritten(archive, lambda name, old: content if name.endswith("/data.pkl") else old)


def test_tensors_of_the_state_dict(archive: Path, scripted: torch.jit.ScriptModule) -> None:
    assert is_torchscript(archive)
    assert tiny.equal(read_torchscript(archive), dict(scripted.state_dict()))


def test_the_code_is_not_read(archive: Path, scripted: torch.jit.ScriptModule) -> None:
    """Neither the source nor the constants: an archive with noise in their place gives the same tensors."""
    noisy = rewritten(archive, lambda name, old: old if "/data" in name else b"noise")
    assert tiny.equal(read_torchscript(noisy), dict(scripted.state_dict()))


def test_plain_files_are_told_apart(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "plain.pt")
    (tmp_path / "text.pt").write_text("no archive")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "plain.pt").read_bytes()[100:])
    for name in ("plain", "text", "cut"):
        assert not is_torchscript(tmp_path / f"{name}.pt")


def test_circles_end(archive: Path) -> None:
    """An object that contains itself, which no module can."""
    circle = b"\x80\x02c__torch__\nTree\n)\x81q\x00}X\x02\x00\x00\x00meq\x01h\x00sb."
    assert read_torchscript(with_pickle(archive, circle)) == {}


class TestRefused:
    @pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
    def test_a_pickle_that_does_harm(self, archive: Path, tmp_path: Path, protocol: int) -> None:
        trace = tmp_path / "trace"
        changed = with_pickle(archive, pickle.dumps(Payload(trace), protocol))
        with pytest.raises(ValueError, match=r"changed\.pt was refused: .*it names .*io\.open"):
            read_torchscript(changed)
        assert not trace.exists()

    @pytest.mark.parametrize(
        "name",
        [
            "builtins eval",
            "os system",
            "torch load",
            "torch.nn Linear",
            "torch._utils _rebuild_wrapper_subclass",
            "torch.jit._pickle __builtins__",
            "collections namedtuple",
            "x__torch__ Tree",
        ],
    )
    def test_every_other_name(self, archive: Path, name: str) -> None:
        changed = with_pickle(archive, f"\x80\x02c{name.replace(' ', chr(10))}\n.".encode("latin1"))
        with pytest.raises(ValueError, match=f"was refused: .*it names {name.replace(' ', '.')}"):
            read_torchscript(changed)

    @pytest.mark.parametrize("target", ["torch._utils _rebuild_tensor_v2", "collections OrderedDict", "__torch__ Tree"])
    def test_known_names_cannot_be_altered(self, archive: Path, target: str) -> None:
        """BUILD with a pair sets attributes: of what is shared with later reads it must not."""
        name = target.replace(" ", "\n")
        state = "}X\x08\x00\x00\x00__call__K\x01s"
        changed = with_pickle(archive, f"\x80\x02c{name}\nN{state}\x86b.".encode("latin1"))
        with pytest.raises(ValueError, match="is not a whole TorchScript archive"):
            read_torchscript(changed)

    @pytest.mark.parametrize(
        ("offset", "size", "stride"),
        [(0, 7, 1), (1, 6, 1), (0, 4, 2), (-1, 1, 1), (0, -1, 1), (0, 2**40, 0)],
    )
    def test_a_view_beyond_its_storage(
        self, archive: Path, offset: int, size: int, stride: int, scripted: torch.jit.ScriptModule
    ) -> None:
        """The one with stride 0 lies inside, but repeats one number: a copy would take any amount of memory."""
        changed = with_pickle(archive, one_tensor(offset, size, stride))
        storage = scripted.state_dict()["transposed"].numel()  # ten numbers under the key 0
        assert storage == 10
        if (size - 1) * stride + offset >= storage or offset < 0 or not 0 <= size <= storage:
            with pytest.raises(ValueError, match="is not a whole TorchScript archive"):
                read_torchscript(changed)
        else:
            assert read_torchscript(changed)["w"].shape == (size,)

    def test_compressed_storages(self, archive: Path) -> None:
        deflated = rewritten(archive, lambda _, old: old, compression=zipfile.ZIP_DEFLATED)
        with pytest.raises(ValueError, match=r"was refused: .*its storage \d+ is compressed"):
            read_torchscript(deflated)

    def test_entries_that_unfold(self, archive: Path) -> None:
        zeros = bytes(2**27)
        small = rewritten(
            archive, lambda name, old: zeros if name.endswith("/data.pkl") else old, compression=zipfile.ZIP_DEFLATED
        )
        assert small.stat().st_size < 2**20
        with pytest.raises(ValueError, match=r"its \d+ bytes would be 1342\d+ unpacked; expected at most 4"):
            read_torchscript(small)

    def test_a_missing_storage(self, archive: Path) -> None:
        lacking = rewritten(archive, lambda name, old: None if name.endswith("/data/0") else old)
        with pytest.raises(ValueError, match="is not a whole TorchScript archive"):
            read_torchscript(lacking)

    @pytest.mark.parametrize("kept", [0, 100, -100])
    def test_a_cut_file(self, archive: Path, kept: int) -> None:
        archive.write_bytes(archive.read_bytes()[:kept])
        with pytest.raises(ValueError, match="is not a whole TorchScript archive"):
            read_torchscript(archive)

    def test_control_the_payload_works(self, tmp_path: Path) -> None:
        trace = tmp_path / "trace"
        pickle.loads(pickle.dumps(Payload(trace))).close()
        assert trace.exists()


def one_tensor(offset: int, size: int, stride: int) -> bytes:
    """The pickle of a module with one tensor `w` over the storage with the key 0."""
    numbers = [b"\x8a" + bytes([8]) + number.to_bytes(8, "little", signed=True) for number in (offset, size, stride)]
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x0atQ"
    view = storage + numbers[0] + numbers[1] + b"\x85" + numbers[2] + b"\x85\x89ccollections\nOrderedDict\n)R"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + view + b"tR"
    return b"\x80\x02c__torch__\nTree\n)\x81}X\x01\x00\x00\x00w" + tensor + b"sb."
