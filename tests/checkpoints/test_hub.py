"""Hub ids, read from a local cache of the hub without a network."""

import json
import os
import subprocess
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects

from bridgetower.checkpoints import read_checkpoint
from bridgetower.checkpoints.hub import locate, parse_hub_id
from bridgetower.checkpoints.towers import read_text_tower
from helpers.checkpoints import make_official, save_transformers_text
from helpers.models import same_tensors

OLD = "0" * 39 + "1"
NEW = "0" * 39 + "2"
# of which heads are known
WIDTHS = {
    "text.hidden_size": 192,
    "vision.hidden_size": 192,
    "vision.num_heads": 3,
}


def add(cache, repo, folder, commit, *refs):
    """Puts a folder into the cache as the hub's client does: blobs, and a snapshot of links to them."""
    repository = cache / f"models--{repo.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir(exist_ok=True)
    for file in (path for path in folder.rglob("*") if path.is_file()):
        inside = snapshot / file.relative_to(folder)
        inside.parent.mkdir(exist_ok=True)
        blob = repository / "blobs" / f"{commit}-{file.name}"
        blob.write_bytes(file.read_bytes())
        inside.symlink_to(os.path.relpath(blob, inside.parent))
    for ref in refs:
        (repository / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    return snapshot


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_commits_and_other_revisions(cache, safe, bridgetower_folder, caplog):
    add(cache, "owner/tower", bridgetower_folder, OLD, "v1", "refs/pr/1")
    add(cache, "owner/tower", safe, NEW, "main")
    assert read_checkpoint("owner/tower", revision=OLD).source == f"owner/tower@{OLD}"
    assert read_checkpoint(f"owner/tower@{OLD}").source == f"owner/tower@{OLD}"
    assert "pin it" not in caplog.text
    newest = read_checkpoint("owner/tower")
    assert newest.source == f"owner/tower@{NEW}"
    assert newest.processor is not None
    assert same_tensors(newest.tensors, read_checkpoint(safe).tensors)
    assert f"owner/tower is at commit {NEW}; pin it by its name owner/tower@{NEW}" in caplog.text
    assert read_checkpoint("owner/tower", revision="v1").source == f"owner/tower@{OLD}"
    assert read_checkpoint("owner/tower@refs/pr/1").source == f"owner/tower@{OLD}"
    with pytest.raises(
        ValueError, match=f"names a revision, and revision is '{NEW}'; leave one of them out"
    ):
        read_checkpoint(f"owner/tower@{OLD}", revision=NEW)


@pytest.mark.parametrize("start", ["https://huggingface.co/", "http://hf.co/"])
def test_web_addresses(start):
    for address, expected in (
        ("owner/to-wer.1", ("owner/to-wer.1", None, None)),
        ("owner/tower/?library=transformers", ("owner/tower", None, None)),
        ("owner/tower/tree/v1", ("owner/tower", None, "v1")),
        ("owner/tower/blob/main/tuned/vqa.ckpt", ("owner/tower", "tuned/vqa.ckpt", "main")),
        ("owner/tower/resolve/main/vqa.ckpt?download=true", ("owner/tower", "vqa.ckpt", "main")),
        ("datasets/owner/tower", None),
        ("owner", None),
        ("owner/tower/discussions", None),
    ):
        assert parse_hub_id(start + address) == expected
    assert parse_hub_id("https://example.com/owner/tower") is None


def test_a_model_at_its_web_address(cache, safe):
    add(cache, "owner/tower", safe, NEW, "main")
    read = read_checkpoint("https://huggingface.co/owner/tower")
    assert read.source == f"owner/tower@{NEW}"
    assert same_tensors(read.tensors, read_checkpoint(safe).tensors)


class TestCkpt:
    @pytest.fixture
    def made(self, tmp_path):
        return make_official(WIDTHS).save(tmp_path / "repository" / "pt_base.ckpt")

    def test_the_only_one(self, cache, made, caplog):
        add(cache, "owner/tower", made.parent, NEW, "main")
        read = read_checkpoint("owner/tower")
        assert read.source == f"owner/tower/pt_base.ckpt@{NEW}"
        assert same_tensors(read.tensors, read_checkpoint(made).tensors)
        assert f"pin it by its name {read.source}" in caplog.text
        caplog.clear()
        assert read_checkpoint(read.source).source == read.source
        assert "pin it" not in caplog.text
        with pytest.raises(
            FileNotFoundError, match="owner/tower is no local path and could not be fetched"
        ):
            read_checkpoint("owner/tower/other.ckpt")

    def test_one_of_several(self, cache, made):
        (made.parent / "tuned").mkdir()
        other = make_official({"heads.vqa": 5, "text.hidden_size": 192}).save(
            made.parent / "tuned" / "vqa.ckpt"
        )
        add(cache, "owner/tower", made.parent, NEW, "main")
        with pytest.raises(
            ValueError, match=r"several checkpoints: pt_base.ckpt, tuned/vqa.ckpt; name one, as in"
        ):
            read_checkpoint("owner/tower")
        checkpoint = read_checkpoint("owner/tower/tuned/vqa.ckpt", revision=NEW)
        assert (checkpoint.source, checkpoint.config.heads.vqa) == (
            f"owner/tower/tuned/vqa.ckpt@{NEW}",
            5,
        )
        assert same_tensors(checkpoint.tensors, read_checkpoint(other).tensors)
        assert read_checkpoint("owner/tower", subfolder="tuned").source == checkpoint.source
        assert (
            read_checkpoint("owner/tower/vqa.ckpt", subfolder="tuned").source == checkpoint.source
        )


def test_options(cache, safe, bridgetower_folder, tmp_path):
    (tmp_path / "repository").mkdir()
    inner = safe.rename(tmp_path / "repository" / "inner")
    add(cache, "owner/models", tmp_path / "repository", NEW, "main")
    read = read_checkpoint("owner/models", subfolder="inner")
    assert read.config == read_checkpoint(inner).config
    assert read.processor is not None
    with pytest.raises(
        FileNotFoundError, match=r"owner/models has neither a config\.json nor a \.ckpt"
    ):
        read_checkpoint("owner/models")
    add(tmp_path / "other", "owner/tower", bridgetower_folder, NEW, "main")
    here = {"cache_dir": tmp_path / "other", "local_files_only": True}
    assert read_checkpoint("owner/tower", **here).source == f"owner/tower@{NEW}"
    with pytest.raises(
        ValueError,
        match=f"subfolder 'x' is for hub ids, but {bridgetower_folder} is a local path; leave it out",
    ):
        read_checkpoint(bridgetower_folder, subfolder="x")


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as its client asks for, with a repository `owner/gated` for who has the token."""

    files: ClassVar[dict[str, bytes]] = {}

    def do_GET(self):
        file = self.path.partition("/resolve/")[2].partition("/")[2]
        tree = [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in self.files]
        info = {
            "id": "owner/gated",
            "sha": NEW,
            "siblings": [{"rfilename": name} for name in self.files],
        }
        status = 200
        headers = {"Content-Type": "application/json"}
        body = b""
        if self.headers.get("Authorization") != "Bearer secret":
            status = 401
            headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"}
        elif file in self.files:
            body = self.files[file]
            headers = {"ETag": f'"{zlib.crc32(body):08x}"', "X-Repo-Commit": NEW}
        elif self.path.startswith("/api/models/owner/gated"):
            body = json.dumps(tree if "/tree/" in self.path else info).encode()
        else:
            status = 404
            headers = {"X-Error-Code": "EntryNotFound"}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 - as http.server calls it

    def log_message(self, *args):
        pass


GATED = """
import os
from bridgetower import read_checkpoint
print(read_checkpoint("owner/gated", token="secret", cache_dir="one").source)
try:
    read_checkpoint("owner/gated", cache_dir="two")
except FileNotFoundError as error:
    print(error)
os.environ["HF_TOKEN"] = "secret"
print(read_checkpoint("owner/gated/a.ckpt", cache_dir="three").source)
"""


def test_a_gated_repository_of_a_server(tmp_path):
    Hub.files = {
        "README.md": b"text",
        "a.ckpt": make_official(WIDTHS).save(tmp_path / "a.ckpt").read_bytes(),
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_DISABLE_XET": "1",
    }
    environment["HF_HOME"] = str(tmp_path / "home")
    command = [sys.executable, "-c", GATED]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    first_source, refused, second_source = done.stdout.splitlines()
    assert first_source == second_source == f"owner/gated/a.ckpt@{NEW}"
    assert (
        "could not be fetched from the hub (GatedRepoError); check the name, the network, and your"
        in refused
    )


def test_a_tower(cache, tmp_path, caplog):
    pytest.importorskip("transformers")
    folder = save_transformers_text(tmp_path / "bert", "BertForPreTraining").source
    add(cache, "owner/bert", folder, NEW, "main")
    assert read_text_tower(f"owner/bert@{NEW}").source == f"owner/bert@{NEW}"
    assert "pin it" not in caplog.text
    tower = read_text_tower("owner/bert")
    assert tower.source == f"owner/bert@{NEW}"
    assert same_tensors(tower.tensors, read_text_tower(str(folder)).tensors)
    assert f"owner/bert is at commit {NEW}; pin it by its name owner/bert@{NEW}" in caplog.text


def test_files_that_are_fetched(tmp_path, monkeypatch):
    files = [
        "config.json",
        "spm.model",
        "vocab.txt",
        "pytorch_model.bin",
        "tf_model.h5",
        "modeling.py",
        "README.md",
    ]
    patterns = []

    def snapshot_download(repo, *, allow_patterns, **_):
        patterns.append(allow_patterns)
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert locate("owner/deberta-v3", "")[0] == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files[:4])
    assert len(patterns) == 2  # pickled weights only where there are no others


def test_what_is_not_there(cache, safe):
    (safe / "model.safetensors").unlink()
    add(cache, "owner/tower", safe, NEW, "main")
    for name in ("nobody/nothing", "owner/tower@v9", "my folder/model", f"owner/tower@{OLD}"):
        with pytest.raises(
            FileNotFoundError, match=f"{name.partition('@')[0]} is no local path and could not be"
        ):
            read_checkpoint(name)
    with pytest.raises(FileNotFoundError, match="has no weights"):
        read_checkpoint("owner/tower")
