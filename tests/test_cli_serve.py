"""`bridgetower serve` as a process: it says where it is, takes the key from the environment, ends on a signal."""

import contextlib
import json
import logging
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from bridgetower.cli.options import LOADED
from bridgetower.cli.serve import KEY, service
from bridgetower.distributed import available_cores
from bridgetower.serve.config import ServeConfig
from bridgetower.serve.server import take_port
from helpers.servers import PATIENCE, URIS, wait_until

PLACE = re.compile(r"serving (\S+) at (http://\S+)")
# bytes, the size and alignment of the address ranges that glibc reserves for pools of threads
HEAP = 2**26


@contextmanager
def heard(number):
    """Lets processes that are started here hear a signal, even if a job in the background was told to ignore it."""
    before = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(number, before)


USERS = (sys.executable, "-m", "bridgetower")


@contextmanager
def process(*arguments, key=None, stdout=None, command=USERS):
    """Starts the command and lends the process, the name of the model and its address."""
    environment = os.environ | ({} if key is None else {KEY: key})
    command = [*command, "serve", "--port", "0", *arguments]
    with (
        heard(signal.SIGINT),
        heard(signal.SIGHUP),
        subprocess.Popen(
            command, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True
        ) as running,
    ):
        try:
            lines = []
            for line in running.stderr:
                lines.append(line)
                if match := PLACE.search(line):
                    break
            else:
                pytest.fail("".join(lines))
            yield running, match[1], match[2]
        finally:
            running.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_serves_until_it_is_told_to_stop(tiny_checkpoint, tmp_path, forked, number):
    options = ("--model", str(tiny_checkpoint), "--name", "tiny", "--access-log")
    with (
        (tmp_path / "log").open("w") as log,
        process(*options, key="secret", stdout=log, command=[forked / "bridgetower"]) as (
            running,
            name,
            address,
        ),
    ):
        assert name == "tiny"
        assert httpx.post(f"{address}/v1/embeddings", json={"input": "a bar"}).status_code == 401
        headers = {"Authorization": "Bearer secret"}
        answer = httpx.post(f"{address}/v1/embeddings", json={"input": "a bar"}, headers=headers)
        assert len(answer.json()["data"]) == 1
        upgrade = {"Connection": "Upgrade", "Upgrade": "websocket"}
        assert httpx.get(f"{address}/health", headers=upgrade).status_code == 200
        assert (
            httpx.get(
                f"{address}/health", headers={f"a{number}": "" for number in range(200)}
            ).status_code
            == 431
        )
        running.send_signal(number)
        _, errors = running.communicate(timeout=PATIENCE)
        assert running.returncode == -number
        assert "INFO stopping: " in errors
        assert errors.rstrip().endswith("stopped")
        assert [line for line in errors.splitlines() if " INFO stop" not in line] == []
    lines = list(map(json.loads, (tmp_path / "log").read_text().splitlines()))
    assert [(line["path"], line["status"]) for line in lines] == [
        *(("/v1/embeddings", status) for status in (401, 200)),
        ("/health", 200),
    ]


def replicas_of(supervisor):
    """The processes with sessions of their own that were forked for a process, with their cores."""
    parents = {}
    leaders = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            _, parent, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            number = int(stat.parent.name)
            parents[number] = int(parent)
            if int(session) == number:
                leaders.append(number)
    numbers = [number for number in leaders if parents.get(parents[number]) == supervisor]
    return {number: os.sched_getaffinity(number) for number in numbers}


@pytest.mark.slow
@pytest.mark.skipif(available_cores() < 2, reason="needs two cores")
def test_replicas_share_a_port_and_their_metrics(tiny_checkpoint):
    def ask(count):
        for _ in range(count):  # each with a connection of its own
            assert (
                httpx.post(
                    f"{address}/v1/embeddings", json={"input": "a bar"}, timeout=PATIENCE
                ).status_code
                == 200
            )

    def figure(name):
        text = httpx.get(f"{address}/metrics", timeout=PATIENCE).text
        return float(re.search(rf"^bridgetower_{name} (\S+)$", text, re.MULTILINE)[1])

    def says(words):
        return next(line for line in running.stderr if words in line)

    options = ("--model", str(tiny_checkpoint), "--name", "tiny", "--replicas", "2")
    with process(*options) as (running, name, address):
        assert name == "tiny"
        ready = httpx.get(f"{address}/ready", timeout=PATIENCE).status_code
        assert ready in (200, 503)  # one listens, perhaps both
        wait_until(lambda: httpx.get(f"{address}/ready", timeout=PATIENCE).status_code == 200)
        before = replicas_of(running.pid)
        assert set.union(*before.values()) <= os.sched_getaffinity(0)
        assert len(before) == 2
        assert not set.intersection(*before.values())
        ask(10)
        assert {
            figure('requests_total{route="/v1/embeddings",status="200"}') for _ in range(10)
        } == {10}
        killed, survivor = before
        os.kill(killed, signal.SIGKILL)
        assert "it is started again now" in says("was killed by signal 9")
        answers = []  # to new connections, none of which is refused
        while answers[-1:] != [200]:
            answers.append(httpx.get(f"{address}/ready", timeout=PATIENCE).status_code)
            assert answers[-1] in (200, 503)
        assert answers[0] == 503
        after = replicas_of(running.pid)
        assert after.keys() & before.keys() == {survivor}
        assert sorted(after.values(), key=min) == sorted(before.values(), key=min)
        ask(10)
        assert figure("requests_in_flight") == 1
        assert figure('requests_total{route="/v1/embeddings",status="200"}') == 20
        running.send_signal(signal.SIGTERM)
        _, errors = running.communicate(timeout=PATIENCE)
        assert running.returncode == 128 + signal.SIGTERM
        assert sorted(re.findall(r"INFO (replica \d: stopped)", errors)) == [
            "replica 1: stopped",
            "replica 2: stopped",
        ]
        assert "Traceback" not in errors


def test_threads_share_memory_requests_are_traced_and_an_interrupt_is_told(
    tiny_checkpoint, tmp_path, monkeypatch
):
    """Traced as docs/deploy.md says, by OpenTelemetry's command and variables alone."""
    for name, value in {
        "TRACES_EXPORTER": "console",
        "METRICS_EXPORTER": "none",
        "LOGS_EXPORTER": "none",
    }.items():
        monkeypatch.setenv(f"OTEL_{name}", value)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    command = shutil.which("opentelemetry-instrument", path=Path(sys.executable).parent)
    trace = "0af7651916cd43dd8448eb211c80319c"
    options = ("--model", str(tiny_checkpoint))
    with (
        (tmp_path / "spans").open("w") as spans,
        process(*options, stdout=spans, command=[command, *USERS]) as (running, _, address),
    ):
        with ThreadPoolExecutor(8) as pool:
            images = {"input": URIS[0], "modality": "image"}
            for answer in [
                pool.submit(httpx.post, f"{address}/v1/embeddings", json=images) for _ in range(32)
            ]:
                assert answer.result().status_code == 200
        if platform.libc_ver()[0] == "glibc":
            maps = [
                line.split() for line in Path(f"/proc/{running.pid}/maps").read_text().splitlines()
            ]
            ends = {
                int(start, 16): int(end, 16)
                for start, end in (fields[0].split("-") for fields in maps if len(fields) == 5)
            }
            reserved = [
                at for at, end in ends.items() if at % HEAP == 0 and ends.get(end, end) == at + HEAP
            ]
            assert len(reserved) <= 3  # 2 were seen; without a limit there are 7 or more
        httpx.get(
            f"{address}/v1/models", headers={"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
        )
        wait_until(lambda: '"name": "GET /v1/models"' in (tmp_path / "spans").read_text())
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=PATIENCE)
        assert running.returncode == 128 + signal.SIGINT
        assert "bridgetower: interrupted" in errors.splitlines()
        assert "Traceback" not in errors
    assert f'"trace_id": "0x{trace}"' in (tmp_path / "spans").read_text()


def test_a_model_is_served_alone(tiny_checkpoint, answering_checkpoint):
    for model, options in (
        (tiny_checkpoint, {}),
        (answering_checkpoint, {"answer_model": str(answering_checkpoint)}),
    ):
        loaded = service(ServeConfig(), LOADED, model=str(model), **options)
        assert [served.name for served in loaded.models] == [str(model)]


@pytest.fixture
def usual_log():
    """Puts back afterwards what the command does to the log of its process."""
    handlers = logging.root.handlers[:]
    yield
    logging.root.handlers[:] = handlers


@pytest.mark.usefixtures("usual_log")
def test_what_cannot_be_served(refused, tiny_checkpoint, monkeypatch, tmp_path):
    monkeypatch.delenv(KEY, raising=False)
    monkeypatch.chdir(tmp_path)
    assert "neither a model nor an index is given; give --model MODEL" in refused(
        "serve", "--port", "0"
    )
    assert "queue is 0" in refused("serve", "--model", tiny_checkpoint, "--queue", "0")
    assert "add --index" in refused(
        "serve", "--model", tiny_checkpoint, "--root", tmp_path, "--port", "0"
    )
    assert "nothing-here" in refused("serve", "--model", "./nothing-here", "--port", "0")
    useless = (
        "serve",
        "--model",
        tiny_checkpoint,
        "--answer-model",
        tiny_checkpoint,
        "--port",
        "0",
    )
    assert "cannot answer questions: this model has no vqa head" in refused(*useless)
    with take_port(ServeConfig(port=0)) as listener:
        port = listener.getsockname()[1]
        assert (
            f"cannot listen at 127.0.0.1, port {port}: Address already in use; choose another"
            in refused("serve", "--model", tiny_checkpoint, "--port", port)
        )
