"""Checks the shape annotations of the tensor code at every call, and lends a small set, model and checkpoint."""

import gc
import json
import logging
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import shutil
import signal
import subprocess
import tempfile
from collections import Counter
from contextlib import contextmanager
from itertools import chain
from multiprocessing.util import Finalize
from pathlib import Path

import jaxtyping
import pytest

from helpers import shape_checks
from helpers.processes import PRELOADED_MODULES

# Left out are modules that refuse wrong values and shapes with a message of their own, which tests want to see.
CHECKED_MODULES = [
    "bridgetower.data.batches.captions",
    "bridgetower.evaluation.masked_words",
    "bridgetower.evaluation.retrieval",
    "bridgetower.model.bridgetower",
    "bridgetower.model.fusion",
    "bridgetower.model.heads",
    "bridgetower.model.layers",
    "bridgetower.model.towers",
    "bridgetower.objectives.losses",
    "bridgetower.objectives.pretraining",
]

# Folders whose tests check shapes; elsewhere, such as in trainings, this would take a quarter of the time.
CHECKED_FOLDERS = ("engines", "evaluation", "model", "objectives")

LONG_FOLDERS = ("distributed", "end_to_end", "pages", "training")
LONGEST_FILE = "test_readme.py"

# The garbage collector waits until the tests are collected, which spares a fifth of the time of all imports.
gc.disable()

# Must come before the first import of the package; test modules and other conftest files then import as they like.
jaxtyping.install_import_hook(CHECKED_MODULES, f"{shape_checks.__name__}.checked")

# The kernels under test, also where PyTorch's own are faster.
os.environ["BRIDGETOWER_PRODUCTS"] = "onednn"

# No test cuts the power, and a training would wait a tenth of its time; tests of syncing have the fixture `synced`.
os.fsync = lambda descriptor: None

# Clients of the hub talk to servers of tests.
os.environ.pop("HF_HUB_OFFLINE", None)

# Processes that need these modules start at once, whatever the code under test would import beforehand.
multiprocessing.set_forkserver_preload(list(PRELOADED_MODULES))
multiprocessing.forkserver.set_forkserver_preload = lambda names: None

# Nothing is under way where processes are forked.
os.environ["PYTHONWARNINGS"] = "ignore:lancedb fork support:RuntimeWarning"


@pytest.hookimpl(trylast=True)  # pytest then knows its own folder
def pytest_configure(config):
    """Keeps the temporary files and caches of tests, and of processes that they start, below pytest's folder."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = config._tmp_path_factory.getbasetemp() / "t"  # short: sockets lie there
        folder.mkdir()
        # pytest may remove it before multiprocessing looks, at exit, for a folder of its own in it.
        multiprocessing.current_process()._config["tempdir"] = str(folder)
        Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=-200)
        os.environ["TMPDIR"] = str(folder)
        os.environ["MPLCONFIGDIR"] = str(folder / "matplotlib")
        tempfile.tempdir = None
        # A shell ignores interrupts of commands in the background, and so would all processes of tests.
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cache-")
    for plugin in config.pluginmanager.get_plugins():
        if hasattr(plugin, "sendevent"):  # of pytest-xdist, in a process that runs tests
            plugin.sendevent = _encodable_events(plugin.sendevent)


def _encodable_events(send):
    """Names of files need not be text: one in a log, a warning or an error would end the process that reports it."""

    def encodable(value):
        match value:
            case str():
                return value.encode("utf-8", "backslashreplace").decode()
            case dict():
                return {encodable(name): encodable(item) for name, item in value.items()}
            case list() | tuple():
                return type(value)(map(encodable, value))
        return value

    return lambda name, **event: send(name, **encodable(event))


def pytest_collection_modifyitems(items):
    """Puts files whose tests take long first, so that no process is left alone with one of them at the end."""
    long = {
        item.path
        for item in items
        if item.path.parent.name in LONG_FOLDERS or item.get_closest_marker("slow")
    }
    items.sort(key=lambda item: (item.path not in long, item.path.name != LONGEST_FILE))


def pytest_collection_finish():
    """Spares the garbage collector, which takes a tenth of the time, what the imports of all tests left.

    And keeps pytest from listening to what PyTorch then logs: each step of an export.
    """
    logging.getLogger("torch.__trace").propagate = True
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 100)  # a full collection is a hundred times rarer
    gc.enable()


def pytest_terminal_summary(terminalreporter, config):
    """Prints the seconds of the slowest test files beside those of tests."""
    if not config.option.durations:
        return
    seconds = Counter()
    for report in chain.from_iterable(terminalreporter.stats.values()):
        if isinstance(report, pytest.TestReport):
            seconds[report.nodeid.partition("::")[0]] += report.duration
    terminalreporter.section("seconds by file")
    for name, duration in seconds.most_common(config.option.durations):
        terminalreporter.write_line(f"{duration:8.1f} {name}")


@pytest.fixture(scope="module", autouse=True)
def checks_of_shapes(request):
    jaxtyping.config.update("jaxtyping_disable", request.path.parent.name not in CHECKED_FOLDERS)


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory):
    """A prepared set of 45 pictures of coloured shapes, 27 for training, 9 each for validation and test."""
    from helpers.shapes import prepare_shapes

    folder = tmp_path_factory.mktemp("shapes")
    return prepare_shapes(folder, folder / "set")


@pytest.fixture(scope="session")
def s3_server():
    """A real S3 server, the same for all tests. `store` is what they use."""
    from helpers.servers import s3_store

    with s3_store() as store:
        yield store


@pytest.fixture
def store(s3_server, monkeypatch):
    """The server without faults, and short pauses before it is asked again."""
    from bridgetower.data.sources import fetch

    monkeypatch.setitem(vars(fetch.PATIENT), "pauses", (0.001,) * 12)
    s3_server.reset()
    yield s3_server
    s3_server.reset()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, tiny_dataset):
    """A checkpoint folder: random weights off their defaults, all heads, a tokenizer trained on the set."""
    from helpers.shapes import write_tiny_checkpoint

    return write_tiny_checkpoint(tiny_dataset, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def answering_checkpoint(tmp_path_factory, tiny_dataset):
    """The same with the heads of VQA (five colours as answers), SNLI-VE and NLVR2, and no others."""
    from helpers.shapes import write_answering_checkpoint

    return write_answering_checkpoint(tiny_dataset, tmp_path_factory.mktemp("answering"))


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """Returns a folder that one of the processes of the tests makes, and all of them read."""
    from bridgetower.files import locked

    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "made-once"

    def made(name, make):
        with locked(shared / f"{name}-lock", wait=True):
            if not (shared / name).exists():
                make(shared / f"{name}-unfinished")
                (shared / f"{name}-unfinished").rename(shared / name)
        return shared / name

    return made


@pytest.fixture(scope="session")
def forked(tmp_path_factory):
    """A folder with `bridgetower`, `torchrun` and `python` that start at once."""
    from helpers.processes import forked_commands

    folder = tmp_path_factory.mktemp("commands")
    with forked_commands(folder):
        yield folder


@pytest.fixture(scope="session")
def exported(tiny_checkpoint, made_once):
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    from bridgetower.checkpoints import read_checkpoint
    from bridgetower.engines.export import write_exported

    return made_once(
        "exported", lambda folder: write_exported(read_checkpoint(tiny_checkpoint), folder)
    )


@pytest.fixture
def tiny_model(tiny_checkpoint):
    """The model of `tiny_checkpoint` in evaluation mode, fresh for each test."""
    from bridgetower.checkpoints import read_checkpoint

    return read_checkpoint(tiny_checkpoint).model()


@pytest.fixture(scope="session")
def predictor(tiny_checkpoint):
    """`tiny_checkpoint` as users load it."""
    from bridgetower.inference.predictor import load

    return load(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="session")
def answering_predictor(answering_checkpoint):
    """`answering_checkpoint` as users load it."""
    from bridgetower.inference.predictor import load

    return load(answering_checkpoint, device="cpu")


@pytest.fixture(scope="session")
def tiny_processor(tiny_checkpoint):
    from bridgetower.processor import Processor

    return Processor.load(tiny_checkpoint)


@pytest.fixture
def run(capsys):
    """Runs the command and returns the JSON lines that it printed."""
    from bridgetower import cli

    def call(*arguments):
        cli.main(list(map(str, arguments)))
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return call


@pytest.fixture
def refused(capsys):
    """Runs the command, expects a user error and returns its one line."""
    from bridgetower import cli

    def call(*arguments):
        with pytest.raises(SystemExit) as caught:
            cli.main(list(map(str, arguments)))
        assert caught.value.code == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = [line for line in captured.err.splitlines() if line.startswith("bridgetower: ")]
        assert "Traceback" not in captured.err
        return line

    return call


@pytest.fixture
def file_limit():
    """Limits the bytes of every file that is written meanwhile: the end is missing, as on a disk that gets full."""

    @contextmanager
    def limited(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture
def synced(monkeypatch):
    """What is synced in a test, in order: paths, each with the names that it has if it is a folder."""
    calls = []

    def record(descriptor):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        calls.append(
            (path, sorted(child.name for child in path.iterdir()) if path.is_dir() else None)
        )

    monkeypatch.setattr(os, "fsync", record)
    return calls


@pytest.fixture
def small_disk(tmp_path):
    """Makes a file system of so many KiB. Skips the test where none can be mounted."""
    disk = tmp_path / "disk"

    def mount(kib):
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(disk)]
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
        if mounted.returncode:
            disk.rmdir()
            pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
        return disk

    yield mount
    if disk.exists():
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
